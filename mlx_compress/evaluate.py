"""The truth about what was lost: loss on held-out text, agreement, size, speed and memory.

Dense and compressed models are measured on the same windows, and what is compared is the paired
difference: far sharper than two separate figures, because most of the spread between windows is
the text's and cancels.

Shape suffixes: N windows, T tokens in a window, B rows of a batch, V vocabulary, R repeats.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from .data import Windows
from .errors import InputError
from .report import machine

LOGITS_BYTES = 2**30
DRAWS = 2**22
PHASES = ("prefill", "decode")
SIZES = ("parameters", "parameter_bytes", "disk_bytes", "dtype")


@dataclass(frozen=True)
class EvaluateConfig:
    """How to measure; `resamples` are the bootstrap's, `repeats` the speed's after one warm-up."""

    batch_size: int = 8
    seed: int = 0
    resamples: int = 2000
    decode_tokens: int = 32
    repeats: int = 5

    def __post_init__(self):
        for name in ("batch_size", "resamples", "decode_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1.")


@dataclass(frozen=True)
class Runner:
    """Generation with a cache, in two calls that both return (logits [1, 1, V], state).

    `prefill(tokens [1, T])` reads a prompt; `step(token [1, 1], state)` reads one token more.
    """

    prefill: Callable[[mx.array], tuple[mx.array, Any]]
    step: Callable[[mx.array, Any], tuple[mx.array, Any]]


@dataclass(frozen=True)
class Subject:
    """What is measured. `logits` maps token ids [B, T] to logits [B, T, V].

    Sizes are in bytes; `runner` and `disk_bytes` are None where there is nothing to measure.
    """

    logits: Callable[[mx.array], mx.array]
    parameters: int
    parameter_bytes: int
    dtype: str
    disk_bytes: int | None = None
    runner: Runner | None = None


@dataclass(frozen=True)
class Perplexity:
    """Mean loss per target token and per UTF-8 byte in nats, and exp of the former."""

    nats_per_token: float
    nats_per_byte: float | None
    perplexity: float
    tokens: int
    bytes: int | None


def subject(
    model: nn.Module, *, folder: str | Path | None = None, make_cache: Callable | None = None
) -> Subject:
    """A language model as a `Subject`; evaluates its parameters.

    `make_cache(model)` gives a fresh cache (`mlx_lm.models.cache.make_prompt_cache`); without it no
    speed is measured. `folder` is the checkpoint whose safetensors are counted.
    """
    mx.eval(model.parameters())
    arrays = [array for _, array in tree_flatten(model.parameters())]
    held = Counter()
    for array in arrays:
        if mx.issubdtype(array.dtype, mx.floating):
            held[str(array.dtype).removeprefix("mlx.core.")] += array.nbytes
    return Subject(
        logits=model,
        parameters=parameter_count(model),
        parameter_bytes=sum(array.nbytes for array in arrays),
        dtype=max(held, key=held.get, default="none"),
        disk_bytes=None if folder is None else disk_bytes(folder),
        runner=None if make_cache is None else cached_runner(model, make_cache),
    )


def evaluate_pair(
    dense: Subject,
    compressed: Subject | None,
    windows: Windows,
    config: EvaluateConfig | None = None,
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict:
    """The report, as a JSON-able dict: `machine()`, seed, dtype, data, dense, compressed, paired.

    With `compressed` None the last two are absent, and `dense` is just the model. Figures that
    cannot be measured are None. An interval is {"estimate", "low", "high"}: for losses a 95 %
    bootstrap over windows, for speeds the median, least and largest of paired repeats.
    `progress(name, done, total)` counts windows, for each model.

    Raises `InputError` for fewer than two windows (no interval), for a tokenizer that is not the
    model's, and for losses that are not finite.
    """
    config = config or EvaluateConfig()
    count, length = windows.tokens.shape
    if count < 2:
        raise InputError(
            f"{windows.path}: {count} window of {length} tokens gives no interval; "
            "give more text, or lower --max-seq-length."
        )
    subjects = {"dense": dense} | ({} if compressed is None else {"compressed": compressed})
    scores = {
        name: score_tokens(each.logits, windows.tokens, config.batch_size, name, progress=progress)
        for name, each in subjects.items()
    }
    costs = _costs(subjects, mx.array(windows.tokens[:1]), config)
    report = {**machine(), "seed": config.seed, "dtype": dense.dtype}
    report["data"] = {"path": str(windows.path), "windows": count, "tokens_per_window": length}
    for name in subjects:
        loss = asdict(perplexity(scores[name][0], windows.target_bytes))
        report[name] = loss | costs[name]
    if compressed is not None:
        sampling = {"seed": config.seed, "resamples": config.resamples}
        paired = compare_scores(*scores.values(), windows.target_bytes, **sampling)
        report["paired"] = paired | costs["paired"]
    return report


def token_losses(
    logits_fn: Callable[[mx.array], mx.array], windows: np.ndarray, batch_size: int = 8
) -> np.ndarray:
    """Cross-entropy in nats float32 [N, T-1] of all tokens but the first; see `score_tokens`."""
    return score_tokens(logits_fn, windows, batch_size)[0]


def score_tokens(
    logits_fn: Callable[[mx.array], mx.array],
    windows: np.ndarray,
    batch_size: int = 8,
    name: str = "the model",
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Losses in nats float32 [N, T-1] and top tokens int32 [N, T-1], from one pass.

    `logits_fn` maps int32 [B, T] to logits [B, T, V]. It always sees B = `batch_size` rows (the
    last batch is filled up), so a graph traced at that size will do; fewer only where float32
    logits would take over 1 GiB. `progress(name, done, total)` counts windows.

    Raises `InputError` for token ids beyond the logits, and for losses that are not finite.
    """
    rows = _rows_that_fit(logits_fn, windows, batch_size, name)
    losses, tops = [], []
    for start in range(0, len(windows), rows):
        batch = windows[start : start + rows]
        filled_BT = np.resize(batch, (rows, batch.shape[1]))
        loss, top = _losses_and_tops(logits_fn(mx.array(filled_BT)), mx.array(filled_BT))
        mx.eval(loss, top)
        losses.append(np.array(loss)[: len(batch)])
        tops.append(np.array(top)[: len(batch)])
        _check_finite(losses[-1], start, name)
        if progress:
            progress(name, start + len(batch), len(windows))
    return np.concatenate(losses), np.concatenate(tops)


