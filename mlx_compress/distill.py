"""Train a student to give a teacher's next-token distributions.

N windows, B rows of a batch, T tokens of a window, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map

from .errors import GateFailed, InputError
from .losses import LOSSES, TaidSchedule, cross_entropy
from .options import among
from .stream import Progress, silent

Model = Callable[[mx.array], mx.array]


@dataclass(frozen=True)
class DistillOptions:
    """How to distil.

    A step reads `grad_accumulation_steps` batches of `batch_size` windows. The learning rate rises
    over `warmup` steps, then falls along a cosine to 0 at `iters`. `hard_labels` is the weight of
    the text's own next tokens (0 to 1) beside the teacher's. Gradients are clipped to the global
    norm `clip`. Held-out loss is taken every `steps_per_eval` steps; after `patience` of those
    without a better one the run ends.
    """

    loss: str = "reverse-kl"
    iters: int = 200
    batch_size: int = 4
    learning_rate: float = 1e-4
    temperature: float = 1.0
    hard_labels: float = 0.0
    warmup: int = 20
    clip: float = 1.0
    grad_accumulation_steps: int = 1
    steps_per_eval: int = 50
    patience: int | None = None
    seed: int = 0

    def __post_init__(self):
        among("--loss", (self.loss,), tuple(LOSSES))
        for name, least in (
            ("iters", 1), ("batch_size", 1), ("warmup", 0), ("grad_accumulation_steps", 1),
            ("steps_per_eval", 1), ("patience", 1), ("seed", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{_flag(name)} {value}: must be at least {least}.")
        for name in ("learning_rate", "temperature", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{_flag(name)} {getattr(self, name):g}: must be more than 0.")
        if not 0 <= self.hard_labels <= 1:
            raise InputError(f"--hard-labels {self.hard_labels:g}: must lie between 0 and 1.")

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        part = (step - self.warmup) / max(1, self.iters - self.warmup)
        return self.learning_rate * (1 + math.cos(math.pi * part)) / 2


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def distil(
    student: nn.Module, teacher: Model, train_NT: np.ndarray, held_out_NT: np.ndarray,
    options: DistillOptions, *, mask_NT: np.ndarray | None = None, progress: Progress = silent,
) -> list[dict]:  # fmt: skip
    """Train `student`, in float32, in place; it ends with the weights of its best held-out loss.

    Both models give logits [B, T, V] of one V. `mask_NT` is 0 at the training tokens that are not
    to be predicted. Returns the held-out `cross_entropy` and `divergence`, nats per token, by
    `step`, from before the first on. Batches depend on seed and step alone. Raises `InputError`
    for no windows, and `GateFailed` where a loss or gradient is not finite: the student then has
    its best weights so far.
    """
    if not len(train_NT) or not len(held_out_NT):
        raise InputError("no windows of text to train or to evaluate on; give more --data.")
    mask_NT = np.ones(train_NT.shape, bool) if mask_NT is None else mask_NT
    student.set_dtype(mx.float32)
    optimizer = optim.AdamW(learning_rate=options.learning_rate)
    curve = [{"step": 0} | held_out(student, teacher, held_out_NT, options)]
    best = _Best(curve[0]["divergence"], _copy(student))
    taid = TaidSchedule()
    for step in range(options.iters):
        batches = [
            (train_NT[rows], mask_NT[rows]) for rows in batch_rows(options, step, len(train_NT))
        ]
        loss = _update(student, teacher, batches, optimizer, options, options.rate(step), taid.t)
        if not math.isfinite(loss):
            student.update(best.weights)
            raise GateFailed(
                f"step {step + 1}: the loss is not finite; lower --learning-rate "
                f"{options.learning_rate:g} or --clip {options.clip:g}."
            )
        taid = taid.after(loss, (step + 1) / options.iters)
        if (step + 1) % options.steps_per_eval == 0 or step + 1 == options.iters:
            curve.append({"step": step + 1} | held_out(student, teacher, held_out_NT, options))
            best.see(curve[-1]["divergence"], student)
        progress("distil", step + 1, options.iters)
        if options.patience and best.stale >= options.patience:
            break
    student.update(best.weights)
    return curve


@dataclass
class _Best:
    nats: float
    weights: dict
    stale: int = 0

    def see(self, nats: float, student: nn.Module) -> None:
        if nats < self.nats:
            self.nats, self.weights, self.stale = nats, _copy(student), 0
        else:
            self.stale += 1


def _copy(student: nn.Module) -> dict:
    # Updates make new arrays, so holding on to the old ones is a copy.
    return tree_map(lambda array: array, student.parameters())


def batch_rows(options: DistillOptions, step: int, count: int) -> list[np.ndarray]:
    """The windows of a step's batches: every window once, in a new order, then all again."""
    size = options.batch_size * options.grad_accumulation_steps
    rounds, places = np.divmod(np.arange(step * size, (step + 1) * size), count)
    orders = {r: np.random.default_rng([options.seed, r]).permutation(count) for r in set(rounds)}
    rows = np.array([orders[r][place] for r, place in zip(rounds, places, strict=True)])
    return np.split(rows, options.grad_accumulation_steps)


