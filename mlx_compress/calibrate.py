"""Statistics of activations, collected once over calibration batches.

What is measured is the input of each *contraction*: where a dimension's units are multiplied into
weights and summed, so that what a unit adds to the model is all that passes there. The graph says
where these places are; no code in the model is touched.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import mlx.core as mx
import numpy as np

from .axes import NamedAxes
from .dims import Axis, leaves
from .errors import InputError
from .graph import Graph, Node
from .stream import Fetch, Progress, groups, silent, stream_backward, stream_forward


@dataclass(frozen=True)
class Contraction:
    """A product of an activation with weights, over the activation's last axis.

    `value` is the activation's id, [..., n]; `axis` its contracted axis. `weight` is (parameter
    path, axis) where the operand is a parameter, else None. `experts` is the id of the indices
    that pick an expert for each row, None for plain weights.
    """

    value: int
    axis: Axis
    weight: tuple[str, int] | None
    experts: int | None = None
    rows: int | None = None
    expert_axis: Axis | None = None

    @property
    def key(self) -> tuple[int, int | None]:
        return self.value, self.experts


@dataclass
class Moments:
    """Sums over all calibration tokens, [n] or [experts, n], float64.

    `square`: sum of x^2. `norm`: sum over batches of the L2 norm over the batch's tokens.
    `taylor`: sum over sequences of |sum over tokens of x * dL/dx|, None without gradients; where
    experts are picked, whose tokens come sorted by expert, batches take the place of sequences.
    """

    square: np.ndarray
    norm: np.ndarray
    taylor: np.ndarray | None = None
    batches: int = 0


@dataclass
class Statistics:
    """Moments by the key of a contraction, and how much text they stand on."""

    moments: dict[tuple[int, int | None], Moments] = field(default_factory=dict)
    tokens: int = 0


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
                axis=axes[node.inputs[0]][-1],
                weight=weight if _has_slots(graph, weight, node.inputs[0]) else None,
                experts=routed,
                rows=node.inputs[2] if routed is not None else None,
                expert_axis=axes[node.inputs[1]][0] if routed is not None else None,
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


def calibrate(
    named: NamedAxes,
    batches: Sequence[Sequence[mx.array]],
    fetch: Fetch,
    *,
    dims: Iterable[str],
    loss: Callable[[int, list[mx.array]], mx.array] | None = None,
    progress: Progress = silent,
) -> Statistics:
    """Moments at every contraction over one of `dims`, streamed segment by segment.

    `batches` hold the graph's inputs, in its shapes. With `loss(batch index, outputs)` the Taylor
    terms are collected too, by a backward pass over as many batches at a time as memory allows.
    Raises `InputError` on NaN or infinity, naming the parameter that holds it, or else the one
    where it was met.
    """
    places = {p.key: p for each in consumers(named, dims).values() for p in each}
    statistics = Statistics()
    tapped = {i for key in places for i in key if i is not None}
    tapped |= {p.rows for p in places.values() if p.rows is not None}
    index = _IndexValues(places.values())

    def on_taps(first: int, b: int, values: dict[int, mx.array]) -> None:
        index.remember(first + b, values)
        for place in places.values():
            if place.value in values:
                _add_moments(statistics, place, values[place.value], index.of(first + b, place))

    def on_gradients(first: int, b: int, values) -> None:
        for place in places.values():
            if place.value in values:
                product = values[place.value][0] * values[place.value][1]
                _add_taylor(statistics, place, product, index.of(first + b, place), batches[0])

    whole = [(0, batches, progress)]
    for first, group, told in groups(named.graph, batches, progress) if loss else whole:
        boundaries = stream_forward(
            named.graph, group, fetch,
            taps=tapped, on_taps=partial(on_taps, first), keep=loss is not None, progress=told,
        )  # fmt: skip
        _check_finite(named, statistics, places, fetch)
        if loss is not None:
            stream_backward(
                named.graph, boundaries, fetch, lambda b, out, first=first: loss(first + b, out),
                taps={p.value for p in places.values()},
                on_gradients=partial(on_gradients, first), progress=told,
            )  # fmt: skip
            _check_finite(named, statistics, places, fetch)
    statistics.tokens = sum(int(batch[0].size) for batch in batches)
    return statistics


CONTRACTIONS = {"Matmul": -2, "AddMM": -2, "GatherMM": -2, "Convolution": -1}


class _IndexValues:
    """The expert indices of each batch; small, and needed again on the way back."""

    def __init__(self, places: Iterable[Contraction]):
        self.ids = {i for p in places for i in (p.experts, p.rows) if i is not None}
        self.held: dict[tuple[int, int], mx.array] = {}

    def remember(self, batch: int, values: dict[int, mx.array]) -> None:
        for i in self.ids & set(values):
            self.held[batch, i] = values[i]
            mx.eval(values[i])

    def of(self, batch: int, place: Contraction) -> tuple[mx.array | None, mx.array | None]:
        return self.held.get((batch, place.rows)), self.held.get((batch, place.experts))


def _per_slot(place: Contraction, value: mx.array, index) -> mx.array:
    """Sum a quantity [..., n] over its rows: [n], or [experts, n] by the expert of each row."""
    rows, experts = index
    if experts is None:
        return value.reshape(-1, value.shape[-1]).sum(axis=0)
    per_row = value.reshape(-1, *value.shape[-2:]).sum(axis=1)
    picked = per_row if rows is None else per_row[rows.reshape(-1)]
    count = sum(dim.size for dim in place.expert_axis)
    return mx.zeros((count, value.shape[-1])).at[experts.reshape(-1)].add(picked)


def _add_moments(statistics: Statistics, place: Contraction, value: mx.array, index) -> None:
    square = _per_slot(place, mx.square(value.astype(mx.float32)), index)
    square = np.array(square, dtype=np.float64)
    held = statistics.moments.get(place.key)
    if held is None:
        zeros = np.zeros_like(square)
        held = statistics.moments[place.key] = Moments(zeros, zeros.copy())
    held.square += square
    held.norm += np.sqrt(square)
    held.batches += 1


def _add_taylor(statistics: Statistics, place, product: mx.array, index, batch) -> None:
    held = statistics.moments[place.key]
    if held.taylor is None:
        held.taylor = np.zeros_like(held.square)
    sequences = batch[0].shape[0]
    if index[1] is None and product.size % (sequences * product.shape[-1]) == 0:
        each = product.reshape(sequences, -1, product.shape[-1]).sum(axis=1)
        term = mx.abs(each).sum(axis=0)
    else:
        term = mx.abs(_per_slot(place, product, index))
    held.taylor += np.array(term, dtype=np.float64)


def check_parameter(path: str, array: mx.array) -> None:
    """Raise `InputError` when a parameter holds NaN or infinity."""
    if mx.issubdtype(array.dtype, mx.floating) and not mx.isfinite(array).all().item():
        raise InputError(
            f"{path}: holds NaN or infinity, so nothing can be scored; repair the checkpoint."
        )


def _check_finite(named: NamedAxes, statistics: Statistics, places, fetch: Fetch) -> None:
    for key, held in statistics.moments.items():
        if np.isfinite(held.square).all() and (
            held.taylor is None or np.isfinite(held.taylor).all()
        ):
            continue
        for path in named.graph.parameters:
            check_parameter(path, fetch([path])[path])
        where = places[key].weight[0] if places[key].weight else f"value {key[0]}"
        raise InputError(
            f"{where}: NaN or infinity arises there during calibration, although all weights are "
            "finite; use --importance magnitude."
        )


def _reading_axis(graph: Graph, node: Node) -> int:
    """The axis of a contraction's weights along which the activation's units lie."""
    shape = graph.values[node.inputs[1]].shape
    if node.op == "Convolution" and shape[-1] == 1:  # depthwise: a kernel for each channel
        return 0
    return CONTRACTIONS[node.op] % len(shape)


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
