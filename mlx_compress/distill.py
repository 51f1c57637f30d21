"""Train a student to give a teacher's next-token distributions.

N windows, B rows of a batch, T tokens of a window, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from .errors import GateFailed, InputError
from .kernels import kl
from .losses import LOSSES, bucketed, cross_entropy
from .options import DistillOptions
from .stream import Progress, silent
from .training_state import Training, TrainingFolder, Weights
from .training_text import Text

Logits = Callable[[mx.array], mx.array]
# What the teacher says of the next tokens of some windows of a text, given their tokens [B, T - 1]:
# logits [B, T - 1, V], or the likeliest k tokens and their log-probabilities [B, T - 1, k].
Teacher = Callable[[Text, np.ndarray, mx.array], tuple[mx.array, ...]]
Batch = tuple[mx.array, mx.array, tuple[mx.array, ...]]  # tokens, mask, what the teacher says
# Whole logits: the gradient comes with the loss, by a Metal kernel where there is one.
WITH_SLOPE = {"forward-kl": kl.forward_kl, "reverse-kl": kl.reverse_kl}
Told = Callable[[dict], None]


def live(logits: Logits) -> Teacher:
    """A teacher that is asked as the training goes."""

    def targets(text: Text, rows: np.ndarray, inputs_BT: mx.array) -> tuple[mx.array, ...]:
        return (logits(inputs_BT),)

    return targets


def logits_of(module: nn.Module) -> Logits:
    """A model's logits alone, where it gives more, which come first."""

    def logits(tokens_BT: mx.array) -> mx.array:
        out = module(tokens_BT)
        while not isinstance(out, mx.array):
            out = out[0]
        return out

    return logits


def distil(
    student: nn.Module, teacher: Teacher, train: Text, held_out: Text, options: DistillOptions,
    folder: TrainingFolder, *, count: int | None = None, told: Told = lambda point: None,
    progress: Progress = silent,
) -> Training:  # fmt: skip
    """Train the trainable parameters of `student`, in place; it ends with its best weights.

    Goes on from what `folder` holds of this run, and keeps the state there at every evaluation, as
    on Ctrl-C. Of the logits the first `count` are compared. The run depends on seed and step alone:
    one that was cut off gives the same losses, to the bit. Held out are `cross_entropy` and
    `divergence`, nats per token, from before the first step on; `told` hears of each. Raises
    `InputError` for no windows, and `GateFailed` where a loss or gradient is not finite.
    """
    if not len(train.tokens) or not len(held_out.tokens):
        raise InputError("no windows of text to train or to evaluate on; give more --data.")
    dtype = getattr(mx, options.dtype)
    student.set_dtype(dtype)
    ask = lambda text, rows: _batch(teacher, text, rows, options)  # noqa: E731

    def judge(training: Training) -> None:
        point = measured(student, ask, held_out, options, count)
        better = training.judge(point, point[_judged_by(options)])
        folder.save(training, training.weights if better else None)
        told(training.curve[-1])

    training = folder.open()
    if training is None:
        training = _start(student, options)
        judge(training)
    try:
        while training.step < options.iters and not _stale(training, options):
            _set(student, training.weights, dtype)
            rows = batch_rows(options, training.step, len(train.tokens))
            batches = [ask(train, part) for part in rows]
            training = _advanced(student, training, batches, options, count, folder)
            if training.step % options.steps_per_eval == 0 or training.step == options.iters:
                _set(student, training.weights, dtype)
                judge(training)
            progress("distil", training.step, options.iters)
    except KeyboardInterrupt:
        folder.save(training)
        raise
    _set(student, folder.best(training), mx.float32)
    mx.eval(student.parameters())
    return training


def _start(student: nn.Module, options: DistillOptions) -> Training:
    weights = {p: a.astype(mx.float32) for p, a in tree_flatten(student.trainable_parameters())}
    optimizer = _optimizer(options)
    optimizer.init(weights)
    return Training(weights, optimizer.state)


def _optimizer(options: DistillOptions) -> optim.Optimizer:
    # Without the correction the first steps are three times as long as the rate says.
    return optim.AdamW(
        learning_rate=options.learning_rate, betas=[0.9, 0.95], weight_decay=0.0,
        bias_correction=True,
    )  # fmt: skip


def _stale(training: Training, options: DistillOptions) -> bool:
    return options.patience is not None and training.stale >= options.patience


def _judged_by(options: DistillOptions) -> str:
    """Plain fine-tuning is judged by what it trains on."""
    return "cross_entropy" if options.hard_labels == 1 else "divergence"


def _set(student: nn.Module, weights: Weights, dtype: mx.Dtype) -> None:
    student.update(tree_unflatten([(path, a.astype(dtype)) for path, a in weights.items()]))


