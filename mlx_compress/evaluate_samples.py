"""The truth about what a program lost: loss and measure on held-out samples, size, work, speed.

As in evaluate.py, dense and compressed see the same samples, and what is compared is the paired
difference.

Shape suffixes: N samples, R repeats.
"""

import time
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np

from .cost import cost, nbytes
from .errors import InputError
from .evaluate import EvaluateConfig, bootstrap_interval, disk_bytes
from .execute import run
from .graph import Graph
from .program import Program
from .report import machine
from .samples import Samples
from .stream import Fetch, Progress, groups, silent, stream_forward


def evaluate_programs(
    dense: Program,
    compressed: Program | None,
    samples: Samples,
    config: EvaluateConfig | None = None,
    *,
    folders: Mapping[str, Path] | None = None,
    progress: Progress = silent,
) -> dict:
    """The report, as a JSON-able dict: `machine()`, seed, dtype, task, data, dense, compressed,
    paired.

    With `compressed` None the last two are absent. `folders` are those of "dense" and "compressed",
    whose safetensors are counted. Under "paired", "loss" and "score" are compressed less dense
    with a 95 % bootstrap interval over samples, "speedup" is the median, least and largest of
    paired repeats. `progress(name, done, total)` counts pieces of work, for each model.

    Raises `InputError` for fewer than two samples, for samples that a program does not take, and
    for losses that are not finite.
    """
    config = config or EvaluateConfig()
    if len(samples) < 2:
        raise InputError(f"{samples.path}: 1 sample gives no interval; give more.")
    programs = {"dense": dense} | ({} if compressed is None else {"compressed": compressed})
    scores = {
        name: score_samples(program, samples, name, progress=progress)
        for name, program in programs.items()
    }
    seconds = batch_seconds(programs, samples, repeats=config.repeats)
    report = {**machine(), **_about(dense, samples, config)}
    for name, program in programs.items():
        loss, answers = scores[name]
        report[name] = {
            "loss": float(loss.mean(dtype=np.float64)),
            "score": samples.score(answers),
            **_sizes(program, samples, (folders or {}).get(name)),
            "ms_per_sample": 1e3 * float(np.median(seconds[name])) / samples.size,
        }
    if compressed is not None:
        paired = compare_samples(samples, *scores.values(), config)
        report["paired"] = paired | {"speedup": _speedup(seconds)}
    return report


def score_samples(
    program: Program, samples: Samples, name: str = "the model", *, progress: Progress = silent
) -> tuple[np.ndarray, np.ndarray]:
    """Losses float32 [N] and answers [N] from one pass, streamed piece by piece of the program.

    Raises `InputError` where a loss is not finite.
    """
    losses, answers = [], []

    def take(b: int, outputs: list[mx.array]) -> None:
        losses.append(np.array(samples.loss(b, outputs)))
        answers.append(samples.answers(b, outputs))

    graph = program.at(samples.sizes(program))
    told = partial(_named, progress, name)
    for first, group, advance in groups(graph, samples.batches, told):
        stream_forward(
            graph, group, program.fetch, progress=advance,
            on_outputs=lambda b, outputs, first=first: take(first + b, outputs),
        )  # fmt: skip
    loss = np.concatenate(losses)
    bad = np.flatnonzero(~np.isfinite(loss))
    if len(bad):
        raise InputError(
            f"{name}: the loss on sample {bad[0]} is not finite; its weights or activations "
            "overflow (try float32)."
        )
    return loss, np.concatenate(answers)


def compare_samples(
    samples: Samples,
    dense: tuple[np.ndarray, np.ndarray],
    compressed: tuple[np.ndarray, np.ndarray],
    config: EvaluateConfig,
) -> dict:
    """Two results of `score_samples`: "loss" and "score", compressed less dense, each as
    {"estimate", "low", "high"} with a 95 % percentile interval over samples."""
    sampling = {"seed": config.seed, "resamples": config.resamples}
    worse_N = np.subtract(compressed[0], dense[0], dtype=np.float64)

    def gained(chosen: np.ndarray | None = None) -> float:
        return samples.score(compressed[1], chosen) - samples.score(dense[1], chosen)

    rng, count = np.random.default_rng(config.seed), len(samples)
    drawn = [gained(rng.integers(count, size=count)) for _ in range(config.resamples)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {
        "loss": bootstrap_interval(worse_N, np.ones(count), **sampling),
        "score": {"estimate": gained(), "low": float(low), "high": float(high)},
    }


def batch_seconds(
    programs: Mapping[str, Program], samples: Samples, *, repeats: int = 5
) -> dict[str, list[float]]:
    """Seconds to compute the first batch with all weights in memory, {name: [R]}.

    Programs take turns within each repeat, and turns change places, so that a machine that drifts
    drifts for all; the first round is a warm-up and not counted.
    """
    ready = {
        name: (program.at(samples.sizes(program)), _weights(program.fetch, program.graph))
        for name, program in programs.items()
    }
    batch, taken = samples.batches[0], {name: [] for name in programs}
    mx.eval(batch)
    for repeat in range(repeats + 1):
        for name in list(ready)[:: -1 if repeat % 2 else 1]:
            graph, weights = ready[name]
            start = time.perf_counter()
            mx.eval(run(graph, batch, weights)[0])
            if repeat:
                taken[name].append(time.perf_counter() - start)
    return taken


def _weights(fetch: Fetch, graph: Graph) -> dict[str, mx.array]:
    weights = dict(fetch(list(graph.parameters)))
    mx.eval(weights)
    return weights


def _named(progress: Progress, name: str, stage: str, done: int, total: int) -> None:
    progress(name, done, total)


def _about(dense: Program, samples: Samples, config: EvaluateConfig) -> dict:
    held: Counter[str] = Counter()
    for i in dense.graph.parameters.values():
        value = dense.graph.values[i]
        held[str(value.dtype).removeprefix("mlx.core.")] += nbytes(value)
    return {
        "seed": config.seed,
        "dtype": max(held, key=held.get, default="none"),
        "task": {
            "measure": samples.measure,
            "higher_is_better": samples.higher_is_better,
            "loss": samples.task.unit,
        },
        "data": {
            "path": str(samples.path),
            "samples": len(samples),
            "samples_per_batch": samples.size,
            "inputs": {
                name: list(array.shape)
                for name, array in zip(dense.inputs, samples.batches[0], strict=True)
            },
        },
    }


def _sizes(program: Program, samples: Samples, folder: Path | None) -> dict:
    costs = cost(program.at(samples.sizes(program)))
    return {
        "parameters": costs.parameters,
        "parameter_bytes": costs.parameter_bytes,
        "disk_bytes": None if folder is None else disk_bytes(folder),
        "macs_per_sample": costs.macs // samples.size,
    }


def _speedup(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    ratios = np.divide(seconds["dense"], seconds["compressed"])
    low, middle, high = np.percentile(ratios, [0, 50, 100]).tolist()
    return {"estimate": middle, "low": low, "high": high}