def held_out(student: Model, teacher: Model, tokens_NT: np.ndarray, options) -> dict[str, float]:
    """Cross-entropy and divergence, nats per token, over all windows."""
    sums, count = np.zeros(2), 0
    for start in range(0, len(tokens_NT), options.batch_size):
        tokens_BT = mx.array(tokens_NT[start : start + options.batch_size])
        own, theirs = student(tokens_BT[:, :-1]), teacher(tokens_BT[:, :-1])
        hard = cross_entropy(own, tokens_BT[:, 1:]).sum()
        soft = _divergence(options, own, theirs).sum()
        sums += [hard.item(), soft.item()]
        count += tokens_BT[:, 1:].size
    return dict(zip(("cross_entropy", "divergence"), (sums / count).tolist(), strict=True))


def _divergence(options, own, theirs, t: float = 1.0) -> mx.array:
    schedule = {"t": t} if options.loss == "taid" else {}
    return LOSSES[options.loss](own, theirs, temperature=options.temperature, **schedule)


def gradients(
    student: nn.Module, teacher: Model, batches, options, t: float = 1.0
) -> tuple[mx.array, dict]:
    """Mean loss, nats per token that counts in any of the batches, and its gradients.

    `t` is that of `taid`, the other losses have none.
    """

    def total(tokens_BT, mask_BT):
        own, theirs = student(tokens_BT[:, :-1]), mx.stop_gradient(teacher(tokens_BT[:, :-1]))
        nats = _divergence(options, own, theirs, t)
        nats = (1 - options.hard_labels) * nats
        if options.hard_labels:
            nats = nats + options.hard_labels * cross_entropy(own, tokens_BT[:, 1:])
        return mx.where(mask_BT[:, 1:], nats, 0).sum()

    count = max(1, sum(int(np.count_nonzero(mask[:, 1:])) for _, mask in batches))
    loss, sums = mx.zeros(()), None
    for tokens_BT, mask_BT in batches:
        nats, grads = nn.value_and_grad(student, total)(mx.array(tokens_BT), mx.array(mask_BT != 0))
        sums = grads if sums is None else tree_map(mx.add, sums, grads)
        loss = loss + nats
        mx.eval(loss, sums)  # one batch's activations at a time
    return loss / count, tree_map(lambda grad: grad / count, sums)


def _update(student, teacher, batches, optimizer, options, rate: float, t: float) -> float:
    """The loss of one step; where it or a gradient is not finite, NaN, and nothing changed."""
    loss, grads = gradients(student, teacher, batches, options, t)
    grads, norm = optim.clip_grad_norm(grads, options.clip)
    if not math.isfinite(loss.item()) or not math.isfinite(norm.item()):
        return math.nan
    optimizer.learning_rate = rate
    optimizer.update(student, grads)
    mx.eval(student.parameters(), optimizer.state)
    return loss.item()
