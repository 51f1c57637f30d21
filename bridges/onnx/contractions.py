"""Rules for products: matrices, routed experts, convolutions. See `ops.py` for what a rule is.

A weight is turned round when the file is written, never by a node: ONNX Runtime's quantisers see a
weight only where it is an input of MatMul itself. A table that is read as a weight too (a tied
embedding) stays as it lies, and Gemm reads it transposed.
"""

from collections.abc import Callable

import numpy as np

from . import experts
from .builder import Handle, cast, constant, current, dynamic_float, emit
from .extents import times
from .views import lazily, reshape, transpose


def matmul(x, a, out):
    return product(x[0], x[1], out[0].shape)


def product(left: Handle, right: Handle, shape: tuple) -> Handle:
    left, right = contracted(left, right)
    if _is_tied(right) and len(right.shape) == 2:
        return _by_gemm(left, transpose(right, (1, 0)), shape)
    return emit("MatMul", left, right, shape=shape)


def contracted(left: Handle, right: Handle) -> tuple[Handle, Handle]:
    """In the type of the weight, so that it is stored once; of two computed ones, in half."""
    held = [h.dtype for h in (left, right) if h.static]
    wanted = held[0] if held else dynamic_float((left, right), left.dtype)
    return cast(left, wanted), cast(right, wanted)


def _is_tied(weight: Handle) -> bool:
    """Whether this is the transposed of a table that embeddings are read from."""
    static = weight.static
    return bool(static) and static.value in current().tables and static.key[1:] == ("T",)


def _by_gemm(left: Handle, table: Handle, shape: tuple) -> Handle:
    """`left` [..., in] times the transposed of `table` [out, in]."""
    if current().buffer:  # for ONNX Runtime alone, which has a shorter way
        return emit("FusedMatMul", left, table, shape=shape, transB=1, domain="com.microsoft")
    rows = reshape(left, (times(*left.shape[:-1]), left.shape[-1]))
    y = emit("Gemm", rows, table, shape=(rows.shape[0], table.shape[0]), transB=1)
    return reshape(y, shape)


def linear(x, a, out):
    return joinable(_linear, x, a, out[0].shape)


def joinable(rule: Callable, x, a, shape: tuple) -> Handle:
    """`rule(x, a, shape)`, a product whose weights hold a row for each output.

    Attention on buffers takes three of them as one, where it can.
    """
    if not current().buffer or any(h.static is None or h.static.steps for h in x[1:]):
        return rule(x, a, shape)
    return lazily("product", tuple(x), (rule, a), lambda: rule(x, a, shape), shape)


def _linear(x, a, shape: tuple) -> Handle:
    y = product(x[0], transpose(x[1], (1, 0)), shape)
    return y if len(x) < 3 else emit("Add", y, cast(x[2], y.dtype), shape=shape)


def add_matmul(x, a, out):
    alpha, beta = a
    y = product(x[0], x[1], out[0].shape)
    added = cast(x[2], y.dtype)
    if alpha != 1:
        y = emit("Mul", y, constant(np.array(alpha), y.dtype), shape=out[0].shape)
    if beta != 1:
        added = emit("Mul", added, constant(np.array(beta), y.dtype), shape=added.shape)
    return emit("Add", y, added, shape=out[0].shape)


def gather_mm(x, a, out):
    return experts.gather_mm(*contracted(x[0], x[1]), x[2:], out[0].shape)
