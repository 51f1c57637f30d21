"""Apply a prune plan to parameters: gather the kept slots, or zero the others.

Every slot of a parameter belongs to at most one unit of each dimension (`NamedAxes.coordinates`),
so a plan becomes, for each axis, the list of slots to keep. Where units are chosen anew within
another dimension that lies on another axis (the channels of each expert) the list differs by row.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .axes import NamedAxes
from .dims import size_of
from .errors import InputError
from .layers import check_layer_cut, dropped_parameters, is_layer_cut
from .plan import PrunePlan
from .stream import Fetch

Cutter = Callable[[str, mx.array], mx.array]  # a parameter's path and the whole array -> what stays


@dataclass(frozen=True)
class Pick:
    """Kept slots of one axis: [kept], or [rows kept of axis `along`, kept]."""

    axis: int
    slots: np.ndarray
    along: int | None = None


def check_plan(named: NamedAxes, plan: PrunePlan) -> None:
    """Raise `InputError` unless every cut names a free dimension of this model, of its size."""
    for cut in plan:
        if is_layer_cut(cut):
            check_layer_cut(named, cut)
            continue
        dimension = named.dimensions.get(cut.name)
        if dimension is None:
            raise InputError(f"{cut.name}: the model has no such dimension; `inspect` lists them.")
        if dimension.size != cut.size:
            raise InputError(
                f"{cut.name}: the plan was made for {cut.size} units, the model has "
                f"{dimension.size}."
            )
        if not dimension.free:
            raise InputError(f"{cut.name}: cannot be pruned ({dimension.frozen}).")
        if cut.within not in (None, dimension.within):
            raise InputError(f"{cut.name}: cannot be chosen within {cut.within}.")
        if cut.within and len(cut.keep) != named.dimensions[cut.within].size:
            raise InputError(
                f"{cut.name}: the plan chooses within {len(cut.keep)} units of {cut.within}, "
                f"the model has {named.dimensions[cut.within].size}."
            )


def picks(named: NamedAxes, plan: PrunePlan, path: str) -> list[Pick]:
    """The slots that a plan keeps of one parameter, for the axes that it cuts."""
    masks = _masks(named, plan, path)
    plain = {k: np.flatnonzero(m) for k, (m, along) in enumerate(masks) if along is None}
    out = [Pick(k, slots) for k, slots in plain.items() if len(slots) < masks[k][0].size]
    for k, (mask, along) in enumerate(masks):
        if along is not None:
            rows = [np.flatnonzero(mask[row]) for row in plain[along]]
            out.append(Pick(k, np.stack(rows), along))
    return out


def prune_array(array: mx.array, cuts: list[Pick]) -> mx.array:
    """The kept slots of a parameter, in their order."""
    for pick in cuts:
        if pick.along is None:
            array = mx.take(array, mx.array(pick.slots), axis=pick.axis)
        else:
            array = mx.take_along_axis(array, _spread(pick, array.shape), axis=pick.axis)
    return array


def spread_array(array: mx.array, cuts: list[Pick], shape: tuple[int, ...]) -> mx.array:
    """The inverse of `prune_array`: an array of `shape`, zero where slots were removed."""
    for pick in reversed(cuts):
        wider = tuple(shape[k] if k == pick.axis else n for k, n in enumerate(array.shape))
        if pick.along is None:
            order = [1] * array.ndim
            order[pick.axis] = array.shape[pick.axis]
            where = mx.broadcast_to(mx.array(pick.slots).reshape(order), array.shape)
        else:
            where = _spread(pick, array.shape)
        array = mx.put_along_axis(mx.zeros(wider, array.dtype), where, array, axis=pick.axis)
    return array


def pruner(named: NamedAxes, plan: PrunePlan) -> Cutter:
    """How a plan cuts a parameter: the kept slots as they are."""
    return lambda path, array: prune_array(array, picks(named, plan, path))


def pruned_fetch(fetch: Fetch, cut: Cutter) -> Fetch:
    """A fetch of pruned parameters, under their old paths; each is cut when it is asked for."""

    def pruned(paths: Iterable[str]) -> dict[str, mx.array]:
        paths = list(paths)
        arrays = dict(fetch(paths))
        return {path: cut(path, arrays.pop(path)) for path in paths}

    return pruned


def pruned_shape(shape: tuple[int, ...], cuts: list[Pick]) -> tuple[int, ...]:
    """The shape of `prune_array`'s result."""
    sizes = {pick.axis: pick.slots.shape[-1] for pick in cuts}
    return tuple(sizes.get(k, n) for k, n in enumerate(shape))


