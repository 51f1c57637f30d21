"""What a graph costs to run: FLOPs, bytes moved, and the memory of its activations.

This is the table from primitive to work, read from shapes alone; nothing is run. The conventions:

- Products count two FLOPs per multiply-accumulate, of the experts that are routed to only. The
  addend of `AddMM` is where the sum starts, and is free. Quantised products cost the same.
  A convolution counts its padding, but not the zeros between dilated inputs.
- Anything elementwise is one FLOP per output element, of whatever dtype, `exp` like `add`. Casts,
  copies, gathers and changes of shape are none.
- `Softmax` and `LogSumExp` cost what they cost written out in such primitives. `Reduce` is one per
  input element, `Sort` n log2 n and `Partition` n comparisons per row of n.
- Bytes are those of each operand read once and each result written once. Of a table, a `Gather`
  reads what it picks; of experts, as many as there are rows to route, at most all. Views move
  nothing and hold no memory of their own. (MLX copies when a `Reshape` meets a transposed array.)
- A value is live from the node that makes it to its last reader, views of it included, in the
  order of the graph; inputs from the start, outputs to the end. Parameters and constants are
  resident throughout, and counted apart. MLX itself may need less, as it writes over an operand
  that dies, or more: on the CPU it allocates ahead of the node that runs.

The tests compare with hand formulas (dense, convolution, attention, Llama, experts), with a slow
simulation of the memory, and with MLX: its views allocate nothing.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from .execute import ELEMENTWISE, UPDATES, require_supported
from .graph import Graph, Node, Value


@dataclass(frozen=True)
class NodeCost:
    """One node. `live_bytes` are the activations in memory while it runs, its own included."""

    flops: int
    bytes_read: int
    bytes_written: int
    live_bytes: int


@dataclass(frozen=True)
class Cost:
    """`nodes` stand beside the graph's. `macs` are the multiply-accumulates of its products.

    `peak_bytes` is the most that activations take at once, and `peak_node` the position of the
    first node where they do, None in a graph without nodes.
    """

    nodes: tuple[NodeCost, ...]
    flops: int
    macs: int
    bytes_read: int
    bytes_written: int
    parameters: int
    parameter_bytes: int
    constant_bytes: int
    peak_bytes: int
    peak_node: int | None


def cost(graph: Graph) -> Cost:
    """The cost of running `graph` once, from its shapes alone.

    Raises `InputError` naming every primitive that has no rule.
    """
    require_supported(graph, FLOPS)
    live = _live_bytes(graph)
    extent = _extents(graph)
    nodes = tuple(
        NodeCost(_flops(graph, node), *_traffic(graph, node, extent), bytes_now)
        for node, bytes_now in zip(graph.nodes, live, strict=True)
    )
    peak_node = max(range(len(live)), key=live.__getitem__, default=None)
    parameters = [graph.values[i] for i in graph.parameters.values()]
    return Cost(
        nodes=nodes,
        flops=sum(node.flops for node in nodes),
        macs=sum(_flops(graph, node, PRODUCTS) for node in graph.nodes) // 2,
        bytes_read=sum(node.bytes_read for node in nodes),
        bytes_written=sum(node.bytes_written for node in nodes),
        parameters=sum(map(size, parameters)),
        parameter_bytes=sum(map(nbytes, parameters)),
        constant_bytes=sum(nbytes(graph.values[i]) for i in graph.constants),
        peak_bytes=0 if peak_node is None else live[peak_node],
        peak_node=peak_node,
    )


def by_module(graph: Graph, costs: Cost) -> dict[str, int]:
    """FLOPs by the module whose parameters a node reads; the rest (attention scores) under "".

    The key is a parameter's path without its last name. What is computed from parameters alone (a
    transposed or dequantised weight) belongs to the first of them, and so does a node's work.
    """
    module = {i: path.rpartition(".")[0] for path, i in graph.parameters.items()}
    dynamic, flops = set(graph.inputs), Counter()
    for node, spent in zip(graph.nodes, costs.nodes, strict=True):
        owners = [module[i] for i in node.inputs if i in module]
        flops[owners[0] if owners else ""] += spent.flops
        if dynamic.intersection(node.inputs):
            dynamic.update(node.outputs)
        elif owners:
            module.update(dict.fromkeys(node.outputs, owners[0]))
    return {path: count for path, count in flops.items() if count}


def size(value: Value) -> int:
    """The number of elements."""
    return math.prod(value.shape)


def nbytes(value: Value) -> int:
    return size(value) * value.dtype.size


# ---- memory

VIEWS = {
    "AsStrided", "Broadcast", "Copy", "Depends", "ExpandDims", "Flatten", "Reshape", "Slice",
    "Split", "Squeeze", "StopGradient", "Transpose", "Unflatten", "View",
}  # fmt: skip


def _aliases(node: Node) -> list[tuple[int, int]]:
    """Pairs (output, the input whose memory it is) of a view."""
    if node.op not in VIEWS:
        return []
    sources = node.inputs if node.op == "Depends" else [node.inputs[0]] * len(node.outputs)
    return list(zip(node.outputs, sources, strict=False))


def _live_bytes(graph: Graph) -> list[int]:
    """For each node, the bytes of activations in memory while it runs."""
    owner = {i: i for i in graph.values}
    last: dict[int, int] = {}
    for k, node in enumerate(graph.nodes):
        for out, source in _aliases(node):
            owner[out] = owner[source]
        last.update({owner[i]: k for i in (*node.inputs, *node.outputs)})
    last.update({owner[i]: len(graph.nodes) for i in graph.outputs})
    resident = {*graph.parameters.values(), *graph.constants}
    dying: dict[int, int] = defaultdict(int)
    for i, k in last.items():
        dying[k] += 0 if i in resident else nbytes(graph.values[i])

    now, live = sum(nbytes(graph.values[i]) for i in set(graph.inputs) & set(last)), []
    for k, node in enumerate(graph.nodes):
        now += sum(nbytes(graph.values[i]) for i in node.outputs if owner[i] == i)
        live.append(now)
        now -= dying[k]
    return live


def _extents(graph: Graph) -> dict[int, int]:
    """The bytes that reading a whole value touches: a broadcast one's are those of its source."""
    extent = {i: nbytes(value) for i, value in graph.values.items()}
    for node in graph.nodes:
        for out, source in _aliases(node):
            extent[out] = min(extent[out], extent[source])
    return extent


