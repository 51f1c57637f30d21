"""Vars of MIL and their types: MLX's types become bool, int32, fp32 and fp16.

Parameters and float inputs have the program's float type. What is made of positions alone (masks,
rotary angles) is fp32, where fp16 would lose positions beyond 2048; it is narrowed where it meets
what is fp16.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from .quiet import mb, types
from .scope import once

NUMPY = {"fp16": np.float16, "fp32": np.float32, "int32": np.int32, "bool": np.bool_}
INT32 = np.iinfo(np.int32)


def kind(dtype: mx.Dtype) -> str:
    """The MIL type of an MLX dtype; that of a float is fp32."""
    if dtype == mx.bool_:
        return "bool"
    return "fp32" if mx.issubdtype(dtype, mx.floating) else "int32"


def type_of(var) -> str:
    return types.builtin_to_string(var.dtype)


def is_float(var) -> bool:
    return type_of(var) in ("fp16", "fp32")


def to_numpy(array: mx.array) -> np.ndarray:
    """Contents of an MLX array in a dtype that NumPy knows; bfloat16 becomes float32."""
    return np.array(array.astype(mx.float32) if array.dtype == mx.bfloat16 else array)


def as_type(array: np.ndarray, name: str) -> np.ndarray:
    """Cast; finite numbers stay finite in fp16, and integers within int32."""
    wanted = NUMPY[name]
    if name == "fp16" and array.dtype != np.float16:
        limit = float(np.finfo(np.float16).max)
        return np.where(np.isinf(array), array, np.clip(array, -limit, limit)).astype(np.float16)
    if name == "int32" and array.dtype.kind in "iu":
        return np.clip(array, INT32.min, INT32.max).astype(np.int32)
    return array.astype(wanted, copy=False)


def constant(array, name: str):
    """A const of a NumPy array or a number."""
    return mb.const(val=as_type(np.asarray(array), name))


def cast(var, name: str):
    """`var` in the type `name`; a constant is cast now, anything else once in the program."""
    if type_of(var) == name:
        return var
    if var.val is not None:
        return constant(var.val, name)
    if name == "bool":
        return mb.not_equal(x=var, y=NUMPY[type_of(var)](0))
    return once(("cast", var.name, name), lambda: mb.cast(x=var, dtype=name))


def alike(arrays: Sequence) -> list:
    """The arrays in one type: what is fp32 becomes fp16 where another is."""
    kinds = {type_of(var) for var in arrays}
    if len(kinds) == 1:
        return list(arrays)
    for name in ("fp16", "fp32", "int32"):
        if name in kinds:
            return [cast(var, name) for var in arrays]
    raise AssertionError(kinds)


def ints(var):
    """A bool as int32, which MIL computes with; anything else as it is."""
    return cast(var, "int32") if type_of(var) == "bool" else var
