"""Statistics of activations, collected once over calibration batches.

What is measured is the input of each contraction (`contractions.py`), where a unit's whole
contribution to the model passes.
"""

from collections.abc import Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import mlx.core as mx
import numpy as np

from .axes import NamedAxes
from .contractions import Contraction, consumers
from .errors import InputError
from .second import SecondMoments
from .stream import Fetch, Progress, groups, silent, stream_backward, stream_forward


@dataclass
class Moments:
    """Sums over all calibration tokens, [n] or [experts, n], float64.

    `square`: sum of x^2, `total`: sum of x, over `rows` rows (a number, or one for each expert).
    `norm`: sum over batches of the L2 norm over the batch's tokens. `taylor` and `fisher`: sums
    over sequences of |s| and of s^2, with s the sum over tokens of x * dL/dx; None without
    gradients. Where experts are picked, whose tokens come sorted by expert, batches take the place
    of sequences.
    """

    square: np.ndarray
    total: np.ndarray
    norm: np.ndarray
    taylor: np.ndarray | None = None
    fisher: np.ndarray | None = None
    rows: np.ndarray | float = 0.0
    batches: int = 0

    @property
    def variance(self) -> np.ndarray:
        rows = np.maximum(self.rows, 1)
        rows = rows[:, None] if np.ndim(rows) else rows
        return np.maximum(self.square / rows - (self.total / rows) ** 2, 0)


@dataclass
class Statistics:
    """Moments by the key of a contraction, and how much text they stand on.

    `second` holds X^T X of two halves of the data, float64 [2, n, n] or [2, experts, n, n], by
    `Contraction.second_key`; n counts the channels of every position of a convolution's patch.
    """

    moments: dict[tuple[int, int | None], Moments] = field(default_factory=dict)
    second: MutableMapping[tuple, np.ndarray] = field(default_factory=dict)
    tokens: int = 0


def calibrate(
    named: NamedAxes,
    batches: Sequence[Sequence[mx.array]],
    fetch: Fetch,
    *,
    dims: Iterable[str],
    loss: Callable[[int, list[mx.array]], mx.array] | None = None,
    second: MutableMapping[tuple, np.ndarray] | None = None,
    progress: Progress = silent,
) -> Statistics:
    """Moments at every contraction over one of `dims`, streamed segment by segment.

    `batches` hold the graph's inputs, in its shapes. With `loss(batch index, outputs)` the Taylor
    terms are collected too, by a backward pass over as many batches at a time as memory allows.
    With `second`, a mapping to fill (in memory or on disk), so are the second moments.

    Raises `InputError` on NaN or infinity, naming the parameter that holds it, or else the one
    where it was met.
    """
    found = [place for each in consumers(named, dims).values() for place in each]
    places = {place.key: place for place in found}
    statistics = Statistics(second={} if second is None else second)
    full = {p.second_key: p for p in found if p.layout and second is not None}
    sums = SecondMoments(statistics.second, full)
    tapped = {i for key in places for i in key if i is not None}
    tapped |= {p.rows for p in places.values() if p.rows is not None}
    index = _IndexValues(places.values())

    def on_taps(first: int, count: int, b: int, values: dict[int, mx.array]) -> None:
        index.remember(first + b, values)
        for place in places.values():
            if place.value in values:
                _add_moments(statistics, place, values[place.value], index.of(first + b, place))
        for place in sums.places.values():
            if place.value in values:
                at = index.of(first + b, place)
                sums.add(place, values[place.value], at, last=b == count - 1)

    def on_gradients(first: int, b: int, values) -> None:
        for place in places.values():
            if place.value in values:
                product = values[place.value][0] * values[place.value][1]
                _add_taylor(statistics, place, product, index.of(first + b, place), batches[0])

    whole = [(0, batches, progress)]
    for first, group, told in groups(named.graph, batches, progress) if loss else whole:
        boundaries = stream_forward(
            named.graph, group, fetch,
            taps=tapped, on_taps=partial(on_taps, first, len(group)), keep=loss is not None,
            progress=told,
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
    value = value.astype(mx.float32)
    square = np.array(_per_slot(place, mx.square(value), index), dtype=np.float64)
    held = statistics.moments.get(place.key)
    if held is None:
        held = Moments(*(np.zeros_like(square) for _ in range(3)))
        statistics.moments[place.key] = held
    held.square += square
    held.total += np.array(_per_slot(place, value, index), dtype=np.float64)
    held.norm += np.sqrt(square)
    held.rows = held.rows + _rows(place, value, index)
    held.batches += 1


def _rows(place: Contraction, value: mx.array, index) -> np.ndarray | float:
    """How many rows a batch has, for each expert where these are picked."""
    if index[1] is None:
        return value.size / value.shape[-1]
    count = sum(dim.size for dim in place.expert_axis)
    picked = np.bincount(np.array(index[1]).reshape(-1), minlength=count)
    return picked.astype(np.float64) * value.shape[-2]


def _add_taylor(statistics: Statistics, place, product: mx.array, index, batch) -> None:
    held = statistics.moments[place.key]
    if held.taylor is None:
        held.taylor, held.fisher = np.zeros_like(held.square), np.zeros_like(held.square)
    sequences = batch[0].shape[0]
    if index[1] is None and product.size % (sequences * product.shape[-1]) == 0:
        each = product.reshape(sequences, -1, product.shape[-1]).sum(axis=1)
        term, square = mx.abs(each).sum(axis=0), mx.square(each).sum(axis=0)
    else:
        each = _per_slot(place, product, index)
        term, square = mx.abs(each), mx.square(each)
    held.taylor += np.array(term, dtype=np.float64)
    held.fisher += np.array(square, dtype=np.float64)


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
