"""From scores and a wish to a prune plan.

Dimensions that the config sets by one number (the MLP width of all layers) are a *family*; they
keep one count, so that a stock config can express the result. `global_pruning` ranks the units of
a family against each other instead, and gives every layer its own count.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import numpy as np

from .axes import Dimension, NamedAxes
from .errors import InputError
from .importance import Scores
from .options import Options
from .plan import Cut, PrunePlan

COARSE = 64  # a dimension with fewer units than this cannot follow a target closely
Counts = dict[str, int]


@dataclass
class Request:
    """How many units each dimension is to keep, and what was changed on the way, in words."""

    counts: Counts
    notes: list[str] = field(default_factory=list)


def prunable(named: NamedAxes, options: Options) -> list[Dimension]:
    """The dimensions that `options` select. Raises `InputError` when there are none."""
    for pattern in options.ignored_layers:
        if not any(_matches(d, (pattern,)) for d in named.dimensions.values()):
            raise InputError(f"--ignored-layers {pattern}: matches no dimension and no parameter.")
    chosen = [
        d
        for d in named.free(options.dims)
        if d.size > 1 and not _matches(d, options.ignored_layers)
    ]
    if not chosen:
        kinds = sorted({d.kind for d in named.free()})
        raise InputError(
            f"nothing to prune: no free dimension of kind {', '.join(options.dims)} is left; "
            f"this model has {', '.join(kinds) or 'none at all'}."
        )
    return chosen


def family(dim: Dimension) -> tuple[str, int]:
    """What dimensions at the same place in different layers have in common."""
    return re.sub(r"\d+", "*", dim.name), dim.size


def request(named: NamedAxes, dims: list[Dimension], options: Options) -> Request:
    """The counts to keep, uniform within a family. `InputError` if a dimension would be emptied."""
    if options.pruning_ratio is not None:
        wanted, ratio = Request({}), options.pruning_ratio
        for d in dims:
            _note(wanted, d, _kept(d, ratio, options.round_to), ratio)
        return wanted
    return _for_target(named, dims, options)


def _kept(dim: Dimension, ratio: float, round_to: int) -> int:
    exact = dim.size * (1 - ratio)
    step = round_to if dim.size % round_to == 0 or dim.size > round_to else 1
    kept = min(dim.size, round(exact / step) * step)
    if kept < 1:
        raise InputError(
            f"--pruning-ratio {ratio:g} would empty {dim.name}, which has {dim.size} units; "
            "lower it, or leave the dimension out with --dims or --ignored-layers."
        )
    return kept


def _note(wanted: Request, dim: Dimension, kept: int, ratio: float) -> None:
    wanted.counts[dim.name] = kept
    exact = dim.size * (1 - ratio)
    if abs(kept - exact) >= 1 or (kept != exact and dim.size < COARSE):
        note = f"{family(dim)[0]}: {kept} of {dim.size} kept, where {exact:.4g} was asked for"
        if note not in wanted.notes:
            wanted.notes.append(note)


def _for_target(named: NamedAxes, dims: list[Dimension], options: Options) -> Request:
    """Coarse dimensions take the target's ratio, rounded; fine ones make up the difference."""
    total = block_parameters(named)
    goal = options.params * total
    wanted = Request({})
    fine = [d for d in dims if d.size >= COARSE] or dims
    for d in dims:
        if d not in fine:
            kept = max(1, _kept_or_none(d, 1 - options.params, options.round_to))
            _note(wanted, d, kept, 1 - options.params)

    def at(ratio: float) -> Counts:
        kept = {d.name: max(1, _kept_or_none(d, ratio, options.round_to)) for d in fine}
        return wanted.counts | kept

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if block_parameters(named, at(middle)) > goal:
            low = middle
        else:
            high = middle
    reachable = [at(low), at(high)]
    best = min(reachable, key=lambda counts: abs(block_parameters(named, counts) - goal))
    reached = block_parameters(named, best) / total
    if abs(reached - options.params) > 0.02:
        least = block_parameters(named, {**wanted.counts, **{d.name: 1 for d in fine}}) / total
        wanted.notes.append(
            f"--target params={options.params:g}: the nearest that these dimensions can reach is "
            f"{reached:.3f} (least: {least:.3f})"
        )
    wanted.counts = best
    return wanted


def _kept_or_none(dim: Dimension, ratio: float, round_to: int) -> int:
    step = round_to if dim.size > round_to else 1
    return min(dim.size, round(dim.size * (1 - ratio) / step) * step)


def block_parameters(named: NamedAxes, counts: Mapping[str, int] | None = None) -> int:
    """Parameters outside the embeddings and the head, with `counts` units kept.

    Embeddings and head are the parameters with an axis that is indexed by the model's input, or
    that is its output.
    """
    total = 0
    for path in named.graph.parameters:
        if not named.is_vocabulary(path):
            total += math.prod(named.sizes_after(path, counts or {}))
    return total


def choose(
    named: NamedAxes, dims: Iterable[Dimension], scores: Scores, wanted: Request,
    options: Options, recipe: Mapping[str, object] | None = None,
) -> PrunePlan:  # fmt: skip
    """Keep the units with the highest scores; ties go to the lower index."""
    counts = dict(wanted.counts)
    if options.global_pruning:
        counts |= _global_counts(list(dims), scores, counts, options.round_to)
    cuts = {}
    for d in dims:
        if counts[d.name] < d.size:
            keep = _top(scores[d.name], counts[d.name])
            cuts[d.name] = Cut(d.name, d.kind, d.size, keep, d.within, d.slots)
    return PrunePlan(cuts, dict(recipe or {}))


def _top(score: np.ndarray, count: int) -> list:
    order = np.argsort(-score, axis=-1, kind="stable")[..., :count]
    return np.sort(order, axis=-1).tolist()


def _global_counts(dims, scores: Scores, counts: Counts, round_to: int) -> Counts:
    """Per family, spend the same number of units where the scores are highest.

    Scores are divided by their dimension's mean, since layers differ in scale. Each dimension
    keeps at least one unit (or `round_to`).
    """
    out: Counts = {}
    families: dict[tuple, list[Dimension]] = {}
    for d in dims:
        families.setdefault(family(d), []).append(d)
    for group in families.values():
        ranked = {d.name: _normalised(scores[d.name]) for d in group}
        budget = sum(counts[d.name] for d in group)
        step = round_to if group[0].size > round_to else 1
        kept = {d.name: step for d in group}
        gains = [
            (float(ranked[d.name][k : k + step].mean()), d.name)
            for d in group
            for k in range(step, d.size - step + 1, step)
        ]
        for _, name in sorted(gains, reverse=True)[: max(0, budget // step - len(group))]:
            kept[name] += step
        out |= kept
    return out


def _normalised(score: np.ndarray) -> np.ndarray:
    """Scores in descending order, by rank: rows of a nested dimension are averaged."""
    ordered = -np.sort(-score, axis=-1)
    ordered = ordered.mean(axis=0) if ordered.ndim > 1 else ordered
    return ordered / max(float(ordered.mean()), 1e-30)


def _matches(dim: Dimension, patterns: Iterable[str]) -> bool:
    names = [dim.name, *(path for path, _ in dim.slots)]
    return any(
        fnmatchcase(name, pattern) or name.startswith(pattern + ".")
        for pattern in patterns
        for name in names
    )
