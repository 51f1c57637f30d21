"""The table from ATen operator to MLX; here are reductions, shapes and indexing.

`ATEN` maps an operator's name, with its overload where overloads differ (`max.dim`), to a rule that
takes the operator's own arguments: arrays for tensors, plain numbers for scalars and sizes, MLX
dtypes. A rule returns an array, or a list where the operator has several outputs. What it need not
care about: the result's dtype is brought to torch's afterwards, and arguments that only say where a
tensor lies (device, layout, memory format) are left out.
"""

from collections.abc import Sequence

import mlx.core as mx

from .aten_entries import ELEMENTWISE, power
from .aten_layers import LAYERS

INFINITY = float("inf")


def _axes(x: mx.array, dim) -> list[int]:
    """The axes that `dim` names: one, several, or all for None and the empty list."""
    dims = [dim] if isinstance(dim, int) else list(dim or range(x.ndim))
    return [d % x.ndim for d in dims] if x.ndim else []


# ---- reductions


def _reduction(function):
    def rule(x, dim=None, keepdim=False, dtype=None):
        axes = _axes(x, dim)
        return function(x, axis=axes, keepdims=keepdim) if axes else x

    return rule


def _variance(x, dim=None, correction=1, keepdim=False):
    ddof = 1 if correction is None else int(correction)
    return mx.var(x, axis=_axes(x, dim), ddof=ddof, keepdims=keepdim)


def _deviation(x, dim=None, correction=1, keepdim=False):
    return mx.sqrt(_variance(x, dim, correction, keepdim))


def _variance_and_mean(x, dim=None, correction=1, keepdim=False):
    mean = mx.mean(x, axis=_axes(x, dim), keepdims=keepdim)
    return [_variance(x, dim, correction, keepdim), mean]


def _norm(x, ord=2, dim=None, keepdim=False, dtype=None):
    axes, size = _axes(x, dim), mx.abs(x)
    if ord == INFINITY:
        return mx.max(size, axis=axes, keepdims=keepdim)
    return power(mx.sum(power(size, ord), axis=axes, keepdims=keepdim), 1 / ord)


def _arg(function):
    def rule(x, dim=None, keepdim=False):
        return function(x.reshape(-1) if dim is None else x, axis=dim or 0, keepdims=keepdim)

    return rule


def _extreme(value, place):
    def rule(x, dim, keepdim=False):
        return [value(x, axis=dim, keepdims=keepdim), place(x, axis=dim, keepdims=keepdim)]

    return rule


def _log_sum_exp(x, dim, keepdim=False):
    return mx.logsumexp(x, axis=_axes(x, dim), keepdims=keepdim)


def _softmax(x, dim, *_):
    return mx.softmax(x, axis=dim)


def _log_softmax(x, dim, *_):
    return x - mx.logsumexp(x, axis=dim, keepdims=True)


def _sort(x, dim=-1, descending=False, stable=None):
    order = mx.argsort(-x if descending else x, axis=dim)
    return [mx.take_along_axis(x, order, axis=dim), order]


def _top(x, k, dim=-1, largest=True, sorted=True):
    return [_slice(a, dim, 0, k) for a in _sort(x, dim, largest)]


# ---- shapes


def _expand(x, size, implicit=False):
    own = [1] * (len(size) - x.ndim) + list(x.shape)
    return mx.broadcast_to(x, [o if n == -1 else n for n, o in zip(size, own, strict=True)])


def _squeeze(x, dim=None):
    return mx.squeeze(x, axis=[k for k in _axes(x, dim) if x.shape[k] == 1])


def _window(x, dim, start, end, step) -> tuple[slice, ...]:
    # torch writes 2**63 - 1 for the end of an axis.
    where = slice(start, end, step).indices(x.shape[dim])
    return (slice(None),) * (dim % x.ndim) + (slice(*where),)


def _slice(x, dim=0, start=None, end=None, step=1):
    return x[_window(x, dim, start, end, step)]


def _select(x, dim, index):
    return x[(slice(None),) * (dim % x.ndim) + (index,)]


def _split_sizes(x, sizes, dim=0):
    ends = [sum(sizes[: k + 1]) for k in range(len(sizes) - 1)]
    return list(mx.split(x, ends, axis=dim))


