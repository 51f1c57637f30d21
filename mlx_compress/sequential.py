"""Refit what is kept, one layer after the other, to what the dense model computes there.

The closed form of `refit.py` takes a layer's inputs from the dense model. In the pruned model they
come from layers that were pruned too, and their errors add up. Here the pruned model runs beside
the dense one: each weight W is fitted on the inputs X that it will have, to take away the error E
that is left behind it, in its own output and in what that is added to (`targets.py`):

    minimise |X D - E|^2 + lambda |D|^2        and go on with W + D (`least_squares.py`)

A bias, where the layer has one, is fitted with it; the mean of a batch norm is one. What is fitted
is each weight that reads a pruned dimension, and behind the first of them each one whose input has
come to differ, but those that give the model's output.

The pruned model runs as the dense graph with removed units zeroed, which is the same. Where
removing is not zeroing (the residual width), and for experts that are picked, see `refit.py`.

Fitting a layer to the dense output on the inputs that it will have is that of ThiNet
(https://arxiv.org/abs/1707.06342) and He et al. (https://arxiv.org/abs/1707.06168); reading the
error behind the residual sum makes later layers mend what earlier ones broke.
"""

import math
from collections.abc import Iterable, Sequence

import mlx.core as mx
import numpy as np

from .axes import NamedAxes
from .execute import execute
from .layers import dropped_parameters, is_layer_cut
from .least_squares import Sums
from .plan import PrunePlan
from .prune import Cutter, picks, prune_array, pruner, spread_array
from .refit import Fitted, with_patches
from .stages import Fit, Stage, fits_of, nbytes_of, stages
from .stream import Fetch, Progress, Segment, load, silent
from .targets import scales_of

HELD = 2**28  # bytes of activations, inside a stage, up to which they are not computed again


def can_run(named: NamedAxes, plan: PrunePlan) -> bool:
    """Whether removing what the plan removes is the same as zeroing it."""
    return all(is_layer_cut(cut) or named.dimensions[cut.name].exact for cut in plan)


def refit_in_sequence(
    named: NamedAxes,
    plan: PrunePlan,
    batches: Sequence[Sequence[mx.array]],
    fetch: Fetch,
    *,
    held_out: Sequence[Sequence[mx.array]] = (),
    masks: Sequence[mx.array] | None = None,
    start: Cutter | None = None,
    mend: bool = True,
    progress: Progress = silent,
) -> Fitted:
    """The cutter for a plan, fitted on `batches` of the graph's inputs, in its shapes.

    Lambda is chosen on `held_out`, by default the last quarter of the batches, which then does not
    count among them. `masks` say which tokens of each of these batches count. It begins with the
    weights that `start` gives, by default the kept ones as they are. Without `mend` only weights
    that read what is removed are fitted. Keeps the activations between two layers, twice, in
    memory, and the fitted weights in their own dtype.
    """
    assert can_run(named, plan)
    every = [*batches, *held_out]
    count = len(batches) if held_out else len(batches) - len(batches) // 4
    fits, left = fits_of(named, plan, mend=mend)
    run = _Run(named, plan, fetch, Fitted(start or pruner(named, plan), left=left), count, masks)
    dense = pruned = [dict(zip(named.graph.inputs, batch, strict=True)) for batch in every]
    pieces = stages(named.graph, fits)
    for k, stage in enumerate(pieces):
        dense, pruned = run.through(stage, dense, pruned, last=k == len(pieces) - 1)
        progress("refit", k + 1, len(pieces))
    return run.cutter


