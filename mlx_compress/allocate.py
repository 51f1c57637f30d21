"""From scores and a wish to a prune plan.

Dimensions that the config sets by one number (the MLP width of all layers) are a *family*; they
keep one count, so that a stock config can express the result. `global_pruning` ranks the units of
a family against each other instead, and gives every layer its own count.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import numpy as np

from .axes import Dimension, NamedAxes
from .budget import DENSE, TOLERANCE, Budget, parameters
from .errors import InputError
from .importance import Scores
from .layers import LayerDimension, layer_dimensions, without
from .options import LAYER_KINDS, Options
from .plan import Cut, PrunePlan

COARSE = 64  # a dimension with fewer units than this cannot follow a target closely
KNOTS = 8  # steps from the dense model to the least, at which a spending that varies is measured
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


def request(
    named: NamedAxes, dims: list[Dimension], options: Options, budget: Budget | None = None
) -> Request:
    """The counts to keep, uniform within a family.

    `budget` is that of the options' target; a fraction of parameters needs none. Raises
    `InputError` if a dimension would be emptied, or a target cannot be met.
    """
    if options.pruning_ratio is not None:
        wanted, ratio = Request({}), options.pruning_ratio
        for d in dims:
            _note(wanted, d, _kept(d, ratio, options.round_to), ratio)
        return wanted
    if not options.max_trials and any(kind in LAYER_KINDS for kind in options.dims):
        raise InputError(
            f"--target {options.budget[0]} with --dims {','.join(options.dims)}: units or whole "
            "layers can make up a target; name one of them, or have both searched by --max-trials."
        )
    return _for_target(named, dims, options, _budget(named, options, budget))


def _budget(named: NamedAxes, options: Options, budget: Budget | None) -> Budget:
    assert budget or options.params is not None, options.budget
    return budget or parameters(named)


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
        asked = f"{round(exact, 1):g} was asked for"
        note = f"{family(dim)[0]}: {kept} of {dim.size} kept, where {asked}"
        if note not in wanted.notes:
            wanted.notes.append(note)


def _for_target(
    named: NamedAxes, dims: list[Dimension], options: Options, budget: Budget
) -> Request:
    """Coarse dimensions take the common ratio of the goal, rounded; fine ones make up for that."""
    goal, step = options.budget[1], options.round_to
    coarse = [d for d in dims if d.size < COARSE]
    coarse = coarse if len(coarse) < len(dims) else []
    fine = [d for d in dims if d not in coarse]
    spent = _spending(named, dims, step, budget)

    def at(ratio: float, fixed: Counts) -> Counts:
        return fixed | {d.name: _at_least_one_step(d, ratio, step) for d in fine}

    def unrounded(ratio: float) -> float:
        down, up, part = _around(coarse, ratio, step)
        return (1 - part) * spent(at(ratio, down)) + part * spent(at(ratio, up))

    def met(fixed: Counts) -> Counts:
        ends = _crossing(lambda ratio: spent(at(ratio, fixed)), goal)
        return min((at(end, fixed) for end in ends), key=lambda counts: abs(spent(counts) - goal))

    _check_reach(options, spent({}), unrounded(1), [d.kind for d in dims])
    ratio = _crossing(unrounded, goal, halvings=12)[1]
    fixed = {d.name: _at_least_one_step(d, ratio, step) for d in coarse}
    if spent(met(fixed)) > goal * (1 + TOLERANCE):
        fixed = _around(coarse, ratio, step)[0]
    wanted = Request({})
    for d in coarse:
        _note(wanted, d, fixed[d.name], ratio)
    wanted.counts = met(fixed)
    return wanted


def _spending(
    named: NamedAxes, dims: list[Dimension], round_to: int, budget: Budget
) -> Callable[[Counts], float]:
    """What counts spend; other dimensions are whole."""

    def common(ratio: float) -> PrunePlan:
        return stand_in(named, {d.name: _at_least_one_step(d, ratio, round_to) for d in dims})

    spent = budget.along(common(k / KNOTS) if k else DENSE for k in range(KNOTS + 1))
    known: dict[tuple, float] = {}

    def of_counts(counts: Counts) -> float:
        key = tuple(counts.get(d.name, d.size) for d in dims)
        if key not in known:
            known[key] = spent(stand_in(named, counts))
        return known[key]

    return of_counts


def _around(dims: list[Dimension], ratio: float, round_to: int) -> tuple[Counts, Counts, float]:
    """The counts below and above what `ratio` leaves, and where between them that lies, 0 to 1."""
    down: Counts = {}
    up: Counts = {}
    parts = []
    for d in dims:
        step = _step(d, round_to)
        exact = d.size * (1 - ratio)
        down[d.name] = low = max(step, math.floor(exact / step) * step)
        up[d.name] = high = min(d.size, max(low, math.ceil(exact / step) * step))
        parts += [(exact - low) / (high - low)] if high > low else []
    return down, up, float(np.mean(parts)) if parts else 0.0


def _crossing(
    spent: Callable[[float], float], goal: float, halvings: int = 40
) -> tuple[float, float]:
    """The ratios nearest to each other of which the first spends more than the goal."""
    low, high = 0.0, 1.0
    for _ in range(halvings):
        middle = (low + high) / 2
        if spent(middle) > goal:
            low = middle
        else:
            high = middle
    return low, high


def _check_reach(options: Options, dense: float, least: float, kinds: Iterable[str]) -> None:
    """Raise `InputError` for a goal that the dense model meets, or that nothing can meet."""
    name, goal = options.budget
    if goal >= dense:
        raise InputError(
            f"--target {name}={goal:g}: the dense model has {dense:.4g} already; ask for less."
        )
    if least > goal * (1 + TOLERANCE):
        others = "other --dims" if "layers" in options.dims else "other --dims, such as layers,"
        raise InputError(
            f"--target {name}={goal:g}: the least that {', '.join(dict.fromkeys(kinds))} can reach "
            f"is {least:.3g}; name {others} or ask for that."
        )


def stand_in(named: NamedAxes, counts: Counts) -> PrunePlan:
    """A plan with the given counts that keeps the first units of each dimension."""
    cuts = {}
    for name, count in counts.items():
        d = named.dimensions[name]
        if count < d.size:
            row = list(range(count))
            keep = [row] * named.dimensions[d.within].size if d.within else row
            cuts[name] = Cut(name, d.kind, d.size, keep, d.within, d.slots)
    return PrunePlan(cuts)


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


def prunable_layers(
    named: NamedAxes, options: Options, budget: Budget | None = None
) -> list[LayerDimension]:
    """The module lists that lose entries, or branches.

    Raises `InputError` when none can, or when they cannot meet the options' target alone.
    """
    kinds = [kind for kind in options.dims if kind in LAYER_KINDS]
    if kinds:
        _check_patterns(named, options)
    found = [d for d in layer_dimensions(named) if d.kind in kinds]
    chosen = [d for d in found if d.free and not _ignored(d, options.ignored_layers)]
    if kinds and not chosen:
        why = next((d.frozen for d in found if d.frozen), "the graph has no such residual branch")
        raise InputError(f"--dims {','.join(kinds)}: nothing can be dropped here ({why}).")
    if chosen and options.budget and len(kinds) == len(options.dims):
        plans = _fewer(chosen)
        spent = _budget(named, options, budget).along(plans)
        _check_reach(options, spent(plans[0]), spent(plans[-1]), kinds)
    return chosen


def choose_layers(
    named: NamedAxes, dims: list[LayerDimension], scores: Scores, options: Options,
    budget: Budget | None = None,
) -> dict[str, Cut]:  # fmt: skip
    """Drop the entries with the lowest scores: a fraction of each list, or down to the target."""
    if options.budget is not None:
        spent = _budget(named, options, budget).along(_fewer(dims))
        order = sorted((scores[d.name][i], d.name, i) for d in dims for i in d.removable)
        plans = _dropping(dims, [(name, i) for _, name, i in order])
        return min(plans, key=lambda plan: abs(spent(plan) - options.budget[1])).cuts
    cuts = {}
    for d in dims:
        count = min(round(d.size * options.pruning_ratio), len(d.removable), d.size - 1)
        order = sorted(d.removable, key=lambda i: scores[d.name][i])
        if count:
            cuts[d.name] = without(d, order[:count])
    return cuts


def _dropping(dims: list[LayerDimension], order: Iterable[tuple[str, int]]) -> list[PrunePlan]:
    """Nothing dropped, then one entry (list, index) more in each plan; one of each list stays."""
    by_name = {d.name: d for d in dims}
    gone: dict[str, list[int]] = {d.name: [] for d in dims}
    plans = [DENSE]
    for name, index in order:
        if len(gone[name]) + 1 < by_name[name].size:
            gone[name].append(index)
            plans.append(PrunePlan({n: without(by_name[n], i) for n, i in gone.items() if i}))
    return plans


def _fewer(dims: list[LayerDimension]) -> list[PrunePlan]:
    """Plans from the dense one to the least, evenly spread."""
    every = _dropping(dims, [(d.name, i) for d in dims for i in d.removable])
    return [every[k] for k in np.linspace(0, len(every) - 1, KNOTS + 1).round().astype(int)]


def _ignored(dim: LayerDimension, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(dim.name, pattern) for pattern in patterns)
