"""Criteria: one function each, a score for every unit of every dimension; larger means keep.

A criterion takes what it needs by name from the sources (`Sources`): weights, activations,
gradients. Scores of a dimension are float64, [units], or [units of the outer one, units] for a
dimension that is chosen anew within another.
"""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .axes import Dimension, NamedAxes
from .calibrate import Moments, Statistics, check_parameter
from .contractions import Contraction, consumers
from .errors import InputError
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
            weights[place.weight] = _absolute_sums(sources, place)
        return weights[place.weight] * norm

    return _over_contractions(sources, score, each_weight=True)


def taylor(sources: Sources) -> Scores:
    """|x * dL/dx| of what the unit hands on: the first-order change of the loss without it.

    The product is summed over the tokens of a sequence, then its magnitude over sequences and
    slots. Since x is multiplied into W, it equals the sum of w * dL/dw over the weights that read
    the unit. Molchanov et al., 2019, https://arxiv.org/abs/1906.10771 (they square it).
    """
    return _over_contractions(sources, lambda place, held: held.taylor)


CRITERIA: dict[str, Callable[[Sources], Scores]] = {
    "random": random,
    "magnitude": magnitude,
    "activation": activation,
    "wanda": wanda,
    "taylor": taylor,
}
NEEDS_DATA = {"activation", "wanda", "taylor"}
NEEDS_GRADIENTS = {"taylor"}


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


def _absolute_sums(sources: Sources, place: Contraction) -> np.ndarray:
    """Sum of |W| for each slot of the contracted axis: [n], or [experts, n]."""
    path, axis = place.weight
    weight = sources.fetch([path])[path].astype(mx.float32)
    check_parameter(path, weight)
    weight = mx.abs(weight)
    keep = {axis, 0} if place.experts is not None else {axis}
    rest = [k for k in range(weight.ndim) if k not in keep]
    return np.array(weight.sum(axis=rest) if rest else weight, dtype=np.float64)
