"""Composites of `patterns.py` as Core ML's own operations."""

import math

import numpy as np

from ...sizes import Size
from .moves import reshape
from .quiet import mb
from .scope import IOS18, once, scalar, scope, shape_of, times
from .values import NUMPY, alike, cast, type_of


def _rms_norm(x, a, out):
    """The mean of squares in fp32: in fp16 it overflows from 256 on."""
    wide = cast(x[0], "fp32")
    mean = mb.reduce_mean(x=mb.mul(x=wide, y=wide), axes=[-1], keep_dims=True)
    normed = mb.mul(x=wide, y=mb.rsqrt(x=mb.add(x=mean, y=NUMPY["fp32"](a[0]))))
    normed = cast(normed, type_of(x[0]))
    return normed if len(x) == 1 else _times(normed, x[1])


def _times(left, right):
    left, right = alike([left, right])
    return mb.mul(x=left, y=right)


def _plus(left, right):
    left, right = alike([left, right])
    return mb.add(x=left, y=right)


def _layer_norm(x, a, out):
    weights = [cast(var, type_of(x[0])) for var in x[1:]]
    if any(var.val is None for var in weights):
        normed = _layer_norm(x[:1], a, out)
        normed = _times(normed, weights[0])
        return _plus(normed, weights[1]) if weights[1:] else normed
    named = dict(zip(("gamma", "beta"), weights, strict=False))
    return mb.layer_norm(x=x[0], axes=[-1], epsilon=NUMPY[type_of(x[0])](a[0]), **named)


def _linear(x, a, out):
    """MIL's linear takes constant weights, and arrays of up to three axes."""
    array, weight, *bias = alike(x)
    held = [weight, *bias]
    if array.rank <= 3 and all(var.val is not None or _is_constexpr(var) for var in held):
        return mb.linear(x=array, weight=weight, bias=bias[0] if bias else None)
    product = mb.matmul(x=array, y=weight, transpose_y=True)
    return _plus(product, bias[0]) if bias else product


def _is_constexpr(var) -> bool:
    return var.op is not None and var.op.op_type.startswith("constexpr_")


def _rope(x, a, out):
    array, cos, sin = x
    dims, traditional = a
    cos, sin = cast(cos, type_of(array)), cast(sin, type_of(array))
    width = out[0].shape[-1]
    turned = array if dims == width else _columns(array, 0, dims)
    if traditional:
        turned = _turn_pairs(turned, cos, sin, (*out[0].shape[:-1], dims))
    else:
        turned = _turn_halves(turned, cos, sin, dims)
    if dims == width:
        return turned
    return mb.concat(values=[turned, _columns(array, dims, width)], axis=-1)


def _columns(array, first: int, last: int, step: int = 1):
    rank = array.rank
    return mb.slice_by_index(
        x=array,
        begin=[0] * (rank - 1) + [first],
        end=[0] * (rank - 1) + [last],
        stride=[1] * (rank - 1) + [step],
        begin_mask=[True] * (rank - 1) + [False],
        end_mask=[True] * (rank - 1) + [False],
    )


