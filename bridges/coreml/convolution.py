"""Convolutions: MLX keeps channels last, MIL first; kernels are turned when they are written."""

import numpy as np

from ...errors import InputError
from .quiet import mb
from .values import alike


def convolution(x, a, out):
    stride, low, high, dilation, input_dilation, groups, flip = a
    array, kernel = alike(x)
    last = array.rank - 1
    transposed = any(n != 1 for n in input_dilation)
    array = mb.transpose(x=array, perm=[0, last, *range(1, last)])
    kernel = _kernel(kernel, groups, flipped=flip != transposed, transposed=transposed)
    common = {"pad_type": "custom", "dilations": list(dilation), "groups": groups}
    if transposed:
        if any(n != 1 for n in stride):
            raise InputError("Convolution with strides both ways has no rule in Core ML.")
        reach = [d * (k - 1) for d, k in zip(dilation, kernel.shape[2:], strict=True)]
        made = _transposed(array, kernel, input_dilation, reach, low, high, common)
    else:
        pad = [n for pair in zip(low, high, strict=True) for n in pair]
        made = mb.conv(x=array, weight=kernel, strides=list(stride), pad=pad, **common)
    return mb.transpose(x=made, perm=[0, *range(2, last + 1), 1])


def _kernel(kernel, groups: int, *, flipped: bool, transposed: bool):
    """[out, ..., in / groups] as MIL takes it: [out, in / groups, ...], or for a transposed one
    [in, out / groups, ...]."""
    last = kernel.rank - 1
    if kernel.val is None:
        if flipped or transposed:
            raise InputError("Convolution with a computed, turned kernel has no rule in Core ML.")
        return mb.transpose(x=kernel, perm=[0, last, *range(1, last)])
    array = np.moveaxis(kernel.val, -1, 1)
    if flipped:
        array = np.flip(array, tuple(range(2, kernel.rank)))
    if transposed:
        outs, ins, *spatial = array.shape
        array = array.reshape(groups, outs // groups, ins, *spatial).swapaxes(1, 2)
        array = array.reshape(groups * ins, outs // groups, *spatial)
    return mb.const(val=np.ascontiguousarray(array))


def _transposed(array, kernel, strides, reach, low, high, common: dict):
    """What MLX pads less than the kernel reaches is cut off; what it pads more is zero."""
    edges = [n for pair in zip(low, high, strict=True) for n in pair]
    cut = [r - n for r, n in zip(np.repeat(reach, 2), edges, strict=True)]
    made = mb.conv_transpose(
        x=array, weight=kernel, strides=list(strides), pad=[int(max(n, 0)) for n in cut], **common
    )
    more = [int(max(-n, 0)) for n in cut]
    return mb.pad(x=made, pad=[0, 0, 0, 0, *more], mode="constant") if any(more) else made
