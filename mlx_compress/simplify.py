"""Say the same with fewer nodes: before patterns are looked for and before a graph is exported.

Gone are nodes that change nothing, nodes that repeat another one (the rotary angles of each layer),
broadcasts that the reader does by itself, and what no output needs. Every square is a `Square`.
Symbolic graphs are welcome.
"""

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx

from .execute import ELEMENTWISE
from .graph import SHAPE_ONLY, Graph, Node, with_outputs

# Readers that broadcast their inputs by themselves, in every target.
BROADCASTING = frozenset(ELEMENTWISE) | {"BitwiseBinary", "Equal"}
IDENTITIES = frozenset(("Contiguous", "Copy", "StopGradient"))
SMALL = 64  # constants of up to so many entries are compared by contents


def simplify(graph: Graph) -> Graph:
    """The same function, value for value, of fewer primitives."""
    return _Simplifier(graph).simplified()


class _Simplifier:
    def __init__(self, graph: Graph):
        self.graph, self.values = graph, graph.values
        self.same: dict[int, int] = {}  # a value -> an earlier one that equals it
        self.seen: dict[tuple, tuple[int, ...]] = {}
        self.broadcast: dict[int, int] = {}  # the output of a Broadcast -> its input
        self.nodes: list[Node] = []

    def simplified(self) -> Graph:
        self._merge_constants()
        for node in self.graph.nodes:
            self._take(replace(node, inputs=tuple(self.same.get(i, i) for i in node.inputs)))
        outputs = tuple(self.same.get(i, i) for i in self.graph.outputs)
        pruned = with_outputs(replace(self.graph, nodes=tuple(self.nodes)), outputs)
        read = {i for node in pruned.nodes for i in node.inputs} | set(outputs)
        constants = {i: a for i, a in pruned.constants.items() if i in read}
        return replace(pruned, constants=constants)

    def _merge_constants(self) -> None:
        first: dict[tuple, int] = {}
        for i, array in self.graph.constants.items():
            if array.size <= SMALL and mx.issubdtype(array.dtype, mx.number):
                key = (array.shape, array.dtype, repr(array.tolist()))
                self.same[i] = first.setdefault(key, i)

    def _take(self, node: Node) -> None:
        if self._changes_nothing(node):
            self.same[node.outputs[0]] = node.inputs[0]
            return
        node = self._as_square(self._without_broadcasts(node))
        dtypes = tuple(self.values[i].dtype for i in node.outputs)
        shapes = tuple(self.values[i].shape for i in node.outputs)
        key = (node.op, node.inputs, _hashable(node.attributes), dtypes, shapes)
        earlier = self.seen.setdefault(key, node.outputs)
        if earlier != node.outputs:
            self.same.update(zip(node.outputs, earlier, strict=True))
            return
        if node.op == "Broadcast":
            self.broadcast[node.outputs[0]] = node.inputs[0]
        self.nodes.append(node)

    def _changes_nothing(self, node: Node) -> bool:
        if len(node.inputs) != 1 or len(node.outputs) != 1:
            return False
        before, after = self.values[node.inputs[0]], self.values[node.outputs[0]]
        if node.op == "Transpose":
            return list(node.attributes[0]) == list(range(len(before.shape)))
        if node.op in SHAPE_ONLY or node.op in IDENTITIES or node.op == "AsType":
            return before == after
        return False

    def _as_square(self, node: Node) -> Node:
        if node.op == "Multiply" and node.inputs[0] == node.inputs[1]:
            return replace(node, op="Square", inputs=node.inputs[:1])
        if node.op == "Power":
            exponent = self.graph.constants.get(node.inputs[1])
            same = self.values[node.inputs[0]] == self.values[node.outputs[0]]
            if same and exponent is not None and exponent.size == 1 and exponent.item() == 2:
                return replace(node, op="Square", inputs=node.inputs[:1])
        return node

    def _without_broadcasts(self, node: Node) -> Node:
        if node.op not in BROADCASTING and node.op != "Matmul":
            return node
        inputs = list(node.inputs)
        for k, number in enumerate(node.inputs):
            bare = [*inputs[:k], self.broadcast.get(number, number), *inputs[k + 1 :]]
            if bare != inputs and self._gives(node, bare):
                inputs = bare
        return replace(node, inputs=tuple(inputs))

    def _gives(self, node: Node, inputs: Sequence[int]) -> bool:
        """Whether the node makes the same shape of these inputs."""
        shapes = [self.values[i].shape for i in inputs]
        want = self.values[node.outputs[0]].shape
        if node.op != "Matmul":
            return broadcast_shape(shapes) == want
        if min(map(len, shapes)) < 2:
            return False
        return broadcast_shape([shape[:-2] for shape in shapes]) == want[:-2]


def broadcast_shape(shapes: Sequence[tuple]) -> tuple | None:
    """The shape that arrays of `shapes` broadcast to, as NumPy does it; None if they do not."""
    rank = max(map(len, shapes))
    out = []
    for axis in range(-rank, 0):
        sizes = {shape[axis] for shape in shapes if len(shape) >= -axis} - {1}
        if len(sizes) > 1:
            return None
        out.append(sizes.pop() if sizes else 1)
    return tuple(out)


def _hashable(entry):
    return tuple(map(_hashable, entry)) if isinstance(entry, tuple | list) else entry