def _turn_halves(array, cos, sin, dims: int):
    first, second = _columns(array, 0, dims // 2), _columns(array, dims // 2, dims)
    other = mb.concat(values=[mb.mul(x=second, y=NUMPY[type_of(array)](-1)), first], axis=-1)
    return mb.add(x=mb.mul(x=array, y=_twice(cos)), y=mb.mul(x=other, y=_twice(sin)))


def _twice(var):
    return once(("twice", var.name), lambda: mb.concat(values=[var, var], axis=var.rank - 1))


def _turn_pairs(array, cos, sin, shape):
    first, second = _columns(array, 0, shape[-1], 2), _columns(array, 1, shape[-1], 2)
    parts = [
        mb.sub(x=mb.mul(x=first, y=cos), y=mb.mul(x=second, y=sin)),
        mb.add(x=mb.mul(x=first, y=sin), y=mb.mul(x=second, y=cos)),
    ]
    return reshape(mb.stack(values=parts, axis=-1), shape)


def _attention(x, a, out):
    """Query heads that share a key head are stacked as more queries, so keys are never repeated."""
    scale, causal = a
    batch, heads, length, _ = out[0].shape
    keys = shape_of(x[1])
    groups = heads // keys[1]
    mask = x[3] if len(x) > 3 else _causal_mask(length, keys[2]) if causal else None
    query, key, value = alike(x[:3])
    if groups > 1:
        stacked = (batch, keys[1], times(length, groups))
        query = reshape(query, (*stacked, query.shape[-1]))
        mask = None if mask is None else _for_groups(mask, groups, stacked)
    attended = _attend(query, key, value, mask, scale)
    return reshape(attended, out[0].shape) if groups > 1 else attended


def _for_groups(mask, groups: int, stacked):
    """The mask [..., L, T] repeated for the stacked queries [..., groups * L, T]."""
    if mask.rank > 2 and mask.shape[-3] == stacked[1] * groups:
        return reshape(mask, (shape_of(mask)[0], *stacked[1:], shape_of(mask)[-1]))
    if mask.rank < 2 or mask.shape[-2] == 1:
        return mask
    return once(
        ("groups", mask.name, groups), lambda: mb.concat(values=[mask] * groups, axis=mask.rank - 2)
    )


def _causal_mask(length, keys):
    """True [L, T] where a query sees a key; None where there is but one query."""
    return None if length == 1 else once(("causal", length, keys), lambda: _seen(length, keys))


def _seen(length, keys):
    if not isinstance(length, Size) and not isinstance(keys, Size):
        return mb.const(val=np.tri(length, keys, keys - length, dtype=bool))
    columns = mb.range_1d(start=0, end=scalar(keys), step=1)
    rows = mb.range_1d(start=0, end=scalar(length), step=1)
    past = mb.sub(x=scalar(keys), y=scalar(length))
    rows = mb.expand_dims(x=mb.add(x=rows, y=past), axes=[1])
    return mb.greater_equal(x=rows, y=mb.expand_dims(x=columns, axes=[0]))


def _attend(query, key, value, mask, scale: float):
    width = query.shape[-1]
    name = type_of(query)
    if mask is not None and type_of(mask) != "bool":
        mask = cast(mask, name)
    if scope().target < IOS18:
        return _attend_by_parts(_scaled(query, scale), key, value, mask)
    query = _scaled(query, scale * math.sqrt(width))
    return mb.scaled_dot_product_attention(query=query, key=key, value=value, attn_mask=mask)


def _scaled(var, factor: float):
    """Times a factor, unless that is one but for rounding."""
    if math.isclose(factor, 1, rel_tol=1e-6):
        return var
    return mb.mul(x=var, y=NUMPY[type_of(var)](factor))


def _attend_by_parts(query, key, value, mask):
    scores = mb.matmul(x=query, y=key, transpose_y=True)
    if mask is not None and type_of(mask) == "bool":
        hidden = NUMPY[type_of(scores)](np.finfo(NUMPY[type_of(scores)]).min)
        scores = mb.select(cond=mask, a=scores, b=hidden)
    elif mask is not None:
        scores = mb.add(x=scores, y=mask)
    return mb.matmul(x=mb.softmax(x=scores, axis=-1), y=value)


GELU = {"none": "EXACT", "tanh": "TANH_APPROXIMATION"}
COMPOSITES = {
    "Attention": _attention,
    "GELU": lambda x, a, out: mb.gelu(x=x[0], mode=GELU[a[0]]),
    "LayerNorm": _layer_norm,
    "Linear": _linear,
    "RMSNorm": _rms_norm,
    "RoPE": _rope,
    "SiLU": lambda x, a, out: mb.silu(x=x[0]),
}
