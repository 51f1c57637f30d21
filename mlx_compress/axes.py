"""The named axes of a model: which slots of which parameters must shrink together.

`named_axes(graph)` lets every primitive unify the axes of its operands (`axis_rules`). What is left
are the model's dimensions: MLP channels, heads, experts, the residual width. Each is a set of
slots, spread over parameters, that stand or fall as one unit. Nothing here knows any architecture;
what a dimension *is* is told by what the graph does with it.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from .axis_rules import INDEXED, INPUT, RULES
from .dims import Axis, Dim, factors, freeze, leaves, size_of
from .graph import Graph, Node
from .inference import Inference, freeze_all
from .roles import Roles

OUTPUT = "the model's output"


@dataclass(frozen=True)
class Dimension:
    """One prunable (or frozen) dimension.

    `slots` are pairs (parameter path, axis). `frozen` says why its size is fixed, None if free.
    `within` names the dimension inside which its units are chosen anew for each unit: the query
    heads of each KV group, the channels of each expert. `exact` tells whether removing a unit
    equals zeroing it; it does not where a mean or a softmax runs over the dimension.
    """

    name: str
    kind: str
    size: int
    slots: tuple[tuple[str, int], ...]
    frozen: str | None = None
    within: str | None = None
    exact: bool = True

    @property
    def free(self) -> bool:
        return self.frozen is None


@dataclass
class NamedAxes:
    """The dimensions of a graph, and the axes of all of its values in terms of them."""

    graph: Graph
    inference: Inference
    dimensions: dict[str, Dimension]
    names: dict[Dim, str] = field(repr=False)

    @property
    def unknown(self) -> dict[str, int]:
        """Primitives without a rule, and how often each occurs."""
        return dict(self.inference.unknown)

    def free(self, kinds: Iterable[str] | None = None) -> list[Dimension]:
        """The prunable dimensions, of the given kinds."""
        wanted = None if kinds is None else set(kinds)
        return [
            d for d in self.dimensions.values() if d.free and (wanted is None or d.kind in wanted)
        ]

    def axes_of(self, path: str) -> list[Axis]:
        return self.inference.axes[self.graph.parameters[path]]

    def sizes_after(self, path: str, counts: Mapping[str, int]) -> tuple[int, ...]:
        """A parameter's shape when dimensions keep `counts` units; the others stay whole."""
        return tuple(self._size_after(axis, counts) for axis in self.axes_of(path))

    def _size_after(self, axis: Axis, counts: Mapping[str, int]) -> int:
        size = 1
        for dim in factors(axis):
            if dim.segments is not None:
                size *= sum(self._size_after(segment, counts) for segment in dim.segments)
            else:
                size *= counts.get(self.names[dim], dim.size)
        return size

    def is_vocabulary(self, path: str) -> bool:
        """Whether a parameter is an embedding or a head: it is indexed by ids, or is the output."""
        reasons = {dim.frozen for axis in self.axes_of(path) for dim in leaves(axis)}
        return bool(reasons & {INDEXED, OUTPUT})

    def describe(self, path: str) -> list[str]:
        """Each axis of a parameter in words: `heads*query_heads*(head_dim|head_dim)`."""
        return [self._words(axis) for axis in self.axes_of(path)]

    def _words(self, axis: Axis) -> str:
        words = []
        for dim in factors(axis):
            if dim.segments is None:
                words.append(self.names[dim])
            else:
                words.append("(" + "|".join(self._words(s) for s in dim.segments) + ")")
        return "*".join(words) or "1"

    @cached_property
    def _coordinates(self) -> dict[str, list[dict[str, np.ndarray]]]:
        return {}

    def coordinates(self, path: str) -> list[dict[str, np.ndarray]]:
        """For each axis of a parameter, `units_along` it."""
        if path not in self._coordinates:
            self._coordinates[path] = [self.units_along(axis) for axis in self.axes_of(path)]
        return self._coordinates[path]

    def units_along(self, axis: Axis) -> dict[str, np.ndarray]:
        """Per dimension on an axis, the unit that each slot belongs to, or -1."""
        return {self.names[d]: units for d, units in _coordinates(axis).items() if d in self.names}


