"""Where a model multiplies activations into weights: the places at which units are worth something.

What is removed there is all that a unit adds to the model. The graph says where these places are;
no code in the model is touched.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from .axes import NamedAxes
from .dims import Axis, leaves, size_of
from .graph import Graph, Node
from .second import Window, window_of

CONTRACTIONS = {"Matmul": -2, "AddMM": -2, "GatherMM": -2, "Convolution": -1}


@dataclass(frozen=True)
class Contraction:
    """A product of an activation with weights, over the activation's last axis.

    `value` is the activation's id, [..., n], and `output` the product's; `axis` is the contracted
    axis. `weight` is (parameter path, axis) where the operand is a parameter, else None.
    `experts` is the id of the indices that pick an expert for each row, None for plain weights.
    `window` says how a convolution takes patches. `layout` is the order in which the parameter's
    axes read: experts, what is contracted, what comes out; None where it cannot be said so.
    """

    value: int
    output: int
    axis: Axis
    weight: tuple[str, int] | None
    experts: int | None = None
    rows: int | None = None
    expert_axis: Axis | None = None
    window: Window | None = None
    layout: tuple[int, ...] | None = None

    @property
    def second_key(self) -> tuple:
        """Where the second moments lie: convolutions with other patches have others."""
        return self.value, self.experts, self.window

    @property
    def leading(self) -> int:
        """How many axes of the layout are batches of weights."""
        return int(self.experts is not None)

    @property
    def contracted(self) -> int:
        """How many axes of the layout are contracted; the last of them is the activation's."""
        return 1 + (len(self.window.kernel) if self.window else 0)

    @property
    def second_bytes(self) -> int:
        """What its second moments take in float64."""
        slots = size_of(self.axis) * (math.prod(self.window.kernel) if self.window else 1)
        experts = size_of(self.expert_axis) if self.expert_axis else 1
        return 2 * 8 * experts * slots**2

    @property
    def key(self) -> tuple[int, int | None]:
        return self.value, self.experts


def contractions(named: NamedAxes) -> list[Contraction]:
    """Where the model multiplies activations into weights."""
    graph, axes = named.graph, named.inference.axes
    static = _static(graph)
    origin = _origins(graph)
    out = []
    for node in graph.nodes:
        if node.op not in CONTRACTIONS or node.inputs[0] in static:
            continue
        if node.inputs[1] not in static:
            continue
        weight = origin.get((node.inputs[1], _reading_axis(graph, node)))
        routed = node.inputs[3] if node.op == "GatherMM" else None
        out.append(
            Contraction(
                value=node.inputs[0],
                output=node.outputs[0],
                axis=axes[node.inputs[0]][-1],
                weight=weight if _has_slots(graph, weight, node.inputs[0]) else None,
                experts=routed,
                rows=node.inputs[2] if routed is not None else None,
                expert_axis=axes[node.inputs[1]][0] if routed is not None else None,
                window=window_of(graph, node),
                layout=_layout(graph, node, origin),
            )
        )
    return out


def consumers(named: NamedAxes, dims: Iterable[str]) -> dict[str, list[Contraction]]:
    """For each dimension, the contractions over it."""
    wanted = set(dims)
    out: dict[str, list[Contraction]] = {name: [] for name in wanted}
    for place in contractions(named):
        for name in {named.names[dim] for dim in leaves(place.axis) if dim in named.names}:
            if name in wanted:
                out[name].append(place)
    return out


def _reading_axis(graph: Graph, node: Node) -> int:
    """The axis of a contraction's weights along which the activation's units lie."""
    shape = graph.values[node.inputs[1]].shape
    if node.op == "Convolution" and shape[-1] == 1:  # depthwise: a kernel for each channel
        return 0
    return CONTRACTIONS[node.op] % len(shape)


def _layout(graph: Graph, node: Node, origin) -> tuple[int, ...] | None:
    """The parameter's axes as the contraction reads them: experts, contracted, the others."""
    rank = len(graph.values[node.inputs[1]].shape)
    if node.op == "Convolution":
        order = [*range(1, rank), 0] if window_of(graph, node) else None
    else:
        wanted = 3 if node.op == "GatherMM" else 2
        order = list(range(rank)) if rank == wanted else None
    found = [origin.get((node.inputs[1], k)) for k in order or ()]
    if not found or None in found or len({path for path, _ in found}) > 1:
        return None
    axes = tuple(axis for _, axis in found)
    return axes if len(axes) == len(graph.shapes()[found[0][0]]) else None


def _has_slots(graph: Graph, weight: tuple[str, int] | None, value: int) -> bool:
    """False where the weights have no slot of their own for each unit (grouped convolution)."""
    if weight is None:
        return False
    path, axis = weight
    return graph.shapes()[path][axis] == graph.values[value].shape[-1]


def _static(graph: Graph) -> set[int]:
    static = set(graph.parameters.values()) | set(graph.constants)
    for node in graph.nodes:
        if node.inputs and static.issuperset(node.inputs):
            static.update(node.outputs)
    return static


def _origins(graph: Graph) -> dict[tuple[int, int], tuple[str, int]]:
    """For values that are parameters with their axes permuted: (value, axis) -> (path, axis)."""
    origin = {
        (value, k): (path, k)
        for path, value in graph.parameters.items()
        for k in range(len(graph.values[value].shape))
    }
    for node in graph.nodes:
        if node.op == "Transpose":
            for k, axis in enumerate(node.attributes[0]):
                if (node.inputs[0], axis) in origin:
                    origin[node.outputs[0], k] = origin[node.inputs[0], axis]
    return origin
