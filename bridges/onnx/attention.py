"""Attention with its cache, and rotary positions, in the layout that they are computed in.

Projections come as [batch, length, heads * width]; the traced code splits the heads off and moves
them forward. ONNX's operators take the first form, so the moves before and after them fall away.
"""

import numpy as np

from .builder import BOOL, INT64, Handle, cast, constant, current, emit
from .extents import ints, number, plus, times
from .views import lazily, reshape, transpose

FORWARD = (0, 2, 1, 3)  # [batch, length, heads, width] -> [batch, heads, length, width]


def attention(x, a, out):
    scale, causal = a
    q, k, v = x[:3]
    mask = x[3] if len(x) > 3 else None
    if mask is not None and mask.dtype != BOOL:
        mask = cast(mask, q.dtype)
    past_k, new_k, past_v, new_v = parts(k, v)
    if causal and past_k is None and q.shape[2] != k.shape[2]:
        mask, causal = _causal(q.shape[2], k.shape[2]), False
    flat = all(is_forward(h) for h in (q, new_k, new_v))
    heads = {"q_num_heads": q.shape[1], "kv_num_heads": k.shape[1]} if flat else {}
    inputs = [rows(h) if flat else h for h in (q, new_k, new_v)]
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
    return heads_forward(results, out[0].shape) if flat else results


def parts(k: Handle, v: Handle):
    """(past, new) of keys and of values, where both still are concatenations of these."""
    grows = [h.open_view("concatenate") for h in (k, v)]
    if k is v or not all(
        view and view.detail == (2,) and len(view.parents) == 2 and len(h.shape) == 4
        for view, h in zip(grows, (k, v), strict=True)
    ):
        return None, k, None, v
    (past_k, new_k), (past_v, new_v) = (view.parents for view in grows)
    if past_k.shape[2] != past_v.shape[2]:
        return None, k, None, v
    return past_k, new_k, past_v, new_v


def _causal(queries, keys) -> Handle:
    """Boolean [queries, keys] for the last queries; ONNX's own counts from the first."""

    def make() -> Handle:
        places = emit("Range", number(plus(keys, times(-1, queries))), number(keys), number(1))
        places.shape = (queries,)
        columns = emit("Range", number(0), number(keys), number(1), shape=(keys,))
        return emit("GreaterOrEqual", reshape(places, (queries, 1)), columns, dtype=BOOL,
                    shape=(queries, keys))  # fmt: skip

    return current().remember(("causal", queries, keys), make)


def is_forward(handle: Handle) -> bool:
    view = handle.view
    return view is not None and view.kind == "transpose" and view.detail == FORWARD


def rows(handle: Handle) -> Handle:
    """[batch, heads, length, width] as [batch, length, heads * width]."""
    batch, heads, length, width = handle.shape
    return reshape(transpose(handle, FORWARD), (batch, length, times(heads, width)))


def heads_forward(handle: Handle, shape: tuple) -> Handle:
    """[batch, length, heads * width] as `shape`, [batch, heads, length, width]."""
    batch, heads, length, width = shape
    return transpose(reshape(handle, (batch, length, heads, width)), FORWARD)


def rope(x, a, out):
    if not current().buffer:
        return turned(x, a)
    # Attention on buffers turns its inputs by itself, where it can.
    return lazily("rope", tuple(x), tuple(a), lambda: turned(x, a), x[0].shape)


def turned(x, a) -> Handle:
    dims, traditional = a
    q, cos, sin = x
    cos, sin = cast(cos, q.dtype), cast(sin, q.dtype)
    batch, heads, length, width = q.shape
    how = {"interleaved": int(traditional), "rotary_embedding_dim": dims if dims < width else 0}
    places = _places(batch, length)
    if not is_forward(q):
        return emit("RotaryEmbedding", q, cos, sin, places, shape=q.shape, **how)
    flat = rows(q)
    result = emit(
        "RotaryEmbedding", flat, cos, sin, places, shape=flat.shape, num_heads=heads, **how
    )
    return heads_forward(result, q.shape)


def _places(batch, length) -> Handle:
    """Rows of cos and sin for each token: [batch, length], 0 and up in each row."""

    def make() -> Handle:
        row = emit("Range", number(0), number(length), number(1), dtype=INT64, shape=(length,))
        return emit("Expand", row, ints((batch, length)), shape=(batch, length))

    if isinstance(batch, int) and isinstance(length, int):
        return constant(np.tile(np.arange(length, dtype=np.int64), (batch, 1)))
    return current().remember(("places", batch, length), make)
