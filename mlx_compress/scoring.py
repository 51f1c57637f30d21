"""Scores on calibration text: read once, when a criterion first asks for it.

`model` is a `bridges.mlx_lm.LanguageModel`, or what offers its `fetch`, `trace` and `tokenizer`.
"""

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import mlx.core as mx
import numpy as np

from .allocate import Request
from .axes import Dimension, NamedAxes, named_axes
from .calibrate import Statistics, calibrate
from .choice import Verdict, judge, sequence_losses
from .contractions import consumers
from .data import Windows, load_windows
from .errors import InputError
from .importance import (
    CRITERIA,
    NEEDS_DATA,
    NEEDS_GRADIENTS,
    NEEDS_SECOND,
    Scores,
    Sources,
)
from .influence import LAYER_CRITERIA, LayerSources, calibrate_layers
from .layers import LayerDimension, layer_dimensions
from .options import Options
from .plan import PrunePlan
from .prune import pruner
from .refit import USUAL, refit
from .second import OnDisk
from .stream import Progress, silent

PROOF_TOKENS = 16
SPILLED = 2**30  # bytes of second moments; more lie on disk
HELD_OUT = 0.25  # of the calibration text, where criteria are judged by it
INFLUENCE = "activation"  # what whole layers are scored by, where a criterion has no word on them


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
    """Per sequence [B], the sum over tokens of the cross-entropy of each next token, in nats."""
    logits, targets = logits_BTV[:, :-1].astype(mx.float32), tokens_BT[:, 1:, None]
    picked = mx.take_along_axis(logits, targets, axis=-1)[..., 0]
    return (mx.logsumexp(logits, axis=-1) - picked).sum(axis=-1)


@dataclass
class Text:
    """Calibration text, read when a criterion first asks for it."""

    model: object
    data: str | Path | Windows | None
    options: Options
    notes: list[str]
    progress: Progress = silent
    _collected: dict = field(default_factory=dict, repr=False)

    @cached_property
    def _all(self) -> list[list[mx.array]]:
        """Whole batches of windows, [B, T] each."""
        windows = read_windows(self.model, self.data, "calibration", self.options, self.notes)
        rows = min(self.options.batch_size, len(windows.tokens))
        whole = len(windows.tokens) // rows * rows
        return [[mx.array(windows.tokens[k : k + rows])] for k in range(0, whole, rows)]

    @property
    def batches(self) -> list[list[mx.array]]:
        """What statistics are collected on: all, or all but what is held out to judge by."""
        return self._all[: len(self._all) - len(self.held_out)]

    @property
    def held_out(self) -> list[list[mx.array]]:
        if self.options.importance != "auto":
            return []
        if len(self._all) < 2:
            raise InputError(
                f"--importance auto judges on held-out text: {len(self._all)} batch of it is not "
                "enough; give more --calibration-samples, or name a criterion."
            )
        return self._all[-max(1, round(len(self._all) * HELD_OUT)) :]

    @cached_property
    def named(self) -> NamedAxes:
        """The axes of the float32 graph at the shape of a batch."""
        return named_axes(self.model.trace(self.batches[0][0], dtype=mx.float32))

    def loss(self, b: int, outputs: list[mx.array]) -> mx.array:
        return next_token_loss(outputs[0], self.batches[b][0]).sum()

    def statistics(self, dims: list[Dimension]) -> Statistics:
        """What is measured at the places that read `dims`; collected once."""
        key = tuple(d.name for d in dims)
        if key not in self._collected:
            self._collected[key] = self._collect(key)
        return self._collected[key]

    def _collect(self, dims: tuple[str, ...]) -> Statistics:
        name = self.options.importance
        gradients = name == "auto" or name in NEEDS_GRADIENTS
        full = self.options.refit or name == "auto" or name in NEEDS_SECOND
        return calibrate(
            self.named, self.batches, self.model.fetch, dims=dims,
            loss=self.loss if gradients else None, second=self._second(dims) if full else None,
            progress=self.progress,
        )  # fmt: skip

    def _second(self, dims: tuple[str, ...]) -> MutableMapping:
        """In memory where they are small."""
        places = {p.second_key: p for each in consumers(self.named, dims).values() for p in each}
        return {} if sum(p.second_bytes for p in places.values()) < SPILLED else OnDisk()

    def sources(self, dims: list[Dimension]) -> Sources:
        """What criteria score by."""
        seed = self.options.seed
        return Sources(
            self.named, tuple(dims), self.model.fetch, self.statistics(dims), seed=seed
        )


def unit_scores(text: Text, dims: list[Dimension]) -> Scores:
    """Scores of unit dimensions by the options' criterion, calibrated if it needs that."""
    name, model = text.options.importance, text.model
    if name not in NEEDS_DATA:
        seed = text.options.seed
        return CRITERIA[name](Sources(inspect(model), tuple(dims), model.fetch, seed=seed))
    return CRITERIA[name](text.sources(dims))


def lost(text: Text, plan: PrunePlan, dims: list[Dimension], batches) -> np.ndarray:
    """The loss of each sequence of `batches` after a plan, refitted if the options say so."""
    cut = pruner(text.named, plan)
    if text.options.refit and plan.cuts:
        cut = refit(text.named, plan, text.statistics(dims), lambdas=USUAL)

    def loss(b: int, outputs: list[mx.array]) -> np.ndarray:
        tokens = batches[b][0]
        return np.array(next_token_loss(outputs[0], tokens)) / (tokens.shape[1] - 1)

    return sequence_losses(text.named, plan, cut, text.model.fetch, batches, loss)


def best_plan(text: Text, dims: list[Dimension], wanted: Request) -> Verdict:
    """The plan of the criterion that loses least on held-out calibration text."""
    return judge(
        text.sources(dims), dims, wanted, text.options,
        lambda plan: lost(text, plan, dims, text.held_out), progress=text.progress,
    )  # fmt: skip


def layer_scores(text: Text, dims: list[LayerDimension]) -> Scores:
    """Scores of whole layers and branches by the options' criterion."""
    name, fetch, seed = text.options.importance, text.model.fetch, text.options.seed
    name = name if name in LAYER_CRITERIA else INFLUENCE
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
