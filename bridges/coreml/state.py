"""Keys and values that stay in the model: Core ML states in place of inputs and outputs.

All layers of one shape share a state [layers, batch, heads, context, width], as in Apple's own
samples. A step writes its keys behind the `past` ones and attends to the first `total`.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import mlx.core as mx

from ...errors import InputError
from ...graph import Graph, Node, Value, with_outputs
from ...program import Program
from ...sizes import Size, size_named
from ..decoder import caches
from .prepare import fix
from .quiet import mb
from .scope import scope, vector
from .values import cast

MASK = "causal_mask"
TOTAL = "total"


def by_total(graph: Graph, length: int | Size) -> Graph:
    """The graph in the number of all tokens, not of past ones; `length` are new."""
    less = length.terms if isinstance(length, Size) else {(): length}
    past = {(TOTAL,): 1, **{names: -c for names, c in less.items()}}
    return fix(graph, {"past": Size(tuple(sorted(past.items())))})


def with_states(
    graph: Graph, program: Program, length: int | Size, context: int
) -> tuple[Graph, tuple[str, ...], dict[str, tuple[int, ...]]]:
    """The graph of a step with its cache in states; the names of its inputs; the states' shapes.

    Raises `InputError` for a cache that does not grow by joining what is new to what was.
    """
    ids = dict(zip(program.inputs, graph.inputs, strict=True))
    made = dict(zip(program.outputs, graph.outputs, strict=True))
    reads = Counter(i for n in graph.nodes for i in n.inputs)
    cached = dict(caches(program))
    pairs = [pair for pair in cached.items() if reads[ids[pair[0]]]]
    if not pairs:
        raise InputError("the program has no cache to keep; export it without states.")
    producer = {o: n for n in graph.nodes for o in n.outputs}
    updates, states = {}, {}
    for name, shape in _shared(pairs, {p: graph.values[ids[p]].shape for p, _ in pairs}).items():
        states[name] = (len(shape[1]), *shape[0][:2], context, shape[0][3])
        for place, (past, present) in enumerate(shape[1]):
            node = producer.get(made[present])
            _require_joined(past, node, ids[past], reads)
            attributes = (
                name,
                place,
                graph.values[ids[past]].shape[2],
                graph.values[made[present]].shape[2],
            )
            updates[made[present]] = Node("StateUpdate", node.inputs[1:], node.outputs, attributes)
    nodes = tuple(updates.get(n.outputs[0], n) for n in graph.nodes)
    mask = max(graph.values) + 1
    values = {**graph.values, mask: Value((1, 1, length, size_named(TOTAL)), mx.float32)}
    kept = [name for name in program.inputs if name not in cached]
    inputs = (*(ids[name] for name in kept), mask)
    graph = replace(graph, nodes=nodes, values=values, inputs=inputs)
    return with_outputs(graph, graph.outputs[: -len(cached)]), (*kept, MASK), states


def _shared(pairs: Iterable[tuple[str, str]], shapes) -> dict[str, tuple]:
    """By the name of a state, the shape of a layer's part in it, and the layers' pairs."""
    groups: dict[tuple, list] = {}
    for past, present in pairs:
        groups.setdefault((past.rpartition(".")[2], shapes[past]), []).append((past, present))
    count = Counter(part for part, _ in groups)
    seen: Counter = Counter()
    out = {}
    for (part, shape), members in groups.items():
        name = f"{part}_cache" if count[part] == 1 else f"{part}_cache_{seen[part]}"
        seen[part] += 1
        out[name] = (shape, members)
    return out


def _require_joined(name: str, node: Node | None, past: int, reads: Counter) -> None:
    joined = node is not None and node.op == "Concatenate" and node.inputs[0] == past
    if not joined or node.attributes[0] != 2 or len(node.inputs) != 2 or reads[past] != 1:
        raise InputError(f"{name}: it is used in other ways than to grow; export without states.")


def update_state(x, a, out):
    """Write what is new behind the past; gives all keys up to `total`."""
    name, place, past, total = a
    state, made = scope().states[name], scope().made
    held = made.get(("state", name)) or mb.read_state(input=state)
    inner, row = [False, True, True, False, True], [False, True, True, True, True]
    written = mb.slice_update(
        x=held,
        update=mb.expand_dims(x=cast(x[0], "fp16"), axes=[0]),
        begin=vector([place, 0, 0, past, 0]),
        end=vector([place + 1, 0, 0, total, 0]),
        begin_mask=inner,
        end_mask=inner,
    )
    held = made["state", name] = mb.coreml_update_state(state=state, value=written)
    seen = mb.slice_by_index(
        x=held,
        begin=[place, 0, 0, 0, 0],
        end=vector([place + 1, 0, 0, total, 0]),
        begin_mask=row,
        end_mask=inner,
        squeeze_mask=[True, False, False, False, False],
    )
    return cast(seen, scope().floats)
