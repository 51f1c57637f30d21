"""The loop of a training: steps of AdamW, held-out measurements, the best weights, the state."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map

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

    Goes on from what `folder` holds of this run, and keeps the state there at every measurement and
    on Ctrl-C. A run depends on seed and step alone: one that was cut off gives the same losses,
    to the bit. `told` hears of each measurement, from before the first step on. Raises `GateFailed`
    where a loss or gradient is not finite. Of several `workers` the first one writes and tells.
    """

    training = folder.open(workers) or first_state(objective.start(), options)
    try:
        while True:
            if _is_due(training, options):
                training = _judged(objective, training, folder, workers, told)
            if training.step == options.iters or _stale(training, options):
                return training
            training = advanced(objective, training, options, folder)
            progress("distil", training.step, options.iters)
    except KeyboardInterrupt:
        if workers.first and folder.kept_step() != training.step:
            folder.save(training)
        raise


def _is_due(training: Training, options: DistillOptions) -> bool:
    """Whether it is to be measured, and was not."""
    measured = bool(training.curve) and training.curve[-1]["step"] == training.step
    wanted = training.step % options.steps_per_eval == 0 or training.step == options.iters
    return wanted and not measured


def _judged(objective, training: Training, folder: TrainingFolder, workers, told) -> Training:
    """The run with a measurement, which is kept on disk by then."""
    point = objective.measured(training.weights)
    if not all(map(math.isfinite, point.values())):
        if training.step == 0:
            raise GateFailed(
                "before the first step what is held out is not finite: a model overflows; try "
                "--dtype float32, or another checkpoint."
            )
        raise _not_finite(f"step {training.step}: what is held out", training, folder)
    training = training.judged(point, point[objective.judged_by])
    if workers.first:
        folder.save(training, training.weights if training.stale == 0 else None)
        told(training.curve[-1])
    return training


def _not_finite(what: str, training: Training, folder: TrainingFolder) -> GateFailed:
    return GateFailed(
        f"{what} is not finite; lower --learning-rate or --clip, and remove {folder.folder} to "
        f"start anew. The best weights so far are those of step {training.best_step} there."
    )


def first_state(weights: Weights, options: DistillOptions) -> Training:
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


def advanced(
    objective: Objective, training: Training, options: DistillOptions, folder: TrainingFolder
) -> Training:
    """The run one step on. Raises `GateFailed` where the loss or a gradient is not finite."""
    loss, grads = objective.gradients(training.weights, training.step, training.taid.t)
    grads, norm = optim.clip_grad_norm(grads, options.clip)
    if not math.isfinite(loss.item()) or not math.isfinite(norm.item()):
        raise _not_finite(f"step {training.step + 1}: the loss", training, folder)
    optimizer = _optimizer(options)
    optimizer.state = tree_map(lambda array: array, training.optimizer)  # it is changed in place
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
