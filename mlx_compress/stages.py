"""What a sequential refit fits, and the pieces of the graph between these places.

A stage ends where the errors of its fits are read, and begins where the last one ended. It holds
several where one ends behind another's beginning, as attention and MLP do that stand side by side.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .axes import NamedAxes
from .contractions import Contraction, contractions
from .dims import leaves
from .graph import Graph, dynamic_values
from .layers import dropped_parameters
from .plan import PrunePlan
from .prune import Pick, picks
from .second import WIDEST
from .stream import Segment, segment_between
from .targets import Target, Targets


@dataclass(frozen=True)
class Fit:
    """A weight to fit, by its target; `keep` are the slots of its input that stay, `outputs` those
    of its output."""

    target: Target
    path: str
    keep: np.ndarray
    outputs: np.ndarray


@dataclass(frozen=True)
class Stage:
    """A piece of the graph, and the weights that are fitted at its end, in order.

    `front` and `back` are the same piece in two, cut before the first of these weights.
    """

    piece: Segment
    front: Segment
    back: Segment
    fits: tuple[Fit, ...]


def fits_of(
    named: NamedAxes, plan: PrunePlan, *, mend: bool
) -> tuple[list[Fit], dict[str, str]]:
    """The weights that read what is removed, with `mend` all but those that give the output.

    Also gives those that cannot be fitted although they read what is removed, with the reason.
    """
    search = _Search(named, plan)
    found = [search.at(place, mend) for place in contractions(named)]
    return [fit for fit in found if fit], search.left


class _Search:
    def __init__(self, named: NamedAxes, plan: PrunePlan):
        self.named, self.plan, self.targets = named, plan, Targets(named.graph)
        self.gone = dropped_parameters(named, plan)
        self.left: dict[str, str] = {}

    def at(self, place: Contraction, mend: bool) -> Fit | None:
        path = place.weight[0] if place.weight else self._source(place)
        if path is None or path in self.gone:
            return None
        loses, cuts = self._loses(place), picks(self.named, self.plan, path)
        why = self._why_not(place, cuts)
        if why and loses:
            self.left[path] = why
        if why or not loses and not mend:
            return None
        target = self.targets.of(place)
        if not loses and target.end in self.named.graph.outputs:
            return None
        slots = {pick.axis: pick.slots for pick in cuts}
        sizes = self.named.graph.shapes()[path]
        ends = (place.weight[1], place.layout[-1])
        return Fit(target, path, *(slots.get(k, np.arange(sizes[k])) for k in ends))

    def _source(self, place: Contraction) -> str | None:
        return self.targets.source(self.targets.maker[place.output].inputs[1])

    def _loses(self, place: Contraction) -> bool:
        """Whether the plan removes some of what is summed over."""
        node = self.targets.maker[place.output]
        if node.op == "Convolution" and self.named.graph.values[node.inputs[1]].shape[-1] == 1:
            return False  # depthwise: each unit has a kernel of its own
        return any(self.named.names.get(dim) in self.plan.cuts for dim in leaves(place.axis))

    def _why_not(self, place: Contraction, cuts: list[Pick]) -> str | None:
        if place.experts is not None or any(pick.along is not None for pick in cuts):
            return "it is routed"
        if place.weight is None or place.layout is None:
            return "it is grouped or transformed"
        if not self.targets.is_alone(place):
            return "it is used more than once"
        positions = math.prod(place.window.kernel) if place.window else 1
        slots = self.named.graph.values[place.value].shape[-1]
        return "it is too wide" if slots * positions > WIDEST else None


def stages(graph: Graph, fits: Sequence[Fit]) -> list[Stage]:
    """Cut the graph behind the ends of fits, where no other fit is under way."""
    dynamic = dynamic_values(graph)
    nodes = [node for node in graph.nodes if dynamic.intersection(node.outputs)]
    at = {out: k for k, node in enumerate(nodes) for out in node.outputs}
    spans = sorted(((at[f.target.end], at[f.target.place.output], f) for f in fits),
                   key=lambda span: span[:2])  # fmt: skip
    out, start, held = [], 0, []
    for k, span in enumerate(spans):
        held.append(span)
        end = span[0] + 1
        if all(begin >= end for _, begin, _ in spans[k + 1 :]):
            first = min(begin for _, begin, _ in held)
            cuts = ((start, end), (start, first), (first, end))
            pieces = (segment_between(graph, nodes, *cut, dynamic) for cut in cuts)
            out.append(Stage(*pieces, tuple(fit for _, _, fit in held)))
            start, held = end, []
    return out


def nbytes_of(graph: Graph, values: Iterable[int]) -> int:
    """What these values of a graph take."""
    known = [graph.values[i] for i in values]
    return sum(math.prod(value.shape) * value.dtype.size for value in known)
