"""Quantised weights in MIL: the codes as they are, with a scale for each group.

MLX: w = scale * code + bias. Core ML: w = scale * (code - offset), so the offset is -bias / scale.
It is an integer where a group reaches down to zero or below and up to it or above, as MLX's own
rounding makes it; then codes and zero points go over as integers, else the offset is a float. Of 2
bits a table of 4 numbers for each group is smaller, and exact.
"""

import mlx.core as mx
import numpy as np

from ...stream import Fetch
from .quantised import Packed
from .quiet import mb, types
from .scope import IOS18, scope
from .values import NUMPY, as_type, constant, to_numpy

ROUNDING = 2.0**-10  # of float16: what differs by less is the same weight there


def weight(packed: Packed, fetch: Fetch, floats: str):
    """The var of a weight; one that MIL cannot hold packed is unpacked, and `notes` say so."""
    arrays = [fetch([path])[path] for path in packed.paths]
    if packed.mode != "affine" or scope().target < IOS18:
        return _unpacked(packed, arrays, floats, f"{packed.mode} weights need another target")
    codes = to_numpy(_codes(packed, arrays)).astype(np.uint8)
    scale, bias = (to_numpy(a.astype(mx.float32)) for a in arrays[1:])
    if packed.bits == 2:
        return _table(codes, scale, bias, floats)
    offset, is_exact = _offset(scale, bias, packed.bits, floats)
    if not is_exact:
        return _unpacked(packed, arrays, floats, "its offsets do not fit")
    held = "uint4" if packed.bits <= 4 else "uint8"
    integral = offset.dtype.kind == "u"
    return mb.constexpr_blockwise_shift_scale(
        data=mb.const(val=_stored(codes, held)),
        scale=constant(scale, floats),
        offset=mb.const(val=_stored(offset, held)) if integral else constant(offset, floats),
    )


def _codes(packed: Packed, arrays: list[mx.array]) -> mx.array:
    """Codes [..., out, in]: what dequantises with scales of one and biases of zero."""
    shape = arrays[1].shape
    return mx.dequantize(
        arrays[0], mx.ones(shape), mx.zeros(shape), group_size=packed.group_size, bits=packed.bits
    )


def _offset(scale, bias, bits: int, floats: str) -> tuple[np.ndarray, bool]:
    """Offsets as integers where all are, else as floats; and whether they say what biases say."""
    with np.errstate(divide="ignore", invalid="ignore"):
        real = np.where(bias == 0, 0, -bias / scale)
    whole = np.round(real)
    if np.all((whole >= 0) & (whole < 2**bits)) and _agree(scale, bias, whole):
        return whole.astype(np.uint8), True
    with np.errstate(over="ignore"):
        real = real.astype(NUMPY[floats])
    return real, bool(np.all(np.isfinite(real))) and _agree(scale, bias, real)


def _agree(scale, bias, offset) -> bool:
    with np.errstate(invalid="ignore", over="ignore"):
        off = np.abs(scale * offset.astype(np.float32) + bias)
    return bool(np.all(off <= ROUNDING * np.abs(bias)))


def _stored(array: np.ndarray, name: str) -> np.ndarray:
    return array.astype(types.nptype_from_builtin(types.string_to_builtin(name)))


def _table(codes, scale, bias, floats: str):
    """All values of each group, and which of them each weight is."""
    lut = scale[..., None] * np.arange(4, dtype=np.float32) + bias[..., None]
    return mb.constexpr_lut_to_dense(
        indices=mb.const(val=_stored(codes, "uint2")), lut=constant(lut[..., None], floats)
    )


def _unpacked(packed: Packed, arrays: list[mx.array], floats: str, reason: str):
    scope().notes.append(f"{packed.paths[0]}: kept as {floats}; {reason}")
    whole = mx.dequantize(
        *arrays, group_size=packed.group_size, bits=packed.bits, mode=packed.mode
    )
    return mb.const(val=as_type(to_numpy(whole), floats))
