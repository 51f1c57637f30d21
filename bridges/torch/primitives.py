"""The table from primitive to torch operation, of the same form as `execute.OPS`.

A rule takes x, the input tensors; a, the attributes; and out, the `Value`s of the outputs, whose
sizes may be symbolic numbers of torch.export: a rule compares none of them. The result's dtype is
set afterwards. Composites of `patterns.py` become torch's own layers.
"""

import math
from collections.abc import Callable

import mlx.core as mx
import torch
import torch.nn.functional as F

from ...errors import InputError
from ...execute import window
from .arrays import TO_TORCH
from .quantised import gather_qmm, quantized_matmul, wrapped

# ---- shapes


def _to_shape(x, a, out):
    return x[0].reshape(out[0].shape)


def _expand(x, a, out):
    return x[0].expand(out[0].shape)


def _windows(tensor, start, end, stride):
    """The slices of each axis with positive steps, and the axes that run backwards."""
    cuts, backwards = [], []
    for k, (first, last, step) in enumerate(zip(start, end, stride, strict=True)):
        if step > 0:
            cuts.append(slice(first, last, step))
            continue
        positions = range(tensor.shape[k])[window(tensor.shape[k], first, last, step)]
        low, high = (positions[-1], positions[0] + 1) if len(positions) else (0, 0)
        cuts.append(slice(low, high, -step))
        backwards.append(k)
    return tuple(cuts), backwards


def _slice(x, a, out):
    cuts, backwards = _windows(x[0], *a)
    part = x[0][cuts]
    return part.flip(backwards) if backwards else part


UPDATES = (torch.maximum, torch.minimum, torch.add, torch.mul)


def _slice_update(x, a, out):
    code, *where = a
    cuts, backwards = _windows(x[0], *where)
    update = x[1].flip(backwards) if backwards else x[1]
    updated = x[0].clone()
    updated[cuts] = UPDATES[code](updated[cuts], update) if code < len(UPDATES) else update
    return updated


def _pad(x, a, out):
    """The value is the last attribute where it is known beforehand (`module`)."""
    axes, low, high, *value = a
    widths = [0] * (2 * x[0].ndim)
    for axis, before, after in zip(axes, low, high, strict=True):
        widths[-2 * axis - 2 : len(widths) - 2 * axis] = [before, after]
    if value:
        return F.pad(x[0], widths, value=value[0])
    inside = F.pad(torch.ones_like(x[0], dtype=torch.bool), widths, value=False)
    return torch.where(inside, F.pad(x[0], widths), x[1])


def _view(x, a, out):
    """Reinterpret the bits. A carrier is narrowed to the width that the sizes tell."""
    target = TO_TORCH[a[0]]
    if x[0].shape[-1:] and x[0].dtype in NARROW:
        width = target.itemsize * out[0].shape[-1] // x[0].shape[-1]
        x = [x[0].to(NARROW[x[0].dtype])] if width < x[0].dtype.itemsize else x
    return x[0].contiguous().view(target)


NARROW = {torch.int64: torch.int32, torch.int32: torch.int16}

# ---- indexing


def _gather(x, a, out):
    axes, sizes = a
    source, indices = x[0], [i.long() for i in x[1:]]
    rest = [k for k in range(source.ndim) if k not in axes]
    for k in range(source.ndim):
        partial = sizes[k] != 1 if k in axes else _differ(sizes[k], source.shape[k])
        if partial:
            raise InputError(f"Gather of partial slices {sizes} has no rule.")
    moved = source.permute([*axes, *rest])
    return moved[tuple(torch.broadcast_tensors(*indices))].reshape(out[0].shape)


def _differ(size, other) -> bool:
    return isinstance(size, int) and isinstance(other, int) and size != other


def _spread_over(shape, tensor, axis: int):
    """The tensor broadcast to `shape` in all axes but one."""
    wanted = [-1 if k == axis else n for k, n in enumerate(shape)]
    return tensor.expand(wanted)


def _gather_axis(x, a, out):
    index = wrapped(x[1], x[0].shape[a[0]])
    shape = [n if k != a[0] else -1 for k, n in enumerate(out[0].shape)]
    source = x[0].expand([-1 if k == a[0] else n for k, n in enumerate(shape)])
    return torch.gather(source, a[0], index.expand(shape))