def _advanced(student, training: Training, batches, options, count, folder) -> Training:
    """The run one step on. Raises `GateFailed` where the loss or a gradient is not finite."""
    loss, grads = gradients(student, batches, options, training.taid.t, count)
    grads, norm = optim.clip_grad_norm(grads, options.clip)
    if not math.isfinite(loss.item()) or not math.isfinite(norm.item()):
        raise GateFailed(
            f"step {training.step + 1}: the loss is not finite; lower --learning-rate "
            f"{options.learning_rate:g} or --clip {options.clip:g}. The best weights so far are "
            f"those of step {training.best_step}, in {folder.folder}."
        )
    optimizer = _optimizer(options)
    optimizer.state = training.optimizer
    optimizer.learning_rate = options.rate(training.step)
    weights = optimizer.apply_gradients(grads, training.weights)
    mx.eval(weights, optimizer.state)
    step = training.step + 1
    return replace(
        training, weights=weights, optimizer=optimizer.state, step=step,
        taid=training.taid.after(loss.item(), step / options.iters),
        losses=[*training.losses, loss.item()],
    )  # fmt: skip


def batch_rows(options: DistillOptions, step: int, count: int) -> list[np.ndarray]:
    """The windows of a step's batches: every window once, in a new order, then all again."""
    size = options.batch_size * options.grad_accumulation_steps
    rounds, places = np.divmod(np.arange(step * size, (step + 1) * size), count)
    orders = {r: np.random.default_rng([options.seed, r]).permutation(count) for r in set(rounds)}
    rows = np.array([orders[r][place] for r, place in zip(rounds, places, strict=True)])
    return np.split(rows, options.grad_accumulation_steps)


def _batch(teacher: Teacher, text: Text, rows: np.ndarray, options: DistillOptions) -> Batch:
    tokens_BT = mx.array(text.tokens[rows])
    asked = options.hard_labels < 1
    targets = teacher(text, rows, tokens_BT[:, :-1]) if asked else ()
    return tokens_BT, mx.array(text.mask[rows]), tuple(map(mx.stop_gradient, targets))


def measured(student: nn.Module, ask, text: Text, options, count: int | None = None) -> dict:
    """Cross-entropy and, with a teacher, divergence: nats per token that counts, of all windows."""
    names = ["cross_entropy"] + ["divergence"] * (options.hard_labels < 1)
    sums, tokens = np.zeros(len(names)), 0
    for start in range(0, len(text.tokens), options.batch_size):
        rows = np.arange(start, min(start + options.batch_size, len(text.tokens)))
        tokens_BT, mask_BT, targets = ask(text, rows)
        own = logits_of(student)(tokens_BT[:, :-1])[..., :count]
        nats = [cross_entropy(own, tokens_BT[:, 1:])]
        nats += [divergence_of(own, targets, options, count=count)] if targets else []
        sums += [mx.where(mask_BT[:, 1:], each, 0).sum().item() for each in nats]
        tokens += mask_BT[:, 1:].sum().item()
    return dict(zip(names, (sums / max(1, tokens)).tolist(), strict=True))


def divergence_of(
    own: mx.array, targets: tuple[mx.array, ...], options: DistillOptions, t: float = 1.0,
    count: int | None = None,
) -> mx.array:  # fmt: skip
    """The options' loss of each token, from the student's first `count` logits and the targets."""
    whole = len(targets) == 1
    own, theirs = (own, targets[0][..., :count]) if whole else bucketed(own, *targets)
    loss = (WITH_SLOPE if whole else LOSSES).get(options.loss, LOSSES[options.loss])
    schedule = {"t": t} if options.loss == "taid" else {}
    return loss(own, theirs, temperature=options.temperature, **schedule)


def gradients(
    student: nn.Module, batches: Sequence[Batch], options: DistillOptions, t: float = 1.0,
    count: int | None = None,
) -> tuple[mx.array, Weights]:  # fmt: skip
    """Mean loss, nats per token that counts in any of the batches, and its gradients, float32.

    `t` is that of `taid`, the other losses have none.
    """

    def total(tokens_BT, mask_BT, targets):
        own = logits_of(student)(tokens_BT[:, :-1])[..., :count]
        nats = 0
        if targets:
            nats = (1 - options.hard_labels) * divergence_of(own, targets, options, t, count)
        if options.hard_labels:
            nats = nats + options.hard_labels * cross_entropy(own, tokens_BT[:, 1:])
        return mx.where(mask_BT[:, 1:], nats, 0).sum()

    tokens = max(1, sum(mask_BT[:, 1:].sum().item() for _, mask_BT, _ in batches))
    loss, sums = mx.zeros(()), None
    for batch in batches:
        nats, grads = nn.value_and_grad(student, total)(*batch)
        grads = {path: grad.astype(mx.float32) for path, grad in tree_flatten(grads)}
        sums = grads if sums is None else tree_map(mx.add, sums, grads)
        loss = loss + nats
        mx.eval(loss, sums)  # one batch's activations at a time
    return loss / tokens, tree_map(lambda grad: grad / tokens, sums)
