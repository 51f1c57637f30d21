"""The road in order: open, trace, find the axes, calibrate, score, allocate, prune, save, prove,
measure. Only this file knows the order; the steps meet in plain data.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from .allocate import (
    Request,
    prunable,
    prunable_layers,
    request,
)
from .axes import Dimension, NamedAxes, named_axes
from .bridges.carriers import Carrier, advice, carrier_named, carriers, write_carrier
from .bridges.measure import check_memory, evaluate_folders
from .bridges.mlx_lm import LanguageModel, open_model
from .budget import Budget, block_parameters
from .calibration import Calibration, fit
from .checkpoint import (
    RECORD,
    check_free,
    copy_rest,
    new_folder,
    parent_record,
    prove,
    pruned_bytes,
    write_config,
    write_record,
    write_weights,
)
from .choice import Verdict
from .edit import edit_graph
from .errors import InputError
from .expressible import fitted_config, snap
from .gate import pass_gate, rejected
from .importance import needs
from .layers import dropped_parameters, is_layer_cut, renamed_paths, settled, without
from .options import KINDS, Options
from .plan import PrunePlan, describe
from .planning import choose_plan, one_kind_whole
from .prune import Cutter, check_plan, pruned_fetch, pruner
from .report import add_plan, record_of, write_report
from .scoring import (
    PROOF_TOKENS,
    as_samples,
    inspect,
    on_text,
    read_windows,
)
from .stream import Fetch, Progress, silent, stream_forward


@dataclass
class Planned:
    """A plan, the config that expresses it, and what is worth telling about them."""

    plan: PrunePlan
    config: dict
    kept_parameters: float
    notes: list[str] = field(default_factory=list)
    carrier: Carrier | None = None
    cut: Cutter | None = None  # how each parameter is cut, where not simply to what is kept
    refit: dict = field(default_factory=dict)  # how it was fitted, and why so
    verdicts: dict[str, Verdict] = field(default_factory=dict)  # why this criterion
    calibration: Calibration | None = None  # what it stands on
    dims: list[Dimension] = field(default_factory=list)
    made: dict = field(default_factory=dict)  # what else was done, for the record


def make_plan(
    model: LanguageModel,
    options: Options,
    data: str | Path | None = None,
    *,
    carrier: str | None = None,
    kept: Path | None = None,
    progress: Progress = silent,
) -> Planned:
    """Decide what to keep. Reads calibration text where the criterion needs it.

    Raises `InputError` before the long part when the request cannot be met: no data, nothing to
    prune, no stock config that could express the shapes. `carrier` names another stock
    architecture that is to hold the result. `kept` is where statistics are kept between runs.
    """
    options.require_amount()
    if data is None and "data" in needs(options.importance):
        raise InputError(f"--importance {options.importance} reads text: give --data.")
    named = inspect(model)
    notes = list(model.notes)
    if named.unknown:
        notes.append(f"primitives without a rule, left alone: {', '.join(sorted(named.unknown))}")
    calibration = on_text(model, data, options, notes, kept=kept, progress=progress)
    layers = prunable_layers(named, options, calibration.budget)
    dims, wanted = units(model, named, options, carrier, calibration.budget)
    for d in layers if carrier is None else ():
        _planned(model, named, PrunePlan({d.name: without(d, d.removable[-1:])}), [], None)
    others = one_kind_whole(
        options, lambda o: units(model, named, o, carrier, calibration.budget)[1]
    )
    plan, verdicts = choose_plan(
        calibration, named, dims, layers, wanted, others,
        together=carrier is None and not options.global_pruning,
        holds=lambda plan: _holds(model, named, plan, carrier),
    )  # fmt: skip
    planned = _planned(model, named, plan, notes, carrier)
    planned.verdicts = verdicts
    return _stands_on(planned, calibration, dims)


def _stands_on(planned: Planned, calibration: Calibration, dims: list[Dimension]) -> Planned:
    planned.calibration, planned.dims = calibration, dims
    if calibration.options.refit and calibration.read is None:
        planned.notes.append("no --data: the kept weights are not refitted")
    return planned


def units(
    model, named: NamedAxes, options: Options, carrier: str | None = None,
    budget: Budget | None = None,
):  # fmt: skip
    """The unit dimensions to prune and their counts, snapped to what a config expresses."""
    if not any(kind in KINDS for kind in options.dims):
        return [], Request({})
    dims = prunable(named, options)
    wanted = request(named, dims, options, budget)
    if options.global_pruning or carrier is not None:
        return dims, wanted
    return snap(model, named, dims, wanted, options, budget)


def _planned(
    model: LanguageModel, named: NamedAxes, plan: PrunePlan, notes: list[str], carrier: str | None
) -> Planned:
    """Find the config. Where the model's own has none, say which carrier would do."""
    check_plan(named, plan)
    gone = dropped_parameters(named, plan)
    kept = block_parameters(named, plan.counts(), gone) / block_parameters(named)
    if carrier is not None:
        chosen = carrier_named(carrier, model, named, plan)
        notes.append(f"written as {chosen.name}, which can hold what {_kind(model)!r} cannot")
        return Planned(plan, chosen.config, kept, notes, chosen)
    try:
        return Planned(plan, fitted_config(model, named, plan), kept, notes)
    except InputError as error:
        raise InputError(
            f"no config of {_kind(model)!r} in stock mlx-lm can hold this plan "
            f"({'; '.join(describe(plan))}); {advice(carriers(model, named, plan))}, or ask for "
            "the same in every layer (no --global-pruning, --dims layers for whole blocks)."
        ) from error