def _scatter_axis(x, a, out):
    code, axis = a
    index = _spread_over(x[0].shape, wrapped(x[1], x[0].shape[axis]), axis)
    updates = x[2].to(x[0].dtype).expand(index.shape)
    if code == 0:
        return x[0].scatter_add(axis, index, updates)
    return x[0].scatter(axis, index, updates)


def _scatter(x, a, out):
    """Updates [indices..., window...], put where the indices say that each window starts."""
    code, axes = a
    source, starts, updates = x[0], [s.long() for s in x[1:-1]], x[-1]
    lead, order = updates.ndim - source.ndim, [*axes]
    order += [k for k in range(source.ndim) if k not in axes]
    updates = updates.permute([*range(lead), *(lead + k for k in order)])
    spans = [torch.arange(n, device=source.device) for n in updates.shape[lead : lead + len(axes)]]
    steps = torch.meshgrid(*spans, indexing="ij")
    where = [
        start.reshape([*start.shape, *[1] * len(axes)]) + step
        for start, step in zip(starts, steps, strict=True)
    ]
    moved = source.permute(order)
    if code in REDUCED:
        moved = _scatter_reduce(moved, where, updates, REDUCED[code])
    else:
        moved = moved.index_put(where, updates, accumulate=code == 2)
    return moved.permute([order.index(k) for k in range(source.ndim)])


REDUCED = {0: "amax", 1: "amin", 3: "prod"}


def _scatter_reduce(source, where, updates, how: str):
    """Rows of the leading axes are numbered through, so that repeated ones count each time."""
    row, count = torch.zeros((), dtype=torch.long, device=source.device), 1
    for index, n in zip(where, source.shape, strict=False):
        row, count = row * n + wrapped(index, n), count * n
    row = row.reshape(-1, 1)
    rows, updates = source.reshape(count, -1), updates.reshape(row.shape[0], -1)
    return rows.scatter_reduce(0, row.expand(updates.shape), updates, how).reshape(source.shape)


def _gather_mm(x, a, out):
    left, right, lefts, rights = x
    left = left.reshape([-1, *left.shape[-2:]])[lefts.long()]
    return left @ right.reshape([-1, *right.shape[-2:]])[rights.long()]


# ---- reductions and orders


def _product(x, dim, keepdim):
    for axis in dim:
        x = x.prod(dim=axis, keepdim=keepdim)
    return x


REDUCTIONS = (torch.all, torch.any, torch.sum, _product, torch.amin, torch.amax)


def _reduce(x, a, out):
    code, axes = a
    return REDUCTIONS[code](x[0], dim=list(axes), keepdim=True) if axes else x[0]


SCANS = (
    lambda x, axis: torch.cummax(x, axis).values,
    lambda x, axis: torch.cummin(x, axis).values,
    torch.cumsum,
    torch.cumprod,
)
BLANKS = (-math.inf, math.inf, 0, 1)


def _scan(x, a, out):
    code, axis, reverse, inclusive = a
    y = SCANS[code](x[0].flip([axis]) if reverse else x[0], axis)
    if not inclusive:
        first = torch.full_like(y.narrow(axis, 0, 1), BLANKS[code])
        y = torch.cat([first, y.narrow(axis, 0, y.shape[axis] - 1)], dim=axis)
    return y.flip([axis]) if reverse else y


def _arg_reduce(x, a, out):
    code, axis = a
    return (torch.argmin, torch.argmax)[code](x[0], dim=axis, keepdim=True)


def _sort(x, a, out):
    return torch.sort(x[0], dim=a[-1], stable=True).values


def _arg_sort(x, a, out):
    return torch.argsort(x[0], dim=a[-1], stable=True)


def _hadamard(x, a, out):
    n, y = x[0].shape[-1], x[0]
    if n & (n - 1):
        raise InputError(f"Hadamard of {n} entries has no rule: it must be a power of two.")
    for step in range(n.bit_length() - 1):
        first, second = y.unflatten(-1, (-1, 2, 1 << step)).unbind(-2)
        y = torch.stack([first + second, first - second], dim=-2).flatten(-3)
    return y * a[0]


