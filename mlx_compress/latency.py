"""How long a forward pass takes on this machine: timed, and read off between what was timed."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import mlx.core as mx
import numpy as np

from .cost import size
from .execute import run
from .graph import Graph

SECONDS = 4.0  # for all repeats together, as far as the bounds allow
LEAST, MOST = 5, 50  # repeats


def milliseconds(graphs: Sequence[Graph], inputs: Sequence[mx.array]) -> list[float]:
    """The time of each graph on `inputs`, with random weights: the median of its repeats.

    Graphs take turns within each repeat, and turns change places, so that a machine that drifts
    drifts for all. The first round is a warm-up and not counted.
    """
    mx.eval(*inputs)
    pools = _pools(graphs)
    weights = [_weights(graph, pools) for graph in graphs]
    taken: list[list[float]] = [[] for _ in graphs]

    def once(repeat: int) -> None:
        for k in range(len(graphs))[:: -1 if repeat % 2 else 1]:
            start = time.perf_counter()
            mx.eval(run(graphs[k], inputs, weights[k])[0])
            taken[k].append(1e3 * (time.perf_counter() - start))

    once(0)
    round_ms = sum(times.pop() for times in taken)
    for repeat in range(min(max(LEAST, int(1e3 * SECONDS / round_ms)), MOST)):
        once(repeat)
    return [float(np.median(times)) for times in taken]


def _pools(graphs: Sequence[Graph]) -> dict[mx.Dtype, mx.array]:
    """By dtype, random numbers for the largest graph: all graphs use the same memory.

    They are positive, so that none is the root of a negative variance and none gets denormal.
    """
    needed: Counter[mx.Dtype] = Counter()
    for graph in graphs:
        here: Counter[mx.Dtype] = Counter()
        for value in _parameters(graph):
            here[value.dtype] += size(value)
        needed |= here
    key = mx.random.key(0)
    pools = {d: mx.random.uniform(0.5, 1.5, (n,), key=key).astype(d) for d, n in needed.items()}
    mx.eval(pools)
    return pools


def _parameters(graph: Graph):
    return [graph.values[i] for i in graph.parameters.values()]


def _weights(graph: Graph, pools: Mapping[mx.Dtype, mx.array]) -> dict[str, mx.array]:
    """Parameters side by side in the pool of their dtype."""
    at: Counter[mx.Dtype] = Counter()
    out = {}
    for path, value in zip(graph.parameters, _parameters(graph), strict=True):
        start = at[value.dtype]
        at[value.dtype] += size(value)
        out[path] = pools[value.dtype][start : at[value.dtype]].reshape(value.shape)
    mx.eval(out)
    return out


def interpolated(work: Sequence[float], times: Sequence[float]) -> Callable[[float], float]:
    """The time of any amount of work, on straight lines between what was timed.

    It never falls as the work grows: of a time that does, the mean of the largest before and the
    least behind is taken.
    """
    order = np.argsort(work, kind="stable")
    work, times = np.asarray(work, float)[order], np.asarray(times, float)[order]
    before = np.maximum.accumulate(times)
    behind = np.minimum.accumulate(times[::-1])[::-1]
    return lambda amount: float(np.interp(amount, work, (before + behind) / 2))