def named_axes(graph: Graph) -> NamedAxes:
    """Find the dimensions of `graph`. Batch and sequence axes are frozen as the model's inputs."""
    inference = _infer(graph)
    slots = _slots(graph, inference)
    roles = Roles.read(graph, inference)
    dims = list(slots)
    kinds = {dim: roles.kind(dim, slots[dim]) for dim in dims}
    names = _names(dims, slots, kinds)
    within = roles.nesting(dims, kinds, slots)
    return NamedAxes(
        graph,
        inference,
        {
            names[dim]: Dimension(
                name=names[dim],
                kind=kinds[dim],
                size=dim.size,
                slots=tuple(slots[dim]),
                frozen=dim.frozen,
                within=names.get(within.get(dim)),
                exact=dim not in roles.mixed,
            )
            for dim in dims
        },
        names,
    )


def _infer(graph: Graph) -> Inference:
    inference = Inference(graph)
    used = {i for node in graph.nodes for i in node.inputs} | set(graph.outputs)
    for value in graph.inputs:
        inference.axes[value] = inference.fresh(value, frozen=INPUT)
    for value in graph.constants:
        inference.axes[value] = inference.fresh(value, frozen="meets a constant array")
    for value in graph.parameters.values():
        why = None if value in used else "not used by the traced call"
        inference.axes[value] = inference.fresh(value, frozen=why)
    for position, node in enumerate(graph.nodes):
        inference.follow(position, node, RULES)
    for value in graph.outputs:
        freeze_all(inference.axes[value], OUTPUT)
    return inference


def _slots(graph: Graph, inference: Inference) -> dict[Dim, list[tuple[str, int]]]:
    slots: dict[Dim, list[tuple[str, int]]] = defaultdict(list)
    for path, value in graph.parameters.items():
        for k, axis in enumerate(inference.axes[value]):
            _freeze_squares(axis)
            for dim in dict.fromkeys(leaves(axis)):
                slots[dim].append((path, k))
    for dim, places in slots.items():
        if len(places) == 1:
            freeze([dim], "no other parameter shares it")
    return slots


def _freeze_squares(axis: Axis) -> None:
    """A dimension multiplied by itself in one axis has no single unit per slot."""
    for dim, count in Counter(id(d) for f in factors(axis) for d in set(leaves([f]))).items():
        if count > 1:
            freeze([d for d in leaves(axis) if id(d) == dim], "stands twice in one axis")


def _names(dims, slots, kinds) -> dict[Dim, str]:
    taken: Counter = Counter()
    names = {}
    for dim in dims:
        prefix = _common_prefix([path for path, _ in slots[dim]])
        name = ".".join([*prefix, kinds[dim]])
        taken[name] += 1
        names[dim] = name if taken[name] == 1 else f"{name}_{taken[name]}"
    return names


def _common_prefix(paths: list[str]) -> list[str]:
    """The innermost module that holds all the parameters."""
    prefix = paths[0].split(".")[:-1]
    for path in paths[1:]:
        parts = path.split(".")[:-1]
        same = [p == q for p, q in zip(prefix, parts, strict=False)]
        prefix = prefix[: same.index(False) if False in same else len(same)]
    return prefix


def _coordinates(axis: Axis) -> dict[Dim, np.ndarray]:
    """For each leaf of an axis, the unit of every slot along it, -1 where it has no part."""
    total = size_of(axis)
    out: dict[Dim, np.ndarray] = {}
    inner = total
    for dim in factors(axis):
        inner //= dim.size
        index = (np.arange(total) // inner) % dim.size
        for leaf, units in _factor_coordinates(dim).items():
            placed = units[index]
            out[leaf] = np.maximum(out[leaf], placed) if leaf in out else placed
    return out


def _factor_coordinates(dim: Dim) -> dict[Dim, np.ndarray]:
    if dim.segments is None:
        return {dim: np.arange(dim.size)}
    out: dict[Dim, np.ndarray] = {}
    start = 0
    for segment in dim.segments:
        for leaf, units in _coordinates(segment).items():
            whole = out.setdefault(leaf, np.full(dim.size, -1))
            whole[start : start + len(units)] = units
        start += size_of(segment)
    return out


def reads(graph: Graph) -> dict[int, list[Node]]:
    """For each value, the nodes that read it."""
    readers: dict[int, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        for value in set(node.inputs):
            readers[value].append(node)
    return readers
