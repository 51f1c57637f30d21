"""The road in order: open, trace, find the axes, calibrate, score, allocate, prune, save, prove,
measure. Only this file knows the order; the steps meet in plain data.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np

from .allocate import Request, block_parameters, choose, prunable, request
from .axes import Dimension, NamedAxes, named_axes
from .bridges.mlx_lm import LanguageModel, open_model
from .calibrate import calibrate
from .checkpoint import (
    RECORD,
    copy_rest,
    new_folder,
    parent_record,
    prove,
    pruned_bytes,
    write_config,
    write_record,
    write_weights,
)
from .data import Windows, load_windows
from .edit import edit_graph
from .errors import InputError
from .expressible import fitted_config, snap
from .importance import CRITERIA, NEEDS_DATA, NEEDS_GRADIENTS, Sources
from .options import Options
from .plan import PrunePlan
from .prune import picks, prune_array
from .stream import Progress, silent, stream_forward

PROOF_TOKENS = 16


@dataclass
class Planned:
    """A plan, the config that expresses it, and what is worth telling about them."""

    plan: PrunePlan
    config: dict
    kept_parameters: float
    notes: list[str] = field(default_factory=list)


def inspect(model: LanguageModel) -> NamedAxes:
    """The named axes of a model, traced at a short length."""
    return named_axes(model.trace(mx.zeros((1, PROOF_TOKENS), mx.int32)))


def make_plan(
    model: LanguageModel,
    options: Options,
    data: str | Path | None = None,
    *,
    progress: Progress = silent,
) -> Planned:
    """Decide what to keep. Reads calibration text where the criterion needs it.

    Raises `InputError` before the long part when the request cannot be met: no data, nothing to
    prune, no stock config that could express the shapes.
    """
    options.require_amount()
    if options.importance in NEEDS_DATA and data is None:
        raise InputError(f"--importance {options.importance} reads text: give --data.")
    named = inspect(model)
    notes = list(model.notes)
    if named.unknown:
        notes.append(f"primitives without a rule, left alone: {', '.join(sorted(named.unknown))}")
    dims = prunable(named, options)
    wanted = request(named, dims, options)
    if not options.global_pruning:
        dims, wanted = snap(model, named, dims, wanted, options)
    notes += wanted.notes
    plan = _choose(model, named, dims, wanted, options, data, notes, progress)
    counts = {cut.name: cut.kept for cut in plan}
    config = fitted_config(model, named, plan)
    kept = block_parameters(named, counts) / block_parameters(named)
    return Planned(plan, config, kept, notes)


def _choose(model, named, dims, wanted: Request, options, data, notes, progress) -> PrunePlan:
    statistics = None
    if options.importance in NEEDS_DATA:
        windows = read_windows(model, data, "calibration", options, notes)
        named, statistics = _statistics(model, windows, dims, options, progress)
    sources = Sources(named, tuple(dims), model.fetch, statistics, options.seed)
    scores = CRITERIA[options.importance](sources)
    recipe = {k: v for k, v in asdict(options).items() if v is not None}
    return choose(named, dims, scores, wanted, options, recipe)


def read_windows(model, data, split: str, options: Options, notes: list[str]) -> Windows:
    """Token windows of `--data`; what the reader had to say goes to `notes`."""
    count = options.calibration_samples if split == "calibration" else options.eval_samples
    windows = load_windows(
        data, split, model.tokenizer(), length=options.max_seq_length, count=count,
        seed=options.seed,
    )  # fmt: skip
    if windows.notice:
        notes.append(windows.notice)
    return windows


def _statistics(model, windows: Windows, dims: list[Dimension], options: Options, progress):
    """Moments, and Taylor terms where wanted, in float32 over whole batches of windows."""
    rows = min(options.batch_size, len(windows.tokens))
    whole = len(windows.tokens) // rows * rows
    batches = [[mx.array(windows.tokens[k : k + rows])] for k in range(0, whole, rows)]
    named = named_axes(model.trace(batches[0][0], dtype=mx.float32))

    def loss(b: int, outputs: list[mx.array]) -> mx.array:
        return next_token_loss(outputs[0], batches[b][0])

    statistics = calibrate(
        named, batches, model.fetch, dims=[d.name for d in dims],
        loss=loss if options.importance in NEEDS_GRADIENTS else None, progress=progress,
    )  # fmt: skip
    return named, statistics


def next_token_loss(logits_BTV: mx.array, tokens_BT: mx.array) -> mx.array:
    """Sum over tokens of the cross-entropy of each next token, in nats."""
    logits, targets = logits_BTV[:, :-1].astype(mx.float32), tokens_BT[:, 1:, None]
    picked = mx.take_along_axis(logits, targets, axis=-1)[..., 0]
    return (mx.logsumexp(logits, axis=-1) - picked).sum()


def save_pruned(
    model: LanguageModel,
    planned: Planned,
    out: str | Path,
    *,
    finish: Callable[[Path], dict] | None = None,
    progress: Progress = silent,
) -> dict:
    """Write and prove the pruned checkpoint; returns what `compression.json` records.

    `finish(folder)` may measure the proven folder and returns metrics to record; when it raises,
    nothing is left at `out`.
    """
    named = inspect(model)
    dtypes = _dtypes(model)
    needs = pruned_bytes(named, planned.plan, dtypes)
    with new_folder(out, needs_bytes=needs) as folder:
        write_weights(folder, named, planned.plan, model.fetch, dtypes, progress=progress)
        write_config(folder, planned.config)
        copy_rest(model.path, folder)
        error = _prove(model, named, planned.plan, folder, dtypes)
        record = {
            "plan": planned.plan.to_json(),
            "parent": parent_record(model.path),
            "kept_block_parameters": planned.kept_parameters,
            "notes": planned.notes,
            "verified": {"loader": "mlx_lm.load in a fresh process", "logit_error": error},
        }
        record["metrics"] = finish(folder) if finish else {}
        write_record(folder, record)
    return record


def _dtypes(model: LanguageModel) -> dict[str, mx.Dtype]:
    from mlx.utils import tree_flatten

    return {path: array.dtype for path, array in tree_flatten(model.module().parameters())}


def _prove(model, named: NamedAxes, plan: PrunePlan, folder: Path, dtypes) -> float:
    """Compare stock mlx-lm's logits with the edited graph's, on random tokens."""
    vocabulary = named.graph.values[named.graph.outputs[0]].shape[-1]
    tokens = np.random.default_rng(0).integers(1, vocabulary, (1, PROOF_TOKENS)).astype(np.int32)
    graph = edit_graph(named, plan)
    logits: list[mx.array] = []

    def fetch(paths):
        arrays = model.fetch(paths)
        return {p: prune_array(arrays.pop(p), picks(named, plan, p)) for p in list(arrays)}

    stream_forward(
        graph, [[mx.array(tokens)]], fetch, on_outputs=lambda b, out: logits.append(out[0])
    )
    return prove(folder, mx.array(tokens), logits[0], min(dtypes.values(), key=lambda d: d.size))


def apply_plan(model: LanguageModel, plan: PrunePlan) -> Planned:
    """Take a saved plan for this model. Raises `InputError` if it was made for another one."""
    named = inspect(model)
    config = fitted_config(model, named, plan)
    counts = {cut.name: cut.kept for cut in plan}
    kept = block_parameters(named, counts) / block_parameters(named)
    return Planned(plan, config, kept, list(model.notes))


def evaluate_folders(
    dense: LanguageModel, compressed: LanguageModel | None, windows: Windows, options: Options,
    *, progress: Progress = silent,
) -> dict:  # fmt: skip
    """Measure one or two checkpoints on the same windows: `evaluate.evaluate_pair`'s report."""
    from .evaluate import EvaluateConfig, evaluate_pair

    config = EvaluateConfig(batch_size=options.batch_size, seed=options.seed)
    subjects = [None if m is None else _subject(m) for m in (dense, compressed)]
    report = evaluate_pair(*subjects, windows, config, progress=progress)
    for name, model in (("dense", dense), ("compressed", compressed)):
        if model is not None:
            report[name]["sample"] = sample(model, windows, options.seed)
    return report


