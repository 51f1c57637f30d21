"""The part of the table from ATen to MLX that works entry by entry: arithmetic, activations, casts.

The order of axes is all the same to these rules, so they run on images of either layout.
"""

import math

import mlx.core as mx

from ...errors import InputError


def _add(x, y, alpha=1):
    return x + (y if alpha == 1 else alpha * y)


def _subtract(x, y, alpha=1):
    return x - (y if alpha == 1 else alpha * y)


def _divide(x, y, rounding_mode=None):
    if rounding_mode is None:
        return mx.divide(x, y)
    return mx.floor_divide(x, y) if rounding_mode == "floor" else _truncate(mx.divide(x, y))


def _truncate(x):
    return mx.sign(x) * mx.floor(mx.abs(x))


def power(x, y):
    special = {2: mx.square, 0.5: mx.sqrt, -0.5: mx.rsqrt, 1: lambda x: x, -1: mx.reciprocal}
    return special[y](x) if isinstance(y, int | float) and y in special else mx.power(x, y)


def _not(x):
    return mx.logical_not(x) if x.dtype == mx.bool_ else -x - 1


def _clamp(x, low=None, high=None):
    x = x if low is None else mx.maximum(x, low)
    return x if high is None else mx.minimum(x, high)


def _gelu(x, approximate="none"):
    if approximate == "tanh":
        return 0.5 * x * (1 + mx.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x * (1 + mx.erf(x / math.sqrt(2))) / 2


def _softplus(x, beta=1.0, threshold=20.0):
    return mx.where(x * beta > threshold, x, mx.logaddexp(x * beta, 0.0) / beta)


def _elu(x, alpha=1.0, scale=1.0, input_scale=1.0):
    # The exponential of what is not taken must stay finite.
    below = alpha * mx.expm1(mx.minimum(x, 0) * input_scale)
    return scale * mx.where(x > 0, x, below)


def _hard_sigmoid(x):
    return _clamp(x + 3, 0, 6) / 6


def _leaky_relu(x, slope=0.01):
    return mx.where(x > 0, x, slope * x)


def _mish(x):
    return x * mx.tanh(_softplus(x))


def _masked_fill(x, mask, value):
    return mx.where(mask, value, x)


def _cast(x, *to, dtype=None, **_):
    dtype = next((t for t in to if isinstance(t, mx.Dtype)), dtype)
    return x if dtype is None else x.astype(dtype)


def _same(x, *_, **__):
    return x


def _dropout(x, p=0.0, train=False):
    if train and p:
        raise InputError("aten.dropout in training mode: call eval() before torch.export.")
    return x


UNARY = {
    "abs": mx.abs, "acos": mx.arccos, "acosh": mx.arccosh, "asin": mx.arcsin, "asinh": mx.arcsinh,
    "atan": mx.arctan, "atanh": mx.arctanh, "bitwise_not": _not, "ceil": mx.ceil, "cos": mx.cos,
    "cosh": mx.cosh, "erf": mx.erf, "exp": mx.exp, "expm1": mx.expm1, "floor": mx.floor,
    "isinf": mx.isinf, "isnan": mx.isnan, "log": mx.log, "log10": mx.log10, "log1p": mx.log1p,
    "log2": mx.log2, "logical_not": mx.logical_not, "neg": mx.negative, "reciprocal": mx.reciprocal,
    "round": mx.round, "rsqrt": mx.rsqrt, "sigmoid": mx.sigmoid, "sign": mx.sign, "sin": mx.sin,
    "sinh": mx.sinh, "sqrt": mx.sqrt, "square": mx.square, "tan": mx.tan, "tanh": mx.tanh,
    "trunc": _truncate, "relu": lambda x: mx.maximum(x, 0), "hardsigmoid": _hard_sigmoid,
    "hardswish": lambda x: x * _hard_sigmoid(x), "mish": _mish, "silu": lambda x: x * mx.sigmoid(x),
    "relu6": lambda x: _clamp(x, 0, 6), "log_sigmoid": lambda x: -_softplus(-x),
    "softsign": lambda x: x / (1 + mx.abs(x)),
    "hardtanh": lambda x, low=-1, high=1: _clamp(x, low, high), "elu": _elu, "gelu": _gelu,
    "celu": lambda x, alpha=1.0: _elu(x, alpha, 1.0, 1 / alpha), "leaky_relu": _leaky_relu,
    "selu": lambda x: _elu(x, 1.6732632423543772, 1.0507009873554805), "softplus": _softplus,
    "clamp": _clamp, "clamp_min": _clamp, "clamp_max": lambda x, high: _clamp(x, None, high),
    "_to_copy": _cast, "to": _cast, "type_as": lambda x, y: x.astype(y.dtype),
    "isfinite": mx.isfinite,
    **dict.fromkeys(("alias", "clone", "contiguous", "detach", "detach_"), _same),
    "lift_fresh_copy": _same,
    "dropout": _dropout, "feature_dropout": _dropout,
    "native_dropout": lambda x, p, train: [_dropout(x, p, train)],
}  # fmt: skip

BINARY = {
    "add": _add, "sub": _subtract, "rsub": lambda x, y, alpha=1: _subtract(y, x, alpha),
    "mul": mx.multiply, "div": _divide, "floor_divide": mx.floor_divide, "pow": power,
    "remainder": mx.remainder, "fmod": lambda x, y: x - y * _truncate(mx.divide(x, y)),
    "maximum": mx.maximum, "minimum": mx.minimum, "atan2": mx.arctan2, "logaddexp": mx.logaddexp,
    "eq": mx.equal, "ne": mx.not_equal, "lt": mx.less, "le": mx.less_equal, "gt": mx.greater,
    "ge": mx.greater_equal, "logical_and": mx.logical_and, "logical_or": mx.logical_or,
    "logical_xor": mx.not_equal, "bitwise_and": mx.bitwise_and, "bitwise_or": mx.bitwise_or,
    "bitwise_xor": mx.bitwise_xor, "__and__": mx.bitwise_and, "__or__": mx.bitwise_or,
    "where": mx.where, "masked_fill": _masked_fill,
    "copy": lambda x, y: mx.broadcast_to(y, x.shape), "hypot": lambda x, y: mx.sqrt(x * x + y * y),
}  # fmt: skip

ELEMENTWISE = {**UNARY, **BINARY}