def _traffic(graph: Graph, node: Node, extent: dict[int, int]) -> tuple[int, int]:
    """Bytes read and written by one node."""
    if node.op in VIEWS:
        return 0, 0
    written = sum(nbytes(graph.values[i]) for i in node.outputs)
    read = {i: extent[i] for i in node.inputs}
    if node.op in ("Gather", "GatherAxis"):
        read[node.inputs[0]] = min(read[node.inputs[0]], written)
    if node.op in ("GatherMM", "GatherQMM"):
        rows = size(graph.values[node.inputs[-1]])
        for i in set(node.inputs[:-2]):
            batch = max(1, math.prod(graph.values[i].shape[:-2]))
            read[i] = read[i] * min(rows, batch) // batch
    return sum(read.values()), written


# ---- FLOPs


def _flops(graph: Graph, node: Node, table: Mapping | None = None) -> int:
    """By a table that may leave primitives out; they cost nothing then."""
    x, out = ([graph.values[i] for i in ids] for ids in (node.inputs, node.outputs))
    rule = (FLOPS if table is None else table).get(node.op)
    return rule(x, node.attributes, out) if rule else 0


# A rule takes x and out, the `Value`s of inputs and outputs; and a, the attributes.


def _none(x, a, out):
    return 0


def _per_output(x, a, out):
    return sum(map(size, out))


