"""The table from primitive to ONNX nodes, opset 23. A rule takes x, handles; a, the attributes;
and out, the `Value`s of the outputs, as in `execute.OPS`.

Composites become ONNX's own RMSNormalization, LayerNormalization, RotaryEmbedding, Attention and
Gelu: on ONNX Runtime's CPU none of its own operators is faster than these.
"""


import mlx.core as mx
import numpy as np

from ...graph import Value
from . import (
    attention,
    buffers,
    contractions,
    convolutions,
    indexing,
    quantized,
    windows,
)
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
    emit,
)
from .elementwise import (
    as_type,
    bitwise,
    entrywise,
    equal,
    expm1,
    float32,
    floor_divide,
    log,
    log_add_exp,
    logical,
    power,
    remainder,
    same_type,
    scalar,
    select,
    unary,
    view,
)
from .extents import ints, number
from .views import concatenate, lazily, reshape, transpose

REDUCTIONS = ("ReduceMin", "ReduceMax", "ReduceSum", "ReduceProd", "ReduceMin", "ReduceMax")


def _reduce(x, a, out):
    code, axes = a
    pool = windows.pooled(x[0], code, axes, out[0].shape)
    if pool is not None:
        return pool
    (y,) = float32(x) if code in (2, 3) else x
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
    return emit(op, *float32(x), dtype=INT64, axis=a[1], keepdims=1)


def _scan(x, a, out):
    code, axis, reverse, inclusive = a
    if code == 2:
        axis = constant(np.array(axis, np.int64))
        (y,) = float32(x)
        y = cast(y, INT32) if y.dtype == BOOL else y
        return emit("CumSum", y, axis, reverse=int(reverse), exclusive=int(not inclusive))
    return _scan_by_mask(float32(x)[0], code, axis, reverse, inclusive)


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
    spread = emit("Where", seen, columns, scalar(empty, x), dtype=x.dtype)
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
    (y,) = float32(x)
    return emit("TopK", y, ints([y.shape[axis]]), outputs=2, shape=[y.shape] * 2,
                dtype=[y.dtype, INT64], axis=axis, largest=int(largest), sorted=1)  # fmt: skip


def _hadamard(x, a, out):
    size = x[0].shape[-1]
    matrix = mx.hadamard_transform(mx.eye(size), scale=a[0])
    return emit("MatMul", x[0], constant(np.array(matrix), x[0].dtype), shape=out[0].shape)


def _add(x, a, out):
    add = entrywise("Add")
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
    return entrywise("Gelu", approximate=a[0])(x, a, out)


def _silu(x, a, out):
    return entrywise("Mul")([x[0], entrywise("Sigmoid")(x, a, out)], a, out)


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
    **{name: entrywise(op) for name, op in SAME.items()},
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
    "AsType": as_type,
    "BitwiseBinary": bitwise,
    "Broadcast": indexing.broadcast,
    "Concatenate": lambda x, a, out: concatenate(same_type(x), a[0], out[0].shape),
    "Convolution": convolutions.convolution,
    "Depends": lambda x, a, out: list(x[: len(out)]),
    "DivMod": lambda x, a, out: [floor_divide(x), remainder(x)],
    "Equal": equal,
    "Exp": entrywise("Exp", wide=True),
    "Expm1": expm1,
    "FloorDivide": floor_divide,
    "Full": indexing.broadcast,
    "Gather": indexing.gather,
    "GatherAxis": indexing.gather_axis,
    "GatherMM": contractions.gather_mm,
    "GatherQMM": quantized.gather_qmm,
    "Hadamard": _hadamard,
    "Log": log,
    "Log1p": lambda x, a, out: emit("Log", emit("Add", x[0], scalar(1, x[0]))),
    "LogAddExp": log_add_exp,
    "LogicalAnd": logical("And"),
    "LogicalNot": logical("Not"),
    "LogicalOr": logical("Or"),
    "LogSumExp": lambda x, a, out: emit("ReduceLogSumExp", *float32(x), ints([-1]), keepdims=1),
    "Matmul": contractions.matmul,
    "NotEqual": lambda x, a, out: emit("Not", equal(x, (), out)),
    "Pad": indexing.pad,
    "Partition": lambda x, a, out: _sorted(x, a[1])[0],
    "Power": power,
    "QuantizedMatmul": quantized.matmul,
    "Reduce": _reduce,
    "Remainder": remainder,
    "Scan": _scan,
    "Scatter": indexing.scatter,
    "ScatterAxis": indexing.scatter_axis,
    "Select": select,
    "Size": lambda x, a, out: number(a[0], current().type_of(out[0].dtype)),
    "Slice": indexing.slice_,
    "SliceUpdate": indexing.slice_update,
    "Softmax": _softmax,
    "Sort": lambda x, a, out: _sorted(x, a[0])[0],
    "Split": indexing.split,
    "Sqrt": lambda x, a, out: unary(*("Sqrt", "Reciprocal")[: 1 + bool(a[0])])(x, a, out),
    "Square": lambda x, a, out: emit("Mul", *float32(x) * 2, shape=out[0].shape),
    "Transpose": lambda x, a, out: transpose(x[0], a[0]),
    "View": view,
    "Attention": lambda *node: (buffers if current().buffer else attention).attention(*node),
    "GELU": _gelu,
    "LayerNorm": _layer_norm,
    "Linear": contractions.linear,
    "Lookup": quantized.lookup,
    "RMSNorm": _rms_norm,
    "RoPE": attention.rope,
    "SiLU": _silu,
}
