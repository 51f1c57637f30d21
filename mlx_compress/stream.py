"""Run a graph piece by piece, so that only one piece's weights are in memory.

The dynamic part of a graph (what depends on its inputs) is cut where least is alive: in a
transformer between blocks, where only the residual stream is. Each segment loads its weights once,
takes all batches through, and forgets the weights. Backwards the same, from stored boundaries.
What depends on parameters and constants alone is computed anew in each segment that reads it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import numpy as np

from .execute import execute, require_supported
from .graph import Graph, Node, dynamic_values

Fetch = Callable[[Iterable[str]], Mapping[str, mx.array]]
Progress = Callable[[str, int, int], None]
PIECES = 48  # a segment holds at least this fraction of the weights; smaller ones are joined
NARROW = 1.5  # a cut may be this much wider than the narrowest nearby
KEPT = 0.25  # what is kept for the way back may take this fraction of the weights' bytes,
KEPT_BYTES = 2**28  # or this many
NEARBY = 1 / 8  # of the weights, before and after
SIDES = ((-1, "left"), (1, "right"))


def silent(stage: str, done: int, total: int) -> None:
    """No progress."""


@dataclass(frozen=True)
class Segment:
    """A run of nodes: what it reads from the previous ones, what it hands on, whose weights."""

    nodes: tuple[Node, ...]
    reads: tuple[int, ...]
    hands_on: tuple[int, ...]
    parameters: tuple[str, ...]


def segments(graph: Graph) -> list[Segment]:
    """Cut a graph into segments that can run one after the other."""
    require_supported(graph)
    dynamic = dynamic_values(graph)
    sequence = [node for node in graph.nodes if dynamic.intersection(node.outputs)]
    cuts = _narrow_cuts(graph, sequence, dynamic)
    bounds = [0, *cuts, len(sequence)]
    pieces = [
        segment_between(graph, sequence, start, end, dynamic)
        for start, end in zip(bounds, bounds[1:], strict=False)
    ]
    return _joined(graph, sequence, dynamic, pieces, bounds)


def stream_forward(
    graph: Graph,
    batches: Sequence[Sequence[mx.array]],
    fetch: Fetch,
    *,
    taps: Iterable[int] = (),
    on_taps: Callable[[int, dict[int, mx.array]], None] | None = None,
    on_outputs: Callable[[int, list[mx.array]], None] | None = None,
    keep: bool = False,
    progress: Progress = silent,
) -> list[list[dict[int, mx.array]]]:
    """Run every batch through `graph`.

    `fetch(paths)` gives parameters, fresh from disk; they are cast to the graph's dtypes. `on_taps`
    gets, for each batch and segment, the tapped values computed there; `on_outputs` a batch's
    outputs. With `keep`, returns for each segment and batch the values that it read, which
    `stream_backward` takes.
    """
    pieces, wanted = segments(graph), set(taps)
    carried = [dict(zip(graph.inputs, batch, strict=True)) for batch in batches]
    boundaries = []
    for s, piece in enumerate(pieces):
        last = piece is pieces[-1]
        weights = load(graph, piece, fetch)
        here = _made(piece, wanted)
        if keep:
            boundaries.append([{i: values[i] for i in piece.reads} for values in carried])
        for b, values in enumerate(carried):
            ends = graph.outputs if last else piece.hands_on
            known = {**weights, **{i: values[i] for i in piece.reads}}
            results, tapped = execute(graph, piece.nodes, known, outputs=ends, taps=here)
            if on_taps and tapped:
                on_taps(b, tapped)
            mx.eval(results)
            if last and on_outputs:
                on_outputs(b, results)
            carried[b] = {} if last else dict(zip(piece.hands_on, results, strict=True))
            progress("forward", s * len(batches) + b + 1, len(pieces) * len(batches))
        del weights
    return boundaries


def stream_backward(
    graph: Graph,
    boundaries: list[list[dict[int, mx.array]]],
    fetch: Fetch,
    loss: Callable[[int, list[mx.array]], mx.array],
    *,
    taps: Iterable[int],
    on_gradients: Callable[[int, dict[int, tuple[mx.array, mx.array]]], None],
    progress: Progress = silent,
) -> None:
    """Differentiate `loss(batch index, outputs)` from the last segment to the first.

    `boundaries` are `stream_forward`'s, and are consumed. `on_gradients(batch, {id: (value,
    gradient)})` gets, segment by segment, the gradient of the loss by each tapped value.
    """
    pieces, wanted = segments(graph), set(taps)
    incoming: list[dict[int, mx.array]] = [{} for _ in boundaries[0]]
    done, total = 0, len(pieces) * len(incoming)
    for piece in reversed(pieces):
        weights = load(graph, piece, fetch)
        held = boundaries.pop()
        here = [i for i in _made(piece, wanted) if _floating(graph, i)]
        for b, reads in enumerate(held):
            finish = (lambda out, b=b: loss(b, out)) if piece is pieces[-1] else None
            tapped, outgoing = _piece_gradients(
                graph, piece, weights, reads, here, incoming[b], finish
            )
            if here:
                on_gradients(b, tapped)
            mx.eval(outgoing)
            incoming[b] = outgoing
            done += 1
            progress("backward", done, total)
        del weights, held


def groups(
    graph: Graph,
    batches: Sequence[Sequence[mx.array]],
    progress: Progress = silent,
    *,
    start: int = 0,
) -> Iterator[tuple[int, Sequence[Sequence[mx.array]], Progress]]:
    """Divide batches so that what `stream_forward` keeps of each group takes little memory.

    Yields, from batch `start` on, the index of a group's first batch, the group, and the progress
    to give to its passes, which counts over all of the batches.
    """
    reads = {i for piece in segments(graph) for i in piece.reads}
    weights = sum(_nbytes(graph, i) for i in graph.parameters.values())
    room = max(KEPT_BYTES, KEPT * weights)
    count = max(1, int(room // max(1, sum(_nbytes(graph, i) for i in reads))))
    for first in range(start, len(batches), count):
        group = batches[first : first + count]
        yield first, group, partial(_part, progress, first, len(group), len(batches))


def _part(progress: Progress, first, own, batches, stage: str, done: int, total: int) -> None:
    pieces = total // own
    progress(stage, first * pieces + done, batches * pieces)


def load(graph: Graph, piece: Segment, fetch: Fetch) -> dict[int, mx.array]:
    """A segment's parameters and constants by value id, in memory, in the graph's dtypes."""
    arrays = fetch(piece.parameters)
    ids = {path: graph.parameters[path] for path in piece.parameters}
    cast = {i: arrays[path].astype(graph.values[i].dtype) for path, i in ids.items()}
    del arrays
    mx.eval(cast)
    needed = {i for node in piece.nodes for i in node.inputs}
    return cast | {i: a for i, a in graph.constants.items() if i in needed}


def _piece_gradients(graph, piece, weights, reads, taps, incoming, finish):
    """(value, gradient) at each tap, and the gradients by the segment's floating reads."""
    floats = [i for i in piece.reads if _floating(graph, i)]
    ends = list(graph.outputs) if finish else [i for i in piece.hands_on if i in incoming]
    shifts = [mx.zeros(graph.values[i].shape, graph.values[i].dtype) for i in taps]
    whole = [i for node in piece.nodes for i in node.outputs if not _floating(graph, i)]

    def run(*arrays):
        known = {**weights, **reads, **dict(zip(floats, arrays, strict=False))}
        moves = zip(taps, arrays[len(floats) :], strict=True)
        edits = {i: (lambda value, move=move: value + move) for i, move in moves}
        edits |= dict.fromkeys(whole, mx.stop_gradient)  # MLX refuses gradients by indices
        out, kept = execute(graph, piece.nodes, known, outputs=ends, taps=taps, replace=edits)
        return [*([finish(out)] if finish else out), *(kept[i] for i in taps)]

    seeds = [mx.array(1.0)] if finish else [incoming[i] for i in ends]
    seeds += [mx.zeros_like(shift) for shift in shifts]
    outputs, slopes = mx.vjp(run, [reads[i] for i in floats] + shifts, seeds)
    values = outputs[len(outputs) - len(taps) :]
    tapped = {i: (v, g) for i, v, g in zip(taps, values, slopes[len(floats) :], strict=True)}
    return tapped, dict(zip(floats, slopes, strict=False))


def _floating(graph: Graph, value: int) -> bool:
    return mx.issubdtype(graph.values[value].dtype, mx.floating)


def _made(piece: Segment, wanted: set[int]) -> list[int]:
    return [out for node in piece.nodes for out in node.outputs if out in wanted]


def _nbytes(graph: Graph, value: int) -> int:
    known = graph.values[value]
    return math.prod(known.shape) * known.dtype.size


def _narrow_cuts(graph: Graph, sequence: Sequence[Node], dynamic: set[int]) -> list[int]:
    """Positions between nodes where less is alive than around, the inputs' own time aside."""
    last = {i: k for k, node in enumerate(sequence) for i in node.inputs if i in dynamic}
    alive, widths = set(graph.inputs), []
    for k, node in enumerate(sequence):
        alive.update(i for i in node.outputs if i in last)
        alive -= {i for i in alive if last.get(i, -1) <= k}
        floats = any(_floating(graph, i) for i in alive)
        widths.append(sum(_nbytes(graph, i) for i in alive) if floats else math.inf)
    read = np.cumsum(_first_reads(graph, sequence, dynamic))
    nearby = NEARBY * read[-1] if len(read) else 0
    low, high = (np.searchsorted(read, read + s * nearby, side) for s, side in SIDES)
    cuts = []
    for k, width in enumerate(widths[:-1]):
        narrowest = min(widths[low[k] : high[k]])
        if width <= NARROW * narrowest < math.inf:
            cuts.append(k + 1)
    return cuts


def _first_reads(graph: Graph, sequence: Sequence[Node], dynamic: set[int]) -> list[int]:
    """For each node, the bytes of the parameters that it is the first to need."""
    size = {i: _nbytes(graph, i) for i in graph.parameters.values()}
    maker = {out: node for node in graph.nodes for out in node.outputs}
    seen, out = set(dynamic), []
    for node in sequence:
        waiting, total = list(node.inputs), 0
        while waiting:
            value = waiting.pop()
            if value not in seen:
                seen.add(value)
                total += size.get(value, 0)
                waiting += maker[value].inputs if value in maker else ()
        out.append(total)
    return out


def segment_between(graph, sequence, start: int, end: int, dynamic: set[int]) -> Segment:
    """The nodes from `start` to before `end` of `sequence`, the dynamic ones, and their needs."""
    own = sequence[start:end]
    made = {out for node in own for out in node.outputs}
    later = {i for node in sequence[end:] for i in node.inputs} | set(graph.outputs)
    earlier = {out for node in sequence[:start] for out in node.outputs} | set(graph.inputs)
    needed = {i for node in own for i in node.inputs}
    if end == len(sequence):
        needed |= set(graph.outputs) - made
    passing = earlier & later
    reads = sorted(earlier & (needed | passing))
    closure, static = _static_closure(graph, needed - dynamic, dynamic)
    positions = {id(node): k for k, node in enumerate(graph.nodes)}
    nodes = sorted([*static, *own], key=lambda node: positions[id(node)])
    paths = {i: path for path, i in graph.parameters.items()}
    return Segment(
        nodes=tuple(nodes),
        reads=tuple(reads),
        hands_on=tuple(sorted((made | earlier) & later)) if end < len(sequence) else (),
        parameters=tuple(paths[i] for i in sorted(closure) if i in paths),
    )


def _static_closure(graph: Graph, wanted: set[int], dynamic: set[int]):
    """The values, and the nodes, from which the static values in `wanted` are computed."""
    closure, nodes = set(wanted), []
    for node in reversed(graph.nodes):
        if closure.intersection(node.outputs) and not dynamic.intersection(node.outputs):
            closure.update(node.inputs)
            nodes.append(node)
    return closure, nodes


def _joined(graph, sequence, dynamic, pieces, bounds) -> list[Segment]:
    """Join neighbours until each holds a fair part of the weights."""
    size = {p: _nbytes(graph, i) for p, i in graph.parameters.items()}
    fair = sum(size.values()) / PIECES
    ends, held = [0], 0
    for piece, end in zip(pieces, bounds[1:], strict=True):
        held += sum(size[path] for path in piece.parameters)
        if held >= fair or end == len(sequence):
            ends.append(end)
            held = 0
    if len(ends) == len(bounds):
        return pieces
    return [
        segment_between(graph, sequence, start, end, dynamic)
        for start, end in zip(ends, ends[1:], strict=False)
    ]
