"""A cache in fixed buffers: past and present are the same memory, and nothing is copied.

com.microsoft.GroupQueryAttention writes new keys and values behind the old ones. Beside the buffers
it is told how many positions are filled: the input `past_length`, one int64. It also turns queries
and keys by itself, and takes them and the values from one product. What it asks for: one width of
heads, a multiple of 8, for queries, keys and values; a mask that is causal, maybe with a window;
and one sequence, where several tokens follow a past.
"""

from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from ...errors import InputError
from ...execute import execute
from ...graph import with_outputs
from ...sizes import instantiate, size_named
from . import attention as plain
from .builder import INT32, INT64, Builder, Handle, Static, current, emit, with_inner
from .extents import ints, number, plus
from .runner import LENGTH, PAST

CAPACITY = size_named("capacity")
FAR = 2**16  # windows as wide as this are looked for


def attention(x, a, out):
    scale, causal = a
    builder, (q, k, v) = current(), x[:3]
    past_k, new_k, past_v, new_v = plain.parts(k, v)
    inputs = builder.inputs.values()
    if past_k not in inputs or past_v not in inputs:
        raise InputError(_refusal("what it attends to is not the cache and the new tokens alone"))
    batch, count, length, width = q.shape
    if width % 8 or out[0].shape[-1] != width:
        raise InputError(_refusal(f"a width of heads of {width} and {out[0].shape[-1]}"))
    window = -1 if causal else _window(builder, x[3]) if len(x) > 3 else None
    if window is None:
        raise InputError(_refusal("a mask that is not causal"))
    queries, new_k, tables, interleaved = _unturned(q, new_k)
    packed = _packed([queries, new_k, new_v])
    total = plus(length, size_named("past"))
    last = number(plus(total, -1), INT32)
    ends = builder.remember(
        ("ends",), lambda: emit("Expand", last, ints([batch]), shape=(batch,))
    )
    results = emit(
        "GroupQueryAttention", *packed, past_k, past_v, ends, number(total, INT32), *tables,
        outputs=3, dtype=q.dtype, domain="com.microsoft",
        shape=[(batch, length, count * width), past_k.shape, past_v.shape],
        num_heads=count, kv_num_heads=k.shape[1], scale=float(scale), local_window_size=window,
        do_rotary=int(bool(tables)), rotary_interleaved=interleaved,
    )  # fmt: skip
    k.name, v.name = results[1].name, results[2].name
    return plain.heads_forward(results[0], out[0].shape)


