"""What is known of a graph's axes while it is read node by node, and how two axes become one."""

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from .dims import (
    Axis,
    Dim,
    Misaligned,
    blend,
    factors,
    freeze,
    is_wild,
    new_axis,
    size_of,
    unify,
)
from .graph import Graph, Node

Axes = list[Axis]
# From the axes of a node's inputs to those of its outputs.
Rule = Callable[["Inference", Node, list[Axes]], list[Axes]]


@dataclass
class Inference:
    """What is known while the graph is read from its inputs to its outputs.

    `axes`: per value, one axis a dimension. `index_of`: for values that hold indices, the axis
    that they point into. `matches`: per node, the wild axes and what they stand along there.
    `reduced`: axes that an operation mixes (means, softmax), where zeroing differs from removing.
    `routed`: pairs (gathered axis, id of the indices) of batched weights such as experts.
    """

    graph: Graph
    axes: dict[int, Axes] = field(default_factory=dict)
    index_of: dict[int, Axis] = field(default_factory=dict)
    matches: dict[int, list] = field(default_factory=dict)
    reduced: list[Axis] = field(default_factory=list)
    routed: list[tuple[Axis, int]] = field(default_factory=list)
    unknown: Counter = field(default_factory=Counter)
    position: int = 0

    def shape(self, value: int) -> tuple[int, ...]:
        return self.graph.values[value].shape

    def unify(self, left: Axis, right: Axis) -> None:
        """Unify two axes. What a wild one stands along twice in a node must keep one size."""
        matches = self.matches.setdefault(self.position, [])
        before = {tuple(ours): theirs for ours, theirs in reversed(matches)}
        count = len(matches)
        unify(left, right, matches)
        for ours, theirs in matches[count:]:
            if tuple(ours) in before:
                unify(before[tuple(ours)], theirs)

    def fresh(self, value: int, *, wild: bool = False, frozen: str | None = None) -> Axes:
        return [new_axis(n, wild=wild, frozen=frozen) for n in self.shape(value)]

    def follow(self, position: int, node: Node, rules: Mapping[str, Rule]) -> None:
        """Set the axes of the outputs of one node, by the rule for its primitive."""
        self.position = position
        x = [self.axes[i] for i in node.inputs]
        try:
            outputs = rules[node.op](self, node, x) if node.op in rules else None
        except Misaligned:
            outputs = self._give_up(node, x, f"{node.op} cuts it in a way that does not fit")
        if outputs is None:
            self.unknown[node.op] += 1
            outputs = self._give_up(node, x, f"no rule for {node.op}")
        self.axes.update(zip(node.outputs, outputs, strict=True))

    def _give_up(self, node: Node, x: list[Axes], why: str) -> list[Axes]:
        for axes in x:
            freeze_all(axes, why)
        return [self.fresh(value, frozen=why) for value in node.outputs]

    def join(self, candidates: list[Axis], size: int) -> Axis:
        """The common axis of elementwise operands: wild ones follow, the others become one."""
        same = [axis for axis in candidates if size_of(axis) == size]
        chosen = next((axis for axis in same if not is_wild(axis)), same[0] if same else [])
        for axis in same:
            if axis is not chosen:
                self.unify(axis, chosen)
        return functools.reduce(blend, same, chosen)

    def solid(self, axis: Axis) -> Axis:
        """The axis as a segment of a sum: with variables of its own where it is wild."""
        out = [Dim(dim.size) if dim.wild else dim for dim in factors(axis)]
        if out != factors(axis):
            self.unify(axis, out)
        return out


def freeze_all(axes: Axes, why: str) -> None:
    for axis in axes:
        freeze(axis, why)
