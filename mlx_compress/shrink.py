"""Prune a saved program: plan, prune, refit, prove, save. No architecture has to hold it.

Widths are free in a program, so nothing is snapped to what a config can say. With samples
(`samples.py`) the criterion is chosen and the kept weights are refitted, as for language models.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np

from .allocate import Request, prunable, prunable_layers, request
from .archive import save_program
from .axes import Dimension, NamedAxes, named_axes
from .budget import block_parameters, program_budget
from .calibration import Calibration, fit
from .checkpoint import new_folder, parent_record, write_record
from .choice import Verdict
from .errors import GateFailed, InputError
from .importance import CRITERIA, needs
from .layers import dropped_parameters, is_layer_cut, settled
from .options import KINDS, Options
from .parity import TOLERANCE, error_of
from .plan import PrunePlan
from .planning import choose_plan, one_kind_whole
from .program import Program, prune_program, with_weights
from .prune import Cutter, check_plan, picks, pruner, spread_array
from .report import record_of
from .samples import read_samples
from .sequential import can_run
from .sizes import sizes_of
from .stream import Progress, silent


@dataclass
class ProgramPlan:
    """A plan for a program, how it cuts, and what is worth telling about it."""

    plan: PrunePlan
    kept_parameters: float
    notes: list[str] = field(default_factory=list)
    cut: Cutter | None = None  # how each parameter is cut, where not simply to what is kept
    refit: dict = field(default_factory=dict)  # how it was fitted, and why so
    verdicts: dict[str, Verdict] = field(default_factory=dict)  # why this criterion
    calibration: Calibration | None = None  # what it stands on
    dims: list[Dimension] = field(default_factory=list)


def on_samples(
    program: Program, data: str | Path | None, options: Options, notes: list[str],
    *, folder: Path | None = None, kept: Path | None = None, progress: Progress = silent,
    open_tokenizer: Callable[[Path], Callable] | None = None,
) -> Calibration:  # fmt: skip
    """The calibration of a program. `folder` is where it lies; `kept` where statistics are kept."""

    def read():
        found = read_samples(
            program, data, "calibration", count=options.calibration_samples,
            batch_size=options.batch_size, seed=options.seed, length=options.max_seq_length,
            folder=folder, open_tokenizer=open_tokenizer,
        )  # fmt: skip
        if found.notice:
            notes.append(found.notice)
        return found

    def trace(inputs):
        return program.at(sizes_of(program.graph, [array.shape for array in inputs]))

    return Calibration(
        trace=trace, fetch=program.fetch, read=None if data is None else read,
        options=options, notes=notes, progress=progress, kept=None if folder is None else kept,
        identity=lambda: sorted(parent_record(folder)["sha256"].values()),
        budget=program_budget(program, options),
    )  # fmt: skip


def plan_program(
    program: Program, options: Options, plan: PrunePlan | None = None,
    calibration: Calibration | None = None,
) -> ProgramPlan:  # fmt: skip
    """Decide what to keep, or take a plan that was made. It is refitted when it is saved.

    Raises `InputError` for a criterion that reads data where there is none, and for a plan of
    another model.
    """
    named = named_axes(program.at())
    calibration = calibration or on_samples(program, None, options, [])
    verdicts, notes = {}, calibration.notes
    if plan is None:
        plan, verdicts, dims = _choose(named, options, calibration)
    else:
        plan = settled(named, plan)
        dims = [named.dimensions[cut.name] for cut in plan if not is_layer_cut(cut)]
    check_plan(named, plan)
    gone = dropped_parameters(named, plan)
    kept = block_parameters(named, plan.counts(), gone) / block_parameters(named)
    planned = ProgramPlan(plan, kept, notes, verdicts=verdicts, calibration=calibration, dims=dims)
    if options.refit and calibration.read is None:
        notes.append("no --data: the kept weights are not refitted")
    return planned


def _choose(named: NamedAxes, options: Options, calibration: Calibration):
    """The plan, the verdicts where it was chosen by evidence, and the unit dimensions of it."""
    options.require_amount()
    if "data" in needs(options.importance) and calibration.read is None:
        names = ", ".join(name for name in CRITERIA if "data" not in needs(name))
        raise InputError(
            f"--importance {options.importance} reads samples: give --data, an .npz with labels or "
            f"sentence pairs in .jsonl, or choose from {names}."
        )
    layers = prunable_layers(named, options, calibration.budget)
    dims, wanted, others = [], Request({}), []
    if any(kind in KINDS for kind in options.dims):

        def ask(options: Options) -> Request:
            return request(named, prunable(named, options), options, calibration.budget)

        dims, wanted = prunable(named, options), ask(options)
        others = one_kind_whole(options, ask)
    return *choose_plan(calibration, named, dims, layers, wanted, others), dims


def save_pruned_program(
    program: Program,
    planned: ProgramPlan,
    out: Path,
    *,
    parent: Path | None = None,
    beside: Callable[[Path], None] = lambda folder: None,
    finish: Callable[[Program, Path], dict] | None = None,
) -> Program:
    """Refit, prune, prove that it equals zeroing, and save as a program folder, all or nothing.

    `parent` is the folder of the dense program, for the record, and `beside(folder)` adds files.
    `finish(pruned, folder)` may measure the proven folder and returns metrics to record. Raises
    `GateFailed` if the pruned program computes something else.
    """
    named = named_axes(program.at())
    fit(planned)
    pruned = prune_program(program, planned.plan, planned.cut)
    verified = {"error_against_zeroing": _prove(program, named, planned, pruned)}
    with new_folder(out) as folder:
        save_program(pruned, folder, {"verified": verified})
        beside(folder)
        record = record_of(planned, {} if parent is None else parent_record(parent), verified)
        record["metrics"] = finish(pruned, folder) if finish else {}
        write_record(folder, record)
    return pruned


def _prove(program: Program, named: NamedAxes, planned: ProgramPlan, pruned: Program):
    """The error against the zeroed program; None where removing is not zeroing by nature."""
    plan, cut = planned.plan, planned.cut or pruner(named, planned.plan)
    if not can_run(named, plan):
        return None
    gone = dropped_parameters(named, plan)
    zeroed = {
        path: mx.zeros_like(array)
        if path in gone
        else spread_array(cut(path, array), picks(named, plan, path), array.shape)
        for path, array in program.fetch(list(program.graph.parameters)).items()
    }
    feeds = program.feeds()
    pairs = zip(pruned.run(feeds), with_weights(program, zeroed).run(feeds), strict=True)
    error = max(error_of(np.array(got), np.array(want))[0] for got, want in pairs)
    if not error <= TOLERANCE[mx.float32]:
        raise GateFailed(f"the pruned model differs from the zeroed one by {error:.1e}.")
    return error
