"""The table from primitive to ONNX nodes, opset 23. A rule takes x, handles; a, the attributes;
and out, the `Value`s of the outputs, as in `execute.OPS`.

Composites become ONNX's own RMSNormalization, LayerNormalization, RotaryEmbedding, Attention and
Gelu: on ONNX Runtime's CPU none of its own operators is faster than these.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ...errors import InputError
from ...graph import Value
from . import attention, buffers, contractions, indexing, quantized, windows
from .builder import (
    BOOL,
    FLOAT,
    FLOATS,
    HALF,
    INT32,
    INT64,
    Handle,
    cast,
    constant,
    current,
    dynamic_float,
    emit,
)
from .extents import ints, number
from .views import concatenate, lazily, reshape, transpose

COMPARISONS = ("Greater", "Less", "GreaterOrEqual", "LessOrEqual", "Equal")


def same_type(x: Sequence[Handle]) -> list[Handle]:
    """All floats in the type to compute in; the rest as it is."""
    wanted = dynamic_float(x, next((h.dtype for h in x if h.dtype in FLOATS), FLOAT))
    return [cast(h, wanted) if h.dtype in FLOATS else h for h in x]


def _float32(x: Sequence[Handle]) -> list[Handle]:
    """In float32, where half precision would overflow or ONNX Runtime has no kernel."""
    return [cast(h, FLOAT) if h.dtype == HALF else h for h in x]


def _elementwise(op: str, wide: bool = False):
    """A node of the same name; a transposed view with scalars stays one."""

    def rule(x, a, out):
        x = _float32(x) if wide else same_type(x)
        viewed = [h for h in x if h.open_view("transpose")]
        if len(viewed) == 1 and all(h is viewed[0] or _is_scalar(h) for h in x):
            view = viewed[0].view
            inner = [view.parents[0] if h is viewed[0] else h for h in x]
            return transpose(_emit(op, inner, view.parents[0].shape), view.detail)
        return _emit(op, x, out[0].shape)

    return rule


def _emit(op: str, x, shape) -> Handle:
    return emit(op, *x, shape=shape, dtype=BOOL if op in COMPARISONS else None)


def _is_scalar(handle: Handle) -> bool:
    return all(n == 1 for n in handle.shape)


def _unary(*ops: str, wide: bool = False):
    """Several nodes, one after the other."""

    def rule(x, a, out):
        handle = (_float32(x) if wide else same_type(x))[0]
        for op in ops:
            handle = emit(op, handle, shape=out[0].shape)
        return handle

    return rule


def _scalar(value: float, like: Handle) -> Handle:
    return constant(np.array(value), like.dtype)


def _logical(op: str):
    return lambda x, a, out: emit(op, *(cast(h, BOOL) for h in x), shape=out[0].shape)


def _floor_divide(x, a=(), out=None):
    left, right = same_type(x)
    if left.dtype in FLOATS:
        return emit("Floor", emit("Div", left, right))
    return emit("Div", emit("Sub", left, _remainder((left, right))), right)


def _remainder(x, a=(), out=None):
    left, right = same_type(x)
    if left.dtype not in FLOATS:
        return emit("Mod", left, right)
    return emit("Sub", left, emit("Mul", _floor_divide((left, right)), right))


def _power(x, a, out):
    base, exponent = _float32(x)
    held = current().graph.constants.get(exponent.static.value) if exponent.static else None
    if held is not None and held.size == 1 and held.item() in (2, 3):
        square = emit("Mul", base, base, shape=out[0].shape)
        return square if held.item() == 2 else emit("Mul", square, base)
    return emit("Pow", base, exponent)


def _log(x, a, out):
    y = emit("Log", x[0])
    return y if a[0] == 2 else emit("Mul", y, _scalar(1 / np.log((2, 10)[a[0]]), y))


def _expm1(x, a, out):
    """tanh(x / 2) * (exp(x) + 1), which loses nothing near zero."""
    (y,) = _float32(x)
    half = emit("Tanh", emit("Mul", y, _scalar(0.5, y)))
    return emit("Mul", half, emit("Add", emit("Exp", y), _scalar(1, y)))


def _log_add_exp(x, a, out):
    left, right = _float32(x)
    gap = emit("Neg", emit("Abs", emit("Sub", left, right)))
    top = emit("Max", left, right)
    return emit("Where", emit("Equal", left, right, dtype=BOOL),
                emit("Add", top, _scalar(np.log(2), top)),
                emit("Add", top, emit("Softplus", gap)), dtype=top.dtype)  # fmt: skip


def _select(x, a, out):
    chosen, other = same_type(x[1:])
    condition = cast(x[0], BOOL)
    if chosen.dtype == BOOL:
        no = emit("And", emit("Not", condition), other)
        return emit("Or", emit("And", condition, chosen), no)
    return emit("Where", condition, chosen, other, dtype=chosen.dtype)


def _equal(x, a, out):
    left, right = same_type(x)
    equal = emit("Equal", left, right, dtype=BOOL)
    if not a or not a[0] or left.dtype not in FLOATS:
        return equal
    both = emit("And", emit("IsNaN", left, dtype=BOOL), emit("IsNaN", right, dtype=BOOL))
    return emit("Or", equal, both)


def _bitwise(x, a, out):
    if x[0].dtype == BOOL:
        return emit(("And", "Or", "Xor")[a[0]], *x)
    if a[0] < 3:
        return emit(("BitwiseAnd", "BitwiseOr", "BitwiseXor")[a[0]], *x)
    left, right = (cast(h, INT64) for h in x)
    power = emit("Pow", constant(np.array(2, np.int64)), right)
    bits = 8 * out[0].dtype.size
    if a[0] == 3:  # wraps at the width of the type
        y = emit("Mul", left, power)
        if bits < 64:
            y = emit("BitwiseAnd", y, constant(np.array(2**bits - 1, np.int64)))
        return cast(y, current().type_of(out[0].dtype))
    return cast(_floor_divide((left, power)), current().type_of(out[0].dtype))


def _view(x, a, out):
    """Whole numbers as several narrower ones, the lowest bits first."""
    bits, count = 8 * a[0].size, out[0].shape[-1] // x[0].shape[-1]
    if x[0].dtype != INT64 or count * bits != 32 or not mx.issubdtype(a[0], mx.integer):
        raise InputError(f"View as {a[0]} has no rule in ONNX, but for narrower integers.")
    powers = constant(2 ** (bits * np.arange(count)))
    parts = emit("Div", emit("Unsqueeze", x[0], ints([-1])), powers)
    parts = emit("Mod", parts, constant(np.array(2**bits)))
    if mx.issubdtype(a[0], mx.signedinteger):
        wrapped = emit("Sub", parts, constant(np.array(2**bits)))
        negative = emit("GreaterOrEqual", parts, constant(np.array(2 ** (bits - 1))), dtype=BOOL)
        parts = emit("Where", negative, wrapped, parts, dtype=INT64)
    parts = cast(parts, current().type_of(a[0]))
    parts.shape = (*x[0].shape, count)
    return reshape(parts, out[0].shape)


def _as_type(x, a, out):
    wanted = current().type_of(a[0])
    from_integer = x[0].dtype not in FLOATS and wanted == HALF
    return cast(x[0], FLOAT if from_integer else wanted)


REDUCTIONS = ("ReduceMin", "ReduceMax", "ReduceSum", "ReduceProd", "ReduceMin", "ReduceMax")


def _reduce(x, a, out):
    code, axes = a
    pool = windows.pooled(x[0], code, axes, out[0].shape)
    if pool is not None:
        return pool
    (y,) = _float32(x) if code in (2, 3) else x
    view = y.open_view("transpose")
    if view:  # in the layout that the input lies in
        axes = [view.detail[k] for k in axes]
        shape = tuple(1 if k in axes else n for k, n in enumerate(view.parents[0].shape))
        inner = _reduce(view.parents, (code, axes), [Value(shape, out[0].dtype)])
        return transpose(inner, view.detail)
    wanted = current().type_of(out[0].dtype)
    y = cast(y, INT32) if y.dtype == BOOL else y
    y = emit(REDUCTIONS[code], y, ints(sorted(axes)), keepdims=1, shape=out[0].shape)
    return y if y.dtype in FLOATS else cast(y, wanted)


def _arg_reduce(x, a, out):
    op = ("ArgMin", "ArgMax")[a[0]]
    return emit(op, *_float32(x), dtype=INT64, axis=a[1], keepdims=1)


def _scan(x, a, out):
    code, axis, reverse, inclusive = a
    if code == 2:
        axis = constant(np.array(axis, np.int64))
        (y,) = _float32(x)
        y = cast(y, INT32) if y.dtype == BOOL else y
        return emit("CumSum", y, axis, reverse=int(reverse), exclusive=int(not inclusive))
    return _scan_by_mask(_float32(x)[0], code, axis, reverse, inclusive)


def _scan_by_mask(x: Handle, code: int, axis: int, reverse: bool, inclusive: bool) -> Handle:
    """A reduction over [.., i, j, ..] where j is not after i; costs the square of the axis."""
    length, rank = x.shape[axis], len(x.shape)
    places = emit("Range", number(0), number(length), number(1), shape=(length,))
    rows = emit("Unsqueeze", places, ints([1]))
    left, right = (places, rows) if reverse else (rows, places)
    seen = emit("GreaterOrEqual" if inclusive else "Greater", left, right, dtype=BOOL)
    seen = emit("Unsqueeze", seen, ints(range(2, rank - axis + 1))) if axis < rank - 1 else seen
    empty = {0: -np.inf, 1: np.inf, 3: 1.0}[code] if x.dtype in FLOATS else {
        0: np.iinfo(np.int32).min, 1: np.iinfo(np.int32).max, 3: 1}[code]  # fmt: skip
    columns = emit("Unsqueeze", x, ints([axis]))
    spread = emit("Where", seen, columns, _scalar(empty, x), dtype=x.dtype)
    op = {0: "ReduceMax", 1: "ReduceMin", 3: "ReduceProd"}[code]
    return emit(op, spread, ints([axis + 1]), keepdims=0)


def _arange(x, a, out):
    """Computed in float32 or integers: what it counts may lie beyond half precision."""
    wanted = current().type_of(out[0].dtype)
    wanted = FLOAT if wanted == HALF else wanted
    return emit("Range", *(number(n, wanted) for n in a), dtype=wanted)


def _softmax(x, a, out):
    return emit("Softmax", *x, axis=-1)


def _sorted(x, axis: int, largest: bool = False) -> list[Handle]:
    """Values and their places, smallest first; of equal ones the first comes first."""
    (y,) = _float32(x)
    return emit("TopK", y, ints([y.shape[axis]]), outputs=2, shape=[y.shape] * 2,
                dtype=[y.dtype, INT64], axis=axis, largest=int(largest), sorted=1)  # fmt: skip


def _hadamard(x, a, out):
    size = x[0].shape[-1]
    matrix = mx.hadamard_transform(mx.eye(size), scale=a[0])
    return emit("MatMul", x[0], constant(np.array(matrix), x[0].dtype), shape=out[0].shape)


def _add(x, a, out):
    add = _elementwise("Add")
    if not current().buffer or any(h.shape != out[0].shape for h in x):
        return add(x, a, out)
    return lazily("add", tuple(same_type(x)), (), lambda: add(x, a, out), out[0].shape)


def _rms_norm(x, a, out):
    """Together with the sum that it norms, where cached attention makes ONNX Runtime a must."""
    view = x[0].open_view("add")
    if view is None or len(x) < 2:
        return _normed("RMSNormalization", x, a[0])
    results = emit(
        "SkipSimplifiedLayerNormalization", *view.parents, cast(x[1], x[0].dtype), outputs=4,
        shape=[x[0].shape] * 4, domain="com.microsoft", epsilon=a[0],
    )  # fmt: skip
    current().nodes[-1].output[1:3] = ["", ""]
    x[0].name = results[3].name
    return results[0]


def _layer_norm(x, a, out):
    return _normed("LayerNormalization", x, a[0])


def _normed(op: str, x, epsilon: float) -> Handle:
    """Over the last axis, in the layout that the input lies in."""
    x = same_type(x)
    y, *weights = x
    if not weights:
        weights = [constant(np.ones(y.shape[-1]), y.dtype)]
    view = y.open_view("transpose")
    if view and view.detail[-1] == len(y.shape) - 1:
        inner = view.parents[0]
        normed = emit(op, inner, *weights, shape=inner.shape, axis=-1, epsilon=epsilon)
        return transpose(normed, view.detail)
    return emit(op, y, *weights, shape=y.shape, axis=-1, epsilon=epsilon)


def _gelu(x, a, out):
    return emit("Gelu", x[0], shape=x[0].shape, approximate=a[0])


def _silu(x, a, out):
    return emit("Mul", x[0], emit("Sigmoid", x[0], shape=x[0].shape), shape=x[0].shape)


SAME = {
    "Abs": "Abs", "ArcCos": "Acos", "ArcCosh": "Acosh", "ArcSin": "Asin",
    "ArcSinh": "Asinh", "ArcTan": "Atan", "ArcTanh": "Atanh", "Ceil": "Ceil", "Cos": "Cos",
    "Cosh": "Cosh", "Divide": "Div", "Erf": "Erf", "Floor": "Floor", "Greater": "Greater",
    "GreaterEqual": "GreaterOrEqual", "Less": "Less", "LessEqual": "LessOrEqual",
    "Maximum": "Max", "Minimum": "Min", "Multiply": "Mul", "Negative": "Neg", "Round": "Round",
    "Sigmoid": "Sigmoid", "Sign": "Sign", "Sin": "Sin", "Sinh": "Sinh", "Subtract": "Sub",
    "Tan": "Tan", "Tanh": "Tanh",
}  # fmt: skip

OPS = {
    **{name: _elementwise(op) for name, op in SAME.items()},
    **dict.fromkeys(
        ("Reshape", "Flatten", "Unflatten", "ExpandDims", "Squeeze"),
        lambda x, a, out: reshape(x[0], out[0].shape),
    ),
    **dict.fromkeys(("Copy", "Contiguous", "StopGradient"), lambda x, a, out: x[0]),
    "Add": _add,
    "AddMM": contractions.add_matmul,
    "Arange": _arange,
    "ArgPartition": lambda x, a, out: _sorted(x, a[1])[1],
    "ArgReduce": _arg_reduce,
    "ArgSort": lambda x, a, out: _sorted(x, a[0])[1],
    "AsStrided": windows.as_strided,
    "AsType": _as_type,
    "BitwiseBinary": _bitwise,
    "Broadcast": indexing.broadcast,
    "Concatenate": lambda x, a, out: concatenate(same_type(x), a[0], out[0].shape),
    "Convolution": contractions.convolution,
    "Depends": lambda x, a, out: list(x[: len(out)]),
    "DivMod": lambda x, a, out: [_floor_divide(x), _remainder(x)],
    "Equal": _equal,
    "Exp": _elementwise("Exp", wide=True),
    "Expm1": _expm1,
    "FloorDivide": _floor_divide,
    "Full": indexing.broadcast,
    "Gather": indexing.gather,
    "GatherAxis": indexing.gather_axis,
    "GatherMM": contractions.gather_mm,
    "GatherQMM": quantized.gather_qmm,
    "Hadamard": _hadamard,
    "Log": _log,
    "Log1p": lambda x, a, out: emit("Log", emit("Add", x[0], _scalar(1, x[0]))),
    "LogAddExp": _log_add_exp,
    "LogicalAnd": _logical("And"),
    "LogicalNot": _logical("Not"),
    "LogicalOr": _logical("Or"),
    "LogSumExp": lambda x, a, out: emit("ReduceLogSumExp", *_float32(x), ints([-1]), keepdims=1),
    "Matmul": contractions.matmul,
    "NotEqual": lambda x, a, out: emit("Not", _equal(x, (), out)),
    "Pad": indexing.pad,
    "Partition": lambda x, a, out: _sorted(x, a[1])[0],
    "Power": _power,
    "QuantizedMatmul": quantized.matmul,
    "Reduce": _reduce,
    "Remainder": _remainder,
    "Scan": _scan,
    "Scatter": indexing.scatter,
    "ScatterAxis": indexing.scatter_axis,
    "Select": _select,
    "Size": lambda x, a, out: number(a[0], current().type_of(out[0].dtype)),
    "Slice": indexing.slice_,
    "SliceUpdate": indexing.slice_update,
    "Softmax": _softmax,
    "Sort": lambda x, a, out: _sorted(x, a[0])[0],
    "Split": indexing.split,
    "Sqrt": lambda x, a, out: _unary(*("Sqrt", "Reciprocal")[: 1 + bool(a[0])])(x, a, out),
    "Square": lambda x, a, out: emit("Mul", *_float32(x) * 2, shape=out[0].shape),
    "Transpose": lambda x, a, out: transpose(x[0], a[0]),
    "View": _view,
    "Attention": lambda *node: (buffers if current().buffer else attention).attention(*node),
    "GELU": _gelu,
    "LayerNorm": _layer_norm,
    "Linear": contractions.linear,
    "Lookup": quantized.lookup,
    "RMSNorm": _rms_norm,
    "RoPE": attention.rope,
    "SiLU": _silu,
}
