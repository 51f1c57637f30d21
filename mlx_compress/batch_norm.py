"""Batch norms measured anew: the mean and the variance that the pruned model has there.

A batch norm keeps what it met in training. With units removed before it other values arrive, and
(x - mean) / sqrt(var + eps) has no longer the mean 0 and the variance 1. No weight is touched.
Where weights are fitted (`sequential.py`) they are fitted to the statistics as they are.

Norms are found in the graph: a parameter that is taken from x, channel by channel, and behind it a
scale with the square root of another parameter and a constant.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .axes import NamedAxes
from .edit import edit_graph
from .execute import execute
from .graph import Graph, Node
from .layers import dropped_parameters
from .plan import PrunePlan
from .prune import Cutter, picks, pruned_fetch, pruner
from .refit import Fitted
from .stream import Fetch, Progress, load, segment_between, silent
from .targets import SCALES, Targets


@dataclass(frozen=True)
class BatchNorm:
    """The id of what is normalised, [..., channels], and the paths of its statistics."""

    value: int
    mean: str
    variance: str


def batch_norms(graph: Graph) -> list[BatchNorm]:
    """The norms whose statistics nothing else reads, in the graph's order."""
    walk = Targets(graph)
    out = []
    for node in graph.nodes:
        if node.op == "Subtract" and node.inputs[0] in walk.dynamic:
            value, taken = node.inputs
            mean = walk.parameter(taken, graph.values[value].shape[-1])
            variance = next(_variances(walk, node.outputs[0]), None) if mean else None
            if variance:
                out.append(BatchNorm(value, mean, variance))
    return out


def recalibrated(
    named: NamedAxes,
    plan: PrunePlan,
    batches: Sequence[Sequence[mx.array]],
    fetch: Fetch,
    *,
    start: Cutter | None = None,
    progress: Progress = silent,
) -> Fitted:
    """The cutter for a plan, with the statistics that the pruned model has on `batches`.

    Each norm is measured behind those before it, which are set by then. What nothing was removed
    before is left as it is. Keeps the activations at one place of the graph in memory.
    """
    cutter = Fitted(start or pruner(named, plan))
    graph, pruned = edit_graph(named, plan), pruned_fetch(fetch, cutter)
    dynamic, behind = Targets(graph).dynamic, _behind(named, plan)
    nodes = [node for node in graph.nodes if dynamic.intersection(node.outputs)]
    at = {out: k for k, node in enumerate(nodes) for out in node.outputs}
    norms = [norm for norm in batch_norms(graph) if norm.mean in behind]
    values = [dict(zip(graph.inputs, batch, strict=True)) for batch in batches]
    reached = 0
    for k, norm in enumerate(norms):
        end = at[norm.value] + 1
        if end > reached:
            piece = segment_between(graph, nodes, reached, end, dynamic)
            values = list(_through(graph, piece, load(graph, piece, pruned), values))
            reached = end
        found = _moments([each[norm.value] for each in values])
        cutter.fitted |= dict(zip((norm.mean, norm.variance), found, strict=True))
        progress("batch norms", k + 1, len(norms))
    return cutter


def _through(graph: Graph, piece, weights, values: list[dict]) -> Iterator[dict]:
    for each in values:
        known = {**weights, **{i: each[i] for i in piece.reads}}
        results, _ = execute(graph, piece.nodes, known, outputs=piece.hands_on)
        mx.eval(results)
        yield dict(zip(piece.hands_on, results, strict=True))


def _moments(arrays: list[mx.array]) -> tuple[mx.array, mx.array]:
    """Mean and variance of each channel over all else, float32; sums in float64."""
    count, total, square = 0, 0.0, 0.0
    for rows in map(_rows, arrays):
        count, total = count + len(rows), total + rows.sum(axis=0, dtype=np.float64)
    for rows in map(_rows, arrays):
        square += np.square(rows - total / count).sum(axis=0)
    return mx.array(total / count, mx.float32), mx.array(square / count, mx.float32)


def _rows(array: mx.array) -> np.ndarray:
    return np.array(array.reshape(-1, array.shape[-1]).astype(mx.float32))


def _behind(named: NamedAxes, plan: PrunePlan) -> set[str]:
    """The means of the norms of the whole graph whose input the plan changes."""
    gone, graph = dropped_parameters(named, plan), named.graph
    changed = {v for p, v in graph.parameters.items() if p in gone or picks(named, plan, p)}
    for node in graph.nodes:
        if changed.intersection(node.inputs):
            changed.update(node.outputs)
    return {norm.mean for norm in batch_norms(graph) if norm.value in changed}


def _variances(walk: Targets, value: int) -> Iterator[str]:
    """Parameters under a root in what `value` is multiplied or divided by."""
    while len(walk.readers.get(value, ())) == 1:
        node = walk.readers[value][0]
        others = [i for i in node.inputs if i != value]
        if node.op not in SCALES or not others or others[0] in walk.dynamic:
            return
        yield from filter(None, (_under(walk, root) for root in _roots(walk, others[0])))
        value = node.outputs[0]


def _roots(walk: Targets, value: int) -> Iterator[Node]:
    waiting = [value]
    while waiting:
        node = walk.maker.get(waiting.pop())
        if node is not None:
            waiting += node.inputs
            if node.op == "Sqrt":
                yield node


def _under(walk: Targets, root: Node) -> str | None:
    """The parameter of sqrt(parameter + constant)."""
    node = walk.maker.get(root.inputs[0])
    if node is None or node.op != "Add":
        return None
    width = walk.graph.values[node.outputs[0]].shape[-1]
    found = [walk.parameter(i, width) for i in node.inputs]
    plain = [walk.by_channel(i, width) in walk.graph.constants for i in node.inputs]
    return next((p for p, other in zip(found, plain[::-1], strict=True) if p and other), None)
