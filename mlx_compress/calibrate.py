"""Statistics of activations, collected once over calibration batches.

What is measured is the input of each contraction (`contractions.py`), where a unit's whole
contribution to the model passes.
"""

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import mlx.core as mx
import numpy as np

from .axes import NamedAxes
from .contractions import Contraction, consumers
from .errors import InputError
from .padding import row_count, without_padding
from .second import SecondMoments
from .store import Store
from .stream import Fetch, Progress, groups, silent, stream_backward, stream_forward


@dataclass
class Moments:
    """Sums over all calibration tokens, [n] or [experts, n], float64.

    `square`: sum of x^2, `total`: sum of x, over `rows` rows (a number, or one for each expert).
    `norm`: sum over batches of the L2 norm over the batch's tokens. `peak`: the largest |x| of all
    tokens, 0 for an expert that none went to. `taylor` and `fisher`: sums over sequences of |s| and
    of s^2, with s the sum over tokens of x * dL/dx; None without gradients. Where experts are
    picked, whose tokens come sorted by expert, batches take the place of sequences.
    """

    square: np.ndarray
    total: np.ndarray
    norm: np.ndarray
    peak: np.ndarray
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

    `second` holds X^T X of two halves of the data, [2, n, n] or [2, experts, n, n], float64 (or
    float32 where n is large), by `Contraction.second_key`; n counts the channels of every position
    of a convolution's patch.
    """

    moments: dict[tuple[int, int | None], Moments] = field(default_factory=dict)
    second: MutableMapping[tuple, np.ndarray] = field(default_factory=dict)


def calibrate(
    named: NamedAxes,
    batches: Sequence[Sequence[mx.array]],
    fetch: Fetch,
    *,
    dims: Iterable[str],
    loss: Callable[[int, list[mx.array]], mx.array] | None = None,
    second: MutableMapping[tuple, np.ndarray] | None = None,
    masks: Sequence[mx.array] | None = None,
    store: Store | None = None,
    progress: Progress = silent,
) -> Statistics:
    """Moments at every contraction over one of `dims`, streamed segment by segment.

    `batches` hold the graph's inputs, in its shapes. With `loss(batch index, outputs)` the Taylor
    terms are collected too, by a backward pass over as many batches at a time as memory allows.
    With `second`, a mapping to fill (in memory or on disk), so are the second moments. `masks` say
    which tokens of each batch count.

    What `store` holds is not collected again, and what is collected goes there, group by group of
    batches; second moments then lie there and not in `second`. With all there nothing is run. The
    result is the same, bit for bit, however often it was interrupted, and without a store, if the
    device itself gives the same sums twice. Where the store cannot be used, its `notes` say why.

    Raises `InputError` on NaN or infinity, naming the parameter that holds it, or else the one
    where it was met; `ResourceError` when the disk of the store is full.
    """
    kinds = _kinds(named, dims, gradients=loss is not None, second=second is not None)
    if store is not None and not store.open(kinds, len(batches)):
        store = None
    fresh = Statistics(second={} if second is None else second)
    statistics = _restored(store, kinds) if store else fresh
    meter = _Meter(statistics, kinds, store.done if store else {}, batches, masks)
    parts = [(0, batches, progress)]
    if loss is not None or store:
        parts = groups(named.graph, batches, progress, start=meter.start)
    for first, group, told in parts:
        _collect(named, meter, first, group, fetch, loss, told)
        if store:
            _commit(store, statistics, first + len(group))
    return statistics


def _kinds(named: NamedAxes, dims, *, gradients: bool, second: bool) -> dict[str, dict]:
    """What is to be collected: for each kind, the places by their keys, in the graph's order."""
    found = [place for each in consumers(named, dims).values() for place in each]
    found.sort(key=lambda place: place.value)
    places = {place.key: place for place in found}
    full = {place.second_key: place for place in found if place.layout}
    asked = {"moments": True, "taylor": gradients, "second": second}
    every = {"moments": places, "taylor": places, "second": full}
    return {kind: every[kind] for kind in every if asked[kind]}


def _collect(named: NamedAxes, meter, first: int, group, fetch, loss, progress) -> None:
    """Take a group of batches, the first of which has the index `first`, through the graph."""
    backward = meter.lacks("taylor", first + len(group) - 1)
    boundaries = stream_forward(
        named.graph, group, fetch,
        taps=meter.tapped, on_taps=partial(meter.forward, first, len(group)), keep=backward,
        progress=progress,
    )  # fmt: skip
    _check_finite(named, meter.statistics, meter.places, fetch)
    if backward:
        stream_backward(
            named.graph, boundaries, fetch, lambda b, out: loss(first + b, out),
            taps={p.value for p in meter.places.values()},
            on_gradients=partial(meter.backward, first), progress=progress,
        )  # fmt: skip
        _check_finite(named, meter.statistics, meter.places, fetch)