def perplexity(losses: np.ndarray, target_bytes: np.ndarray | None = None) -> Perplexity:
    """Of losses in nats [N, T-1]; `target_bytes` [N] as from `data.target_bytes`."""
    total = losses.sum(dtype=np.float64)
    size = None if target_bytes is None else int(target_bytes.sum())
    mean = float(total / losses.size)
    return Perplexity(
        nats_per_token=mean,
        nats_per_byte=float(total / size) if size else None,
        perplexity=float(np.exp(min(mean, 700.0))),
        tokens=losses.size,
        bytes=size,
    )


def bootstrap_interval(
    numerator: np.ndarray,
    denominator: np.ndarray,
    *,
    seed: int = 0,
    resamples: int = 2000,
) -> dict[str, float]:
    """sum(numerator) / sum(denominator) over windows [N], with its 95 % percentile interval.

    Windows are resampled, not tokens, because losses within a window hang together. The same
    `seed` and N give the same resamples. Returns "estimate", "low" and "high".

    Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3
    """
    rng = np.random.default_rng(seed)
    count = len(numerator)
    numerator, denominator = np.asarray(numerator, float), np.asarray(denominator, float)
    ratios, block = [], max(1, DRAWS // count)
    for done in range(0, resamples, block):
        draws = rng.integers(count, size=(min(block, resamples - done), count))
        ratios.append(numerator[draws].sum(1) / np.maximum(denominator[draws].sum(1), 1))
    low, high = np.percentile(np.concatenate(ratios), [2.5, 97.5])
    estimate = numerator.sum() / max(denominator.sum(), 1)
    return {"estimate": float(estimate), "low": float(low), "high": float(high)}


def compare_scores(
    dense: tuple[np.ndarray, np.ndarray],
    compressed: tuple[np.ndarray, np.ndarray],
    target_bytes: np.ndarray | None = None,
    *,
    seed: int = 0,
    resamples: int = 2000,
) -> dict:
    """Two results of `score_tokens` on the same windows: how much worse, and how often of one mind.

    "nats_per_token" and "nats_per_byte" are compressed less dense (positive: worse);
    "top_token_agreement" is the fraction of positions where both put the same token first.
    """
    worse_N = np.subtract(compressed[0], dense[0], dtype=np.float64).sum(1)
    agreed_N = (compressed[1] == dense[1]).sum(1)
    tokens_N = np.full(len(worse_N), dense[0].shape[1])
    interval = partial(bootstrap_interval, seed=seed, resamples=resamples)
    sized = target_bytes is not None and target_bytes.sum() > 0
    return {
        "nats_per_token": interval(worse_N, tokens_N),
        "nats_per_byte": interval(worse_N, target_bytes) if sized else None,
        "top_token_agreement": interval(agreed_N, tokens_N),
    }


def cached_runner(model: Callable, make_cache: Callable) -> Runner:
    """A `Runner` for an mlx-lm model: `model(tokens, cache=cache)`, `make_cache(model)`.

    Prefill is what mlx-lm does: all of the prompt but its last token fill the cache, which needs
    no logits; then the last token gives them.
    """

    def prefill(tokens):
        cache = make_cache(model)
        if tokens.shape[1] > 1:
            model(tokens[:, :-1], cache=cache)
            mx.eval([entry.state for entry in cache])
        return model(tokens[:, -1:], cache=cache), cache

    def step(token, cache):
        return model(token, cache=cache), cache

    return Runner(prefill, step)


def prefill_decode_speed(
    runners: Mapping[str, Runner],
    prompt: mx.array,
    *,
    decode_tokens: int = 32,
    repeats: int = 5,
) -> dict[str, dict[str, list[float]]]:
    """Tokens per second, {name: {"prefill": [R], "decode": [R]}}, batch 1, greedy.

    Runners take turns within each repeat, and turns change places, so that a machine that drifts
    drifts for all of them: compare repeat by repeat. The first round is a warm-up and not counted.
    `prompt` is int32 [1, T].
    """
    rates = {name: {phase: [] for phase in PHASES} for name in runners}
    for repeat in range(repeats + 1):
        for name in list(runners)[:: -1 if repeat % 2 else 1]:
            prefill, decode = _generate(runners[name], prompt, decode_tokens)
            if repeat:
                rates[name]["prefill"].append(prompt.shape[1] / prefill)
                rates[name]["decode"].append(decode_tokens / decode)
    return rates


def peak_bytes(work: Callable[[], Any], *, own_bytes: int = 0) -> int:
    """Peak memory of `work()` beyond what is resident before it, plus `own_bytes`.

    So a model's peak is its own even when another is loaded: give its parameters as `own_bytes`.
    """
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(work())
    return max(0, mx.get_peak_memory() - before) + own_bytes


def parameter_count(model: nn.Module) -> int:
    """Weights as numbers: a quantised layer counts those it stands for, without its scales."""
    bits = {path: m.bits for path, m in model.named_modules() if hasattr(m, "bits")}
    count = 0
    for path, array in tree_flatten(model.parameters()):
        layer, _, name = path.rpartition(".")
        if layer not in bits or name == "bias":
            count += array.size
        elif name == "weight":
            count += array.nbytes * 8 // bits[layer]
    return count


def disk_bytes(folder: str | Path) -> int:
    """Bytes of a folder's safetensors files. Raises `InputError` where there are none."""
    sizes = [path.stat().st_size for path in Path(folder).glob("*.safetensors")]
    if not sizes:
        raise InputError(f"{folder}: no safetensors files; give the folder of a checkpoint.")
    return sum(sizes)


def _rows_that_fit(logits_fn, windows, batch_size, name) -> int:
    """Rows of a batch; builds one batch to see the vocabulary, and evaluates nothing."""
    length = windows.shape[1]
    vocabulary = logits_fn(mx.array(np.resize(windows, (batch_size, length)))).shape[-1]
    if windows.max() >= vocabulary:
        raise InputError(
            f"token id {windows.max()} is beyond the {vocabulary} logits of {name}; "
            "use the tokenizer that belongs to it."
        )
    return max(1, min(batch_size, LOGITS_BYTES // (4 * length * vocabulary)))


def _losses_and_tops(logits_BTV: mx.array, tokens_BT: mx.array) -> tuple[mx.array, mx.array]:
    logits_BTV = logits_BTV[:, :-1].astype(mx.float32)
    chosen_BT1 = mx.take_along_axis(logits_BTV, tokens_BT[:, 1:, None], axis=-1)
    losses_BT = mx.logsumexp(logits_BTV, axis=-1) - chosen_BT1.squeeze(-1)
    return losses_BT, mx.argmax(logits_BTV, axis=-1).astype(mx.int32)


def _check_finite(losses: np.ndarray, start: int, name: str) -> None:
    bad = np.flatnonzero(~np.isfinite(losses).all(axis=1))
    if len(bad):
        raise InputError(
            f"{name}: the loss on window {start + bad[0]} is not finite; "
            "its weights or activations overflow (try float32)."
        )


def _generate(runner: Runner, prompt: mx.array, decode_tokens: int) -> tuple[float, float]:
    """Seconds to read `prompt`, and seconds to write tokens after it, one step ahead as mlx-lm."""
    start = time.perf_counter()
    logits, state = runner.prefill(prompt)
    token = mx.argmax(logits[:, -1:], axis=-1)
    mx.eval(token)
    read = time.perf_counter()
    for _ in range(decode_tokens):
        logits, state = runner.step(token, state)
        following = mx.argmax(logits[:, -1:], axis=-1)
        mx.async_eval(following)
        mx.eval(token)
        token = following
    mx.eval(token)
    return read - start, time.perf_counter() - read


def _costs(subjects: Mapping[str, Subject], prompt: mx.array, config: EvaluateConfig) -> dict:
    """Sizes, speeds and peak memory of each subject, and under "paired" the speedups."""
    runners = {name: each.runner for name, each in subjects.items() if each.runner}
    count = config.decode_tokens
    rates = prefill_decode_speed(runners, prompt, decode_tokens=count, repeats=config.repeats)
    costs = {name: {size: getattr(each, size) for size in SIZES} for name, each in subjects.items()}
    for name, each in subjects.items():
        for phase in PHASES:
            median = float(np.median(rates[name][phase])) if name in rates else None
            costs[name][f"{phase}_tokens_per_s"] = median
        costs[name]["peak_bytes"] = each.runner and peak_bytes(
            partial(_generate, each.runner, prompt, count), own_bytes=each.parameter_bytes
        )
    costs["paired"] = {f"{phase}_speedup": _speedup(rates, phase) for phase in PHASES}
    return costs


def _speedup(rates: dict[str, dict[str, list[float]]], phase: str) -> dict[str, float] | None:
    if len(rates) < 2:
        return None
    ratios = np.divide(rates["compressed"][phase], rates["dense"][phase])
    low, middle, high = np.percentile(ratios, [0, 50, 100]).tolist()
    return {"estimate": middle, "low": low, "high": high}
