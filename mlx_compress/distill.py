"""Distillation of language models: a student learns a teacher's next-token distributions.

N windows, B rows of a batch, T tokens of a window, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from .attribution import misalignment
from .errors import InputError
from .explained import Explainer, Traced, View
from .kernels import kl
from .losses import LOSSES, bucketed, cross_entropy
from .options import DIVERGENCES, DistillOptions, among
from .training import batch_rows
from .training_state import Weights
from .training_text import Text
from .workers import ALONE, Workers

Logits = Callable[[mx.array], mx.array]
# What the teacher says of the next tokens of some windows of a text, given their tokens [B, T - 1]:
# logits [B, T - 1, V], or the likeliest k tokens and their log-probabilities [B, T - 1, k].
Teacher = Callable[[Text, np.ndarray, mx.array], tuple[mx.array, ...]]
# The prompts [B, P] with so many tokens behind them that a model samples by a key.
Write = Callable[[nn.Module, mx.array, int, mx.array], mx.array]
USUAL = "reverse-kl"
LOSS, TOKENS = " loss", " tokens"  # beside parameters' paths, in which no space is
# Whole logits: the gradient comes with the loss, by a Metal kernel where there is one.
WITH_SLOPE = {"forward-kl": kl.forward_kl, "reverse-kl": kl.reverse_kl}


def live(logits: Logits) -> Teacher:
    """A teacher that is asked as the training goes."""

    def targets(text: Text, rows: np.ndarray, inputs_BT: mx.array) -> tuple[mx.array, ...]:
        return (logits(inputs_BT),)

    return targets


def logits_of(module: nn.Module) -> Logits:
    """A model's logits alone, where it gives more, which come first."""

    return lambda tokens_BT: first_array(module(tokens_BT))


def first_array(out) -> mx.array:
    while not isinstance(out, mx.array):
        out = out[0]
    return out


class Batch(NamedTuple):
    """Windows [B, T] of which tokens count by `weights`, 0 for not at all; what the teacher says of
    them, and where attributions are aligned what one of its answers rests on. Those that are the
    student's `own` words are no labels."""

    tokens: mx.array
    weights: mx.array
    targets: tuple[mx.array, ...]
    view: View | None = None
    own: bool = False


