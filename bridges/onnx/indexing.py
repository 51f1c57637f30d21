"""Rules that pick, place and repeat entries: see `ops.py` for what a rule is."""

from math import prod

import numpy as np

from ...errors import InputError
from ...execute import UPDATES, window
from ...graph import Value
from ...sizes import Size
from .builder import INT32, INT64, Handle, cast, constant, emit
from .extents import ints, number, plus
from .views import reshape, transpose

FAR = 2**63 - 1  # beyond the end of every axis
COMBINE = {"maximum": "Max", "minimum": "Min", "add": "Add", "multiply": "Mul"}
SCATTER = {"maximum": "max", "minimum": "min", "add": "add", "multiply": "mul"}


def broadcast(x, a, out):
    shape = out[0].shape
    if x[0].shape == shape:
        return x[0]
    return emit("Expand", x[0], ints(shape), shape=shape)


def slice_(x, a, out):
    return sliced(x[0], *a, shape=out[0].shape)


def sliced(array: Handle, starts, ends, strides, *, shape) -> Handle:
    """What is cut out; axes that stay whole are not mentioned."""
    cuts = [
        (axis, *_bounds(size, *cut)) for axis, (size, kept, *cut) in
        enumerate(zip(array.shape, shape, starts, ends, strides, strict=True))
        if not (cut[0] == 0 and cut[2] == 1 and kept == size)
    ]  # fmt: skip
    if not cuts:
        return array
    axes, *bounds = zip(*cuts, strict=True)
    start, end, step = map(ints, bounds)
    return emit("Slice", array, start, end, ints(axes), step, shape=tuple(shape))


def _bounds(size, start, end, stride) -> tuple:
    """MLX's as ONNX's. Forwards they are the same; backwards ONNX needs a sign for "to the end"."""
    if stride > 0:
        return start, FAR if end == size else end, stride
    if any(isinstance(n, Size) for n in (size, start, end)):
        raise InputError("a reversed slice of an axis of open size has no rule in ONNX.")
    cut = window(size, start, end, stride)
    return cut.start, -FAR if cut.stop is None else cut.stop, cut.step


def split(x, a, out):
    axis = a[1]
    sizes = ints([value.shape[axis] for value in out])
    shapes = [value.shape for value in out]
    if len(out) == 1:
        return x[0]
    return emit("Split", x[0], sizes, outputs=len(out), shape=shapes, axis=axis)


def pad(x, a, out):
    axes, low, high = a
    view = x[0].open_view("transpose")
    if view:  # in the layout that the input lies in
        shape = [0] * len(view.detail)
        for k, n in zip(view.detail, out[0].shape, strict=True):
            shape[k] = n
        moved = ([view.detail[k] for k in axes], low, high)
        inner = Value(tuple(shape), out[0].dtype)
        return transpose(pad([view.parents[0], x[1]], moved, [inner]), view.detail)
    value = reshape(cast(x[1], x[0].dtype), ())
    return emit("Pad", x[0], ints((*low, *high)), value, ints(axes), shape=out[0].shape)


def slice_update(x, a, out):
    code, starts, ends, strides = a
    source, update = x[0], cast(x[1], x[0].dtype)
    if any(stride != 1 for stride in strides):
        return _slice_update_by_places(source, update, code, starts, ends, strides)
    return _place(source, update, code, starts, 0)


def _place(source: Handle, update: Handle, code: int, starts, axis: int) -> Handle:
    """Before, what is updated along the other axes, after: from the first axis that is cut."""
    while axis < len(starts) and source.shape[axis] == update.shape[axis]:
        axis += 1
    if axis == len(starts):
        if code >= len(UPDATES):
            return update
        return emit(COMBINE[UPDATES[code]], source, update, shape=source.shape)
    start, kept = starts[axis], update.shape[axis]
    stop = plus(start, kept)

    def part(low, high, size) -> Handle:
        shape = (*source.shape[:axis], size, *source.shape[axis + 1 :])
        bounds = (ints([low]), ints([high]), ints([axis]))
        return emit("Slice", source, *bounds, shape=shape)

    inner = _place(part(start, stop, kept), update, code, starts, axis + 1)
    before, after = part(0, start, None), part(stop, FAR, None)
    return emit("Concat", before, inner, after, shape=source.shape, axis=axis)