class _Run:
    """`dense` and `pruned` are what each model has computed for every batch, by value id; they are
    one list as long as the two are the same."""

    def __init__(
        self, named: NamedAxes, plan: PrunePlan, fetch: Fetch, cutter: Fitted, count: int, masks
    ):
        self.named, self.plan, self.fetch, self.cutter = named, plan, fetch, cutter
        self.count = count  # of batches that are fitted; the others are judged on
        self.masks = masks
        self.graph = named.graph
        self.gone = dropped_parameters(named, plan)

    # ---- one stage

    def through(self, stage: Stage, dense: list[dict], pruned: list[dict], *, last: bool):
        """Both models through a stage; the weights of the pruned one are fitted on the way."""
        ends = [fit.target.end for fit in stage.fits]
        weights = load(self.graph, stage.piece, self.fetch)
        if pruned is dense and not self._changes(stage.piece.parameters):
            both = [self._execute(stage.piece, weights, values)[0] for values in dense]
            return both, both
        found = [self._execute(stage.piece, weights, values, ends) for values in dense]
        dense, wanted = [values for values, _ in found], [taps for _, taps in found]
        weights, piece = load(self.graph, stage.piece, self._zeroed), stage.piece
        if nbytes_of(self.graph, stage.back.reads) * len(pruned) <= HELD:
            piece = stage.back
            pruned = [self._execute(stage.front, weights, values)[0] for values in pruned]
        for fit in stage.fits:
            self._fit(fit, piece, weights, pruned, [taps[fit.target.end] for taps in wanted])
        if not last:
            pruned = [self._execute(piece, weights, values)[0] for values in pruned]
        return dense, pruned

    def _picks(self, path: str):
        return picks(self.named, self.plan, path)

    def _changes(self, paths: Iterable[str]) -> bool:
        return any(path in self.gone or self._picks(path) for path in paths)

    def _zeroed(self, paths: Iterable[str]) -> dict[str, mx.array]:
        return {
            path: mx.zeros_like(array)
            if path in self.gone
            else spread_array(self.cutter(path, array), self._picks(path), array.shape)
            for path, array in self.fetch(list(paths)).items()
        }

    def _execute(self, piece: Segment, weights, values, taps=(), *, ends=None):
        """What a piece hands on, or `ends`, and tapped values, evaluated."""
        known = {**weights, **{i: values[i] for i in piece.reads}}
        wanted = piece.hands_on if ends is None else ends
        results, tapped = execute(self.graph, piece.nodes, known, outputs=wanted, taps=taps)
        mx.eval(results, tapped)
        return dict(zip(wanted, results, strict=True)), tapped

    # ---- one weight

    def _fit(self, fit: Fit, piece: Segment, weights, pruned: list[dict], wanted) -> None:
        """Put the fitted weight, and bias, in place of those in `weights`."""
        target, place = fit.target, fit.target.place
        sums = Sums(place.window, fit.keep, fit.outputs, biased=target.bias is not None)
        for b, (values, want) in enumerate(zip(pruned, wanted, strict=True)):
            got, taps = self._execute(piece, weights, values, [place.value], ends=[target.end])
            mask = None if self.masks is None else self.masks[b]
            error = want - got[target.end]
            sums.add(taps[place.value], error, judged=b >= self.count, mask=mask)
        change, lam = sums.change()
        if change is None:
            return
        self.cutter.chosen[fit.path] = lam
        scales = scales_of(self.graph, target, piece.nodes, weights)
        rows = len(change) - sums.biased
        self._replace(fit, weights, _over(change[:rows], target.slope(scales)[fit.outputs]))
        if sums.biased:
            slope = target.bias_slope(scales)[fit.outputs]
            self._replace_bias(fit, weights, _over(change[rows], slope))

    def _replace(self, fit: Fit, weights: dict[int, mx.array], change: np.ndarray) -> None:
        """Add `change` [kept slots at every position, outputs] to the weight."""
        place = fit.target.place
        old = weights[self.graph.parameters[fit.path]].transpose(place.layout)
        inner = old.shape[: place.contracted]
        whole = np.zeros((math.prod(inner), old.shape[-1]), np.float32)
        whole[np.ix_(with_patches(fit.keep, inner), fit.outputs)] = change
        new = old + mx.array(whole.reshape(old.shape))
        self._put(fit.path, weights, new.transpose(np.argsort(place.layout).tolist()))

    def _replace_bias(self, fit: Fit, weights: dict[int, mx.array], change: np.ndarray) -> None:
        path = fit.target.bias.path
        old = weights[self.graph.parameters[path]]
        whole = np.zeros(old.shape, np.float32)
        whole[fit.outputs] = change
        self._put(path, weights, old + mx.array(whole))

    def _put(self, path: str, weights: dict[int, mx.array], new: mx.array) -> None:
        """What is saved is rounded, so the run goes on with what is saved."""
        value = self.graph.parameters[path]
        new = new.astype(self.fetch([path])[path].dtype)
        self.cutter.fitted[path] = prune_array(new, self._picks(path))
        weights[value] = new.astype(self.graph.values[value].dtype)
        mx.eval(self.cutter.fitted[path], weights[value])


def _over(change: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """`change / slope`, and 0 where nothing comes through."""
    return np.divide(change, slope, out=np.zeros_like(change), where=slope != 0)
