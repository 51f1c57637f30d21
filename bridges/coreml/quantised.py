"""Find MLX's quantised weights in a graph: what reads codes, scales and biases reads one weight.

The primitives `QuantizedMatmul` and `GatherQMM` say it themselves. An embedding looks codes up and
unpacks them with shifts and masks, otherwise for each width; so it is found by what it computes:
the value that equals `mx.dequantize` of the rows, tried on random codes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import mlx.core as mx

from ...errors import InputError
from ...execute import QUANTISATION_MODES, execute
from ...graph import Graph, Node, Value, with_outputs
from ...sizes import instantiate

BITS = (2, 3, 4, 5, 6, 8)
ROWS = 7  # of the codes that an embedding is tried on


@dataclass(frozen=True)
class Packed:
    """The paths of a weight's codes, scales and, in mode "affine", biases."""

    paths: tuple[str, ...]
    group_size: int
    bits: int
    mode: str


def merge_quantised(graph: Graph) -> tuple[Graph, dict[int, Packed]]:
    """The graph with whole weights [..., out, in], and how each is packed, by its value's id."""
    merger = _Merger(graph)
    nodes = tuple(merger.merged(node) for node in graph.nodes)
    merged = replace(graph, nodes=nodes, values={**graph.values, **merger.values})
    return with_outputs(merged, graph.outputs), {i: p for p, i in merger.ids.items()}


class _Merger:
    def __init__(self, graph: Graph):
        self.graph = graph
        self.paths = {number: path for path, number in graph.parameters.items()}
        self.ids: dict[Packed, int] = {}
        self.values: dict[int, Value] = {}
        self.embeddings = dict(_embeddings(graph, self.paths))

    def merged(self, node: Node) -> Node:
        if node.outputs[0] in self.embeddings:
            numbers, ids, group_size, bits = self.embeddings[node.outputs[0]]
            weight = self._weight(numbers, group_size, bits, "affine")
            return Node("Embedding", (weight, ids), node.outputs)
        if node.op == "QuantizedMatmul" and self._held(node.inputs[1:]):
            x, *numbers = node.inputs
            weight = self._weight(numbers, *node.attributes[:2], self._mode(node))
            return Node("Linear" if node.attributes[3] else "Matmul", (x, weight), node.outputs)
        if node.op == "GatherQMM" and self._held(node.inputs[1:-2]):
            x, *numbers, left, right = node.inputs
            weight = self._weight(numbers, *node.attributes[:2], self._mode(node))
            name = "GatherLinear" if node.attributes[3] else "GatherMM"
            return Node(name, (x, weight, left, right), node.outputs)
        return node

    def _held(self, numbers) -> bool:
        return all(number in self.paths for number in numbers)

    def _mode(self, node: Node) -> str:
        return QUANTISATION_MODES[node.attributes[2]]

    def _weight(self, numbers, group_size: int, bits: int, mode: str) -> int:
        packed = Packed(tuple(self.paths[i] for i in numbers), group_size, bits, mode)
        if packed not in self.ids:
            self.ids[packed] = max(self.graph.values) + 1 + len(self.ids)
            *rows, columns = self.graph.values[numbers[0]].shape
            shape = (*rows, columns * 32 // bits)
            self.values[self.ids[packed]] = Value(shape, mx.float32)
        return self.ids[packed]


def _embeddings(graph: Graph, paths: Mapping[int, str]) -> Iterator[tuple[int, tuple]]:
    """Values that are rows of a quantised weight: its arrays, the ids, group size and bits."""
    lookups = [n for n in graph.nodes if n.op == "Gather" and n.inputs[0] in paths]
    for node in lookups:
        codes, ids = node.inputs[0], node.inputs[1]
        if len(node.inputs) == 2 and graph.values[codes].dtype == mx.uint32:
            stem = paths[codes].removesuffix("weight")
            numbers = [graph.parameters.get(stem + name) for name in ("scales", "biases")]
            if None not in numbers:
                found = _unpacked(graph, (codes, *numbers), ids)
                yield from [found] if found else []


def _unpacked(graph: Graph, numbers: tuple[int, ...], ids: int) -> tuple[int, tuple] | None:
    """The first value made of rows of the three arrays alone that is what they stand for."""
    made_of = {number: {number} for number in numbers} | {ids: set()}
    made_of |= {number: set() for number in graph.constants}
    nodes = []
    for node in graph.nodes:
        if all(i in made_of for i in node.inputs) and node.inputs:
            nodes.append(node)
            sources = set().union(*(made_of[i] for i in node.inputs))
            made_of.update(dict.fromkeys(node.outputs, sources))
            width = graph.values[node.outputs[0]].shape[-1:]
            spec = _spec(graph, numbers, *width) if len(sources) == 3 else None
            if spec and _is_dequantised(graph, nodes, numbers, ids, node.outputs[0], spec):
                return node.outputs[0], (numbers, ids, *spec)
    return None


def _spec(graph: Graph, numbers, width) -> tuple[int, int] | None:
    """Group size and bits of rows of `width`; None where no quantisation has such."""
    columns, groups = (graph.values[i].shape[-1] for i in numbers[:2])
    if not isinstance(width, int) or width % groups or 32 * columns % width:
        return None
    bits = 32 * columns // width
    return (width // groups, bits) if bits in BITS else None


def _is_dequantised(graph: Graph, nodes, numbers, ids: int, value: int, spec) -> bool:
    small = instantiate(graph, {name: 2 for v in graph.values.values() for n in v.shape
                                for name in getattr(n, "names", ())})  # fmt: skip
    group_size, bits = spec
    columns, groups = (graph.values[i].shape[-1] for i in numbers[:2])
    key = mx.random.key(bits)
    codes = mx.random.randint(0, 2**31 - 1, (ROWS, columns), key=key).astype(mx.uint32) * 2 + 1
    scales, biases = mx.random.normal((2, ROWS, groups), key=key)
    picked = mx.random.randint(0, ROWS, small.values[ids].shape, key=key)
    known = {**graph.constants, **dict(zip(numbers, (codes, scales, biases), strict=True))}
    known[ids] = picked
    wanted = {n.outputs[0] for n in nodes}
    there = [n for n in small.nodes if n.outputs[0] in wanted]
    try:
        (got,), _ = execute(small, there, known, outputs=[value])
    except (InputError, ValueError):
        return False
    rows = [mx.take(a, picked, axis=0) for a in (codes, scales, biases)]
    want = mx.dequantize(*rows, group_size=group_size, bits=bits)
    return got.shape == want.shape and mx.allclose(got, want, rtol=1e-5, atol=1e-5).item()
