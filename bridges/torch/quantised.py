"""MLX's affine quantisation in plain torch operations.

`bits` wide integers lie in one little-endian stream of bits, row by row; each group of `group_size`
entries has a scale and a bias: w = scale * q + bias.
"""

import math

import torch

from ...errors import InputError
from ...execute import QUANTISATION_MODES

BYTE = 8


def unpacked(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Packed rows [..., n * bits / 32] of uint32 as integers [..., n]."""
    width = math.lcm(bits, BYTE) // BYTE  # bytes that hold a whole number of entries
    octets = packed.contiguous().view(torch.uint8).unflatten(-1, (-1, width)).long()
    weights = torch.arange(width, device=packed.device) * BYTE
    words = torch.bitwise_left_shift(octets, weights).sum(dim=-1, keepdim=True)
    shifts = torch.arange(width * BYTE // bits, device=packed.device) * bits
    entries = torch.bitwise_right_shift(words, shifts) & ((1 << bits) - 1)
    return entries.flatten(-2)


def dequantised(packed, scales, biases, group_size: int, bits: int) -> torch.Tensor:
    """The weights [..., rows, n] in the dtype of the scales."""
    grouped = unpacked(packed, bits).unflatten(-1, (-1, group_size)).to(scales.dtype)
    return (grouped * scales.unsqueeze(-1) + biases.unsqueeze(-1)).flatten(-2)


def quantized_matmul(x, a, out):
    group_size, bits, mode, transposed = a
    _require_affine(mode)
    weight = dequantised(*x[1:4], group_size, bits)
    return x[0] @ (weight.mT if transposed else weight)


def gather_qmm(x, a, out):
    """As GatherMM; only the weights that are picked are dequantised."""
    group_size, bits, mode, transposed, *_ = a
    _require_affine(mode)
    left, *packed, lefts, rights = x
    rights = rights.long()
    picked = (tensor.flatten(0, -3)[rights] for tensor in packed)
    weight = dequantised(*picked, group_size, bits)
    left = left.reshape([-1, *left.shape[-2:]])[lefts.long()]
    return left @ (weight.mT if transposed else weight)


def _require_affine(mode: int) -> None:
    if mode:
        raise InputError(
            f"weights quantised by {QUANTISATION_MODES[mode]} have no rule for torch; requantise "
            "them by affine."
        )


def wrapped(index: torch.Tensor, size) -> torch.Tensor:
    """Indices as torch.gather takes them: negative ones count from the end."""
    index = index.long()
    return torch.where(index < 0, index + size, index)
