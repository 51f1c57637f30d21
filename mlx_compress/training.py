"""The loop of a training: steps of AdamW, held-out measurements, the best weights, the state."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from .errors import GateFailed
from .options import DistillOptions
from .stream import Progress, silent
from .training_state import Training, TrainingFolder, Weights
from .workers import ALONE, Workers

Told = Callable[[dict], None]


class Objective(Protocol):
    """What is trained: float32 weights by path, their loss at a step, and how they are judged."""

    judged_by: str  # the entry of `measured` that should be low

    def start(self) -> Weights:
        """The weights before the first step."""

    def gradients(self, weights: Weights, step: int, t: float) -> tuple[mx.array, Weights]:
        """The mean loss of a step and its gradients; `t` is that of `losses.taid`."""

    def measured(self, weights: Weights) -> dict[str, float]:
        """What is held out."""


def train(
    objective: Objective, options: DistillOptions, folder: TrainingFolder,
    *, workers: Workers = ALONE, told: Told = lambda point: None, progress: Progress = silent,
) -> Training:  # fmt: skip
    """Train to the end, or until `patience` is over; `folder` then holds the best weights.

    Goes on from what `folder` holds of this run, and keeps the state there at every measurement,
    as on Ctrl-C. A run depends on seed and step alone: one that was cut off gives the same losses,
    to the bit. `told` hears of each measurement, from before the first step on. Raises `GateFailed`
    where a loss or gradient is not finite. Of several `workers` the first one writes and tells.
    """

    def judge(training: Training) -> None:
        point = objective.measured(training.weights)
        better = training.judge(point, point[objective.judged_by])
        if workers.first:
            folder.save(training, training.weights if better else None)
            told(training.curve[-1])

    training = folder.open(workers)
    if training is None:
        training = _start(objective.start(), options)
        judge(training)
    try:
        while training.step < options.iters and not _stale(training, options):
            training = _advanced(objective, training, options, folder)
            if training.step % options.steps_per_eval == 0 or training.step == options.iters:
                judge(training)
            progress("distil", training.step, options.iters)
    except KeyboardInterrupt:
        if workers.first:
            folder.save(training)
        raise
    return training


def _start(weights: Weights, options: DistillOptions) -> Training:
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


def _advanced(
    objective: Objective, training: Training, options: DistillOptions, folder: TrainingFolder
) -> Training:
    """The run one step on. Raises `GateFailed` where the loss or a gradient is not finite."""
    loss, grads = objective.gradients(training.weights, training.step, training.taid.t)
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
    """The samples of a step's batches: every one once, in a new order, then all again."""
    size = options.batch_size * options.grad_accumulation_steps
    rounds, places = np.divmod(np.arange(step * size, (step + 1) * size), count)
    orders = {r: np.random.default_rng([options.seed, r]).permutation(count) for r in set(rounds)}
    rows = np.array([orders[r][place] for r, place in zip(rounds, places, strict=True)])
    return np.split(rows, options.grad_accumulation_steps)
