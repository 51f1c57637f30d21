"""Rules that work entry by entry, in whatever layout the entries lie; see `ops.py`."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ...errors import InputError
from . import convolutions
from .builder import (
    BOOL,
    FLOAT,
    FLOATS,
    HALF,
    INT64,
    Handle,
    cast,
    constant,
    current,
    dynamic_float,
    emit,
)
from .extents import ints
from .views import reshape, transpose

COMPARISONS = ("Greater", "Less", "GreaterOrEqual", "LessOrEqual", "Equal")


def same_type(x: Sequence[Handle]) -> list[Handle]:
    """All floats in the type to compute in; the rest as it is."""
    wanted = dynamic_float(x, next((h.dtype for h in x if h.dtype in FLOATS), FLOAT))
    return [cast(h, wanted) if h.dtype in FLOATS else h for h in x]


def float32(x: Sequence[Handle]) -> list[Handle]:
    """In float32, where half precision would overflow or ONNX Runtime has no kernel."""
    return [cast(h, FLOAT) if h.dtype == HALF else h for h in x]


def entrywise(op: str, wide: bool = False, **attributes):
    """A node of the same name, on what the inputs are views of where they are turned alike."""

    def rule(x, a, out):
        x = float32(x) if wide else same_type(x)
        inner, permutation = _layout(x, len(out[0].shape))
        if permutation is None:
            return _emit(op, x, out[0].shape, **attributes)
        back = _inverse(permutation)
        shape = tuple(out[0].shape[k] for k in back)
        alone = all(current().readers[h.value] == 1 for h in x if not h.static)
        result = convolutions.folded(op, inner, shape) if alone else None
        return transpose(result or _emit(op, inner, shape, **attributes), permutation)

    return rule


def _emit(op: str, x, shape, **attributes) -> Handle:
    if op == "Max" and _is_zero(x[1]):
        return emit("Relu", x[0], shape=shape)
    kind = BOOL if op in COMPARISONS else None
    return emit(op, *x, shape=shape, dtype=kind, **attributes)


def _is_zero(handle: Handle) -> bool:
    held = current().graph.constants.get(handle.static.value) if handle.static else None
    return held is not None and held.size == 1 and held.item() == 0


def _layout(x: Sequence[Handle], rank: int):
    """The inputs in the layout that one of them lies in, and how to turn it back; or no turn."""
    views = [view for h in x if (view := h.open_view("transpose")) and len(view.detail) == rank]
    if not views:
        return x, None
    permutation = views[0].detail
    inner = [_inside(h, permutation) for h in x]
    return (inner, permutation) if all(inner) else (x, None)


def _inside(handle: Handle, permutation: tuple) -> Handle | None:
    """The handle before the turn, if that costs little: a view of it, or of few entries."""
    view = handle.open_view("transpose")
    if view and view.detail == permutation:
        return view.parents[0]
    rank = len(permutation)
    wide = (1,) * (rank - len(handle.shape)) + handle.shape
    if all(n == 1 for n in wide):
        return handle
    if not handle.static and (1 not in handle.shape or len(handle.shape) != rank):
        return None
    return transpose(reshape(handle, wide), _inverse(permutation))


def _inverse(permutation: tuple) -> tuple:
    return tuple(permutation.index(k) for k in range(len(permutation)))


def unary(*ops: str, wide: bool = False):
    """Several nodes, one after the other."""

    def rule(x, a, out):
        handle = (float32(x) if wide else same_type(x))[0]
        for op in ops:
            handle = emit(op, handle, shape=out[0].shape)
        return handle

    return rule


def scalar(value: float, like: Handle) -> Handle:
    return constant(np.array(value), like.dtype)


def logical(op: str):
    return lambda x, a, out: emit(op, *(cast(h, BOOL) for h in x), shape=out[0].shape)


def floor_divide(x, a=(), out=None):
    left, right = same_type(x)
    if left.dtype in FLOATS:
        return emit("Floor", emit("Div", left, right))
    return emit("Div", emit("Sub", left, remainder((left, right))), right)


def remainder(x, a=(), out=None):
    left, right = same_type(x)
    if left.dtype not in FLOATS:
        return emit("Mod", left, right)
    return emit("Sub", left, emit("Mul", floor_divide((left, right)), right))


def power(x, a, out):
    base, exponent = float32(x)
    held = current().graph.constants.get(exponent.static.value) if exponent.static else None
    if held is not None and held.size == 1 and held.item() in (2, 3):
        square = emit("Mul", base, base, shape=out[0].shape)
        return square if held.item() == 2 else emit("Mul", square, base)
    return emit("Pow", base, exponent)


def log(x, a, out):
    y = emit("Log", x[0])
    return y if a[0] == 2 else emit("Mul", y, scalar(1 / np.log((2, 10)[a[0]]), y))


def expm1(x, a, out):
    """tanh(x / 2) * (exp(x) + 1), which loses nothing near zero."""
    (y,) = float32(x)
    half = emit("Tanh", emit("Mul", y, scalar(0.5, y)))
    return emit("Mul", half, emit("Add", emit("Exp", y), scalar(1, y)))


def log_add_exp(x, a, out):
    left, right = float32(x)
    gap = emit("Neg", emit("Abs", emit("Sub", left, right)))
    top = emit("Max", left, right)
    return emit("Where", emit("Equal", left, right, dtype=BOOL),
                emit("Add", top, scalar(np.log(2), top)),
                emit("Add", top, emit("Softplus", gap)), dtype=top.dtype)  # fmt: skip


def select(x, a, out):
    chosen, other = same_type(x[1:])
    condition = cast(x[0], BOOL)
    if chosen.dtype == BOOL:
        no = emit("And", emit("Not", condition), other)
        return emit("Or", emit("And", condition, chosen), no)
    return emit("Where", condition, chosen, other, dtype=chosen.dtype)


def equal(x, a, out):
    left, right = same_type(x)
    equal = emit("Equal", left, right, dtype=BOOL)
    if not a or not a[0] or left.dtype not in FLOATS:
        return equal
    both = emit("And", emit("IsNaN", left, dtype=BOOL), emit("IsNaN", right, dtype=BOOL))
    return emit("Or", equal, both)


def bitwise(x, a, out):
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
    return cast(floor_divide((left, power)), current().type_of(out[0].dtype))


def view(x, a, out):
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


def as_type(x, a, out):
    wanted = current().type_of(a[0])
    from_integer = x[0].dtype not in FLOATS and wanted == HALF
    return cast(x[0], FLOAT if from_integer else wanted)
