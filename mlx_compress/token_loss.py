"""The loss of a batch of windows by a teacher's next-token distributions, and its gradients.

N windows, B rows of a batch, T tokens of a window, V vocabulary.
"""

from collections.abc import Callable, Iterable
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
from .inner import Matching, Values
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
    """Windows [B, T] of which tokens count by `mask` (0 or 1), and how much by `shares`, all alike
    without; what the teacher says of them, where attributions are aligned what one of its answers
    rests on, and where it is matched `inside` the values there. Those that are the student's `own`
    words are no labels."""

    tokens: mx.array
    mask: mx.array
    targets: tuple[mx.array, ...] = ()
    shares: mx.array | None = None
    view: View | None = None
    inside: Values | None = None
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
    student: Traced, batches: Iterable[Batch], options: DistillOptions, t: float = 1.0,
    count: int | None = None, workers: Workers = ALONE, split: Split | None = None,
    matching: Matching | None = None, beside: Weights | None = None,
) -> tuple[mx.array, Weights]:  # fmt: skip
    """Mean loss, nats per token that counts in any of the batches, and its gradients, float32.

    `batches` are this process's parts of them. `t` is that of `taid`, the other losses have none.
    A misalignment of attributions is added as a mean over rows, `matching` as one over tokens;
    `beside` the parameters are the projections that it learns.
    """
    loss, tokens, sums = mx.zeros(()), mx.zeros(()), None
    for batch in batches:
        total = partial(_batch_loss, student, batch, options, t, count, split, matching)
        nats, grads = _differentiated(student.module, total, beside or {})
        grads = {path: grad.astype(mx.float32) for path, grad in grads.items()}
        sums = grads if sums is None else tree_map(mx.add, sums, grads)
        loss, tokens = loss + nats, tokens + batch.mask[:, 1:].sum()
        mx.eval(loss, tokens, sums)  # one batch's activations at a time
        del batch, total
    shared = workers.sum({LOSS: loss, TOKENS: tokens, **sums})
    loss, tokens = shared.pop(LOSS), mx.maximum(shared.pop(TOKENS), 1)
    return loss / tokens, tree_map(lambda grad: grad / tokens, shared)


def _batch_loss(
    student: Traced, batch: Batch, options, t: float, count, split, matching, projections: Weights
) -> mx.array:
    """All that is added up for one batch, times the tokens that count."""
    inputs_BT, mask_BT, more = batch.tokens[:, :-1], batch.mask[:, 1:], mx.zeros(())
    if matching is not None:
        head = None if split is None else split.head
        output, own = student.tapped(inputs_BT, matching.own_taps, head)
        more = matching.loss(own, batch.inside, mask_BT, projections)
    elif split is not None:
        output = split.head.hidden(inputs_BT)
    else:
        output = first_array(student.module(inputs_BT))
    if batch.view is not None:
        positions_B, tokens_B, theirs_BT = batch.view
        own_BT = student.attribution(inputs_BT, positions_B, tokens_B)
        more = more + options.attribution_weight * misalignment(own_BT, theirs_BT).mean()
    return _nats(output, batch, options, t, count, split) + more * mask_BT.sum()


def _differentiated(
    module: nn.Module, loss: Callable[[Weights], mx.array], beside: Weights
) -> tuple[mx.array, Weights]:
    """The loss, and its gradients by a module's parameters and by what is learnt `beside` them.

    Raises `InputError` for a model that has no gradient.
    """

    def total(parameters: dict, beside: Weights) -> mx.array:
        module.update(parameters)
        return loss(beside)

    try:
        own = module.trainable_parameters()
        found, (grads, others) = mx.value_and_grad(total, argnums=(0, 1))(own, beside)
        return found, dict(tree_flatten(grads)) | others
    except (AttributeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = " ".join(str(error).split()).rstrip(".")
        raise InputError(f"--model: this architecture cannot be trained ({reason}).") from error


def _nats(output, batch: Batch, options, t: float, count, split: Split | None) -> mx.array:
    """The weighted sum of the losses of a batch's tokens, from logits, or from hidden states where
    the head is apart."""
    labels_BT = batch.tokens[:, 1:]
    hard = 0 if batch.own else options.hard_labels

    def nats(own: mx.array, labels: mx.array, *targets: mx.array) -> mx.array:
        found = 0
        if targets:
            found = (1 - hard) * divergence_of(own, targets, options, t, count)
        return found + hard * cross_entropy(own, labels) if hard else found

    counts_BT = batch.mask[:, 1:]
    if batch.shares is not None:
        counts_BT = counts_BT * batch.shares[:, 1:]
    if split is None:
        found = nats(output[..., :count], labels_BT, *batch.targets)
        return mx.where(counts_BT != 0, found * counts_BT, 0).sum()

    def chunk(own: mx.array, labels: mx.array, *targets: mx.array) -> mx.array:
        apart = split.project is not None and len(targets) == 1
        return nats(own, labels, *(map(split.project, targets) if apart else targets))

    head = split.head
    flat = [array.reshape(-1, *array.shape[2:]) for array in (
        output, counts_BT, labels_BT, *batch.targets
    )]  # fmt: skip
    return projected_loss(
        flat[0], head.weight[:count], flat[1], loss=chunk, chunk=split.chunk, per_token=flat[2:],
        bias_V=None if head.bias is None else head.bias[:count], train_head=head.trained,
    )  # fmt: skip
