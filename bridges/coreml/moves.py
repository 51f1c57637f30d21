"""Rules that move data: shapes, slices, gathers, scatters. MIL spellings of `execute.py`'s."""

from collections.abc import Sequence

import numpy as np

from ...errors import InputError
from ...execute import UPDATES
from ...sizes import Size
from .quiet import mb
from .scope import scalar, shape_of, vector
from .values import NUMPY, alike, cast, ints, is_float, kind, type_of


def reshape(var, shape: Sequence):
    """`var` in a shape that may have open sizes; one of them is left to MIL to infer."""
    if var.val is not None and not any(isinstance(n, Size) for n in shape):
        return mb.const(val=np.reshape(var.val, shape))
    if not shape:
        return mb.squeeze(x=var, axes=list(range(var.rank))) if var.rank else var
    if var.rank == 0:
        var = mb.expand_dims(x=var, axes=[0])
    unknown = [k for k, n in enumerate(shape) if isinstance(n, Size)]
    if unknown:
        inferred = max(unknown, key=lambda k: len(shape[k].items))
        shape = [-1 if k == inferred else n for k, n in enumerate(shape)]
    return mb.reshape(x=var, shape=vector(shape))


def to_shape(x, a, out):
    return reshape(x[0], out[0].shape)


def expand_dims(x, a, out):
    var, axes = x[0], list(a[0])
    return to_shape(x, a, out) if var.rank == 0 else mb.expand_dims(x=var, axes=axes)


def squeeze(x, a, out):
    var, axes = x[0], list(a[0])
    if var.val is not None or any(var.shape[k] != 1 for k in axes):
        return to_shape(x, a, out)
    undone = var.op is not None and var.op.op_type == "expand_dims"
    if undone and list(var.op.axes.val) == axes:
        return var.op.x
    return mb.squeeze(x=var, axes=axes)


def transpose(x, a, out):
    if x[0].val is not None:
        return mb.const(val=np.ascontiguousarray(np.transpose(x[0].val, a[0])))
    return mb.transpose(x=x[0], perm=list(a[0]))


def broadcast(x, a, out):
    """The same numbers repeated along new axes and along axes of size 1."""
    var, shape = x[0], out[0].shape
    if var.rank < len(shape):
        lead = len(shape) - var.rank
        var = mb.expand_dims(x=var, axes=[*range(lead)]) if var.rank else reshape(var, [1] * lead)
    repeats = [n if m == 1 and n != 1 else 1 for m, n in zip(var.shape, shape, strict=True)]
    if all(n == 1 for n in repeats):
        return var
    if type_of(var) == "bool":
        return cast(mb.tile(x=ints(var), reps=vector(repeats)), "bool")
    return mb.tile(x=var, reps=vector(repeats))


def concatenate(x, a, out):
    return mb.concat(values=alike(x), axis=a[0])


def split(x, a, out):
    axis = a[1]
    sizes = [value.shape[axis] for value in out]
    if any(isinstance(n, Size) for n in sizes):
        raise InputError("Split along an open size has no rule in Core ML; give it a fixed one.")
    parts = mb.split(x=x[0], split_sizes=sizes, axis=axis)
    return list(parts) if isinstance(parts, list | tuple) else [parts]


def pad(x, a, out):
    axes, low, high = a
    var, fill = x[0], x[1].val
    if fill is None:
        raise InputError("Pad with a computed value has no rule in Core ML.")
    kept = type_of(var)
    var = var if is_float(var) else cast(var, "fp32")
    widths = np.zeros((var.rank, 2), np.int32)
    for axis, *width in zip(axes, low, high, strict=True):
        widths[axis] = width
    name = type_of(var)
    padded = mb.pad(x=var, pad=widths.reshape(-1), mode="constant", constant_val=NUMPY[name](fill))
    return cast(padded, kept)


# ---- windows


def _bounds(var, start, end, stride) -> dict:
    """MLX's slice as MIL's: what lies at an edge is said by a mask."""
    edges = [_edges(*axis) for axis in zip(shape_of(var), start, end, stride, strict=True)]
    begins, ends, begin_mask, end_mask = map(list, zip(*edges, strict=True))
    return {
        "begin": vector(begins), "end": vector(ends), "stride": list(stride),
        "begin_mask": begin_mask, "end_mask": end_mask,
    }  # fmt: skip


def _edges(n, first, last, step) -> tuple:
    """Start and end along an axis of size `n`, and whether each is the axis's own."""
    if isinstance(n, Size) or isinstance(last, Size):
        whole = last == n  # then it is the mask that says so, and the bounds stay numbers
        return first, 0 if whole else last, first == 0 and step > 0, whole
    last = last + n if last < 0 else last
    if step > 0:
        return first, min(last, n), first == 0, last >= n
    return first, max(last, 0), False, last < 0


def slice_(x, a, out):
    return mb.slice_by_index(x=x[0], **_bounds(x[0], *a))


def slice_update(x, a, out):
    code, bounds = a[0], _bounds(x[0], *a[1:])
    whole, update = alike(x)
    if code < len(UPDATES):
        combine = (mb.maximum, mb.minimum, mb.add, mb.mul)[code]
        update = combine(x=mb.slice_by_index(x=whole, **bounds), y=update)
    return mb.slice_update(x=whole, update=update, **bounds)