def _subject(model: LanguageModel):
    from mlx_lm.models.cache import make_prompt_cache

    from .evaluate import subject

    module = model.module()
    if mx.default_device().type == mx.DeviceType.cpu:
        module.set_dtype(mx.float32)  # half precision is 30 times slower there
    return subject(module, folder=model.path, make_cache=make_prompt_cache)


def sample(model: LanguageModel, windows: Windows, seed: int, *, tokens: int = 40) -> dict:
    """A continuation of the first words of the evaluation text, sampled at temperature 0.8."""
    from mlx_lm import generate
    from mlx_lm.sample_utils import make_sampler

    tokenizer, module = model.tokenizer(), model.module()
    prompt = windows.tokens[0][: min(12, windows.tokens.shape[1] // 2)].tolist()
    mx.random.seed(seed)
    text = generate(
        module, tokenizer, prompt, max_tokens=tokens, sampler=make_sampler(temp=0.8, top_p=0.95)
    )
    return {"prompt": tokenizer.decode(prompt), "continuation": text}


def compress(
    model: LanguageModel,
    options: Options,
    data: str | Path,
    out: str | Path,
    *,
    plan: PrunePlan | None = None,
    carrier: str | None = None,
    on_plan: Callable[[Planned], None] = lambda planned: None,
    progress: Progress = silent,
) -> dict:
    """The whole job: plan, prune, save, prove, measure dense against compressed.

    Returns the report, which is also written into the folder as `report.json`. `on_plan` hears of
    the plan before the work begins.
    """
    started = time.perf_counter()
    notes: list[str] = []
    windows = read_windows(model, data, "evaluation", options, notes)
    if plan:
        planned = apply_plan(model, plan)
    else:
        planned = make_plan(model, options, data, progress=progress)
    planned.notes += [note for note in notes if note not in planned.notes]
    on_plan(planned)
    report: dict = {}

    def finish(folder: Path) -> dict:
        from .report import write_report

        pruned = open_model(folder)
        report.update(evaluate_folders(model, pruned, windows, options, progress=progress))
        report["kept_block_parameters"] = planned.kept_parameters
        report["seconds"] = time.perf_counter() - started
        report["recipe"] = dict(planned.plan.recipe)
        report["notes"] = planned.notes
        write_report(report, folder / "report.json")
        return {k: report[k] for k in ("dense", "compressed", "paired")}

    save_pruned(model, planned, out, finish=finish, progress=progress)
    return report


def read_plan(path: str | Path) -> PrunePlan:
    """A plan from its own file, or from the `compression.json` of a folder."""
    path = Path(path)
    if path.is_dir():
        path = path / RECORD
    if path.name == RECORD:
        import json

        try:
            return PrunePlan.from_json(json.loads(path.read_text(encoding="utf8"))["plan"])
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{path}: holds no plan ({error}).") from error
    return PrunePlan.load(path)
