"""How far the output of a contraction is off, read where it can still be put right.

What a contraction gives is often only added to something else: y = x W, then perhaps a scale and a
shift for each channel (batch norm), then y + r, with r the residual stream. If r is off as well, W
can make up for that too. So the error of y is read at the end of such a chain: at s = a y + b + r,
as the difference of s between the dense and the pruned model, over a.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

from .contractions import Contraction
from .execute import apply_node
from .graph import SHAPE_ONLY, Graph, Node, dynamic_values

RESHAPES = frozenset(("ExpandDims", "Flatten", "Reshape", "Squeeze", "Unflatten"))
SUMS = frozenset(("Add", "Subtract"))
SCALES = frozenset(("Multiply", "Divide"))


@dataclass(frozen=True)
class Target:
    """The contraction, the nodes from its output to `end`, and where a bias can go.

    `bias` is a parameter [outputs] that is added on the way and read by nothing else, None where
    there is none; after the first `bias_at` nodes of the chain it has been added.
    """

    place: Contraction
    chain: tuple[Node, ...]
    end: int
    bias: str | None = None
    bias_at: int = 0

    def error(self, graph: Graph, values: Mapping[int, mx.array], difference: mx.array):
        """The error of the contraction's output, in its shape, from that at `end`.

        `values` holds what the scales of the chain are computed to.
        """
        slope = self.slope(graph, values, len(self.chain))
        error = mx.where(slope == 0, 0, difference / mx.where(slope == 0, 1, slope))
        return error.reshape(graph.values[self.place.output].shape)

    def slope(self, graph: Graph, values: Mapping[int, mx.array], count: int) -> mx.array:
        """d(value after `count` nodes of the chain) / d(output), entry by entry."""
        here, slope = self.place.output, mx.ones(graph.values[self.place.output].shape)
        for node in self.chain[:count]:
            if node.op in SCALES:
                other = values[node.inputs[1 - node.inputs.index(here)]]
                slope = slope * other if node.op == "Multiply" else slope / other
            elif node.op == "Subtract" and node.inputs[1] == here:
                slope = -slope
            elif node.op in RESHAPES:
                slope = apply_node(graph, node, [slope])[0]
            here = node.outputs[0]
        return slope

    @property
    def bias_is_taken_off(self) -> bool:
        before = (self.place.output, *(node.outputs[0] for node in self.chain))
        node = self.chain[self.bias_at - 1] if self.bias_at else None
        return bool(node) and node.op == "Subtract" and node.inputs[0] == before[self.bias_at - 1]

    @property
    def scales(self) -> list[int]:
        """The ids of the values that the chain multiplies or divides by."""
        here, found = self.place.output, []
        for node in self.chain:
            if node.op in SCALES:
                found.append(node.inputs[1 - node.inputs.index(here)])
            here = node.outputs[0]
        return found


def target_of(graph: Graph, place: Contraction) -> Target:
    """Follow a contraction's output as long as it is only shifted, scaled and added to."""
    readers, dynamic = _readers(graph), dynamic_values(graph)
    here, chain, bias = place.output, [], _own_bias(graph, place, readers)
    while len(readers.get(here, ())) == 1 and here not in graph.outputs:
        node = readers[here][0]
        others = [i for i in node.inputs if i != here]
        if node.op in SUMS and bias is None:
            bias = _bias(graph, others[0], readers, len(chain) + 1) if others else None
        static = not dynamic.intersection(others)
        if node.op not in SUMS | RESHAPES and not (node.op in SCALES and others and static):
            break
        if node.op == "Divide" and node.inputs[0] != here:
            break
        chain.append(node)
        here = node.outputs[0]
        if not static:
            break
    return Target(place, tuple(chain), here, *(bias or ()))


def _readers(graph: Graph) -> dict[int, list[Node]]:
    out: dict[int, list[Node]] = {}
    for node in graph.nodes:
        for i in node.inputs:
            out.setdefault(i, []).append(node)
    return out


def _own_bias(graph: Graph, place: Contraction, readers) -> tuple[str, int] | None:
    """The addend of an `AddMM`."""
    node = next(n for n in graph.nodes if place.output in n.outputs)
    return _bias(graph, node.inputs[2], readers, 0) if node.op == "AddMM" else None


def _bias(graph: Graph, value: int, readers, at: int) -> tuple[str, int] | None:
    """The parameter of one axis that `value` is, if nothing else reads it."""
    maker = {o: n for n in graph.nodes for o in n.outputs}
    while len(readers[value]) == 1 and value in maker and maker[value].op in SHAPE_ONLY:
        value = maker[value].inputs[0]
    path = next((p for p, i in graph.parameters.items() if i == value), None)
    alone = path is not None and len(readers[value]) == 1
    return (path, at) if alone and len(graph.shapes()[path]) == 1 else None
