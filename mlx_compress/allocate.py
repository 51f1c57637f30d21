"""From scores and a wish to a prune plan.

Dimensions that the config sets by one number (the MLP width of all layers) are a *family*; they
keep one count, so that a stock config can express the result. `global_pruning` ranks the units of
a family against each other instead, and gives every layer its own count.
"""

import math
import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import numpy as np

from .axes import OUTPUT, Dimension, NamedAxes
from .dims import leaves
from .errors import InputError
from .importance import Scores
from .layers import LayerDimension, dropped_parameters, layer_dimensions, without
from .options import LAYER_KINDS, Options
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
    _check_patterns(named, options)
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


def _check_patterns(named: NamedAxes, options: Options) -> None:
    for pattern in options.ignored_layers:
        units = any(_matches(d, (pattern,)) for d in named.dimensions.values())
        if not units and not any(_ignored(d, (pattern,)) for d in layer_dimensions(named)):
            raise InputError(
                f"--ignored-layers {pattern}: matches no dimension and no parameter; "
                "`inspect` lists them."
            )


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
    if _nearest(dim.size, ratio, 1) < 1:
        raise InputError(
            f"--pruning-ratio {ratio:g} would empty {dim.name}, which has {dim.size} units; "
            "lower it, or leave the dimension out with --dims or --ignored-layers."
        )
    return _at_least_one_step(dim, ratio, round_to)


def _at_least_one_step(dim: Dimension, ratio: float, round_to: int) -> int:
    step = _step(dim, round_to)
    return max(step, _nearest(dim.size, ratio, step))


def _step(dim: Dimension, round_to: int) -> int:
    """What counts are rounded to: dimensions with no more units than `round_to` are not."""
    return round_to if dim.size > round_to else 1


def _nearest(size: int, ratio: float, step: int) -> int:
    """The multiple of `step` nearest to what `ratio` leaves; the larger of two as near."""
    return min(size, math.floor(size * (1 - ratio) / step + 0.5) * step)


def _note(wanted: Request, dim: Dimension, kept: int, ratio: float) -> None:
    wanted.counts[dim.name] = kept
    exact = dim.size * (1 - ratio)
    off = abs(kept - exact)
    if off >= 1 or (off > 1e-6 and dim.size < COARSE):
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
            kept = _at_least_one_step(d, 1 - options.params, options.round_to)
            _note(wanted, d, kept, 1 - options.params)

    def at(ratio: float) -> Counts:
        kept = {d.name: _at_least_one_step(d, ratio, options.round_to) for d in fine}
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
        least = block_parameters(named, at(1)) / total
        wanted.notes.append(
            f"--target params={options.params:g}: the nearest that these dimensions can reach is "
            f"{reached:.3f} (least: {least:.3f})"
        )
    wanted.counts = best
    return wanted


def block_parameters(
    named: NamedAxes, counts: Mapping[str, int] | None = None, gone: Container[str] = ()
) -> int:
    """Parameters outside the embeddings and the head, with `counts` units kept, without `gone`.

    Embeddings are the matrices from which rows are taken (other than by the choice of experts),
    the head has the model's output as an axis.
    """
    outside = _embeddings_and_head(named)
    return sum(
        math.prod(named.sizes_after(path, counts or {}))
        for path in named.graph.parameters
        if path not in outside and path not in gone
    )


def _embeddings_and_head(named: NamedAxes) -> set[str]:
    graph, axes = named.graph, named.inference.axes
    experts = {dim for axis, _ in named.inference.routed for dim in leaves(axis)}
    tables = {
        node.inputs[0]
        for node in graph.nodes
        if node.op == "Gather" and tuple(node.attributes[0]) == (0,)
        if len(axes[node.inputs[0]]) > 1 and not experts & set(leaves(axes[node.inputs[0]][0]))
    }
    return {
        path
        for path, value in graph.parameters.items()
        if value in tables
        or any(dim.frozen == OUTPUT for axis in named.axes_of(path) for dim in leaves(axis))
    }


def choose(
    named: NamedAxes, dims: Iterable[Dimension], scores: Scores, wanted: Request,
    options: Options, recipe: Mapping[str, object] | None = None,
) -> PrunePlan:  # fmt: skip
    """Keep the units with the highest scores; ties go to the lower index."""
    counts, dims = dict(wanted.counts), list(dims)
    if options.global_pruning:
        counts |= _global_counts(dims, scores, counts, options.round_to)
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
        if budget == sum(d.size for d in group):
            continue
        step = _step(group[0], round_to)
        kept = {d.name: step for d in group}
        gains = [
            (float(ranked[d.name][k : k + step].mean()), d.name)
            for d in group
            for k in range(step, d.size - step + 1, step)
        ]
        gains.sort(key=lambda gain: -gain[0])
        for _, name in gains[: max(0, budget // step - len(group))]:
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


def prunable_layers(named: NamedAxes, options: Options) -> list[LayerDimension]:
    """The module lists that lose entries, or branches. Raises `InputError` when none can."""
    kinds = [kind for kind in options.dims if kind in LAYER_KINDS]
    if kinds:
        _check_patterns(named, options)
    found = [d for d in layer_dimensions(named) if d.kind in kinds]
    chosen = [d for d in found if d.free and not _ignored(d, options.ignored_layers)]
    if kinds and not chosen:
        why = next((d.frozen for d in found if d.frozen), "the graph has no such residual branch")
        raise InputError(f"--dims {','.join(kinds)}: nothing can be dropped here ({why}).")
    return chosen


def choose_layers(
    named: NamedAxes, dims: list[LayerDimension], scores: Scores, options: Options
) -> dict[str, Cut]:
    """Drop the entries with the lowest scores: a fraction of each list, or down to the target."""
    if options.params is not None:
        return _layers_for_target(named, dims, scores, options.params)
    cuts = {}
    for d in dims:
        count = min(round(d.size * options.pruning_ratio), len(d.removable), d.size - 1)
        order = sorted(d.removable, key=lambda i: scores[d.name][i])
        if count:
            cuts[d.name] = without(d, order[:count])
    return cuts


def _layers_for_target(named, dims, scores: Scores, target: float) -> dict[str, Cut]:
    """One entry at a time, the lowest score first, while that comes nearer to the target."""
    total = block_parameters(named)
    order = sorted((scores[d.name][i], d.name, i) for d in dims for i in d.removable)
    by_name = {d.name: d for d in dims}
    gone: dict[str, list[int]] = {d.name: [] for d in dims}
    best, best_error = {}, 1 - target
    for _, name, index in order:
        if len(gone[name]) + 1 >= by_name[name].size:
            continue
        gone[name].append(index)
        cuts = {n: without(by_name[n], which) for n, which in gone.items() if which}
        lost = dropped_parameters(named, PrunePlan(cuts))
        error = abs(block_parameters(named, gone=lost) / total - target)
        if error < best_error:
            best, best_error = cuts, error
    return best


def _ignored(dim: LayerDimension, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(dim.name, pattern) for pattern in patterns)
