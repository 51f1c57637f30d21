"""Refit what is kept: the weights that read a pruned dimension take over what the others gave.

For y = x W, with x the input on calibration data and K the kept slots, the kept rows become

    W_K + (H_KK + lambda I)^-1 H_KP W_P,        H = X^T X, P the removed slots

which minimises |X_K W' - X W|^2 + lambda |W' - W_K|^2: the least squares fit of the dense output,
held near the old weights where the data says nothing. With lambda infinite it is plain pruning.
Lambda is chosen per layer: fitted on one half of the calibration data, judged on the other.

Works for linear layers, for the experts of routed ones, and for convolutions, whose slots are the
patch positions of each channel. Float64 throughout; only to choose lambda for more than 2,048 slots
float32 is enough.

The refit is that of SlimGPT, OSSCAR (https://arxiv.org/abs/2403.12983) and others; holding it near
the old weights rather than near zero makes a layer that loses nothing stay as it is.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from .axes import NamedAxes
from .calibrate import Statistics
from .contractions import Contraction, contractions
from .least_squares import judged_errors, solution
from .plan import PrunePlan
from .prune import Cutter, Pick, picks, prune_array
from .second import as_matrices

LAMBDAS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # times the mean of H's diagonal
USUAL = (1e-2,)  # where many plans are compared, and none is kept


@dataclass
class Refit:
    """Cuts parameters as a plan says, refitting those that read what is removed.

    A `prune.Cutter`. `chosen` maps a parameter to its lambda once it was cut, `left` those that
    are cut plainly to the reason. What was fitted is fitted once, and `held`; with None, each time.
    """

    named: NamedAxes
    plan: PrunePlan
    statistics: Statistics
    places: Mapping[str, Contraction]
    lambdas: tuple[float, ...] = LAMBDAS
    chosen: dict[str, float] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    held: dict[str, mx.array] | None = None

    def __call__(self, path: str, array: mx.array) -> mx.array:
        if self.held is not None and path in self.held:
            return self.held[path].astype(array.dtype)
        cuts = picks(self.named, self.plan, path)
        place = self.places.get(path)
        own = [pick for pick in cuts if place and pick.axis == place.weight[1]]
        if not own:
            return prune_array(array, cuts)
        halves = self.statistics.second.get(place.second_key)
        if halves is None:
            self.left[path] = "its inputs were not measured"
            return prune_array(array, cuts)
        fitted, self.chosen[path] = _refitted(array, place, own[0], halves, self.lambdas)
        fitted = prune_array(fitted, [pick for pick in cuts if pick is not own[0]])
        if self.held is not None:
            mx.eval(fitted)
            self.held[path] = fitted
        return fitted

    def forget(self, paths: Iterable[str]) -> None:
        """These will not be asked for again."""
        for path in paths if self.held else ():
            self.held.pop(path, None)


@dataclass
class Fitted:
    """Cuts parameters as `start` does, but for those that were found on the pruned model's inputs.

    A `prune.Cutter`. `fitted` holds what was found, as it is after pruning, `chosen` the lambda of
    each weight, `left` why others that read what is removed were not fitted.
    """

    start: Cutter
    fitted: dict[str, mx.array] = field(default_factory=dict)
    chosen: dict[str, float] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __call__(self, path: str, array: mx.array) -> mx.array:
        if path in self.fitted:
            return self.fitted[path].astype(array.dtype)
        return self.start(path, array)


def refit(
    named: NamedAxes, plan: PrunePlan, statistics: Statistics,
    *, lambdas: tuple[float, ...] = LAMBDAS, hold: bool = False,
) -> Refit:  # fmt: skip
    """The cutter for a plan, from second moments at the contractions that it touches.

    `hold` is for one that is asked several times: fitted weights stay in memory, in their dtype.
    """
    places: dict[str, Contraction] = {}
    shared: set[str] = set()
    for place in contractions(named):
        if place.weight and place.layout:
            path = place.weight[0]
            shared |= {path} if path in places else set()
            places[path] = place
    own = {path: place for path, place in places.items() if path not in shared}
    return Refit(named, plan, statistics, own, lambdas, held={} if hold else None)


def _refitted(
    array: mx.array, place: Contraction, pick: Pick, halves, lambdas: tuple[float, ...]
) -> tuple[mx.array, float]:
    """The kept slots of a weight, in its own layout and dtype, and lambda: the largest of its
    experts'."""
    weights, each = as_matrices(array, place, halves)
    shape = [array.shape[k] for k in place.layout]
    ends = (place.leading, place.leading + place.contracted)
    lead, inner, rest = shape[: ends[0]], shape[slice(*ends)], shape[ends[1] :]
    rows = np.broadcast_to(pick.slots, (len(weights), pick.slots.shape[-1]))
    fits = [
        fit_kept(weight, moments, with_patches(keep, inner), lambdas)
        for weight, moments, keep in zip(weights, each, rows, strict=True)
    ]
    kept = np.stack([fitted for fitted, _ in fits])
    kept = kept.reshape(*lead, *inner[:-1], rows.shape[1], *rest)
    kept = kept.transpose(np.argsort(place.layout))
    return mx.array(kept.astype(np.float32)).astype(array.dtype), max(lam for _, lam in fits)


def with_patches(keep: np.ndarray, inner: Sequence[int]) -> np.ndarray:
    """Kept channels at every position of a patch; channels are the last axis."""
    return (np.arange(math.prod(inner[:-1]))[:, None] * inner[-1] + keep).reshape(-1)


def fit_kept(
    weight: np.ndarray, halves: np.ndarray, keep: np.ndarray, lambdas=LAMBDAS
) -> tuple[np.ndarray, float]:
    """The refitted rows of `weight` [n, m] and lambda, from H of two halves of data [2, n, n].

    Rank-deficient moments are no trouble: lambda is at least 1e-4 of the mean diagonal.
    """
    gone = np.setdiff1d(np.arange(len(weight)), keep)
    if not len(gone):
        return weight, 0.0
    parts = [
        (h[np.ix_(keep, keep)].astype(np.float64), h[np.ix_(keep, gone)] @ weight[gone])
        for h in halves
    ]
    ridges = [_ridge(h, len(keep)) for h in halves]
    lam = lambdas[0]
    if len(lambdas) > 1:
        errors = judged_errors(*parts, lambda each: each * ridges[0], lambdas)
        lam = lambdas[int(np.argmin(errors))]
    square, cross = (first + second for first, second in zip(*parts, strict=True))
    change = solution(square, cross, lam * (ridges[0] + ridges[1]))
    return weight[keep] + change, lam


def _ridge(moments: np.ndarray, kept: int) -> np.ndarray:
    """The mean of the diagonal, as often as slots are kept."""
    return np.full(kept, max(np.trace(moments, dtype=np.float64) / len(moments), 1e-30))