def _holds(model: LanguageModel, named: NamedAxes, plan: PrunePlan, carrier: str | None) -> bool:
    """Whether a stock config can express a plan."""
    try:
        if carrier is not None:
            carrier_named(carrier, model, named, plan)
        else:
            fitted_config(model, named, plan)
    except InputError:
        return False
    return True


def _kind(model: LanguageModel) -> str:
    return model.config.get("model_type", "unknown")


def save_pruned(
    model: LanguageModel,
    planned: Planned,
    out: str | Path,
    *,
    fetch: Fetch | None = None,
    finish: Callable[[Path], dict] | None = None,
    progress: Progress = silent,
) -> dict:
    """Refit, write and prove the pruned checkpoint; returns what `compression.json` records.

    `fetch` gives the weights where they are not those of the model's folder. `finish(folder)` may
    measure the proven folder and returns metrics to record; when it raises, nothing is left at
    `out`.
    """
    named = inspect(model)
    fit(planned)
    dtypes = _dtypes(model)
    needs = pruned_bytes(named, planned.plan, dtypes)
    with new_folder(out, needs_bytes=needs) as folder:
        pruned = pruned_fetch(fetch or model.fetch, planned.cut or pruner(named, planned.plan))
        if planned.carrier is None:
            write_weights(folder, named, planned.plan, pruned, dtypes, progress=progress)
        else:
            write_carrier(folder, pruned, named, planned.carrier, progress=progress)
        write_config(folder, planned.config)
        copy_rest(model.path, folder)
        error = _prove(model, planned, folder, dtypes, pruned)
        verified = {"loader": "mlx_lm.load in a fresh process", "logit_error": error}
        record = record_of(planned, parent_record(model.path), verified) | planned.made
        record["metrics"] = finish(folder) if finish else {}
        write_record(folder, record)
    return record


def _dtypes(model: LanguageModel) -> dict[str, mx.Dtype]:
    return {path: array.dtype for path, array in tree_flatten(model.module().parameters())}