@dataclass
class NextToken:
    """The trainable parameters of `student`, and the options' loss on the text `train`.

    A `training.Objective`. Of the logits the first `count` are compared. Held out are
    `cross_entropy` and `divergence`, nats per token; plain fine-tuning asks no teacher. The student
    computes in the options' dtype. Raises `InputError` for no windows.
    """

    student: nn.Module
    teacher: Teacher
    train: Text
    held_out: Text
    options: DistillOptions
    count: int | None = None
    workers: Workers = ALONE
    explainer: Explainer | None = None
    write: Write | None = None

    def __post_init__(self):
        if not len(self.train.tokens) or not len(self.held_out.tokens):
            raise InputError("no windows of text to train or to evaluate on; give more --data.")
        if self.options.loss is not None:
            among("--loss", (self.options.loss,), DIVERGENCES)
        self.traced = Traced(self.student)
        self.workers.check(self.options.batch_size)
        self.dtype = getattr(mx, self.options.dtype)
        self.student.set_dtype(self.dtype)

    @property
    def judged_by(self) -> str:
        return "cross_entropy" if self.options.hard_labels == 1 else "divergence"

    def start(self) -> Weights:
        trained = tree_flatten(self.student.trainable_parameters())
        return {path: array.astype(mx.float32) for path, array in trained}

    def gradients(self, weights: Weights, step: int, t: float) -> tuple[mx.array, Weights]:
        self._set(weights)
        rows = batch_rows(self.options, step, len(self.train.tokens))
        rng = np.random.default_rng([self.options.seed, step])
        parts = [self.workers.part(part) for part in rows]
        if rng.random() < self.options.on_policy:
            keys = rng.integers(2**32, size=(len(parts), self.workers.count))
            batches = [self._own(part, int(key[self.workers.rank]))
                       for part, key in zip(parts, keys, strict=True)]  # fmt: skip
        else:
            batches = [self._explained(self._batch(self.train, p), p, step) for p in parts]
        return gradients(self.traced, batches, self.options, t, self.count, self.workers)

    def _own(self, rows: np.ndarray, seed: int) -> Batch:
        """Windows that the student writes on from their first quarter."""
        length = self.train.tokens.shape[1]
        prompt = max(1, length // 4)
        prompts_BP = mx.array(self.train.tokens[rows, :prompt])
        tokens_BT = self.write(self.student, prompts_BP, length - prompt, mx.random.key(seed))
        written = mx.broadcast_to(mx.arange(length) >= prompt, tokens_BT.shape)
        targets = self.teacher(self.train, rows, tokens_BT[:, :-1])
        targets = tuple(map(mx.stop_gradient, targets))
        return Batch(tokens_BT, written.astype(mx.float32), targets, own=True)

    def _explained(self, batch: Batch, rows: np.ndarray, step: int) -> Batch:
        """With what the options ask of attributions at this step."""
        if self.options.attribution == "weights":
            on = self.explainer.token_weights(self.train, rows)
            weights = mx.concatenate([batch.weights[:, :1], batch.weights[:, 1:] * on], axis=1)
            return batch._replace(weights=weights)
        turn, left = divmod(step, self.options.attribution_every)
        if self.options.attribution != "align" or left:
            return batch
        number = turn % self.options.attribution_views
        return batch._replace(view=self.explainer.view(self.train, rows, number))

    def measured(self, weights: Weights) -> dict[str, float]:
        """Of all windows, at the tokens that count."""
        self._set(weights)
        names = ["cross_entropy"] + ["divergence"] * (self.options.hard_labels < 1)
        own_rows = self.workers.part(np.arange(len(self.held_out.tokens)))
        sums = dict.fromkeys([*names, "tokens"], mx.zeros(()))
        for start in range(0, len(own_rows), self.options.batch_size):
            rows = own_rows[start : start + self.options.batch_size]
            batch = self._batch(self.held_out, rows)
            labels_BT = batch.tokens[:, 1:]
            own = logits_of(self.student)(batch.tokens[:, :-1])[..., : self.count]
            found = {"cross_entropy": cross_entropy(own, labels_BT), "tokens": mx.ones(())}
            if batch.targets:
                found["divergence"] = divergence_of(
                    own, batch.targets, self.options, count=self.count
                )
            for name, nats in found.items():
                sums[name] = sums[name] + mx.where(batch.weights[:, 1:] != 0, nats, 0).sum()
            mx.eval(sums)
        sums = self.workers.sum(sums)
        return {name: sums[name].item() / max(1, sums["tokens"].item()) for name in names}

    def _set(self, weights: Weights) -> None:
        cast = [(path, array.astype(self.dtype)) for path, array in weights.items()]
        self.student.update(tree_unflatten(cast))

    def _batch(self, text: Text, rows: np.ndarray) -> Batch:
        tokens_BT = mx.array(text.tokens[rows])
        asked = self.options.hard_labels < 1
        targets = self.teacher(text, rows, tokens_BT[:, :-1]) if asked else ()
        weights_BT = mx.array(text.mask[rows].astype(np.float32))
        return Batch(tokens_BT, weights_BT, tuple(map(mx.stop_gradient, targets)))


def divergence_of(
    own: mx.array, targets: tuple[mx.array, ...], options: DistillOptions, t: float = 1.0,
    count: int | None = None,
) -> mx.array:  # fmt: skip
    """The options' loss of each token, from the student's first `count` logits and the targets."""
    whole = len(targets) == 1
    own, theirs = (own, targets[0][..., :count]) if whole else bucketed(own, *targets)
    name = options.loss or USUAL
    loss = (WITH_SLOPE if whole else LOSSES).get(name, LOSSES[name])
    schedule = {"t": t} if name == "taid" else {}
    return loss(own, theirs, temperature=options.temperature, **schedule)


def gradients(
    student: Traced, batches: Sequence[Batch], options: DistillOptions, t: float = 1.0,
    count: int | None = None, workers: Workers = ALONE,
) -> tuple[mx.array, Weights]:  # fmt: skip
    """Mean loss, nats per token that counts in any of the batches, and its gradients, float32.

    `batches` are this process's parts of them. `t` is that of `taid`, the other losses have none.
    A misalignment of attributions is added as a mean over rows.
    """

    def total(batch: Batch) -> mx.array:
        inputs_BT, counts_BT = batch.tokens[:, :-1], batch.weights[:, 1:]
        own, nats = logits_of(student.module)(inputs_BT)[..., :count], 0
        hard = 0 if batch.own else options.hard_labels
        if batch.targets:
            nats = (1 - hard) * divergence_of(own, batch.targets, options, t, count)
        if hard:
            nats = nats + hard * cross_entropy(own, batch.tokens[:, 1:])
        loss = mx.where(counts_BT != 0, nats * counts_BT, 0).sum()
        if batch.view is None:
            return loss
        positions_B, tokens_B, theirs_BT = batch.view
        own_BT = student.attribution(inputs_BT, positions_B, tokens_B)
        apart = misalignment(own_BT, theirs_BT).mean()
        return loss + options.attribution_weight * apart * (counts_BT != 0).sum()

    loss, sums = mx.zeros(()), None
    for batch in batches:
        nats, grads = nn.value_and_grad(student.module, partial(total, batch))()
        grads = {path: grad.astype(mx.float32) for path, grad in tree_flatten(grads)}
        sums = grads if sums is None else tree_map(mx.add, sums, grads)
        loss = loss + nats
        mx.eval(loss, sums)  # one batch's activations at a time
    tokens = sum((batch.weights[:, 1:] != 0).sum() for batch in batches)
    shared = workers.sum({LOSS: loss, TOKENS: tokens, **sums})
    loss, tokens = shared.pop(LOSS), mx.maximum(shared.pop(TOKENS), 1)
    return loss / tokens, tree_map(lambda grad: grad / tokens, shared)
