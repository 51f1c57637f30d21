"""Criteria: one function each, a score for every unit of every dimension; larger means keep.

A criterion takes what it needs by name from the sources (`Sources`): weights, activations,
gradients. Scores of a dimension are float64, [units], or [units of the outer one, units] for a
dimension that is chosen anew within another.

Names joined by + are criteria too: `criterion("magnitude+taylor")`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import mlx.core as mx
import numpy as np

from .axes import Dimension, NamedAxes
from .calibrate import Moments, Statistics, check_parameter
from .contractions import Contraction, consumers
from .errors import InputError
from .osscar import removal_costs
from .second import as_matrices
from .stream import Fetch

Scores = dict[str, np.ndarray]


@dataclass(frozen=True)
class Sources:
    """What criteria score by. `statistics` is None where the criterion needs none."""

    named: NamedAxes
    dims: tuple[Dimension, ...]
    fetch: Fetch
    statistics: Statistics | None = None
    seed: int = 0


def random(sources: Sources) -> Scores:
    """Uniform noise from `seed`: the baseline that any criterion must beat."""
    rng = np.random.default_rng(sources.seed)
    return {d.name: rng.random(_shape(sources.named, d)) for d in sources.dims}


def magnitude(sources: Sources) -> Scores:
    """Sum over parameters of the L2 norm of the unit's slots.

    The group magnitude of Fang et al., 2023, https://arxiv.org/abs/2301.12900. Reads weights only.
    """
    scores = {d.name: np.zeros(_shape(sources.named, d)) for d in sources.dims}
    for path, dims in _by_parameter(sources.dims).items():
        weight = sources.fetch([path])[path].astype(mx.float32)
        check_parameter(path, weight)
        square = mx.square(weight)
        for d in dims:
            array, axes = _reduced(sources.named, d, path, square)
            scores[d.name] += np.sqrt(unit_sums(sources.named, d, axes, array))
    return scores


def activation(sources: Sources) -> Scores:
    """L2 norm over a batch's tokens of what each slot hands on, mean over batches; L2 over slots.

    Minitron: Muralidharan et al., 2024, https://arxiv.org/abs/2407.14679.
    """
    return _over_contractions(sources, lambda place, held: (held.norm / held.batches) ** 2, np.sqrt)


def wanda(sources: Sources) -> Scores:
    """Sum over the unit's slots and the weights W that read them of |W| * ||x||.

    The structured form of Sun et al., 2023, https://arxiv.org/abs/2306.11695.
    """
    weights = {}

    def score(place: Contraction, held: Moments) -> np.ndarray:
        norm = np.sqrt(held.square)
        if place.weight is None:
            return norm
        if place.weight not in weights:
            weights[place.weight] = _weight_sums(sources, place, mx.abs)
        return weights[place.weight] * norm

    return _over_contractions(sources, score, each_weight=True)


def taylor(sources: Sources) -> Scores:
    """|x * dL/dx| of what the unit hands on: the first-order change of the loss without it.

    The product is summed over the tokens of a sequence, then its magnitude over sequences and
    slots. Since x is multiplied into W, it equals the sum of w * dL/dw over the weights that read
    the unit. Molchanov et al., 2019, https://arxiv.org/abs/1906.10771 (they square it).
    """
    return _over_contractions(sources, lambda place, held: held.taylor)


def fisher(sources: Sources) -> Scores:
    """Sum over sequences of (x * dL/dx)^2: the second-order term, by the diagonal of the Fisher.

    Optimal Brain Damage with gradients squared for curvature: LeCun et al., 1989; Molchanov et
    al., 2019, https://arxiv.org/abs/1906.10771.
    """
    return _over_contractions(sources, lambda place, held: held.fisher)


def fluctuation(sources: Sources) -> Scores:
    """Var(x) * ||W||^2 over the weights W that read the slot: what a constant cannot stand in for.

    FLAP: An et al., 2024, https://arxiv.org/abs/2312.11983.
    """
    weights = {}

    def score(place: Contraction, held: Moments) -> np.ndarray:
        if place.weight is None:
            return held.variance
        if place.weight not in weights:
            weights[place.weight] = _weight_sums(sources, place, mx.square)
        return weights[place.weight] * held.variance

    return _over_contractions(sources, score, each_weight=True)


def osscar(sources: Sources) -> Scores:
    """What is lost by the time a unit is removed, cheapest first, the others making up for it.

    See `osscar.py`. A dimension whose inputs keep no second moments scores by `wanda`.
    """
    places = fully_measured(sources, sources.dims)
    out = {
        d.name: sum(_removal_costs(sources, d, place) for place in places[d.name])
        for d in sources.dims
        if d.name in places
    }
    plain = tuple(d for d in sources.dims if d.name not in out)
    return out | (wanda(replace(sources, dims=plain)) if plain else {})


def fully_measured(sources: Sources, dims: Sequence[Dimension]) -> dict[str, list[Contraction]]:
    """What reads each dimension, for those of which all of it has second moments."""
    second = sources.statistics.second
    found = consumers(sources.named, [d.name for d in dims])
    return {
        name: places
        for name, places in found.items()
        if places and all(p.layout and p.weight and p.second_key in second for p in places)
    }


def read_matrices(sources: Sources, place: Contraction) -> tuple[np.ndarray, np.ndarray]:
    """The weights of a place and the moments of its inputs, float64 [e, n, m] and [e, n, n]."""
    path = place.weight[0]
    array = sources.fetch([path])[path].astype(mx.float32)
    check_parameter(path, array)
    weights, each = as_matrices(array, place, sources.statistics.second[place.second_key])
    return weights, each.sum(axis=1, dtype=np.float64)


def by_expert(named: NamedAxes, dim: Dimension, place: Contraction) -> bool:
    """Whether each matrix of the place reads the units of one unit of the outer dimension."""
    return bool(place.leading and dim.within and dim.within not in named.units_along(place.axis))


def _removal_costs(sources: Sources, dim: Dimension, place: Contraction) -> np.ndarray:
    weights, moments = read_matrices(sources, place)
    units = flat_units(sources.named, dim, place)
    patches = weights.shape[1] // len(units)
    costs = [
        removal_costs(weight, each, np.tile(units, patches))
        for weight, each in zip(weights, moments, strict=True)
    ]
    total = np.stack(costs) if by_expert(sources.named, dim, place) else sum(costs)
    return total.reshape(_shape(sources.named, dim))


def flat_units(named: NamedAxes, dim: Dimension, place: Contraction) -> np.ndarray:
    """The unit of each slot; of a dimension chosen within another on this axis, counted through."""
    here = named.units_along(place.axis)
    units = here[dim.name]
    if dim.within in here:
        outer = here[dim.within]
        units = np.where((units >= 0) & (outer >= 0), outer * dim.size + units, -1)
    return units


def combined(sources: Sources) -> Scores:
    """Magnitude, activations and gradients together: `magnitude+wanda+taylor`."""
    return _summed((magnitude, wanda, taylor), sources)


def _summed(parts: Sequence[Callable[[Sources], Scores]], sources: Sources) -> Scores:
    """The sum of scores, each divided by its mean over the dimension.

    So every part has the same say in every layer, and ranking across layers, which divides by the
    mean too, sees the mean of the curves that the parts would have shown alone. Ranks would not do
    there: where the parts agree, all layers would look alike.
    """
    each = [part(sources) for part in parts]
    return {d.name: sum(_by_mean(scores[d.name]) for scores in each) for d in sources.dims}


def _by_mean(score: np.ndarray) -> np.ndarray:
    return score / max(float(score.mean()), 1e-300)


CRITERIA: dict[str, Callable[[Sources], Scores]] = {
    "random": random,
    "magnitude": magnitude,
    "activation": activation,
    "wanda": wanda,
    "fluctuation": fluctuation,
    "fisher": fisher,
    "taylor": taylor,
    "combined": combined,
    "osscar": osscar,
}
NEEDS_DATA = CRITERIA.keys() - {"random", "magnitude"}
NEEDS_GRADIENTS = {"fisher", "taylor", "combined"}
NEEDS_SECOND = {"osscar"}


def criterion(name: str) -> Callable[[Sources], Scores]:
    """The criterion of a name, or of several joined by +, each divided by its mean.

    Raises `InputError` naming the part that is not known.
    """
    parts = [CRITERIA[part] for part in _parts(name)]
    return parts[0] if len(parts) == 1 else partial(_summed, parts)


def needs(name: str) -> frozenset[str]:
    """What `criterion(name)` reads besides weights: of "data", "gradients" and "second" (moments).

    `auto`, which tries every criterion, needs what any of them does.
    """
    parts = CRITERIA.keys() if name == "auto" else set(_parts(name))
    table = {"data": NEEDS_DATA, "gradients": NEEDS_GRADIENTS, "second": NEEDS_SECOND}
    return frozenset(need for need, names in table.items() if parts & names)


def _parts(name: str) -> list[str]:
    parts = name.split("+")
    for part in parts:
        if part not in CRITERIA:
            raise InputError(
                f"--importance {name}: there is no {part or 'empty name'}; choose from "
                f"{', '.join(CRITERIA)}, or join some of these with +."
            )
    return parts


def unit_sums(
    named: NamedAxes, dim: Dimension, axes: list[dict[str, np.ndarray]], array: np.ndarray
) -> np.ndarray:
    """Sum the entries of `array` by the unit of `dim` that each belongs to.

    `axes` gives, for each axis of `array`, the units of its slots by dimension name.
    """
    out = np.zeros(_shape(named, dim))
    for k, here in enumerate(axes):
        if dim.name not in here:
            continue
        index = [_along(here[dim.name], k, array.ndim)]
        valid = index[0] >= 0
        if dim.within:
            j = next(j for j, other in enumerate(axes) if dim.within in other)
            index.insert(0, _along(axes[j][dim.within], j, array.ndim))
            valid = valid & (index[0] >= 0)
        spread = [np.broadcast_to(units, array.shape) for units in index]
        valid = np.broadcast_to(valid, array.shape)
        np.add.at(out, tuple(units[valid] for units in spread), array[valid])
    return out


def _along(units: np.ndarray, axis: int, rank: int) -> np.ndarray:
    shape = [1] * rank
    shape[axis] = len(units)
    return units.reshape(shape)


def _shape(named: NamedAxes, dim: Dimension) -> tuple[int, ...]:
    return (named.dimensions[dim.within].size, dim.size) if dim.within else (dim.size,)


def _by_parameter(dims) -> dict[str, list[Dimension]]:
    out: dict[str, list[Dimension]] = {}
    for d in dims:
        for path in dict.fromkeys(path for path, _ in d.slots):
            out.setdefault(path, []).append(d)
    return out


def _reduced(named: NamedAxes, dim: Dimension, path: str, array: mx.array):
    """Sum `array` over the axes that carry neither the dimension nor its outer one."""
    coordinates = named.coordinates(path)
    kept = [k for k, here in enumerate(coordinates) if {dim.name, dim.within} & set(here)]
    rest = [k for k in range(array.ndim) if k not in kept]
    total = array.sum(axis=rest) if rest else array
    return np.array(total, dtype=np.float64), [coordinates[k] for k in kept]


def _over_contractions(
    sources: Sources,
    score: Callable[[Contraction, Moments], np.ndarray],
    finish: Callable[[np.ndarray], np.ndarray] = lambda total: total,
    *,
    each_weight: bool = False,
) -> Scores:
    """Sum `score(contraction, moments)`, per slot, over every place that reads a dimension.

    A place is a value, which several weights may read; with `each_weight`, each of these is one.
    """
    named, held = sources.named, sources.statistics.moments
    by_dim = consumers(named, [d.name for d in sources.dims])
    out = {}
    for d in sources.dims:
        total = np.zeros(_shape(named, d))
        places = by_dim[d.name] if each_weight else {p.key: p for p in by_dim[d.name]}.values()
        for place in places:
            array = score(place, held[place.key])
            total += unit_sums(named, d, *_placed(named, d, place, array))
        if not by_dim[d.name]:
            raise InputError(
                f"{d.name}: no weights read it directly, so it has no activation score; use "
                "--importance magnitude, or leave it out with --ignored-layers."
            )
        out[d.name] = finish(total)
    return out


def _placed(named: NamedAxes, dim: Dimension, place: Contraction, array: np.ndarray):
    axes = [named.units_along(place.axis)]
    if place.experts is None:
        return axes, array
    experts = named.units_along(place.expert_axis)
    if dim.within in experts or dim.name in experts:
        return [experts, *axes], array
    return axes, array.sum(axis=0)


def _weight_sums(sources: Sources, place: Contraction, of: Callable) -> np.ndarray:
    """Sum of `of(W)` for each slot of the contracted axis: [n], or [experts, n]."""
    path, axis = place.weight
    weight = sources.fetch([path])[path].astype(mx.float32)
    check_parameter(path, weight)
    weight = of(weight)
    keep = {axis, 0} if place.experts is not None else {axis}
    rest = [k for k in range(weight.ndim) if k not in keep]
    return np.array(weight.sum(axis=rest) if rest else weight, dtype=np.float64)