# ---- makers


def _arange(x, a, out):
    """Whole numbers stay whole: torch would round the end of a float range."""
    start, _, step = (int(n) if isinstance(n, float) and n.is_integer() else n for n in a)
    return torch.arange(out[0].shape[0]) * step + start


def _size(x, a, out):
    return torch.full((), a[0], dtype=TO_TORCH[out[0].dtype])


# ---- layers


def _convolution(x, a, out):
    """x [N, ..., C] and w [O, ..., C / groups], MLX's order of axes."""
    stride, low, high, kernel_dilation, input_dilation, groups, flip = a
    count = len(stride)
    data, weight = x[0].movedim(-1, 1), x[1].movedim(-1, 1)
    data = _stretched(data, input_dilation)
    widths = [n for pair in zip(reversed(low), reversed(high), strict=True) for n in pair]
    data = F.pad(data, widths) if any(widths) else data
    weight = weight.flip(list(range(2, weight.ndim))) if flip else weight
    convolve = (F.conv1d, F.conv2d, F.conv3d)[count - 1]
    y = convolve(data, weight, stride=stride, dilation=kernel_dilation, groups=groups)
    return y.movedim(1, -1)


def _stretched(data, dilation):
    """Put zeros between the entries of each spatial axis."""
    for k, gap in enumerate(dilation, start=2):
        if gap > 1:
            apart = F.pad(data.unsqueeze(k + 1), [0, 0] * (data.ndim - k - 1) + [0, gap - 1])
            data = apart.flatten(k, k + 1).narrow(k, 0, (data.shape[k] - 1) * gap + 1)
    return data


def _add_product(x, a, out):
    alpha, beta = a
    product = torch.matmul(x[0], x[1])
    product = product if alpha == 1 else alpha * product
    return product + (x[2] if beta == 1 else beta * x[2])


def _equal(x, a, out):
    equal = torch.eq(*x)
    return equal | ((x[0] != x[0]) & (x[1] != x[1])) if a[0] else equal


def _rope(x, a, out):
    tensor, cos, sin = x
    dims, traditional = a
    turned, rest = tensor[..., :dims], tensor[..., dims:]
    cos, sin = cos.to(tensor.dtype), sin.to(tensor.dtype)
    halves = (turned[..., 0::2], turned[..., 1::2]) if traditional else turned.chunk(2, dim=-1)
    first, second = halves
    parts = [first * cos - second * sin, first * sin + second * cos]
    turned = torch.stack(parts, dim=-1).flatten(-2) if traditional else torch.cat(parts, dim=-1)
    return torch.cat([turned, rest], dim=-1)


def _attention(x, a, out):
    scale, causal = a
    q, k, v, *mask = x
    length, total = q.shape[-2], k.shape[-2]
    square = isinstance(length, int) and isinstance(total, int) and length == total
    if causal and not square:
        rows = torch.arange(length, device=q.device).unsqueeze(-1) + (total - length)
        mask = [torch.arange(total, device=q.device) <= rows]
    mask = mask[0] if mask else None
    mask = mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal and square, scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip


def _layer_norm(x, a, out):
    weight, bias = (*x[1:], None, None)[:2]
    return F.layer_norm(x[0], x[0].shape[-1:], weight, bias, a[0])


def _rms_norm(x, a, out):
    return F.rms_norm(x[0], x[0].shape[-1:], *x[1:], eps=a[0])


def _elementwise(function: Callable) -> Callable:
    return lambda x, a, out: function(*x)


BITWISE = (torch.bitwise_and, torch.bitwise_or, torch.bitwise_xor,
           torch.bitwise_left_shift, torch.bitwise_right_shift)  # fmt: skip

