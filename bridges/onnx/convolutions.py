"""Convolutions: see `ops.py` for what a rule is.

MLX keeps channels last, ONNX first. The turns of neighbours undo each other, as what works entry by
entry takes either layout (`elementwise.py`).
"""

from collections.abc import Sequence

import numpy as np

from ...errors import InputError
from .builder import Handle, Static, current, emit
from .contractions import contracted
from .extents import ints
from .views import lazily, reshape, then, transpose


def convolution(x, a, out):
    """MLX keeps channels last, and weights [out, spatial..., in / groups]; ONNX first."""
    stride, low, high, kernel_dilation, input_dilation, groups, flip = a
    left, weight = contracted(x[0], x[1])
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
        y = _convolved(first, weight, None, how, shape)
    else:
        y = _upsampling(first, weight, stride, low, high, input_dilation, groups, shape, how)
    return transpose(y, back)


def _convolved(first: Handle, weight: Handle, bias: Handle | None, how: dict, shape) -> Handle:
    """A Conv that is not written yet: what scales and shifts its channels can still join it."""

    def write() -> Handle:
        return emit("Conv", first, weight, bias, shape=shape, **how)

    parents = (first, weight) if bias is None else (first, weight, bias)
    return lazily("convolution", parents, (how,), write, shape)


def folded(op: str, x: Sequence[Handle], shape: tuple) -> Handle | None:
    """A convolution whose channels are scaled or shifted by a static vector, as one; else None.

    The weights are scaled when the file is written: so batch norm costs nothing.
    """
    if op not in ("Mul", "Add", "Sub") or len(x) != 2:
        return None
    view, vector = x[0].open_view("convolution"), x[1]
    if view is None and op != "Sub":
        view, vector = x[1].open_view("convolution"), x[0]
    if view is None or not vector.static or view.parents[1].static is None:
        return None
    channels = shape[1]
    if vector.shape not in ((), (1,), (1, channels, *[1] * (len(shape) - 2))):
        return None
    first, weight, *bias = view.parents
    if bias and not bias[0].static:
        return None
    (how,) = view.detail
    shift = bias[0] if bias else None
    if op == "Mul":
        tall = (channels, *[1] * (len(weight.shape) - 1))
        weight = _combined("Mul", weight, vector, tall)
        shift = shift and _combined("Mul", shift, vector, (channels,))
    else:
        shift = _combined(op, shift, vector, (channels,))
    return _convolved(first, weight, shift, how, shape)


COMBINE = {"Mul": np.multiply, "Add": np.add, "Sub": np.subtract}


def _combined(op: str, left: Handle | None, right: Handle, shape: tuple) -> Handle:
    """A static handle combined with a vector in the shape given; of nothing, for None."""
    builder = current()
    like = left or Handle(shape, right.dtype)
    name = builder.unique(f"{builder.label(like if left else right)}.{op.lower()}")

    def make() -> np.ndarray:
        vector = builder.contents(right)
        wide = vector.reshape(shape if vector.size > 1 else (1,) * len(shape))
        if left is None:
            return np.broadcast_to(COMBINE[op](np.zeros((), wide.dtype), wide), shape)
        return COMBINE[op](builder.contents(left), wide)

    builder.recipes[name] = make
    return Handle(like.shape, like.dtype, static=Static(name))


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
