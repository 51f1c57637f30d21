"""Distillation of language models: a student learns a teacher's next-token distributions.

N windows, B rows of a batch, T tokens of a window, V vocabulary.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from .errors import InputError
from .explained import Explainer, Traced
from .graph import Graph
from .heads import Head, first_array, head_of
from .inner import (
    WEIGHED,
    Matching,
    Values,
    block_weights,
    only_projections,
    without_projections,
)
from .losses import cross_entropy
from .options import DIVERGENCES, DistillOptions, among
from .token_loss import Batch, Split, divergence_of, gradients
from .training import batch_rows
from .training_state import Weights
from .training_text import Text
from .workers import ALONE, Workers

# What the teacher says of the next tokens of some windows of a text, given their tokens [B, T - 1]:
# logits [B, T - 1, V], or hidden states where its head is taken off, or the likeliest k tokens,
# their log-probabilities [B, T - 1, k], and that of all others [B, T - 1].
Teacher = Callable[[Text, np.ndarray, mx.array], tuple[mx.array, ...]]
# The prompts [B, P] with so many tokens behind them that a model samples by a key.
Write = Callable[[nn.Module, mx.array, int, mx.array], mx.array]
# Logits of a batch beyond the first are never whole; at most as many at a time as fit the second,
# and of so small a part of the tokens that the peak is a fraction of the whole.
LOGITS_BYTES, CHUNK_BYTES, LEAST_CHUNK, CHUNKS = 2**28, 2**25, 16, 32


class Live:
    """A `Teacher` that is asked as the training goes: a language model, or a function to logits."""

    def __init__(self, model: Callable[[mx.array], object]):
        self.model, self.head, self._traced = model, None, Traced(model)

    def __call__(self, text: Text, rows: np.ndarray, inputs_BT: mx.array) -> tuple[mx.array, ...]:
        if self.head is not None:
            return (self.head.hidden(inputs_BT),)
        return (first_array(self.model(inputs_BT)),)

    def graph(self, inputs_BT: mx.array) -> Graph:
        """From tokens to what it gives."""
        return self._traced.graph(inputs_BT, self.head)

    def tapped(self, inputs_BT: mx.array, taps: Iterable[int]) -> tuple[mx.array, Values]:
        """What it gives, and the values at these ids inside its graph."""
        return self._traced.tapped(inputs_BT, taps, self.head)

    def split(self) -> Head | None:
        """Give hidden states from now on, where the head comes apart."""
        if self.head is None and isinstance(self.model, nn.Module):
            self.head = head_of(self.model)
        return self.head


def chunk_of(tokens: int, vocabulary: int) -> int:
    """How many of a batch's tokens get their logits at a time."""
    return max(LEAST_CHUNK, min(CHUNK_BYTES // (4 * vocabulary), tokens // CHUNKS))


@dataclass
class NextToken:
    """The trainable parameters of `student`, and the options' loss on the text `train`.

    A `training.Objective`. Of the logits the first `count` are compared. Held out are
    `cross_entropy` and `divergence`, nats per token; plain fine-tuning asks no teacher, unless what
    is inside it is matched, for which it has to be `Live`. The student computes in the options'
    dtype. Raises `InputError` for no windows.
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
        for text in (self.train, self.held_out):
            if not text.mask[:, 1:].any():
                raise InputError(
                    f"--mask-prompt: no window of the {text.name} text has a token of an answer; "
                    "give a longer --max-seq-length, or more --val-samples."
                )
        trained = tree_flatten(self.student.trainable_parameters())
        self._start = {path: array.astype(mx.float32) for path, array in trained}
        self.dtype = getattr(mx, self.options.dtype)
        self.student.set_dtype(self.dtype)
        logits = first_array(self.student(mx.zeros((1, 2), mx.int32)))
        self.vocabulary = logits.shape[-1]
        self.apart = self._split()
        self.matching = self._matching()
        if self.matching is not None:
            self._start |= self.matching.start()

    def _split(self) -> Split | None:
        """Where the logits of a batch are large, and heads come apart."""
        rows = self.options.batch_size // self.workers.count
        tokens = rows * (self.train.tokens.shape[1] - 1)
        if 4 * tokens * self.vocabulary <= LOGITS_BYTES:
            return None
        own = head_of(self.student)
        is_live = isinstance(self.teacher, Live) and self.options.hard_labels < 1
        theirs = self.teacher.split() if own and is_live else None
        if own is None or is_live and theirs is None:
            return None
        return Split(own, chunk_of(tokens, self.vocabulary), theirs and theirs.logits)

    def _matching(self) -> Matching | None:
        """How what is inside the models is compared, where the options ask for it."""
        if not self.options.looks_inside:
            return None
        if not isinstance(self.teacher, Live):
            raise InputError("--hidden-weight, --attention-weight: need the teacher itself.")
        rows = self.options.batch_size // self.workers.count
        inputs_BT = mx.zeros((rows, self.train.tokens.shape[1] - 1), mx.int32)
        own = self.traced.graph(inputs_BT, self.apart and self.apart.head)
        matching = Matching(own, self.teacher.graph(inputs_BT), self.options)
        if self.options.attribution == "weights":
            shares_BL = self.explainer.block_shares(self.train, WEIGHED)
            matching.weights = block_weights(shares_BL, len(matching.pairs))
        return matching

    @property
    def judged_by(self) -> str:
        return "cross_entropy" if self.options.hard_labels == 1 else "divergence"

    def start(self) -> Weights:
        return self._start

    def gradients(self, weights: Weights, step: int, t: float) -> tuple[mx.array, Weights]:
        self._set(weights)
        rows = batch_rows(self.options, step, len(self.train.tokens))
        rng = np.random.default_rng([self.options.seed, step])
        parts = [self.workers.part(part) for part in rows]
        if rng.random() < self.options.on_policy:
            keys = rng.integers(2**32, size=(len(parts), self.workers.count))
            batches = (self._own(part, int(key[self.workers.rank]))
                       for part, key in zip(parts, keys, strict=True))  # fmt: skip
        else:
            batches = (self._explained(self._batch(self.train, p), p, step) for p in parts)
        return gradients(
            self.traced, batches, self.options, t, self.count, self.workers, self.apart,
            self.matching, only_projections(weights),
        )  # fmt: skip

    def _own(self, rows: np.ndarray, seed: int) -> Batch:
        """Windows that the student writes on from their first quarter."""
        length = self.train.tokens.shape[1]
        prompt = max(1, length // 4)
        prompts_BP = mx.array(self.train.tokens[rows, :prompt])
        tokens_BT = self.write(self.student, prompts_BP, length - prompt, mx.random.key(seed))
        written = mx.broadcast_to(mx.arange(length) >= prompt, tokens_BT.shape)
        batch = Batch(tokens_BT, written.astype(mx.float32), own=True)
        return self._answered(batch, self.train, rows)

    def _explained(self, batch: Batch, rows: np.ndarray, step: int) -> Batch:
        """With what the options ask of attributions at this step."""
        if self.options.attribution == "weights":
            return batch._replace(shares=self.explainer.token_weights(self.train, rows))
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
        size = self._rows_at_a_time()
        for start in range(0, len(own_rows), size):
            batch = self._batch(self.held_out, own_rows[start : start + size], inside=False)
            labels_BT = batch.tokens[:, 1:]
            own = first_array(self.student(batch.tokens[:, :-1]))[..., : self.count]
            found = {"cross_entropy": cross_entropy(own, labels_BT), "tokens": mx.ones(())}
            if batch.targets:
                targets = batch.targets
                if self.apart is not None and self.apart.project is not None:
                    targets = tuple(map(self.apart.project, targets))
                found["divergence"] = divergence_of(own, targets, self.options, count=self.count)
            for name, nats in found.items():
                sums[name] = sums[name] + mx.where(batch.mask[:, 1:] != 0, nats, 0).sum()
            mx.eval(sums)
        sums = self.workers.sum(sums)
        return {name: sums[name].item() / max(1, sums["tokens"].item()) for name in names}

    def _rows_at_a_time(self) -> int:
        """Whose logits are not large."""
        window = 4 * self.vocabulary * (self.held_out.tokens.shape[1] - 1)
        return max(1, min(self.options.batch_size, LOGITS_BYTES // window))

    def _set(self, weights: Weights) -> None:
        own = without_projections(weights)
        self.student.update(tree_unflatten([(p, a.astype(self.dtype)) for p, a in own.items()]))

    def _batch(self, text: Text, rows: np.ndarray, *, inside: bool = True) -> Batch:
        mask_BT = mx.array(text.mask[rows].astype(np.float32))
        batch = Batch(mx.array(text.tokens[rows]), mask_BT)
        return self._answered(batch, text, rows, inside=inside)

    def _answered(self, batch: Batch, text: Text, rows: np.ndarray, *, inside=True) -> Batch:
        """With what the teacher says of it, and where it is matched what it computes there."""
        inputs_BT, asked = batch.tokens[:, :-1], self.options.hard_labels < 1
        values, targets = None, ()
        if inside and self.matching is not None:
            output, values = self.teacher.tapped(inputs_BT, self.matching.their_taps)
            values = {i: mx.stop_gradient(value) for i, value in values.items()}
            targets = (output,) if asked else ()
        elif asked:
            targets = self.teacher(text, rows, inputs_BT)
        return batch._replace(targets=tuple(map(mx.stop_gradient, targets)), inside=values)