ELEMENTWISE = {
    "Abs": torch.abs, "Add": torch.add, "ArcCos": torch.acos, "ArcCosh": torch.acosh,
    "ArcSin": torch.asin, "ArcSinh": torch.asinh, "ArcTan": torch.atan, "ArcTan2": torch.atan2,
    "ArcTanh": torch.atanh, "Ceil": torch.ceil, "Contiguous": lambda x: x, "Copy": lambda x: x,
    "Cos": torch.cos, "Cosh": torch.cosh, "Divide": torch.true_divide, "Erf": torch.erf,
    "ErfInv": torch.erfinv, "Exp": torch.exp, "Expm1": torch.expm1, "Floor": torch.floor,
    "FloorDivide": torch.floor_divide, "Greater": torch.gt, "GreaterEqual": torch.ge,
    "Less": torch.lt, "LessEqual": torch.le, "Log1p": torch.log1p, "LogAddExp": torch.logaddexp,
    "LogicalAnd": torch.logical_and, "LogicalNot": torch.logical_not,
    "LogicalOr": torch.logical_or, "Maximum": torch.maximum, "Minimum": torch.minimum,
    "Multiply": torch.mul, "Negative": torch.neg, "NotEqual": torch.ne, "Power": torch.pow,
    "Remainder": torch.remainder, "Round": torch.round, "Select": torch.where,
    "Sigmoid": torch.sigmoid, "Sign": torch.sign, "SiLU": F.silu, "Sin": torch.sin,
    "Sinh": torch.sinh, "Square": torch.square, "StopGradient": lambda x: x.detach(),
    "Subtract": torch.sub, "Tan": torch.tan, "Tanh": torch.tanh, "Matmul": torch.matmul,
    "Linear": F.linear,
}  # fmt: skip

TORCH = {
    **{name: _elementwise(function) for name, function in ELEMENTWISE.items()},
    **dict.fromkeys(("Reshape", "Flatten", "Unflatten", "ExpandDims", "Squeeze"), _to_shape),
    **dict.fromkeys(("Broadcast", "Full"), _expand),
    **dict.fromkeys(("Sort", "Partition"), _sort),
    **dict.fromkeys(("ArgSort", "ArgPartition"), _arg_sort),
    "AddMM": _add_product,
    "Arange": _arange,
    "ArgReduce": _arg_reduce,
    "AsStrided": lambda x, a, out: x[0].contiguous().as_strided(*a),
    "AsType": lambda x, a, out: x[0],
    "Attention": _attention,
    "BitwiseBinary": lambda x, a, out: BITWISE[a[0]](*x),
    "Concatenate": lambda x, a, out: torch.cat(x, dim=a[0]),
    "Convolution": _convolution,
    "Depends": lambda x, a, out: list(x[: len(out)]),
    "DivMod": lambda x, a, out: [torch.floor_divide(*x), torch.remainder(*x)],
    "Equal": _equal,
    "GELU": lambda x, a, out: F.gelu(x[0], approximate=a[0]),
    "Gather": _gather,
    "GatherAxis": _gather_axis,
    "GatherMM": _gather_mm,
    "GatherQMM": gather_qmm,
    "Hadamard": _hadamard,
    "LayerNorm": _layer_norm,
    "Log": lambda x, a, out: (torch.log2, torch.log10, torch.log)[a[0]](x[0]),
    "LogSumExp": lambda x, a, out: torch.logsumexp(x[0], dim=-1, keepdim=True),
    "Pad": _pad,
    "QuantizedMatmul": quantized_matmul,
    "RMSNorm": _rms_norm,
    "Reduce": _reduce,
    "RoPE": _rope,
    "Scan": _scan,
    "Scatter": _scatter,
    "ScatterAxis": _scatter_axis,
    "Size": _size,
    "Slice": _slice,
    "SliceUpdate": _slice_update,
    "Softmax": lambda x, a, out: torch.softmax(x[0], dim=-1),
    "Split": lambda x, a, out: list(torch.tensor_split(x[0], list(a[0]), dim=a[1])),
    "Sqrt": lambda x, a, out: torch.rsqrt(x[0]) if a[0] else torch.sqrt(x[0]),
    "Transpose": lambda x, a, out: x[0].permute(a[0]),
    "View": _view,
}


def result_dtype(dtype: mx.Dtype) -> torch.dtype:
    """The dtype that torch holds a value in."""
    from .arrays import CARRIERS

    return CARRIERS.get(TO_TORCH[dtype], TO_TORCH[dtype])