# ---- gathers and scatters


def gather(x, a, out):
    axes, sizes = a
    source, indices = ints(x[0]), [cast(i, "int32") for i in x[1:]]
    whole = [k for k in range(source.rank) if k not in axes]
    if any(sizes[k] != (1 if k in axes else shape_of(x[0])[k]) for k in range(source.rank)):
        raise InputError(f"Gather of partial slices {tuple(sizes)} has no rule in Core ML.")
    if len(axes) == 1:
        taken = _take(source, indices[0], axes[0])
    else:
        order = [*axes, *whole]
        moved = source if order == sorted(order) else mb.transpose(x=source, perm=order)
        taken = mb.gather_nd(x=moved, indices=mb.stack(values=indices, axis=-1))
    lead = len(out[0].shape) - source.rank
    return mb.expand_dims(x=cast(taken, type_of(x[0])), axes=[lead + k for k in sorted(axes)])


def _take(source, indices, axis: int):
    """Slices [indices..., the other axes]; a scalar index takes one."""
    if axis:
        order = [axis, *(k for k in range(source.rank) if k != axis)]
        source = mb.transpose(x=source, perm=order)
    if indices.rank:
        return mb.gather(x=source, indices=indices, axis=0)
    one = mb.gather(x=source, indices=mb.expand_dims(x=indices, axes=[0]), axis=0)
    return mb.squeeze(x=one, axes=[0])


def gather_axis(x, a, out):
    var, kept = ints(x[0]), type_of(x[0])
    taken = mb.gather_along_axis(x=var, indices=cast(x[1], "int32"), axis=a[0])
    return cast(taken, kept)


def scatter_axis(x, a, out):
    code, axis = a
    source, updates = map(ints, alike([x[0], x[2]]))
    indices, mode = cast(x[1], "int32"), "add" if code == 0 else "update"
    if any(isinstance(n, Size) for n in out[0].shape):
        order = [k for k in range(source.rank) if k != axis % source.rank] + [axis % source.rank]
        moved = (mb.transpose(x=v, perm=order) for v in (source, indices, updates))
        shape = [out[0].shape[k] for k in order]
        changed = reshape(_scatter_rows(*moved, shape_of(x[1])[axis], mode), shape)
        changed = mb.transpose(x=changed, perm=[order.index(k) for k in range(source.rank)])
    else:
        changed = mb.scatter_along_axis(
            data=source, indices=indices, updates=updates, axis=axis, mode=mode
        )
    return cast(changed, type_of(x[0]))


def _scatter_rows(source, indices, updates, picked, mode: str):
    """Along the last axis, in one long row: MIL's scatter along an axis compares open sizes.

    `picked` is the size of the last axis of `indices`.
    """
    rows = mb.reshape(x=indices, shape=vector([-1, picked]))
    count, width = (mb.slice_by_index(x=mb.shape(x=v), begin=[k], end=[k + 1], squeeze_mask=[True])
                    for v, k in ((rows, 0), (source, source.rank - 1)))  # fmt: skip
    starts = mb.mul(x=mb.range_1d(start=0, end=count, step=1), y=width)
    places = mb.add(x=rows, y=mb.expand_dims(x=starts, axes=[1]))
    return mb.scatter_nd(
        data=mb.reshape(x=source, shape=[-1]),
        indices=mb.reshape(x=places, shape=[-1, 1]),
        updates=mb.reshape(x=updates, shape=[-1]),
        mode=mode,
    )


SCATTER_MODES = ("max", "min", "add", "mul", "update")


def scatter(x, a, out):
    """Updates of whole rows, placed by indices into the first axes."""
    code, axes = a
    source, indices, updates = ints(x[0]), x[1:-1], ints(x[-1])
    lead = updates.rank - source.rank
    windows = updates.shape[lead:]
    if list(axes) != [*range(len(axes))] or any(n != 1 for n in windows[: len(axes)]):
        raise InputError(f"Scatter of windows along axes {list(axes)} has no rule in Core ML.")
    rows = mb.squeeze(x=updates, axes=[lead + k for k in range(len(axes))])
    where = mb.stack(values=[cast(i, "int32") for i in indices], axis=-1)
    source, rows = alike([source, rows])
    mode = SCATTER_MODES[min(code, len(UPDATES))]
    changed = mb.scatter_nd(data=source, indices=where, updates=rows, mode=mode)
    return cast(changed, type_of(x[0]))


# ---- made of nothing


def arange(x, a, out):
    start, stop, step = a
    name = kind(out[0].dtype)
    if not any(isinstance(n, Size) for n in a):
        return mb.const(val=np.arange(start, stop, step).astype(NUMPY[name]))
    whole = mb.range_1d(start=_whole(start), end=_whole(stop), step=_whole(step))
    return cast(whole, name)


def _whole(form):
    if not isinstance(form, Size) and form != int(form):
        raise InputError(f"Arange by {form} up to an open size has no rule in Core ML.")
    return scalar(form)


def size(x, a, out):
    form = a[0]
    if not isinstance(form, Size):
        return mb.const(val=NUMPY[kind(out[0].dtype)](form))
    return cast(scalar(form), kind(out[0].dtype))