def zero_array(named: NamedAxes, plan: PrunePlan, path: str, array: mx.array) -> mx.array:
    """The parameter with all slots of removed units set to zero: what pruning must equal."""
    for k, (mask, along) in enumerate(_masks(named, plan, path)):
        shape = [1] * array.ndim
        shape[k] = mask.shape[-1]
        if along is not None:
            shape[along] = mask.shape[0]
            mask = mask if along < k else mask.T
        array = mx.where(mx.array(mask.reshape(shape)), array, mx.zeros((), array.dtype))
    return array


def pruned_shapes(named: NamedAxes, plan: PrunePlan) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter that is left after pruning."""
    gone = dropped_parameters(named, plan)
    return {
        path: pruned_shape(shape, picks(named, plan, path))
        for path, shape in named.graph.shapes().items()
        if path not in gone
    }


def prune_parameters(
    named: NamedAxes, plan: PrunePlan, parameters: Mapping[str, mx.array]
) -> dict[str, mx.array]:
    """The parameters left after pruning, under their old paths, lazy.

    Raises `InputError` for a plan of another model.
    """
    check_plan(named, plan)
    _check_shapes(named, parameters)
    gone = dropped_parameters(named, plan)
    return {
        path: prune_array(array, picks(named, plan, path))
        for path, array in parameters.items()
        if path not in gone
    }


def zero_parameters(
    named: NamedAxes, plan: PrunePlan, parameters: Mapping[str, mx.array]
) -> dict[str, mx.array]:
    """All parameters with the removed units zeroed, lazy; the oracle of `prune_parameters`.

    The parameters of dropped layers and branches are zero as a whole.
    """
    check_plan(named, plan)
    _check_shapes(named, parameters)
    gone = dropped_parameters(named, plan)
    return {
        path: mx.zeros_like(array) if path in gone else zero_array(named, plan, path, array)
        for path, array in parameters.items()
    }


def _check_shapes(named: NamedAxes, parameters: Mapping[str, mx.array]) -> None:
    shapes = named.graph.shapes()
    for path, array in parameters.items():
        if shapes.get(path) != array.shape:
            raise InputError(f"{path}: shape {array.shape}, but the graph has {shapes.get(path)}.")


def _masks(named: NamedAxes, plan: PrunePlan, path: str) -> list[tuple[np.ndarray, int | None]]:
    """Per axis, which slots stay: ([slots], None), or ([slots of `along`, slots], along)."""
    coordinates = named.coordinates(path)
    out = []
    for axis, dims in enumerate(named.axes_of(path)):
        mask, along = np.ones(size_of(dims), dtype=bool), None
        for name, units in coordinates[axis].items():
            if name not in plan.cuts:
                continue
            cut = plan.cuts[name]
            keep, rest = cut.mask(), units < 0
            if cut.within is None:
                mask = mask & (rest | keep[units])
            elif cut.within in coordinates[axis]:
                mask = mask & (rest | keep[coordinates[axis][cut.within], units])
            else:
                along = next(k for k, here in enumerate(coordinates) if cut.within in here)
                mask = mask & (rest | keep[coordinates[along][cut.within]][:, units])
        out.append((mask, along))
    return out


def _spread(pick: Pick, shape: tuple[int, ...]) -> mx.array:
    """Row-wise indices in the shape that `take_along_axis` wants."""
    order = pick.slots if pick.along < pick.axis else pick.slots.T
    inner = [1] * len(shape)
    inner[pick.along], inner[pick.axis] = shape[pick.along], pick.slots.shape[-1]
    whole = tuple(inner[k] if k in (pick.along, pick.axis) else n for k, n in enumerate(shape))
    return mx.broadcast_to(mx.array(order.reshape(inner)), whole)
