"""The table from primitive to MIL operations: what `execute.OPS` says in `mx`, said to Core ML.

A rule takes x, the input vars; a, the attributes, in which a size may be open; and out, the
`Value`s of the outputs. Types are those of `values.py`.
"""

import numpy as np

from ...errors import InputError
from ...simplify import broadcast_shape
from .composites import COMPOSITES
from .convolution import convolution
from .moves import (
    arange,
    broadcast,
    concatenate,
    expand_dims,
    gather,
    gather_axis,
    pad,
    scatter,
    scatter_axis,
    size,
    slice_,
    slice_update,
    split,
    squeeze,
    to_shape,
    transpose,
)
from .quiet import mb
from .scope import shape_of
from .values import NUMPY, alike, cast, constant, ints, is_float, kind, type_of


def _unary(name: str):
    return lambda x, a, out: getattr(mb, name)(x=ints(x[0]))


def _binary(name: str):
    """Numbers of one type; MIL computes no bools."""

    def rule(x, a, out):
        left, right = map(ints, alike(x))
        result = getattr(mb, name)(x=left, y=right)
        return cast(result, "bool") if kind(out[0].dtype) == "bool" else result

    return rule


def _maximum(x, a, out):
    """With zero it is Core ML's relu, which it fuses."""
    for var, other in (x, x[::-1]):
        zero = other.val is not None and other.rank <= 1 and not np.any(other.val)
        if zero and is_float(var) and var.rank >= 1:
            return mb.relu(x=var)
    return _binary("maximum")(x, a, out)


def _logical(name: str):
    return lambda x, a, out: getattr(mb, name)(x=cast(x[0], "bool"), y=cast(x[1], "bool"))


def _full_precision(function):
    """In fp32 within, whatever it takes and gives."""

    def rule(x, a, out):
        result = function([cast(var, "fp32") if is_float(var) else var for var in x], a, out)
        return cast(result, type_of(x[0]))

    return rule


REDUCTIONS = ("reduce_min", "reduce_max", "reduce_sum", "reduce_prod", "reduce_min", "reduce_max")


def _reduce(x, a, out):
    code, axes = a
    if not axes:
        return x[0]
    var = ints(cast(x[0], "bool") if code < 2 else x[0])
    reduced = getattr(mb, REDUCTIONS[code])(x=var, axes=list(axes), keep_dims=True)
    return cast(reduced, kind(out[0].dtype)) if not is_float(reduced) else reduced


def _arg_reduce(x, a, out):
    code, axis = a
    function = (mb.reduce_argmin, mb.reduce_argmax)[code]
    return function(x=x[0], axis=axis, keep_dims=True)


def _scan(x, a, out):
    code, axis, reverse, inclusive = a
    if code != 2:
        raise InputError("of the scans, only the sum has a rule in Core ML.")
    return mb.cumsum(x=ints(x[0]), axis=axis, reverse=reverse, exclusive=not inclusive)


def _arg_sort(x, a, out):
    """Whole sorts stand for partitions, whose order is free."""
    return mb.argsort(x=x[0], axis=a[-1], ascending=True)


def _sort(x, a, out):
    return mb.gather_along_axis(x=x[0], indices=_arg_sort(x, a, out), axis=a[-1])


def _as_type(x, a, out):
    name = kind(out[0].dtype)
    return x[0] if name == "fp32" and is_float(x[0]) else cast(x[0], name)


def _bitwise(x, a, out):
    names = ("logical_and", "logical_or", "logical_xor")
    if kind(out[0].dtype) != "bool" or a[0] >= len(names):
        raise InputError("BitwiseBinary of integers has no rule in Core ML.")
    return getattr(mb, names[a[0]])(x=x[0], y=x[1])


def _equal(x, a, out):
    left, right = map(ints, alike(x))
    equal = mb.equal(x=left, y=right)
    if not a[0]:
        return equal
    nans = mb.logical_and(x=mb.not_equal(x=left, y=left), y=mb.not_equal(x=right, y=right))
    return mb.logical_or(x=equal, y=nans)


def _select(x, a, out):
    """MIL takes the shape of the two that are chosen from, so one of them must have it."""
    first, second = alike(x[1:])
    condition = cast(x[0], "bool")
    if broadcast_shape([shape_of(v) for v in x[1:]]) != out[0].shape:
        zeros = _scaled(cast(condition, type_of(ints(first))), 0)
        first = cast(mb.add(x=ints(first), y=zeros), type_of(first))
    return mb.select(cond=condition, a=first, b=second)


def _matmul(x, a, out):
    left, right = alike(x)
    return mb.matmul(x=left, y=right)


def _add_mm(x, a, out):
    alpha, beta = a
    product = _scaled(_matmul(x[:2], (), out), alpha)
    return mb.add(**dict(zip("xy", alike([product, _scaled(x[2], beta)]), strict=True)))


def _scaled(var, factor: float):
    return var if factor == 1 else mb.mul(x=var, y=NUMPY[type_of(var)](factor))


def _log(x, a, out):
    return _scaled(mb.log(x=x[0]), (1 / np.log(2), 1 / np.log(10), 1)[a[0]])


def _log_add_exp(x, a, out):
    left, right = alike(x)
    apart = mb.abs(x=mb.sub(x=left, y=right))
    return mb.add(x=mb.maximum(x=left, y=right), y=mb.softplus(x=_scaled(apart, -1)))


