"""Where the error of a contraction's output is read: as late as it can still be put right.

What a contraction gives is often only added to something else: y = x W, then perhaps a scale and a
shift for each channel (batch norm), then s = a y + b + r, with r the residual stream. If r is off
as well, W can make up for that too. So such a chain is followed to its end, and the error is the
difference of s between the dense and the pruned model: a change D of W changes s by a x D.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .contractions import Contraction
from .execute import execute
from .graph import SHAPE_ONLY, Graph, Node, dynamic_values

SAME = frozenset(("AsType", "ExpandDims", "Flatten", "Reshape", "Squeeze", "Unflatten"))
MOVES = SHAPE_ONLY | {"AsType"}
SUMS = frozenset(("Add", "Subtract"))
SCALES = frozenset(("Multiply", "Divide"))


@dataclass(frozen=True)
class Step:
    """A node of a chain. `scale` is the id of what it multiplies or divides by, one entry for each
    output or for all, which does not depend on the model's inputs."""

    sign: int = 1
    scale: int | None = None
    divides: bool = False


@dataclass(frozen=True)
class Bias:
    """A parameter [outputs] that nothing else reads, added `gain` times after `at` steps."""

    path: str
    at: int
    gain: float


@dataclass(frozen=True)
class Target:
    """A contraction, the steps from its output to the value `end`, and a bias on the way, if any.

    `gain` times the product is the output; it has `width` entries for each row.
    """

    place: Contraction
    width: int
    end: int
    steps: tuple[Step, ...]
    gain: float
    bias: Bias | None

    @property
    def scales(self) -> list[int]:
        return [step.scale for step in self.steps if step.scale is not None]

    def slope(self, scales: Mapping[int, np.ndarray]) -> np.ndarray:
        """d end / d product, float64 [outputs], where `scales` are computed to float64 [n]."""
        return self.gain * self._slope(scales, 0)

    def bias_slope(self, scales: Mapping[int, np.ndarray]) -> np.ndarray:
        """d end / d bias, likewise."""
        return self.bias.gain * self._slope(scales, self.bias.at)

    def _slope(self, scales, start: int) -> np.ndarray:
        slope = np.ones(self.width)
        for step in self.steps[start:]:
            by = 1.0 if step.scale is None else scales[step.scale]
            slope = step.sign * (slope / by if step.divides else slope * by)
        return slope


class Targets:
    """The targets of a graph's contractions, and the graph as they are found in it.

    `dynamic` are the values that depend on the inputs; `maker` and `readers` give nodes by value,
    `paths` the parameters.
    """

    def __init__(self, graph: Graph):
        self.graph, self.dynamic = graph, dynamic_values(graph)
        self.maker = {out: node for node in graph.nodes for out in node.outputs}
        self.paths: dict[int, list[str]] = {}
        for path, value in graph.parameters.items():
            self.paths.setdefault(value, []).append(path)
        self.readers: dict[int, list[Node]] = {}
        for node in graph.nodes:
            for value in node.inputs:
                self.readers.setdefault(value, []).append(node)

    def of(self, place: Contraction) -> Target:
        """Follow the output as long as it is only shifted, scaled by channel, and added to."""
        width = self._shape(place.output)[-1]
        gain, bias = self._product(place, width)
        end, steps = place.output, []
        for node, other in self._chain(place.output):
            step = self._step(node, end, other, width)
            if step is None:
                break
            steps.append(step)
            if node.op in SUMS:
                sign = -1 if node.op == "Subtract" and node.inputs[1] == other else 1
                bias = bias or self._bias(other, width, len(steps), sign)
            end = node.outputs[0]
        return Target(place, width, end, tuple(steps), gain, bias)

    def is_alone(self, place: Contraction) -> bool:
        """Whether the weight of a contraction goes nowhere else."""
        value = self.graph.parameters[place.weight[0]]
        while self._read_once(value):
            value = self.readers[value][0].outputs[0]
            if value == place.output:
                return True
        return False

    def _read_once(self, value: int) -> bool:
        once = len(self.readers.get(value, ())) == 1 and value not in self.graph.outputs
        return once and len(self.paths.get(value, ())) < 2

    def _shape(self, value: int) -> tuple[int, ...]:
        return self.graph.values[value].shape

    def _product(self, place: Contraction, width: int) -> tuple[float, Bias | None]:
        """The gain of the product, and of an `AddMM` what its addend is."""
        node = self.maker[place.output]
        if node.op != "AddMM":
            return 1.0, None
        alpha, beta = node.attributes
        return alpha, self._bias(node.inputs[2], width, 0, beta)

    def _chain(self, here: int) -> Iterator[tuple[Node, int | None]]:
        """The only reader of each value, and what else it reads."""
        while self._read_once(here):
            node = self.readers[here][0]
            yield node, next((i for i in node.inputs if i != here), None)
            here = node.outputs[0]

    def _step(self, node: Node, here: int, other: int | None, width: int) -> Step | None:
        if node.op in SAME:
            return Step()
        if node.op in SUMS:
            return Step(-1 if node.op == "Subtract" and node.inputs[1] == here else 1)
        divides = node.op == "Divide"
        if node.op not in SCALES or divides and node.inputs[0] != here:
            return None
        scale = None if other in self.dynamic else self.by_channel(other, width)
        fits = self._shape(here)[-1] == width
        return Step(1, scale, divides) if fits and scale is not None else None

    def _bias(self, value: int, width: int, at: int, gain: float) -> Bias | None:
        path = self.parameter(value, width)
        return Bias(path, at, gain) if path and gain else None

    def parameter(self, value: int, width: int) -> str | None:
        """The parameter [width] that a value is along its last axis, if nothing else reads it."""
        found = self.by_channel(value, width, once=True)
        fits = found in self.paths and self._shape(found) == (width,)
        return self.paths[found][0] if fits else None

    def source(self, value: int) -> str | None:
        """The parameter that a value is, but for its layout and its dtype."""
        while value in self.maker and self.maker[value].op in MOVES:
            value = self.maker[value].inputs[0]
        return next(iter(self.paths.get(value, ())), None)

    def by_channel(self, value: int, width: int, *, once: bool = False) -> int | None:
        """The id of what was broadcast along all axes but the last: [width], or of one entry.

        With `once`, only if nothing else reads it.
        """
        while not once or self._read_once(value):
            shape, node = self._shape(value), self.maker.get(value)
            if math.prod(shape) != 1 and shape[-1] != width:
                return None
            if node is None or node.op not in SHAPE_ONLY or node.op == "Transpose":
                return value if math.prod(shape) in (1, width) else None
            value = node.inputs[0]
        return None


def scales_of(graph: Graph, target: Target, nodes, known) -> dict[int, np.ndarray]:
    """The scales of a chain as `Target.slope` takes them, from parameters and constants.

    `nodes` are some of the graph's, with what the scales are computed from.
    """
    dynamic = dynamic_values(graph)
    static = [node for node in nodes if not dynamic.intersection(node.outputs)]
    _, found = execute(graph, static, dict(known), outputs=(), taps=target.scales)
    return {
        i: np.array(scale.astype(mx.float32), dtype=np.float64).reshape(-1)
        for i, scale in found.items()
    }