def _per_input(x, a, out):
    return size(x[0])


def _product(x, a, out):
    return 2 * size(out[0]) * x[0].shape[-1]


def _convolution(x, a, out):
    """x [N, spatial..., C], w [O, kernel..., C / groups]."""
    kernel, dilation = x[1].shape[1:-1], a[4]
    places = [
        taps * (after if spread == 1 else before)
        for taps, before, after, spread in zip(
            kernel, x[0].shape[1:-1], out[0].shape[1:-1], dilation, strict=True
        )
    ]
    return 2 * out[0].shape[0] * math.prod(places) * x[1].shape[0] * x[1].shape[-1]


def _softmax(x, a, out):
    return 5 * size(x[0])


def _log_sum_exp(x, a, out):
    return 4 * size(x[0]) + 2 * size(out[0])


def _levels(value: Value, axis: int) -> int:
    return max(0, value.shape[axis] - 1).bit_length()


def _sort(x, a, out):
    return size(x[0]) * _levels(x[0], a[0])


def _hadamard(x, a, out):
    return size(x[0]) * (_levels(x[0], -1) + 1)


def _update(x, a, out):
    """Of SliceUpdate (source, update) and Scatter (..., update): one each where it is combined."""
    return size(x[-1]) if a[0] < len(UPDATES) else 0


def _scatter_axis(x, a, out):
    return size(x[1]) if a[0] == 0 else 0


def _attention(x, a, out):
    """Scaling, the scores, their mask, the softmax, and the sum of values."""
    scores = _scores(x)
    masked = scores if a[1] or len(x) > 3 else 0
    return size(x[0]) + _attention_products(x, a, out) + masked + 5 * scores


def _attention_products(x, a, out):
    return 2 * _scores(x) * (x[0].shape[-1] + x[2].shape[-1])


def _scores(x):
    return math.prod(x[0].shape[:3]) * x[1].shape[2]


def _norm(whole: int, per_row: int):
    """`whole` FLOPs per element, one more for each weight, and `per_row` per row."""
    return lambda x, a, out: (whole + len(x) - 1) * size(x[0]) + per_row * (
        size(x[0]) // x[0].shape[-1]
    )


def _rope(x, a, out):
    return 3 * size(x[0]) // x[0].shape[-1] * a[0]


def _gelu(x, a, out):
    return {"none": 5, "tanh": 8}[a[0]] * size(x[0])


MULTIPLIES = ("Matmul", "AddMM", "GatherMM", "QuantizedMatmul", "GatherQMM", "Linear")
PRODUCTS = {
    **dict.fromkeys(MULTIPLIES, _product),
    "Convolution": _convolution,
    "Attention": _attention_products,
}

MOVES = VIEWS | {
    "Arange", "AsType", "Concatenate", "Contiguous", "Full", "Gather", "GatherAxis", "Pad", "Size"
}  # fmt: skip

FLOPS = {
    **dict.fromkeys(ELEMENTWISE, _per_output),
    **dict.fromkeys(("BitwiseBinary", "DivMod", "Equal", "Log", "Sqrt"), _per_output),
    **dict.fromkeys(("ArgPartition", "ArgReduce", "Partition", "Reduce", "Scan"), _per_input),
    **dict.fromkeys(("ArgSort", "Sort"), _sort),
    **dict.fromkeys(("Scatter", "SliceUpdate"), _update),
    **dict.fromkeys(MOVES, _none),
    **PRODUCTS,
    "Hadamard": _hadamard,
    "LogSumExp": _log_sum_exp,
    "ScatterAxis": _scatter_axis,
    "Softmax": _softmax,
    "Attention": _attention,
    "GELU": _gelu,
    "LayerNorm": _norm(5, 4),
    "RMSNorm": _norm(3, 3),
    "RoPE": _rope,
    "SiLU": lambda x, a, out: 2 * size(x[0]),
}
