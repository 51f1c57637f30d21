"""Refit what is kept, one layer after the other, to what the dense model computes there.

The closed form of `refit.py` takes a layer's inputs from the dense model. In the pruned model they
come from layers that were pruned too, and their errors add up. Here the pruned model runs beside
the dense one: each weight W that reads a pruned dimension is fitted on the inputs X that it will
have, to take away the error that it sees, in its own output and in what that is added to:

    minimise |X (W + D) - Y|^2 + lambda |D|^2,    D = (X^T X + lambda I)^-1 X^T (Y - X W)

with Y - X W read where the output has joined the residual stream (`targets.py`). A bias, where the
layer has one, is fitted with it. Then the pruned model goes on with W + D. Lambda is chosen on the
other half of the data, also as infinite: a change that does not hold up is not made.

The pruned model runs as the dense graph with removed units zeroed, which is the same. Where
removing is not zeroing (the residual width), and for experts that are picked, see `refit.py`.

Fitting each layer to the dense output on pruned inputs is that of SparseGPT's successors, such as
Frantar and Alistarh's OBC (https://arxiv.org/abs/2208.11580); reading the error behind the
residual sum makes later layers mend what earlier ones broke.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from .axes import NamedAxes
from .contractions import Contraction, contractions
from .execute import execute
from .graph import Graph, dynamic_values
from .layers import dropped_parameters, is_layer_cut
from .plan import PrunePlan
from .prune import Cutter, picks, prune_array, pruner, spread_array, zero_array
from .refit import with_patches
from .second import WIDEST, patches
from .stream import Fetch, Progress, Segment, load, segment_between, silent
from .targets import SUMS, Target, target_of

LAMBDAS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, np.inf)  # times the mean of the diagonal of X^T X


@dataclass(frozen=True)
class Fit:
    """A weight to fit, by its target; `keep` are the slots of its input that stay."""

    target: Target
    path: str
    keep: np.ndarray

    @property
    def place(self) -> Contraction:
        return self.target.place


@dataclass(frozen=True)
class Stage:
    """A piece of the graph, and the weights that are fitted at its end, in order."""

    piece: Segment
    fits: tuple[Fit, ...]


@dataclass
class Sequential:
    """Cuts parameters as a plan says; those that were fitted, to what was found.

    A `prune.Cutter`. `fitted` holds them as they are after pruning, `chosen` the lambda of each,
    `left` why others were not fitted.
    """

    start: Cutter
    fitted: dict[str, mx.array] = field(default_factory=dict)
    chosen: dict[str, float] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __call__(self, path: str, array: mx.array) -> mx.array:
        if path in self.fitted:
            return self.fitted[path].astype(array.dtype)
        return self.start(path, array)


def can_run(named: NamedAxes, plan: PrunePlan) -> bool:
    """Whether removing what the plan removes is the same as zeroing it."""
    return all(is_layer_cut(cut) or named.dimensions[cut.name].exact for cut in plan)


def refit_in_sequence(
    named: NamedAxes,
    plan: PrunePlan,
    batches: Sequence[Sequence[mx.array]],
    fetch: Fetch,
    *,
    start: Cutter | None = None,
    mend: bool = True,
    progress: Progress = silent,
) -> Sequential:
    """The cutter for a plan, fitted on `batches` of the graph's inputs, in its shapes.

    With `mend`, weights that read nothing that is removed are fitted too where their output joins
    a residual stream that is off by then. Keeps the activations between two layers, twice, in
    memory, and the fitted weights in their own dtype.
    """
    assert can_run(named, plan)
    run = _Run(named, plan, fetch, start or pruner(named, plan))
    dense = [dict(zip(named.graph.inputs, batch, strict=True)) for batch in batches]
    pruned = [dict(values) for values in dense]
    stages = _stages(named.graph, run.fits(mend))
    for k, stage in enumerate(stages):
        dense, pruned = run.stage(stage, dense, pruned)
        progress("refit", k + 1, len(stages))
    return run.cutter


class _Run:
    def __init__(self, named: NamedAxes, plan: PrunePlan, fetch: Fetch, start: Cutter):
        self.named, self.plan, self.fetch, self.graph = named, plan, fetch, named.graph
        self.start = start
        self.cutter = Sequential(start)
        self.gone = dropped_parameters(named, plan)

    def fits(self, mend: bool) -> list[Fit]:
        """What can be fitted, in the order of the graph. Nothing is before the first cut."""
        places = [p for p in contractions(self.named) if p.weight]
        paths = [p.weight[0] for p in places]
        out: list[Fit] = []
        for place, path in zip(places, paths, strict=True):
            cuts = [] if path in self.gone else picks(self.named, self.plan, path)
            own = [pick for pick in cuts if pick.axis == place.weight[1]]
            why = self._why_not(place, paths.count(path))
            if own and why:
                self.cutter.left[path] = why
            elif not why and path not in self.gone and (own or mend):
                target = target_of(self.graph, place)
                keep = own[0].slots if own else np.arange(self._slots(place))
                if own or self._mends(target):
                    out.append(Fit(target, path, keep))
        return out

    def _slots(self, place: Contraction) -> int:
        return self.graph.values[place.value].shape[-1]

    def _why_not(self, place: Contraction, times: int) -> str | None:
        positions = math.prod(place.window.kernel) if place.window else 1
        if place.experts is not None or times > 1 or place.layout is None:
            return "it is shared, routed or transformed"
        return "it is too wide" if self._slots(place) * positions > WIDEST else None

    def _mends(self, target: Target) -> bool:
        """Whether the output joins something, and whether that can be off."""
        if not target.chain or target.chain[-1].op not in SUMS:
            return False
        return dynamic_values(self.graph).issuperset(target.chain[-1].inputs)

    # ---- one stage

    def stage(self, stage: Stage, dense: list[dict], pruned: list[dict]):
        """Both models through a stage; the weights of the pruned one are fitted on the way."""
        ends = [fit.target.end for fit in stage.fits]
        weights = load(self.graph, stage.piece, self.fetch)
        through = [self._execute(stage.piece, weights, values, ends) for values in dense]
        weights = load(self.graph, stage.piece, self._zeroed)
        for fit in stage.fits:
            wanted = [{fit.target.end: tapped[fit.target.end]} for _, tapped in through]
            self._fit(fit, stage.piece, weights, pruned, wanted)
        pruned = [self._execute(stage.piece, weights, values)[0] for values in pruned]
        return [values for values, _ in through], pruned

    def _zeroed(self, paths) -> dict[str, mx.array]:
        arrays = self.fetch(list(paths))
        return {
            path: mx.zeros_like(array)
            if path in self.gone
            else spread_array(
                self.start(path, array), picks(self.named, self.plan, path), array.shape
            )
            for path, array in arrays.items()
        }

    def _execute(self, piece: Segment, weights, values, taps=(), *, ends=None):
        """What a piece hands on, and tapped values, evaluated."""
        known = {**weights, **{i: values[i] for i in piece.reads}}
        wanted = piece.hands_on if ends is None else ends
        results, tapped = execute(self.graph, piece.nodes, known, outputs=wanted, taps=taps)
        mx.eval(results, tapped)
        return dict(zip(wanted, results, strict=True)), tapped

    def _fit(self, fit: Fit, piece: Segment, weights, pruned, wanted) -> None:
        """Put the fitted weight, and bias, in place of those in `weights`."""
        sums = _Sums(fit)
        taps = [fit.place.value, *fit.target.scales]
        for values, target in zip(pruned, wanted, strict=True):
            got, here = self._execute(piece, weights, values, taps, ends=[fit.target.end])
            difference = target[fit.target.end] - got[fit.target.end]
            sums.add(here[fit.place.value], fit.target.error(self.graph, here, difference))
        change, lam = sums.change()
        if change is None:
            return
        self.cutter.chosen[fit.path] = lam
        self._replace(fit, weights, change[: len(change) - sums.biased])
        if sums.biased:
            self._replace_bias(fit, weights, here, change[-1])

    def _replace(self, fit: Fit, weights: dict[int, mx.array], change: np.ndarray) -> None:
        """Add `change` [kept slots at every position, outputs] to the weight."""
        value, place = self.graph.parameters[fit.path], fit.place
        old = weights[value].transpose(place.layout)
        inner = old.shape[: place.contracted]
        whole = np.zeros((math.prod(inner), old.shape[-1]), np.float32)
        whole[with_patches(fit.keep, inner)] = change
        new = old + mx.array(whole.reshape(old.shape))
        self._put(fit.path, weights, new.transpose(np.argsort(place.layout).tolist()))

    def _replace_bias(self, fit: Fit, weights, values, change: np.ndarray) -> None:
        target = fit.target
        slope = target.slope(self.graph, values, target.bias_at).reshape(-1, len(change))[0]
        sign = -1 if target.bias_is_taken_off else 1
        value = self.graph.parameters[target.bias]
        self._put(
            target.bias, weights, weights[value] + sign * slope * mx.array(change, mx.float32)
        )

    def _put(self, path: str, weights: dict[int, mx.array], new: mx.array) -> None:
        new = zero_array(self.named, self.plan, path, new)
        dtype = self.fetch([path])[path].dtype
        kept = prune_array(new.astype(dtype), picks(self.named, self.plan, path))
        mx.eval(new, kept)
        weights[self.graph.parameters[path]] = new
        self.cutter.fitted[path] = kept


class _Sums:
    """X^T X and X^T E of two halves of each batch; with a bias, X has a column of ones."""

    def __init__(self, fit: Fit):
        self.window, self.keep = fit.place.window, mx.array(fit.keep)
        self.biased = int(fit.target.bias is not None)
        self.square: np.ndarray | float = 0.0  # [2, n, n]
        self.cross: np.ndarray | float = 0.0  # [2, n, outputs]

    def add(self, value: mx.array, error: mx.array) -> None:
        """The input of a contraction and the error of its output, of one batch."""
        x = patches(mx.take(value, self.keep, axis=-1).astype(mx.float32), self.window)
        if self.biased:
            x = mx.concatenate([x, mx.ones((x.shape[0], 1))], axis=-1)
        e = error.reshape(x.shape[0], -1).astype(mx.float32)
        middle = len(x) // 2
        halves = [(x[:middle], e[:middle]), (x[middle:], e[middle:])]
        sums = [(a.T @ a, a.T @ b) for a, b in halves]
        mx.eval(sums)
        self.square = self.square + _float64([a for a, _ in sums])
        self.cross = self.cross + _float64([b for _, b in sums])

    def change(self) -> tuple[np.ndarray | None, float]:
        """What to add to the weights, with the bias as its last row, and lambda; None for none."""
        lam = min(LAMBDAS, key=self._held_out)
        if lam == np.inf:
            return None, lam
        return self._solution(self.square.sum(axis=0), self.cross.sum(axis=0), lam), lam

    def _held_out(self, lam: float) -> float:
        """The squared error on the half that was not fitted, less that of no change."""
        if lam == np.inf:
            return 0.0
        change = self._solution(self.square[0], self.cross[0], lam)
        return float(np.sum(change * (self.square[1] @ change - 2 * self.cross[1])))

    def _solution(self, square: np.ndarray, cross: np.ndarray, lam: float) -> np.ndarray:
        count = len(square) - self.biased
        ridge = np.full(len(square), lam * max(np.trace(square[:count, :count]) / count, 1e-30))
        ridge[count:] = 0
        return np.linalg.solve(square + np.diag(ridge), cross)


def _float64(arrays: list[mx.array]) -> np.ndarray:
    return np.stack([np.array(array, dtype=np.float64) for array in arrays])


def _stages(graph: Graph, fits: list[Fit]) -> list[Stage]:
    """Cut the graph behind the ends of fits, where no other fit is under way."""
    dynamic = dynamic_values(graph)
    sequence = [node for node in graph.nodes if dynamic.intersection(node.outputs)]
    at = {out: k for k, node in enumerate(sequence) for out in node.outputs}
    spans = sorted(((at[f.target.end], at[f.place.output], f) for f in fits), key=lambda s: s[:2])
    stages, start, held = [], 0, []
    for k, (end, _, fit) in enumerate(spans):
        held.append(fit)
        if all(begin > end for _, begin, _ in spans[k + 1 :]) and end + 1 < len(sequence):
            piece = segment_between(graph, sequence, start, end + 1, dynamic)
            stages.append(Stage(piece, tuple(held)))
            start, held = end + 1, []
    if held:
        piece = segment_between(graph, sequence, start, len(sequence), dynamic)
        stages.append(Stage(piece, tuple(held)))
    return stages