def _slice_update_by_places(source, update, code, starts, ends, strides) -> Handle:
    """With strides: by the place of each updated entry in the flat array; sizes must be known."""
    if any(isinstance(n, Size) for n in (*source.shape, *starts, *ends)):
        raise InputError("an update with strides along an axis of open size has no rule in ONNX.")
    places = np.arange(prod(source.shape), dtype=np.int64).reshape(source.shape)
    cuts = tuple(map(window, source.shape, starts, ends, strides))
    flat = constant(places[cuts].reshape(-1))
    how = SCATTER[UPDATES[code]] if code < len(UPDATES) else "none"
    row, new = reshape(source, (prod(source.shape),)), reshape(update, (prod(update.shape),))
    result = emit("ScatterElements", row, flat, new, shape=row.shape, axis=0, reduction=how)
    return reshape(result, source.shape)


def gather(x, a, out):
    axes, sizes = a
    source, *indices = x
    if any(
        (1 if k in axes else n) != size
        for k, (n, size) in enumerate(zip(source.shape, sizes, strict=True))
    ):
        raise InputError(f"Gather of partial slices {sizes} of {source.shape} has no rule.")
    indices = [_index(h) for h in indices]
    if len(axes) == 1:
        return _gather_one(source, indices[0], axes[0], out[0].shape)
    rest = [k for k in range(len(source.shape)) if k not in axes]
    places = _stacked(indices, out[0].shape[: len(out[0].shape) - len(source.shape)])
    return reshape(emit("GatherND", transpose(source, [*axes, *rest]), places,
                        shape=(*places.shape[:-1], *(source.shape[k] for k in rest))),
                   out[0].shape)  # fmt: skip


def _gather_one(source: Handle, index: Handle, axis: int, shape) -> Handle:
    before, after = source.shape[:axis], source.shape[axis + 1 :]
    lead = len(index.shape)
    taken = emit("Gather", source, index, axis=axis, shape=(*before, *index.shape, *after))
    order = [*range(axis, axis + lead), *range(axis), *range(axis + lead, len(taken.shape))]
    return reshape(transpose(taken, order), shape)


def _index(handle: Handle) -> Handle:
    """ONNX takes int32 and int64."""
    return handle if handle.dtype in (INT32, INT64) else cast(handle, INT64)


def _stacked(indices: list[Handle], shape) -> Handle:
    """Indices side by side on a new last axis, int64 [*shape, count]."""
    wide = [
        cast(h if h.shape == tuple(shape) else emit("Expand", h, ints(shape), shape=tuple(shape)),
             INT64)
        for h in indices
    ]  # fmt: skip
    columns = [reshape(h, (*shape, 1)) for h in wide]
    if len(columns) == 1:
        return columns[0]
    return emit("Concat", *columns, shape=(*shape, len(columns)), axis=len(shape))


def gather_axis(x, a, out):
    source, index = x[0], _index(x[1])
    return emit("GatherElements", source, index, axis=a[0], shape=out[0].shape)


def scatter(x, a, out):
    """Updates [indices..., window...], put where the indices say that each window starts."""
    code, axes = a
    source, starts, updates = x[0], x[1:-1], cast(x[-1], x[0].dtype)
    rank = len(source.shape)
    lead = len(updates.shape) - rank
    rest = [k for k in range(rank) if k not in axes]
    order = [*axes, *rest]
    moved = transpose(source, order)
    updates = transpose(updates, [*range(lead), *(lead + k for k in order)])
    steps = updates.shape[lead : lead + len(axes)]
    where = [_with_steps(h, k, steps) for k, h in enumerate(starts)]
    places = _stacked(where, updates.shape[: lead + len(axes)])
    how = SCATTER[UPDATES[code]] if code < len(UPDATES) else "none"
    result = emit("ScatterND", moved, places, updates, shape=moved.shape, reduction=how)
    return transpose(result, [order.index(k) for k in range(rank)])


def _with_steps(start: Handle, k: int, steps) -> Handle:
    """The place along the k-th indexed axis of each entry of the windows: [indices..., *steps]."""
    spread = reshape(cast(start, INT64), (*start.shape, *[1] * len(steps)))
    if steps[k] == 1:
        return spread
    if isinstance(steps[k], Size):
        step = emit("Range", number(0), number(steps[k]), number(1), shape=(steps[k],))
        step = reshape(step, (steps[k], *[1] * (len(steps) - k - 1)))
    else:
        step = constant(np.arange(steps[k]).reshape(-1, *[1] * (len(steps) - k - 1)))
    shape = (*start.shape, *(n if j == k else 1 for j, n in enumerate(steps)))
    return emit("Add", spread, step, shape=shape)


def scatter_axis(x, a, out):
    code, axis = a
    source, index, updates = x[0], _index(x[1]), cast(x[2], x[0].dtype)
    if updates.shape != index.shape:
        updates = emit("Expand", updates, ints(index.shape), shape=index.shape)
    how = "add" if code == 0 else "none"
    return emit("ScatterElements", source, index, updates, axis=axis, reduction=how,
                shape=source.shape)  # fmt: skip