def _sqrt(x, a, out):
    return mb.rsqrt(x=x[0]) if a[0] else mb.sqrt(x=x[0])


def _softmax(x, a, out):
    return mb.softmax(x=x[0], axis=-1)


def _sinh_inverse(x, a, out):
    root = mb.sqrt(x=_plus(mb.square(x=x[0]), 1))
    return mb.mul(x=mb.sign(x=x[0]), y=mb.log(x=mb.add(x=mb.abs(x=x[0]), y=root)))


def _cosh_inverse(x, a, out):
    return mb.log(x=mb.add(x=x[0], y=mb.sqrt(x=_plus(mb.square(x=x[0]), -1))))


def _plus(var, term: float):
    return mb.add(x=var, y=NUMPY[type_of(var)](term))


def _hadamard(x, a, out):
    """As a matrix of plus and minus one, doubled until it is as wide as the last axis."""
    width = out[0].shape[-1]
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < width:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    if len(matrix) != width:
        raise InputError(f"Hadamard of width {width}, no power of two, has no rule in Core ML.")
    return mb.matmul(x=x[0], y=constant(matrix * a[0], type_of(x[0])))


def _gather_mm(x, a, out):
    """The matrices that the indices pick, multiplied pair by pair."""
    left, right = alike(x[:2])
    return mb.matmul(x=_picked(left, x[2]), y=_picked(right, x[3]))


def _gather_linear(x, a, out):
    """The same with matrices [out, in]."""
    left, right = alike(x[:2])
    return mb.matmul(x=_picked(left, x[2]), y=_picked(right, x[3]), transpose_y=True)


def _picked(matrices, indices):
    if matrices.rank != 3:
        matrices = mb.reshape(x=matrices, shape=[-1, *matrices.shape[-2:]])
    return mb.gather(x=matrices, indices=cast(indices, "int32"), axis=0)


def _unary_of(*names: str) -> dict:
    return {name: _unary(name.lower()) for name in names}


OPS = {
    **_unary_of("Abs", "Ceil", "Cos", "Cosh", "Erf", "Exp", "Floor", "Round", "Sigmoid", "Sign",
                "Sin", "Sinh", "Square", "Tan", "Tanh"),
    **{name: _unary(mil) for name, mil in {
        "ArcCos": "acos", "ArcSin": "asin", "ArcTan": "atan", "ArcTanh": "atanh",
    }.items()},
    **{name: _binary(mil) for name, mil in {
        "Add": "add", "Divide": "real_div", "FloorDivide": "floor_div", "Greater": "greater",
        "GreaterEqual": "greater_equal", "Less": "less", "LessEqual": "less_equal",
        "Minimum": "minimum", "Multiply": "mul", "NotEqual": "not_equal",
        "Power": "pow", "Remainder": "mod", "Subtract": "sub",
    }.items()},
    **{name: _logical(mil) for name, mil in {
        "LogicalAnd": "logical_and", "LogicalOr": "logical_or",
    }.items()},
    **dict.fromkeys(("Contiguous", "Copy", "StopGradient"), lambda x, a, out: x[0]),
    **dict.fromkeys(("Flatten", "Reshape", "Unflatten"), to_shape),
    "AddMM": _add_mm,
    "Arange": arange,
    "ArcCosh": _cosh_inverse,
    "ArcSinh": _sinh_inverse,
    "ArgPartition": _arg_sort,
    "ArgReduce": _arg_reduce,
    "ArgSort": _arg_sort,
    "AsType": _as_type,
    "BitwiseBinary": _bitwise,
    "Broadcast": broadcast,
    "Concatenate": concatenate,
    "Convolution": convolution,
    "Depends": lambda x, a, out: list(x[: len(out)]),
    "DivMod": lambda x, a, out: [_binary("floor_div")(x, a, out), _binary("mod")(x, a, out)],
    "Embedding": lambda x, a, out: mb.gather(x=x[0], indices=cast(x[1], "int32"), axis=0),
    "Equal": _equal,
    "ExpandDims": expand_dims,
    "Expm1": lambda x, a, out: _plus(mb.exp(x=x[0]), -1),
    "Full": broadcast,
    "Gather": gather,
    "GatherAxis": gather_axis,
    "GatherLinear": _gather_linear,
    "GatherMM": _gather_mm,
    "Hadamard": _hadamard,
    "Log": _log,
    "Log1p": lambda x, a, out: mb.log(x=_plus(x[0], 1)),
    "LogAddExp": _log_add_exp,
    "LogSumExp": _full_precision(
        lambda x, a, out: mb.reduce_log_sum_exp(x=x[0], axes=[-1], keep_dims=True)
    ),
    "LogicalNot": lambda x, a, out: mb.logical_not(x=cast(x[0], "bool")),
    "Matmul": _matmul,
    "Maximum": _maximum,
    "Negative": lambda x, a, out: _scaled(x[0], -1),
    "Pad": pad,
    "Partition": _sort,
    "Reduce": _reduce,
    "Scan": _scan,
    "Scatter": scatter,
    "ScatterAxis": scatter_axis,
    "Select": _select,
    "Size": size,
    "Slice": slice_,
    "SliceUpdate": slice_update,
    "Softmax": lambda x, a, out: (_full_precision(_softmax) if a[0] else _softmax)(x, a, out),
    "Sort": _sort,
    "Split": split,
    "Sqrt": _sqrt,
    "Squeeze": squeeze,
    "Transpose": transpose,
    **COMPOSITES,
}  # fmt: skip
