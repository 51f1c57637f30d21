"""Rules for products: matrices, routed experts, convolutions. See `ops.py` for what a rule is.

A weight is turned round when the file is written, never by a node: ONNX Runtime's quantisers see a
weight only where it is an input of MatMul itself. A table that is read as a weight too (a tied
embedding) stays as it lies, and Gemm reads it transposed.
"""

from collections.abc import Callable

import numpy as np

from ...errors import InputError
from . import experts
from .builder import Handle, cast, constant, current, dynamic_float, emit
from .extents import ints, times
from .views import lazily, reshape, then, transpose


def matmul(x, a, out):
    return product(x[0], x[1], out[0].shape)


def product(left: Handle, right: Handle, shape: tuple) -> Handle:
    left, right = _contracted(left, right)
    if _is_tied(right) and len(right.shape) == 2:
        return _by_gemm(left, transpose(right, (1, 0)), shape)
    return emit("MatMul", left, right, shape=shape)


def _contracted(left: Handle, right: Handle) -> tuple[Handle, Handle]:
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
    return experts.gather_mm(*_contracted(x[0], x[1]), x[2:], out[0].shape)


def convolution(x, a, out):
    """MLX keeps channels last, and weights [out, spatial..., in / groups]; ONNX first."""
    stride, low, high, kernel_dilation, input_dilation, groups, flip = a
    left, weight = _contracted(x[0], x[1])
    rank = len(left.shape)
    forward, back = (0, rank - 1, *range(1, rank - 1)), (0, *range(2, rank), 1)
    first = transpose(left, forward)
    shape = tuple(out[0].shape[k] for k in forward)
    upsampled = any(n != 1 for n in input_dilation)
    if bool(flip) != upsampled:
        weight = _flipped(weight)
    weight = transpose(weight, forward)
    how = {"dilations": list(kernel_dilation), "group": groups}
    if not upsampled:
        first, low, high = _cropped(first, low, high)
        how |= {"pads": [*low, *high], "strides": list(stride)}
        y = emit("Conv", first, weight, shape=shape, **how)
    else:
        y = _upsampling(first, weight, stride, low, high, input_dilation, groups, shape, how)
    return transpose(y, back)


def _flipped(weight: Handle) -> Handle:
    axes = tuple(range(1, len(weight.shape) - 1))
    if weight.static:
        return then(weight, "flipped", lambda array: np.flip(array, axes), weight.shape)
    count = len(axes)
    return emit("Slice", weight, ints([-1] * count), ints([-(2**63 - 1)] * count), ints(axes),
                ints([-1] * count), shape=weight.shape)  # fmt: skip


def _cropped(first: Handle, low, high):
    """Negative padding cuts; ONNX's Conv only pads."""
    if min(*low, *high, 0) == 0:
        return first, low, high
    count = len(low)
    starts = [max(-n, 0) for n in low]
    ends = [min(n, 0) or 2**63 - 1 for n in high]
    cut = emit("Slice", first, ints(starts), ints(ends), ints(range(2, 2 + count)),
               shape=(*first.shape[:2], *[None] * count))  # fmt: skip
    return cut, [max(n, 0) for n in low], [max(n, 0) for n in high]


def _upsampling(first, weight, stride, low, high, dilation, groups, shape, how) -> Handle:
    """A convolution over an input spread out with zeros, as ConvTranspose."""
    spans = [(k - 1) * d for k, d in zip(weight.shape[2:], how["dilations"], strict=True)]
    before = [span - n for span, n in zip(spans, low, strict=True)]
    after = [span - n for span, n in zip(spans, high, strict=True)]
    if any(n != 1 for n in stride) or min(before) < 0:
        raise InputError(
            f"a convolution with stride {tuple(stride)} over an input dilated by "
            f"{tuple(dilation)} and padded by {tuple(low)} has no rule in ONNX."
        )
    outs, width = weight.shape[0], weight.shape[1]
    spatial = weight.shape[2:]
    split = reshape(weight, (groups, outs // groups, width, *spatial))
    turned = transpose(split, (0, 2, 1, *range(3, 3 + len(spatial))))
    weight = reshape(turned, (groups * width, outs // groups, *spatial))
    return emit("ConvTranspose", first, weight, shape=shape, strides=list(dilation),
                pads=[*before, *(max(n, 0) for n in after)],
                output_padding=[max(-n, 0) for n in after], **how)  # fmt: skip
