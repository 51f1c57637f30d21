"""Arrays and dtypes between torch and MLX.

MLX to torch shares the memory of an evaluated array. The other way copies on a CPU, where MLX can
only use memory of its own, and shares where the device allows it.
"""

import mlx.core as mx
import torch

from ...errors import InputError

TO_MLX = {
    torch.bool: mx.bool_, torch.uint8: mx.uint8, torch.int8: mx.int8, torch.int16: mx.int16,
    torch.int32: mx.int32, torch.int64: mx.int64, torch.float16: mx.float16,
    torch.bfloat16: mx.bfloat16, torch.float32: mx.float32, torch.float64: mx.float32,
    torch.uint16: mx.uint16, torch.uint32: mx.uint32, torch.uint64: mx.uint64,
}  # fmt: skip
TO_TORCH = {theirs: ours for ours, theirs in TO_MLX.items() if ours != torch.float64}
# torch computes little with these; what is computed of them is held in the next wider type.
CARRIERS = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}


def to_mlx(name: str, tensor: torch.Tensor) -> mx.array:
    """A tensor as an array, float64 as float32. `InputError` where MLX has no such array."""
    if tensor.dtype not in TO_MLX or tensor.layout != torch.strided or tensor.is_meta:
        kind = "no data" if tensor.is_meta else f"{tensor.dtype}, {tensor.layout}"
        raise InputError(f"{name}: a tensor with {kind} has no place in MLX; convert it before.")
    array = mx.from_dlpack(tensor.detach().cpu().contiguous())
    return array.astype(TO_MLX[tensor.dtype])


def to_torch_tensor(array: mx.array) -> torch.Tensor:
    """An array as a tensor that shares its memory."""
    mx.eval(array)
    return torch.from_dlpack(array)