def _split(x, size, dim=0):
    n = x.shape[dim]
    return _split_sizes(x, [min(size, n - k) for k in range(0, n, size)], dim)


def _unbind(x, dim=0):
    return [_select(x, dim, k) for k in range(x.shape[dim])]


def _concatenate(arrays, dim=0):
    # torch lets an empty vector stand among arrays of any rank.
    return mx.concatenate([a for a in arrays if a.shape != (0,)] or arrays[:1], axis=dim)


def _stack(arrays, dim=0):
    return mx.stack(arrays, axis=dim)


def _flip(x, dims):
    axes = _axes(x, list(dims))
    return x[tuple(slice(None, None, -1 if k in axes else None) for k in range(x.ndim))]


def _roll(x, shifts, dims=()):
    return mx.roll(x, list(shifts), axis=list(dims) or None)


def _flatten(x, start=0, end=-1):
    return mx.flatten(x, start, end)


def _swap(x, first, second):
    return mx.swapaxes(x, first, second)


def pad(x: mx.array, widths: Sequence[int], value: float = 0.0) -> mx.array:
    """torch's padding: pairs (before, after) from the last axis on; negative ones cut off."""
    pairs = [(0, 0)] * x.ndim
    for k in range(len(widths) // 2):
        pairs[-1 - k] = (widths[2 * k], widths[2 * k + 1])
    cuts = tuple(
        slice(max(0, -low), n - max(0, -high))
        for (low, high), n in zip(pairs, x.shape, strict=True)
    )
    x = x[cuts] if any(low < 0 or high < 0 for low, high in pairs) else x
    grown = [(max(0, low), max(0, high)) for low, high in pairs]
    return mx.pad(x, grown, constant_values=value) if any(map(any, grown)) else x


# ---- indexing


def _index(x, indices):
    """`x[indices]`, where None stands for a whole axis."""
    indexed = [k for k, index in enumerate(indices) if index is not None]
    arrays = [indices[k] for k in indexed]
    if len(indexed) == 1:
        return mx.take(x, arrays[0], axis=indexed[0])
    rest = [k for k in range(x.ndim) if k not in indexed]
    taken = mx.transpose(x, [*indexed, *rest])[tuple(mx.broadcast_arrays(*arrays))]
    lead = taken.ndim - len(rest)
    adjacent = indexed == list(range(indexed[0], indexed[-1] + 1))
    before = indexed[0] if adjacent else 0
    places = range(lead, taken.ndim)
    return mx.transpose(taken, [*places[:before], *range(lead), *places[before:]])


def _index_put(x, indices, values, accumulate=False):
    masks = [k for k, i in enumerate(indices) if i is not None and i.dtype == mx.bool_]
    if masks and values.size == 1 and len(masks) == sum(i is not None for i in indices) == 1:
        mask = indices[masks[0]]
        mask = mx.reshape(mask, (*mask.shape, *[1] * (x.ndim - masks[0] - mask.ndim)))
        return mx.where(mask, x + values if accumulate else values, x)
    whole = tuple(slice(None) if i is None else i for i in indices)
    if accumulate:
        return x.at[whole].add(values)
    updated = mx.array(x)
    updated[whole] = values
    return updated


def _index_select(x, dim, index):
    return mx.take(x, index, axis=dim)


def _gather(x, dim, index, sparse_grad=False):
    window = tuple(
        slice(None) if k == dim % x.ndim else slice(n) for k, n in enumerate(index.shape)
    )
    return mx.take_along_axis(x[window], index, axis=dim)


def _scatter(x, dim, index, source):
    source = source if isinstance(source, mx.array) else mx.array(source, x.dtype)
    source = mx.broadcast_to(source, index.shape) if source.ndim == 0 else source
    return mx.put_along_axis(x, index, source.astype(x.dtype), axis=dim)


def _slice_scatter(x, source, dim=0, start=None, end=None, step=1):
    updated = mx.array(x)
    updated[_window(x, dim, start, end, step)] = source
    return updated


def _select_scatter(x, source, dim, index):
    updated = mx.array(x)
    updated[(slice(None),) * (dim % x.ndim) + (index,)] = source
    return updated


def _embedding(weight, index, *_):
    return mx.take(weight, index, axis=0)


# ---- makers


def _full(size, value, dtype=None):
    return mx.full(size, value, dtype=dtype)


def _full_like(x, value, dtype=None):
    return mx.full(x.shape, value, dtype=dtype or x.dtype)


def _constant(value):
    def rule(size, dtype=None):
        return mx.full(size, value, dtype=dtype or mx.float32)

    return rule


def _constant_like(value):
    def rule(x, size=None, dtype=None):
        return mx.full(x.shape if size is None else size, value, dtype=dtype or x.dtype)

    return rule


def _arange(*bounds, dtype=None):
    return mx.arange(*bounds, dtype=dtype)


ATEN = {
    **ELEMENTWISE,
    **LAYERS,
    "sum": _reduction(mx.sum), "mean": _reduction(mx.mean), "amax": _reduction(mx.max),
    "amin": _reduction(mx.min), "prod": _reduction(mx.prod), "any": _reduction(mx.any),
    "all": _reduction(mx.all), "max": _reduction(mx.max), "min": _reduction(mx.min),
    "max.dim": _extreme(mx.max, mx.argmax), "min.dim": _extreme(mx.min, mx.argmin),
    "max.other": mx.maximum, "min.other": mx.minimum, "argmax": _arg(mx.argmax),
    "argmin": _arg(mx.argmin), "var": _variance, "std": _deviation, "var_mean": _variance_and_mean,
    "linalg_vector_norm": _norm, "logsumexp": _log_sum_exp, "_softmax": _softmax,
    "softmax": _softmax, "_log_softmax": _log_softmax, "log_softmax": _log_softmax,
    "cumsum": lambda x, dim, dtype=None: mx.cumsum(x, axis=dim),
    "cumprod": lambda x, dim, dtype=None: mx.cumprod(x, axis=dim),
    "sort": _sort, "sort.stable": lambda x, stable=None, dim=-1, descending=False: _sort(
        x, dim, descending
    ), "argsort": lambda x, dim=-1, descending=False: _sort(x, dim, descending)[1], "topk": _top,
    "mm": mx.matmul, "bmm": mx.matmul, "matmul": mx.matmul, "mv": mx.matmul, "dot": mx.matmul,
    **dict.fromkeys(("view", "reshape", "_unsafe_view"), mx.reshape),
    "view.dtype": lambda x, dtype: x.view(dtype), "permute": mx.transpose, "transpose": _swap,
    "as_strided": mx.as_strided, **dict.fromkeys(("t", "numpy_T"), lambda x: x.T),
    "mT": lambda x: mx.swapaxes(x, -1, -2), "expand_as": lambda x, y: mx.broadcast_to(x, y.shape),
    "chunk": lambda x, count, dim=0: _split(x, -(-x.shape[dim] // count), dim),
    "expand": _expand,
    "squeeze": _squeeze, "unsqueeze": mx.expand_dims,
    "slice": _slice, "select": _select, "split": _split, "split_with_sizes": _split_sizes,
    "split_with_sizes_copy": _split_sizes, "unbind": _unbind, "cat": _concatenate, "stack": _stack,
    "flip": _flip, "roll": _roll, "repeat": lambda x, repeats: mx.tile(x, repeats),
    "flatten": _flatten, "constant_pad_nd": pad, "tril": mx.tril, "triu": mx.triu,
    "index": _index, "_unsafe_index": _index, "index_put": _index_put, "gather": _gather,
    "_unsafe_index_put": _index_put, "index_select": _index_select, "scatter": _scatter,
    "slice_scatter": _slice_scatter, "select_scatter": _select_scatter, "embedding": _embedding,
    "full": _full, "full_like": _full_like, "zeros": _constant(0), "ones": _constant(1),
    "empty": _constant(0), "zeros_like": _constant_like(0), "ones_like": _constant_like(1),
    "empty_like": _constant_like(0), "new_zeros": _constant_like(0), "new_ones": _constant_like(1),
    "new_empty": _constant_like(0),
    "new_full": lambda x, size, value, dtype=None: _full(size, value, dtype or x.dtype),
    "eye": lambda n, m=None, dtype=None: mx.eye(n, m, dtype=dtype or mx.float32),
    "scalar_tensor": lambda value, dtype=None: mx.array(value, dtype), "arange": _arange,
    "sym_size": lambda x, dim: x.shape[dim], "sym_numel": lambda x: x.size,
}  # fmt: skip
