"""Rows of a batch that stand for no token: what sequences are filled up with counts nowhere.

A program says which tokens count by an input of this name, as Hugging Face does.
"""

import math

import mlx.core as mx

MASK = "attention_mask"


def without_padding(value: mx.array, mask: mx.array | None) -> mx.array:
    """`value` [R, T, ..., n] or [R * T, n] with zeros where `mask` [R, T] is 0.

    What has other axes in front is left as it is, as is all without a mask.
    """
    rows = _rows(value, mask)
    if rows is None:
        return value
    return mx.where(rows.reshape(*rows.shape, *[1] * (value.ndim - rows.ndim)), value, 0)


def row_count(value: mx.array, mask: mx.array | None) -> float:
    """How many rows of n entries `value` [..., n] has, but for padding."""
    rows = _rows(value, mask)
    if rows is None:
        return value.size / value.shape[-1]
    return rows.sum().item() * math.prod(value.shape[rows.ndim : -1])


def _rows(value: mx.array, mask: mx.array | None) -> mx.array | None:
    """Which entries of the leading axes count."""
    if mask is None or value.ndim < 2:
        return None
    if value.ndim > mask.ndim and value.shape[: mask.ndim] == mask.shape:
        return mask != 0
    return mask.reshape(-1) != 0 if value.shape[0] == mask.size else None
