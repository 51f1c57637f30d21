"""Scores on calibration text: read once, when a criterion first asks for it.

`model` is a `bridges.mlx_lm.LanguageModel`, or what offers its `fetch`, `trace` and `tokenizer`.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import mlx.core as mx

from .axes import Dimension, NamedAxes, named_axes
from .calibrate import Statistics, calibrate
from .data import Windows, load_windows
from .importance import CRITERIA, NEEDS_DATA, NEEDS_GRADIENTS, Scores, Sources
from .influence import LAYER_CRITERIA, LayerSources, calibrate_layers
from .layers import LayerDimension, layer_dimensions
from .options import Options
from .stream import Progress, silent

PROOF_TOKENS = 16


def inspect(model) -> NamedAxes:
    """The named axes of a model, traced at a short length in float32, whatever is on disk."""
    return named_axes(model.trace(mx.zeros((1, PROOF_TOKENS), mx.int32), dtype=mx.float32))


def read_windows(model, data, split: str, options: Options, notes: list[str]) -> Windows:
    """Token windows of `--data`; what the reader had to say goes to `notes`."""
    if isinstance(data, Windows):
        return data
    count = options.calibration_samples if split == "calibration" else options.eval_samples
    windows = load_windows(
        data, split, model.tokenizer(), length=options.max_seq_length, count=count,
        seed=options.seed,
    )  # fmt: skip
    if windows.notice:
        notes.append(windows.notice)
    return windows


def next_token_loss(logits_BTV: mx.array, tokens_BT: mx.array) -> mx.array:
    """Sum over tokens of the cross-entropy of each next token, in nats."""
    logits, targets = logits_BTV[:, :-1].astype(mx.float32), tokens_BT[:, 1:, None]
    picked = mx.take_along_axis(logits, targets, axis=-1)[..., 0]
    return (mx.logsumexp(logits, axis=-1) - picked).sum()


@dataclass
class Text:
    """Calibration text, read when a criterion first asks for it."""

    model: object
    data: str | Path | Windows | None
    options: Options
    notes: list[str]
    progress: Progress = silent

    @cached_property
    def batches(self) -> list[list[mx.array]]:
        """Whole batches of windows, [B, T] each."""
        windows = read_windows(self.model, self.data, "calibration", self.options, self.notes)
        rows = min(self.options.batch_size, len(windows.tokens))
        whole = len(windows.tokens) // rows * rows
        return [[mx.array(windows.tokens[k : k + rows])] for k in range(0, whole, rows)]

    @cached_property
    def named(self) -> NamedAxes:
        """The axes of the float32 graph at the shape of a batch."""
        return named_axes(self.model.trace(self.batches[0][0], dtype=mx.float32))

    def loss(self, b: int, outputs: list[mx.array]) -> mx.array:
        return next_token_loss(outputs[0], self.batches[b][0])


def unit_scores(text: Text, dims: list[Dimension]) -> Scores:
    """Scores of unit dimensions by the options' criterion, calibrated if it needs that."""
    name, model = text.options.importance, text.model
    if name not in NEEDS_DATA:
        seed = text.options.seed
        return CRITERIA[name](Sources(inspect(model), tuple(dims), model.fetch, seed=seed))
    return CRITERIA[name](Sources(text.named, tuple(dims), model.fetch, collect(text, dims)))


def collect(text: Text, dims: list[Dimension]) -> Statistics:
    """Moments at what reads `dims`, and Taylor terms where the criterion wants them."""
    return calibrate(
        text.named, text.batches, text.model.fetch, dims=[d.name for d in dims],
        loss=text.loss if text.options.importance in NEEDS_GRADIENTS else None,
        progress=text.progress,
    )  # fmt: skip


def layer_scores(text: Text, dims: list[LayerDimension]) -> Scores:
    """Scores of whole layers and branches by the options' criterion."""
    name, fetch, seed = text.options.importance, text.model.fetch, text.options.seed
    if name not in NEEDS_DATA:
        named = inspect(text.model)
        return LAYER_CRITERIA[name](LayerSources(named, tuple(dims), fetch, seed=seed))
    names = {d.name for d in dims}
    here = tuple(d for d in layer_dimensions(text.named) if d.name in names)
    statistics = calibrate_layers(
        text.named, text.batches, fetch, dims=here,
        loss=text.loss if name in NEEDS_GRADIENTS else None, progress=text.progress,
    )  # fmt: skip
    return LAYER_CRITERIA[name](LayerSources(text.named, here, fetch, statistics, seed))
