"""Improve a plan by swaps: what is kept is exchanged for what is not while the refit gains by it.

Any criterion can make the plan; counts stay as they are. What the other cuts of the plan remove is
counted as gone. Left as they are: whole layers and experts, dimensions that something reads whose
inputs keep no second moments (grouped and depthwise convolutions), those whose units differ in
their number of slots, and those that would take more than `ROOM` bytes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from .axes import Dimension, NamedAxes
from .contractions import Contraction
from .importance import Sources, by_expert, flat_units, fully_measured, read_matrices
from .osscar import Reading, alike, reading, swapped
from .plan import Cut, PrunePlan

ROOM = 2**32


def refine(sources: Sources, plan: PrunePlan) -> PrunePlan:
    """The plan with the units of each cut swapped (`osscar.swapped`), one cut after the other.

    `sources.statistics` must hold second moments; cuts of dimensions without them stay.
    """
    named, cuts = sources.named, dict(plan.cuts)
    dims = [replace(named.dimensions[cut.name], within=cut.within)
            for cut in plan if cut.name in named.dimensions]  # fmt: skip
    places = fully_measured(sources, dims)
    for dim in dims:
        here = places.get(dim.name, [])
        if sum(place.second_bytes for place in here) <= ROOM:
            others = {name: cut for name, cut in cuts.items() if name != dim.name}
            cuts[dim.name] = _refined(sources, others, dim, here, cuts[dim.name])
    return replace(plan, cuts=cuts)


def _refined(sources: Sources, others: Mapping[str, Cut], dim: Dimension, places, cut: Cut) -> Cut:
    keep = np.flatnonzero(cut.mask())
    for readings in _groups(sources, others, dim, places):
        if alike(readings):
            keep = swapped(readings, keep, row=dim.size)
    if not cut.within:
        return replace(cut, keep=keep.tolist())
    rows = [keep[keep // dim.size == k] % dim.size for k in range(len(cut.keep))]
    return replace(cut, keep=[row.tolist() for row in rows])


def _groups(
    sources: Sources, others: Mapping[str, Cut], dim: Dimension, places: list[Contraction]
) -> Iterator[list[Reading]]:
    """Readings that must keep the same units: of one expert after the other, or all there are."""
    each = [_readings(sources, others, dim, place) for place in places]
    if all(by_expert(sources.named, dim, place) for place in places):
        yield from map(list, zip(*each, strict=True))
    else:
        yield [one for readings in each for one in readings]


def _readings(
    sources: Sources, others: Mapping[str, Cut], dim: Dimension, place: Contraction
) -> Iterator[Reading]:
    """One for each matrix; units are counted through those of the outer dimension."""
    weights, moments = read_matrices(sources, place)
    units = flat_units(sources.named, dim, place)
    patches = weights.shape[1] // len(units)
    alive = np.broadcast_to(_alive(sources.named, others, place), (len(weights), len(units)))
    shifted = by_expert(sources.named, dim, place)
    for e, (weight, square) in enumerate(zip(weights, moments, strict=True)):
        own = np.where(units >= 0, units + shifted * e * dim.size, -1)
        yield reading(weight, square, np.tile(own, patches), np.tile(alive[e], patches))


def _alive(named: NamedAxes, others: Mapping[str, Cut], place: Contraction) -> np.ndarray:
    """The slots of the contracted axis that the other cuts keep: [n], or [experts, n]."""
    here = named.units_along(place.axis)
    alive = np.ones(1, dtype=bool)
    for name, units in here.items():
        if name not in others:
            continue
        cut, mask = others[name], others[name].mask()
        kept = mask[here[cut.within], units] if cut.within in here else mask[..., units]
        alive = alive & (kept | (units < 0))
    return alive