def _prove(model, planned: Planned, folder: Path, dtypes, pruned: Fetch) -> float:
    """Compare stock mlx-lm's logits with the edited graph's, on random tokens, as on disk."""
    plan = planned.plan
    named = named_axes(model.trace(mx.zeros((1, PROOF_TOKENS), mx.int32)))
    vocabulary = named.graph.values[named.graph.outputs[0]].shape[-1]
    tokens = np.random.default_rng(0).integers(1, vocabulary, (1, PROOF_TOKENS)).astype(np.int32)
    logits: list[mx.array] = []
    paths = {path: path for path in named.graph.parameters}
    try:
        graph = edit_graph(named, plan)
    except InputError:  # experts that a router ranks: take the graph of the new config instead
        graph = model.trace_config(planned.config, mx.array(tokens))
        paths = {new: old for old, new in renamed_paths(named, plan).items()}

    def fetch(wanted):
        arrays = pruned([paths[path] for path in wanted])
        return {p: arrays[paths[p]] for p in wanted}

    stream_forward(
        graph, [[mx.array(tokens)]], fetch, on_outputs=lambda b, out: logits.append(out[0])
    )
    return prove(folder, mx.array(tokens), logits[0], min(dtypes.values(), key=lambda d: d.size))


def apply_plan(
    model: LanguageModel,
    plan: PrunePlan,
    options: Options | None = None,
    data: str | Path | None = None,
    *,
    carrier: str | None = None,
    kept: Path | None = None,
    progress: Progress = silent,
) -> Planned:
    """Take a saved plan for this model. Raises `InputError` if it was made for another one.

    The kept weights are refitted where `data` is given and the options do not say otherwise.
    """
    named = inspect(model)
    planned = _planned(model, named, settled(named, plan), list(model.notes), carrier)
    calibration = on_text(
        model, data, options or Options(), planned.notes, kept=kept, progress=progress
    )
    dims = [named.dimensions[cut.name] for cut in planned.plan if not is_layer_cut(cut)]
    return _stands_on(planned, calibration, dims)


def compress(
    model: LanguageModel,
    options: Options,
    data: str | Path,
    out: str | Path,
    *,
    plan: PrunePlan | None = None,
    carrier: str | None = None,
    on_plan: Callable[[Planned], None] = lambda planned: None,
    kept: Path | None = None,
    progress: Progress = silent,
) -> dict:
    """The whole job: plan, prune, save, prove, measure dense against compressed.

    Returns the report, which is also written into the folder as `report.json`. `on_plan` hears of
    the plan before the work begins.
    """
    started = time.perf_counter()
    notes: list[str] = []
    check_memory(model)
    if options.max_drop is not None:
        check_free(rejected(Path(out)))
    windows = read_windows(model, data, "evaluation", options, notes)
    if plan:
        planned = apply_plan(
            model, plan, options, data, carrier=carrier, kept=kept, progress=progress
        )
    else:
        planned = make_plan(model, options, data, carrier=carrier, kept=kept, progress=progress)
    planned.notes += [note for note in notes if note not in planned.notes]
    on_plan(planned)
    report: dict = {}

    def finish(folder: Path) -> dict:
        pruned = open_model(folder)
        report.update(evaluate_folders(model, pruned, windows, options, progress=progress))
        planned.notes += planned.calibration.unlike(report["dense"])
        add_plan(report, planned, time.perf_counter() - started)
        write_report(report, folder / "report.json")
        return {k: report[k] for k in ("dense", "compressed", "paired")}

    save_pruned(model, planned, out, finish=finish, progress=progress)
    if options.max_drop is not None:
        pass_gate(planned, report, as_samples(windows, options.batch_size), Path(out))
    return report


def read_plan(path: str | Path) -> PrunePlan:
    """A plan from its own file, or from the `compression.json` of a folder."""
    path = Path(path)
    if path.is_dir():
        path = path / RECORD
    if path.name == RECORD:
        try:
            return PrunePlan.from_json(json.loads(path.read_text(encoding="utf8"))["plan"])
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{path}: holds no plan ({error}).") from error
    return PrunePlan.load(path)