def in_buffers(run):
    """A runner of such a file as one whose cache grows: for comparing it with the program."""

    def grown(feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        length = feeds["input_ids"].shape[1]
        past = next(a.shape[2] for name, a in feeds.items() if name.startswith(PAST))
        wider = [(0, 0), (0, 0), (0, length), (0, 0)]
        held = {n: np.pad(a, wider) if n.startswith(PAST) else a for n, a in feeds.items()}
        return run({**held, LENGTH: np.array([past])})

    return grown


def with_buffers(builder: Builder) -> None:
    """Declare the caches as buffers, and the input that says how far they are filled."""
    caches = [h for h in builder.inputs.values() if h.name.startswith("past_key_values.")]
    if not caches:
        raise InputError("cache buffer: the program has no cache; leave the option out.")
    for handle in caches:
        handle.shape = (*handle.shape[:2], CAPACITY, *handle.shape[3:])
    filled = Handle((1,), INT64, LENGTH)
    builder.inputs[LENGTH] = filled
    builder.remember(("named", "past"), lambda: filled)


def require_buffers(builder: Builder) -> None:
    """Raise `InputError` where anything but the attention on buffers reads a cache."""
    for node in with_inner(builder.nodes):
        read = [name for name in node.input if name.startswith("past_key_values.")]
        if read and node.op_type != "GroupQueryAttention":
            raise InputError(_refusal("something of its own, such as sinks or soft caps,"))


def _refusal(what: str) -> str:
    return f"cache in buffers: attention with {what} has no rule; export with a cache that grows."


def _unturned(q: Handle, k: Handle):
    """Queries and keys before their turn, and the tables to turn them with; or turned, and none.

    The operator turns 16 entries of a head, or a multiple of that, and heads as wide.
    """
    views = [h.open_view("rope") for h in (q, k)]
    alike = all(views) and views[0].parents[1:] == views[1].parents[1:]
    if alike and q.shape[-1] % 16 == 0 and views[0].detail[0] % 16 == 0:
        tables = [_table(current(), h) for h in views[0].parents[1:]]
        if views[0].detail == views[1].detail and all(tables):
            return views[0].parents[0], views[1].parents[0], tables, int(views[0].detail[1])
    turned = [plain.turned(v.parents, v.detail) if v else None for v in views]
    return turned[0] or q, turned[1] or k, [], 0


def _packed(x: list[Handle]) -> list[Handle | None]:
    """One product for all three where they are products of the same input, else each by itself."""
    flat = [plain.rows(h) for h in x]
    views = [h.open_view("product") for h in flat]
    if not all(views) or len({(view.parents[0], view.detail) for view in views}) != 1:
        return flat
    weights = [view.parents[1:] for view in views]
    if len({len(w) for w in weights}) != 1:
        return flat
    left, (rule, a) = views[0].parents[0], views[0].detail
    joined = [_joined(current(), part) for part in zip(*weights, strict=True)]
    shape = (*left.shape[:-1], joined[0].shape[0])
    return [rule([left, *joined], a, shape), None, None]


def _joined(builder: Builder, weights: tuple[Handle, ...]) -> Handle:
    """Static handles one after the other, along their first axis."""
    values = [h.static.value for h in weights]
    name = "+".join(builder.paths.get(v, str(v)) for v in values)
    builder.recipes[name] = lambda: mx.concatenate([builder.array(v) for v in values])
    shape = (sum(h.shape[0] for h in weights), *weights[0].shape[1:])
    return Handle(shape, weights[0].dtype, static=Static(name))


# ---- what depends on positions alone


def _at(builder: Builder, value: int, length: int, past: int) -> np.ndarray | None:
    """A value of the graph for given sizes, if it depends on nothing else."""
    part = with_outputs(builder.graph, [value])
    made = {o for node in part.nodes for o in node.outputs}
    read = {i for node in part.nodes for i in node.inputs} - made
    if not read <= builder.graph.constants.keys():
        return None
    part = instantiate(part, {"batch": 1, "length": length, "past": past})
    known = {i: builder.graph.constants[i] for i in read}
    (array,), _ = execute(part, part.nodes, known, outputs=[value])
    return np.array(array)


def _table(builder: Builder, angles: Handle) -> Handle | None:
    """Cosines or sines of all positions [buffer, dims / 2], if a row is that of its position."""

    def make() -> Handle | None:
        value, size = angles.value, builder.buffer
        table = None if value is None else _at(builder, value, size, 0)
        if table is None or table.ndim != 2:
            return None
        for length, past in ((1, 0), (5, 3), (2, size - 2)):
            if not np.array_equal(_at(builder, value, length, past), table[past : past + length]):
                return None
        name = f"positions.{value}"
        builder.recipes[name] = lambda: table
        return Handle(table.shape, builder.type_of(mx.float32), static=Static(name))

    return builder.remember(("table", angles.value), make)


def _window(builder: Builder, mask: Handle) -> int | None:
    """How many keys a query sees, its own among them, if the mask is a causal window."""

    def make() -> int | None:
        row = None if mask.value is None else _at(builder, mask.value, 1, FAR)
        if row is None or row.dtype != np.bool_:
            return None
        width = int(row.reshape(-1, FAR + 1)[-1].sum())
        for length, past in ((7, 0), (5, 3), (3, width + 4)):
            rows, columns = np.arange(length)[:, None] + past, np.arange(length + past)
            want = (columns <= rows) & (columns > rows - width)
            got = _at(builder, mask.value, length, past)
            if got.shape[-2:] != want.shape or not (got == want).all():
                return None
        return -1 if width > FAR else width

    return builder.remember(("window", mask.value), make)
