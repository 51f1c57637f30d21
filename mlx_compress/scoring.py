"""Calibration of language models: text as samples, and scores of units and of whole layers.

`model` is a `bridges.mlx_lm.LanguageModel`, or what offers its `fetch`, `trace`, `path` and
`tokenizer`.
"""

from pathlib import Path

import mlx.core as mx
import numpy as np

from .axes import Dimension, NamedAxes, named_axes
from .budget import language_budget
from .calibration import Calibration
from .checkpoint import parent_record
from .data import Windows, load_windows
from .importance import Scores, Sources, criterion, needs
from .influence import LAYER_CRITERIA, LayerSources, calibrate_layers
from .layers import LayerDimension, layer_dimensions
from .options import Options
from .samples import Samples
from .stream import Progress, silent
from .tasks import NEXT_TOKEN

PROOF_TOKENS = 16
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


def as_samples(windows: Windows, batch_size: int) -> Samples:
    """Whole batches of windows: tokens [B, T] in, the next of each to come out."""
    rows = min(batch_size, len(windows.tokens))
    whole = len(windows.tokens) // rows * rows
    tokens = np.asarray(windows.tokens[:whole])
    batches = [[mx.array(tokens[k : k + rows])] for k in range(0, whole, rows)]
    return Samples(batches, tokens, rows, NEXT_TOKEN, windows.path)


def on_text(
    model, data: str | Path | Windows | None, options: Options, notes: list[str],
    *, kept: Path | None = None, progress: Progress = silent,
) -> Calibration:  # fmt: skip
    """The calibration of a language model. `kept` is where statistics are kept between runs."""

    def read() -> Samples:
        windows = read_windows(model, data, "calibration", options, notes)
        calibration.bytes_per_token = float(windows.target_bytes.sum() / windows.tokens[:, 1:].size)
        return as_samples(windows, options.batch_size)

    calibration = Calibration(
        trace=lambda inputs: model.trace(inputs[0], dtype=mx.float32),
        fetch=model.fetch,
        read=None if data is None else read,
        options=options, notes=notes, progress=progress, kept=kept,
        identity=lambda: [*sorted(parent_record(model.path)["sha256"].values()),
                          *sorted(model.zeros)],
        budget=language_budget(model, options),
    )  # fmt: skip
    return calibration


def unit_scores(calibration: Calibration, named: NamedAxes, dims: list[Dimension]) -> Scores:
    """Scores by the options' criterion; from `named` alone where it reads no data."""
    name, seed = calibration.options.importance, calibration.options.seed
    if "data" not in needs(name):
        return criterion(name)(Sources(named, tuple(dims), calibration.fetch, seed=seed))
    return calibration.scores(dims, name)


def layer_scores(
    calibration: Calibration, named: NamedAxes, dims: list[LayerDimension], name: str
) -> Scores:
    """Scores of whole layers and branches by a criterion, or by their influence where it has no
    word on them."""
    used = name if name in LAYER_CRITERIA else INFLUENCE
    told = f"whole layers are ranked by {used}: {name} is about units"
    if used != name and told not in calibration.notes:
        calibration.notes.append(told)
    if "data" not in needs(used):
        seed = calibration.options.seed
        return LAYER_CRITERIA[used](LayerSources(named, tuple(dims), calibration.fetch, seed=seed))
    return LAYER_CRITERIA[used](layer_sources(calibration, dims, "gradients" in needs(used)))


def layer_sources(
    calibration: Calibration, dims: list[LayerDimension], gradients: bool
) -> LayerSources:
    """What whole layers are scored by, of the samples that are not held out."""
    named, names = calibration.named, {d.name for d in dims}
    here = tuple(d for d in layer_dimensions(named) if d.name in names)
    statistics = calibrate_layers(
        named, calibration.batches, calibration.fetch, dims=here,
        loss=calibration.loss if gradients else None, progress=calibration.progress,
    )  # fmt: skip
    return LayerSources(named, here, calibration.fetch, statistics, calibration.options.seed)
