"""Attention with its cache, and rotary positions, in the layout that they are computed in.

Projections come as [batch, length, heads * width]; the traced code splits the heads off and moves
them forward. ONNX's operators take the first form, so the moves before and after them fall away.
"""

import numpy as np

from .builder import (
    BOOL,
    INT64,
    Handle,
    cast,
    constant,
    current,
    emit,
    ints,
    number,
    reshape,
    transpose,
)  # fmt: skip
from .forms import plus, times

FORWARD = (0, 2, 1, 3)  # [batch, length, heads, width] -> [batch, heads, length, width]


def concatenate(x: list[Handle], axis: int, shape: tuple) -> Handle:
    """The parts in one; where attention reads a cache that grows, it does that by itself."""
    if len(x) == 2 and axis == 2 and len(shape) == 4:
        return Handle(shape, x[0].dtype, view=("concatenate", tuple(x), axis))
    return emit("Concat", *x, shape=shape, axis=axis)


def attention(x, a, out):
    scale, causal = a
    q, k, v = x[:3]
    mask = x[3] if len(x) > 3 else None
    if mask is not None and mask.dtype != BOOL:
        mask = cast(mask, q.dtype)
    past_k, new_k, past_v, new_v = _cache(k, v)
    if causal and past_k is None and q.shape[2] != k.shape[2]:
        mask, causal = _causal(q.shape[2], k.shape[2]), False
    flat = all(_is_forward(h) for h in (q, new_k, new_v))
    heads = {"q_num_heads": q.shape[1], "kv_num_heads": k.shape[1]} if flat else {}
    inputs = [_rows(h) if flat else h for h in (q, new_k, new_v)]
    inputs += [mask, past_k, past_v]
    while inputs[-1] is None:
        inputs.pop()
    batch, count, length, width = out[0].shape
    shape = (batch, length, count * width) if flat else out[0].shape
    results = emit(
        "Attention", *inputs, outputs=1 if past_k is None else 3, dtype=q.dtype,
        shape=shape if past_k is None else [shape, k.shape, v.shape],
        scale=float(scale), is_causal=int(causal), **heads,
    )  # fmt: skip
    if past_k is not None:
        results, k.name, v.name = results[0], results[1].name, results[2].name
    if not flat:
        return results
    return transpose(reshape(results, (batch, length, count, width)), FORWARD)


def _cache(k: Handle, v: Handle):
    """(past, new) of keys and of values, where both still are concatenations of these."""
    grows = [h.name is None and h.view is not None and h.view[0] == "concatenate" for h in (k, v)]
    if k is v or not all(grows) or k.view[1][0].shape[2] != v.view[1][0].shape[2]:
        return None, k, None, v
    return *k.view[1], *v.view[1]


def _causal(queries, keys) -> Handle:
    """Boolean [queries, keys] for the last queries; ONNX's own counts from the first."""

    def make() -> Handle:
        rows = emit("Range", number(plus(keys, times(-1, queries))), number(keys), number(1))
        rows.shape = (queries,)
        columns = emit("Range", number(0), number(keys), number(1), shape=(keys,))
        return emit("GreaterOrEqual", reshape(rows, (queries, 1)), columns, dtype=BOOL,
                    shape=(queries, keys))  # fmt: skip

    return current().remember(("causal", queries, keys), make)


def _is_forward(handle: Handle) -> bool:
    return handle.view is not None and handle.view[0] == "transpose" and handle.view[2] == FORWARD


def _rows(handle: Handle) -> Handle:
    """[batch, heads, length, width] as [batch, length, heads * width]."""
    batch, heads, length, width = handle.shape
    return reshape(transpose(handle, FORWARD), (batch, length, heads * width))


def rope(x, a, out):
    dims, traditional = a
    q, cos, sin = x
    cos, sin = cast(cos, q.dtype), cast(sin, q.dtype)
    batch, heads, length, width = q.shape
    how = {"interleaved": int(traditional), "rotary_embedding_dim": dims if dims < width else 0}
    places = _places(batch, length)
    if not _is_forward(q):
        return emit("RotaryEmbedding", q, cos, sin, places, shape=q.shape, **how)
    rows = _rows(q)
    turned = emit(
        "RotaryEmbedding", rows, cos, sin, places, shape=rows.shape, num_heads=heads, **how
    )
    return transpose(reshape(turned, (batch, length, heads, width)), FORWARD)


def _places(batch, length) -> Handle:
    """Rows of cos and sin for each token: [batch, length], 0 and up in each row."""

    def make() -> Handle:
        row = emit("Range", number(0), number(length), number(1), dtype=INT64, shape=(length,))
        return emit("Expand", row, ints((batch, length)), shape=(batch, length))

    if isinstance(batch, int) and isinstance(length, int):
        return constant(np.tile(np.arange(length, dtype=np.int64), (batch, 1)))
    return current().remember(("places", batch, length), make)
