"""Prune a saved program: plan, prune, refit, prove, save. No architecture has to hold it.

Widths are free in a program, so nothing is snapped to what a config can say. With samples
(`samples.py`) the criterion is chosen and the kept weights are refitted, as for language models.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np

from .allocate import block_parameters, choose, prunable, request
from .archive import save_program
from .axes import Dimension, NamedAxes, named_axes
from .calibration import Calibration
from .checkpoint import new_folder, parent_record
from .choice import Verdict
from .errors import GateFailed, InputError
from .evaluate import EvaluateConfig
from .evaluate_samples import evaluate_programs
from .importance import CRITERIA, needs
from .options import Options
from .parity import TOLERANCE, error_of
from .plan import PrunePlan
from .program import Program, prune_program, with_weights
from .prune import Cutter, check_plan, picks, pruner, spread_array
from .report import write_report
from .samples import Samples, read_samples
from .scoring import best_plan, unit_scores
from .sizes import sizes_of
from .stream import Progress, silent


@dataclass
class ProgramPlan:
    """A plan for a program, how it cuts, and what is worth telling about it."""

    plan: PrunePlan
    kept_parameters: float
    notes: list[str] = field(default_factory=list)
    cut: Cutter | None = None
    refit: dict = field(default_factory=dict)
    verdict: Verdict | None = None
    calibration: Calibration | None = None
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
    )  # fmt: skip


def plan_program(
    program: Program, options: Options, plan: PrunePlan | None = None,
    calibration: Calibration | None = None,
) -> ProgramPlan:  # fmt: skip
    """Decide what to keep, or take a plan that was made; refit where there are samples.

    Raises `InputError` for a criterion that reads data where there is none, and for a plan of
    another model.
    """
    named = named_axes(program.at())
    calibration = calibration or on_samples(program, None, options, [])
    verdict, notes = None, calibration.notes
    if plan is None:
        plan, verdict = _choose(named, options, calibration)
    check_plan(named, plan)
    dims = [named.dimensions[cut.name] for cut in plan]
    kept = block_parameters(named, plan.counts()) / block_parameters(named)
    planned = ProgramPlan(plan, kept, notes, verdict=verdict, calibration=calibration, dims=dims)
    if options.refit and calibration.read is not None:
        planned.cut, planned.refit = calibration.fitted(plan, dims)
    return planned


def _choose(named: NamedAxes, options: Options, calibration: Calibration):
    """The plan by the options' criterion, and the verdict where it was chosen by evidence."""
    options.require_amount()
    if "data" in needs(options.importance) and calibration.read is None:
        names = ", ".join(name for name in CRITERIA if "data" not in needs(name))
        raise InputError(
            f"--importance {options.importance} reads samples: give --data, an .npz with labels or "
            f"sentence pairs in .jsonl, or choose from {names}."
        )
    dims = prunable(named, options)
    wanted = request(named, dims, options)
    calibration.notes += wanted.notes
    recipe = {k: v for k, v in asdict(options).items() if v is not None}
    if options.importance == "auto":
        verdict = best_plan(calibration, dims, wanted)
        chosen = {**recipe, "chosen": verdict.winner.name}
        return PrunePlan(verdict.winner.plan.cuts, chosen), verdict
    scores = unit_scores(calibration, named, dims)
    return choose(named, dims, scores, wanted, options, recipe), None


def save_pruned_program(
    program: Program, planned: ProgramPlan, out: Path,
    *, finish: Callable[[Program, Path], dict] | None = None,
) -> Program:  # fmt: skip
    """Prune, prove that it equals zeroing, and save as a program folder, all or nothing.

    `finish(pruned, folder)` may measure the proven folder and returns metrics to record. Raises
    `GateFailed` if the pruned program computes something else.
    """
    named = named_axes(program.at())
    pruned = prune_program(program, planned.plan, planned.cut)
    record = {
        "plan": planned.plan.to_json(),
        "notes": planned.notes,
        "kept_block_parameters": planned.kept_parameters,
        "verified": {"error_against_zeroing": _prove(program, named, planned, pruned)},
    }
    if planned.refit:
        found = {"lambda": planned.cut.chosen, "left_as_it_is": planned.cut.left}
        record["refit"] = planned.refit | found
    if planned.verdict is not None:
        record["criteria"] = planned.verdict.document()
    with new_folder(out) as folder:
        save_program(pruned, folder, record)
        if finish:
            save_program(pruned, folder, {**record, "metrics": finish(pruned, folder)})
    return pruned


def _prove(program: Program, named: NamedAxes, planned: ProgramPlan, pruned: Program):
    """The error against the zeroed program; None where removing is not zeroing by nature."""
    plan, cut = planned.plan, planned.cut or pruner(named, planned.plan)
    if not all(named.dimensions[c.name].exact for c in plan):
        return None
    zeroed = {
        path: spread_array(cut(path, array), picks(named, plan, path), array.shape)
        for path, array in program.fetch(list(program.graph.parameters)).items()
    }
    feeds = program.feeds()
    pairs = zip(pruned.run(feeds), with_weights(program, zeroed).run(feeds), strict=True)
    error = max(error_of(np.array(got), np.array(want))[0] for got, want in pairs)
    if not error <= TOLERANCE[mx.float32]:
        raise GateFailed(f"the pruned model differs from the zeroed one by {error:.1e}.")
    return error


def compress_program(
    program: Program, planned: ProgramPlan, out: Path, samples: Samples,
    *, folder: Path, progress: Progress = silent,
) -> dict:  # fmt: skip
    """Save and measure beside the dense program; returns the report, also written there.

    Raises `GateFailed` for a loss beyond `max_drop`: the program is then kept aside.
    """
    report: dict = {}
    options = planned.calibration.options

    def finish(pruned: Program, work: Path) -> dict:
        report.update(evaluate_programs(
            program, pruned, samples, EvaluateConfig(seed=options.seed),
            folders={"dense": folder, "compressed": work}, progress=progress,
        ))  # fmt: skip
        report["kept_block_parameters"] = planned.kept_parameters
        report["recipe"], report["notes"] = dict(planned.plan.recipe), planned.notes
        if planned.verdict is not None:
            report["criteria"] = planned.verdict.document()
        write_report(report, work / "report.json")
        return {k: report[k] for k in ("dense", "compressed", "paired")}

    save_pruned_program(program, planned, out, finish=finish)
    return report
