"""Criteria for whole layers and branches: a score for each entry of a list; larger means keep.

They have the names of `importance.CRITERIA`. A score is float64 [entries], infinite for an entry
that cannot be dropped. What a layer is scored by is what it adds to the residual stream.

    sources = LayerSources(named, dims, fetch, calibrate_layers(named, batches, fetch, dims=dims))
    scores = LAYER_CRITERIA["activation"](sources)[dims[0].name]
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from .axes import NamedAxes
from .errors import InputError
from .importance import Scores
from .layers import Branch, LayerDimension
from .stream import Fetch, Progress, silent, stream_backward, stream_forward

Pair = tuple[int, int, bool]  # ids of x and of f(x), or of x and of x + f(x) where the flag is set


@dataclass
class LayerStatistics:
    """What was measured at each pair (x, f(x)): means over tokens; and per branch, by sequence.

    `turned`: 1 - cos(x, x + f(x)). `added`: |f(x)| / |x|. `taylor`: by the id of f(x), the sum over
    a sequence of f(x) * dL/df(x), [sequences].
    """

    turned: dict[Pair, float] = field(default_factory=dict)
    added: dict[Pair, float] = field(default_factory=dict)
    taylor: dict[int, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerSources:
    """What criteria score by. `statistics` is None where the criterion needs none."""

    named: NamedAxes
    dims: tuple[LayerDimension, ...]
    fetch: Fetch
    statistics: LayerStatistics | None = None
    seed: int = 0


def random(sources: LayerSources) -> Scores:
    """Uniform noise from `seed`: the baseline that any criterion must beat."""
    rng = np.random.default_rng(sources.seed)
    return {d.name: _finish(d, rng.random(d.size)) for d in sources.dims}


def magnitude(sources: LayerSources) -> Scores:
    """L2 norm of the weights that would be gone."""
    paths = {path for d in sources.dims for i in d.removable for path in d.parameters[i]}
    square = {path: _square(sources.fetch([path])[path]) for path in sorted(paths)}

    def score(d: LayerDimension, i: int) -> float:
        return sum(square[path] for path in d.parameters[i]) ** 0.5

    return _of_each(sources, score)


def activation(sources: LayerSources) -> Scores:
    """Block influence: 1 - the mean over tokens of cos(x_in, x_out).

    ShortGPT: Men et al., 2024, https://arxiv.org/abs/2403.03853. For a branch, x_out is
    x_in + f(x).
    """
    return _of_each(sources, lambda d, i: sum(sources.statistics.turned[p] for p in _pairs(d, i)))


def wanda(sources: LayerSources) -> Scores:
    """Mean over tokens of |f(x)| / |x|: the norm of what the layer adds, relative to the stream.

    What Wanda's |W| * |x| means for a layer: the size of what its weights make of its inputs
    (Sun et al., 2023, https://arxiv.org/abs/2306.11695), beside that of what passes without it.
    """
    return _of_each(sources, lambda d, i: sum(sources.statistics.added[p] for p in _pairs(d, i)))


def taylor(sources: LayerSources) -> Scores:
    """Mean over sequences of |sum of f(x) * dL/df(x)|: the first-order change of the loss.

    The terms of all branches of a block are added before the magnitude is taken.
    """

    def score(d: LayerDimension, i: int) -> float:
        terms = (sources.statistics.taylor[branch.value] for branch in d.branches[i])
        return float(np.abs(sum(terms)).mean())

    return _of_each(sources, score)


LAYER_CRITERIA: dict[str, Callable[[LayerSources], Scores]] = {
    "random": random,
    "magnitude": magnitude,
    "activation": activation,
    "wanda": wanda,
    "taylor": taylor,
}


def calibrate_layers(
    named: NamedAxes,
    batches: Sequence[Sequence[mx.array]],
    fetch: Fetch,
    *,
    dims: Sequence[LayerDimension],
    loss: Callable[[int, list[mx.array]], mx.array] | None = None,
    progress: Progress = silent,
) -> LayerStatistics:
    """Measure every removable entry of `dims` in one pass, streamed segment by segment.

    `batches` hold the graph's inputs, in its shapes. With `loss(batch index, outputs)` the Taylor
    terms are collected too, by one backward pass. Raises `InputError` on NaN or infinity.
    """
    pairs = [pair for d in dims for i in d.removable for pair in _pairs(d, i)]
    meter = _Meter(list(dict.fromkeys(pairs)), named.graph.inputs, batches)
    boundaries = stream_forward(
        named.graph, batches, fetch,
        taps=meter.taps, on_taps=meter.see, keep=loss is not None, progress=progress,
    )  # fmt: skip
    statistics = meter.statistics()
    if loss is not None:
        branches = [b for d in dims for i in d.removable for b in d.branches[i]]
        statistics.taylor = _taylor(named, branches, batches, boundaries, fetch, loss, progress)
    return statistics


def _taylor(named, branches: list[Branch], batches, boundaries, fetch, loss, progress):
    found: dict[int, dict[int, np.ndarray]] = {branch.value: {} for branch in branches}

    def on_gradients(b: int, values: dict[int, tuple[mx.array, mx.array]]) -> None:
        for i, (value, slope) in values.items():
            product = value.astype(mx.float32) * slope.astype(mx.float32)
            sums = product.reshape(batches[b][0].shape[0], -1).sum(axis=1)
            found[i][b] = np.array(sums, dtype=np.float64)

    stream_backward(
        named.graph, boundaries, fetch, loss,
        taps=list(found), on_gradients=on_gradients, progress=progress,
    )  # fmt: skip
    return {i: np.concatenate([each[b] for b in sorted(each)]) for i, each in found.items()}


class _Meter:
    """Measures pairs whose values come from different segments: holds x until f(x) is there."""

    def __init__(self, pairs: list[Pair], inputs: Sequence[int], batches):
        self.pairs = pairs
        self.taps = {i for x, y, _ in pairs for i in (x, y)}
        self.held = [dict(zip(inputs, batch, strict=True)) for batch in batches]
        self.sums: dict[Pair, np.ndarray] = {pair: np.zeros(2) for pair in pairs}
        self.open = [list(pairs) for _ in batches]
        self.tokens: dict[Pair, int] = dict.fromkeys(pairs, 0)

    def see(self, b: int, values: dict[int, mx.array]) -> None:
        held = self.held[b]
        held.update(values)
        mx.eval(values)
        for pair in [p for p in self.open[b] if p[0] in held and p[1] in held]:
            self._measure(pair, held)
            self.open[b].remove(pair)
        needed = {i for x, y, _ in self.open[b] for i in (x, y)}
        self.held[b] = {i: a for i, a in held.items() if i in needed}

    def _measure(self, pair: Pair, held: dict[int, mx.array]) -> None:
        x, y = (held[i].astype(mx.float32) for i in pair[:2])
        y, added = (y, y - x) if pair[2] else (x + y, y)
        norm_x, norm_y, norm_added = (_norm(a) for a in (x, y, added))
        tiny = 1e-30
        turned = 1 - (x * y).sum(axis=-1) / mx.maximum(norm_x * norm_y, tiny)
        grown = norm_added / mx.maximum(norm_x, tiny)
        self.sums[pair] += [turned.sum().item(), grown.sum().item()]
        self.tokens[pair] += turned.size

    def statistics(self) -> LayerStatistics:
        means = {pair: self.sums[pair] / max(self.tokens[pair], 1) for pair in self.pairs}
        if not all(np.isfinite(mean).all() for mean in means.values()):
            raise InputError(
                "NaN or infinity in the residual stream during calibration; check the weights, or "
                "calibrate in float32."
            )
        turned, added = ({p: float(mean[k]) for p, mean in means.items()} for k in (0, 1))
        return LayerStatistics(turned, added)


def _pairs(dim: LayerDimension, index: int) -> list[Pair]:
    if dim.ends[index] is not None:
        return [(*dim.ends[index], True)]
    return [(branch.stream, branch.value, False) for branch in dim.branches[index]]


def _of_each(sources: LayerSources, score: Callable[[LayerDimension, int], float]) -> Scores:
    out = {}
    for d in sources.dims:
        removable = set(d.removable)
        out[d.name] = _finish(d, [score(d, i) if i in removable else 0 for i in range(d.size)])
    return out


def _finish(dim: LayerDimension, scores) -> np.ndarray:
    out = np.array(scores, dtype=np.float64)
    out[list(dim.why)] = np.inf
    return out


def _square(array: mx.array) -> float:
    return mx.square(array.astype(mx.float32)).sum().item()


def _norm(array: mx.array) -> mx.array:
    return mx.sqrt(mx.square(array).sum(axis=-1))