class _Meter:
    """Adds batches to the statistics, each kind from the first batch on that it lacks."""

    def __init__(self, statistics: Statistics, kinds, done: Mapping[str, int], batches, masks):
        self.statistics, self.kinds, self.batches = statistics, kinds, batches
        self.masks = masks or [None] * len(batches)
        self.places = kinds["moments"]
        self.done = {kind: done.get(kind, 0) for kind in kinds}
        self.start = min(self.done.values())
        self.sums = SecondMoments(statistics.second, kinds.get("second", {}))
        self.index = _IndexValues(self.places.values())
        self.tapped = {i for key in self.places for i in key if i is not None}
        self.tapped |= {p.rows for p in self.places.values() if p.rows is not None}

    def lacks(self, kind: str, batch: int) -> bool:
        return kind in self.done and self.done[kind] <= batch

    def forward(self, first: int, count: int, b: int, values: dict[int, mx.array]) -> None:
        self.index.remember(first + b, values)
        for place in self._lacking("moments", first + b, values):
            index = self.index.of(first + b, place)
            value, mask = values[place.value], self._mask(first + b, place)
            _add_moments(self.statistics, place, value, index, mask)
        for place in self._lacking("second", first + b, values):
            index = self.index.of(first + b, place)
            value = without_padding(values[place.value], self._mask(first + b, place))
            self.sums.add(place, value, index, last=b == count - 1)

    def backward(self, first: int, b: int, values) -> None:
        for place in self._lacking("taylor", first + b, values):
            product = values[place.value][0] * values[place.value][1]
            product = without_padding(product, self._mask(first + b, place))
            index = self.index.of(first + b, place)
            _add_taylor(self.statistics, place, product, index, self.batches[0])

    def _mask(self, batch: int, place: Contraction) -> mx.array | None:
        """A patch of a convolution may hold a token and padding; it counts."""
        return None if place.window else self.masks[batch]

    def _lacking(self, kind: str, batch: int, values) -> list[Contraction]:
        places = self.kinds[kind].values() if self.lacks(kind, batch) else ()
        return [place for place in places if place.value in values]


def _commit(store: Store, statistics: Statistics, done: int) -> None:
    for key, held in statistics.moments.items():
        rows = held.rows[:, None] if np.ndim(held.rows) else held.rows
        rows = np.broadcast_to(rows, held.square.shape)
        sums = (held.square, held.total, held.norm, held.peak, rows)
        store.kept["moments"][key] = np.stack(sums)
        if held.taylor is not None:
            store.kept["taylor"][key] = np.stack((held.taylor, held.fisher))
    store.commit(done)


def _restored(store: Store, kinds: Iterable[str]) -> Statistics:
    """What `_commit` kept, of the kinds that are asked for."""
    statistics = Statistics()
    for key, (*sums, rows) in store.kept["moments"].items():
        rows = rows[:, 0] if rows.ndim > 1 else float(rows[0])
        statistics.moments[key] = Moments(*sums, rows=rows, batches=store.done["moments"])
    if "taylor" in kinds:
        for key, (taylor, fisher) in store.kept["taylor"].items():
            held = statistics.moments[key]
            held.taylor, held.fisher = taylor, fisher
    if "second" in kinds:
        statistics.second = store.kept["second"]
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


def _per_slot(place: Contraction, value: mx.array, index, *, peak: bool = False) -> mx.array:
    """The sum, or the peak, of a quantity [..., n] over its rows.

    Float32 [n], or [experts, n] by the expert of each row. A peak is of what is never negative.
    """
    over = mx.max if peak else mx.sum
    rows, experts = index
    if experts is None:
        return over(value.reshape(-1, value.shape[-1]), axis=0)
    per_row = over(value.reshape(-1, *value.shape[-2:]), axis=1)
    picked = per_row if rows is None else per_row[rows.reshape(-1)]
    count = sum(dim.size for dim in place.expert_axis)
    each = mx.zeros((count, value.shape[-1])).at[experts.reshape(-1)]
    return each.maximum(picked) if peak else each.add(picked)


def _add_moments(statistics: Statistics, place: Contraction, value, index, mask) -> None:
    value = without_padding(value.astype(mx.float32), mask)
    square = np.array(_per_slot(place, mx.square(value), index), dtype=np.float64)
    held = statistics.moments.get(place.key)
    if held is None:
        held = Moments(*(np.zeros_like(square) for _ in range(4)))
        statistics.moments[place.key] = held
    held.square += square
    held.total += np.array(_per_slot(place, value, index), dtype=np.float64)
    held.norm += np.sqrt(square)
    peak = np.array(_per_slot(place, mx.abs(value), index, peak=True), dtype=np.float64)
    held.peak = np.maximum(held.peak, peak)
    held.rows = held.rows + _rows(place, value, index, mask)
    held.batches += 1


def _rows(place: Contraction, value: mx.array, index, mask) -> np.ndarray | float:
    """How many rows a batch has, for each expert where these are picked."""
    if index[1] is None:
        return row_count(value, mask)
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
            f"{path}: holds NaN or infinity, so nothing can be computed; repair the checkpoint."
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
            "finite; use --importance magnitude --no-refit."
        )
