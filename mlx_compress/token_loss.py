"""The loss of a batch of windows by a teacher's next-token distributions, and its gradients.

N windows, B rows of a batch, T tokens of a window, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from .attribution import misalignment
from .errors import InputError
from .explained import Traced, View
from .heads import Head, first_array
from .kernels import kl
from .kernels.projected import projected_loss
from .losses import LOSSES, bucketed, cross_entropy
from .options import DistillOptions
from .training_state import Weights
from .workers import ALONE, Workers

Logits = Callable[[mx.array], mx.array]
USUAL = "reverse-kl"
# Whole logits: the gradient comes with the loss, by a Metal kernel where there is one.
WITH_SLOPE = {"forward-kl": kl.forward_kl, "reverse-kl": kl.reverse_kl}
LOSS, TOKENS = " loss", " tokens"  # beside parameters' paths, in which no space is


@dataclass
class Split:
    """The student's head apart from its hidden states, and how `chunk` tokens at a time are told.

    `project` makes a live teacher's logits of its hidden states.
    """

    head: Head
    chunk: int
    project: Logits | None = None


class Batch(NamedTuple):
    """Windows [B, T] of which tokens count by `weights`, 0 for not at all; what the teacher says of
    them, and where attributions are aligned what one of its answers rests on. Those that are the
    student's `own` words are no labels."""

    tokens: mx.array
    weights: mx.array
    targets: tuple[mx.array, ...]
    view: View | None = None
    own: bool = False


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
    count: int | None = None, workers: Workers = ALONE, split: Split | None = None,
) -> tuple[mx.array, Weights]:  # fmt: skip
    """Mean loss, nats per token that counts in any of the batches, and its gradients, float32.

    `batches` are this process's parts of them. `t` is that of `taid`, the other losses have none.
    A misalignment of attributions is added as a mean over rows.
    """

    def total(batch: Batch) -> mx.array:
        loss = _nats(student, batch, options, t, count, split)
        if batch.view is None:
            return loss
        positions_B, tokens_B, theirs_BT = batch.view
        own_BT = student.attribution(batch.tokens[:, :-1], positions_B, tokens_B)
        apart = misalignment(own_BT, theirs_BT).mean()
        return loss + options.attribution_weight * apart * (batch.weights[:, 1:] != 0).sum()

    loss, sums = mx.zeros(()), None
    for batch in batches:
        nats, grads = _differentiated(student.module, partial(total, batch))
        grads = {path: grad.astype(mx.float32) for path, grad in tree_flatten(grads)}
        sums = grads if sums is None else tree_map(mx.add, sums, grads)
        loss = loss + nats
        mx.eval(loss, sums)  # one batch's activations at a time
    tokens = sum((batch.weights[:, 1:] != 0).sum() for batch in batches)
    shared = workers.sum({LOSS: loss, TOKENS: tokens, **sums})
    loss, tokens = shared.pop(LOSS), mx.maximum(shared.pop(TOKENS), 1)
    return loss / tokens, tree_map(lambda grad: grad / tokens, shared)


def _differentiated(module: nn.Module, loss: Callable[[], mx.array]):
    """Raises `InputError` for a model that has no gradient."""
    try:
        return nn.value_and_grad(module, loss)()
    except (AttributeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = " ".join(str(error).split()).rstrip(".")
        raise InputError(f"--model: this architecture cannot be trained ({reason}).") from error


def _nats(student: Traced, batch: Batch, options, t: float, count, split: Split | None) -> mx.array:
    """The weighted sum of the losses of a batch's tokens."""
    inputs_BT, labels_BT = batch.tokens[:, :-1], batch.tokens[:, 1:]
    hard = 0 if batch.own else options.hard_labels

    def nats(own: mx.array, labels: mx.array, *targets: mx.array) -> mx.array:
        found = 0
        if targets:
            found = (1 - hard) * divergence_of(own, targets, options, t, count)
        return found + hard * cross_entropy(own, labels) if hard else found

    counts_BT = batch.weights[:, 1:]
    if split is None:
        own = first_array(student.module(inputs_BT))[..., :count]
        found = nats(own, labels_BT, *batch.targets)
        return mx.where(counts_BT != 0, found * counts_BT, 0).sum()

    def chunk(own: mx.array, labels: mx.array, *targets: mx.array) -> mx.array:
        apart = split.project is not None and len(targets) == 1
        return nats(own, labels, *(map(split.project, targets) if apart else targets))

    hidden_BTD, head = split.head.hidden(inputs_BT), split.head
    flat = [array.reshape(-1, *array.shape[2:]) for array in (
        hidden_BTD, counts_BT, labels_BT, *batch.targets
    )]  # fmt: skip
    return projected_loss(
        flat[0], head.weight[:count], flat[1], loss=chunk, chunk=split.chunk, per_token=flat[2:],
        bias_V=None if head.bias is None else head.bias[:count], train_head=head.trained,
    )  # fmt: skip
