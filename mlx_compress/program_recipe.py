"""The road for saved programs: what `recipe.py` does for language models, under the same names.

Samples take the place of text, a program folder that of a checkpoint, and the proof is that what
was pruned equals the dense program with the removed units zeroed.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import shrink
from .archive import is_program, load_program
from .bridges.exports import copy_tokenizer
from .bridges.tokenizers import open_tokenizer
from .calibration import Calibration
from .checkpoint import check_free
from .errors import InputError
from .evaluate import EvaluateConfig
from .evaluate_samples import evaluate_programs
from .gate import pass_gate, rejected
from .options import Options
from .parity import Case
from .plan import PrunePlan
from .program import Program
from .report import add_plan, write_report
from .samples import Samples, holds_samples, read_samples
from .shrink import ProgramPlan
from .stream import Progress, silent

CASE = 8  # samples


@dataclass(frozen=True)
class SavedProgram:
    """A program, and the folder that holds it and its tokenizer."""

    path: Path
    program: Program


def is_saved(name: str) -> bool:
    """Whether a model of this name is a saved program."""
    return is_program(Path(name).expanduser())


def open_model(name: str | Path, *, trust_remote_code: bool = False) -> SavedProgram:
    """Open a program folder; there is no code in one."""
    path = Path(name).expanduser()
    return SavedProgram(path, load_program(path))


def make_plan(
    model: SavedProgram,
    options: Options,
    data: str | Path | None = None,
    *,
    carrier: str | None = None,
    kept: Path | None = None,
    progress: Progress = silent,
) -> ProgramPlan:
    """Decide what to keep. `kept` is where statistics are kept between runs.

    Raises `InputError` where the criterion reads samples and there are none, where nothing can be
    pruned, and for a carrier: any widths fit a program.
    """
    _check_carrier(model, carrier)
    calibration = _calibration(model, options, data, kept, progress)
    return shrink.plan_program(model.program, options, None, calibration)


def apply_plan(
    model: SavedProgram,
    plan: PrunePlan,
    options: Options | None = None,
    data: str | Path | None = None,
    *,
    carrier: str | None = None,
    kept: Path | None = None,
    progress: Progress = silent,
) -> ProgramPlan:
    """Take a saved plan for this program. Raises `InputError` if it was made for another one.

    The kept weights are refitted where `data` is given and the options do not say otherwise.
    """
    _check_carrier(model, carrier)
    options = options or Options()
    calibration = _calibration(model, options, data, kept, progress)
    return shrink.plan_program(model.program, options, plan, calibration)


def save_pruned(
    model: SavedProgram,
    planned: ProgramPlan,
    out: str | Path,
    *,
    finish: Callable[[Program, Path], dict] | None = None,
    progress: Progress = silent,
) -> Program:
    """Write and prove the pruned program, with the tokenizer of the dense one."""
    return shrink.save_pruned_program(
        model.program, planned, Path(out), parent=model.path, beside=copy_tokenizer(model.path),
        finish=finish,
    )  # fmt: skip


def compress(
    model: SavedProgram,
    options: Options,
    data: str | Path,
    out: str | Path,
    *,
    plan: PrunePlan | None = None,
    carrier: str | None = None,
    on_plan: Callable[[ProgramPlan], None] = lambda planned: None,
    kept: Path | None = None,
    progress: Progress = silent,
) -> dict:
    """The whole job: plan, prune, save, prove, measure dense against compressed.

    Returns the report, which is also written into the folder as `report.json`. `on_plan` hears of
    the plan before the work begins. Raises `GateFailed` for a drop beyond `options.max_drop`.
    """
    started = time.perf_counter()
    notes: list[str] = []
    if options.max_drop is not None:
        check_free(rejected(Path(out)))
    samples = read_evaluation(model, data, options, notes)
    more = {"carrier": carrier, "kept": kept, "progress": progress}
    if plan:
        planned = apply_plan(model, plan, options, data, **more)
    else:
        planned = make_plan(model, options, data, **more)
    planned.notes += [note for note in notes if note not in planned.notes]
    on_plan(planned)
    report: dict = {}

    def finish(pruned: Program, folder: Path) -> dict:
        smaller = SavedProgram(folder, pruned)
        report.update(evaluate_models(model, smaller, samples, options, progress=progress))
        add_plan(report, planned, time.perf_counter() - started)
        write_report(report, folder / "report.json")
        return {k: report[k] for k in ("dense", "compressed", "paired")}

    save_pruned(model, planned, out, finish=finish)
    if options.max_drop is not None:
        pass_gate(planned, report, samples, Path(out))
    return report


def read_evaluation(
    model: SavedProgram, data: str | Path, options: Options, notes: list[str]
) -> Samples:
    """What is measured on; what the reader had to say goes to `notes`."""
    samples = read_samples(
        model.program, data, "evaluation", count=options.eval_samples,
        batch_size=options.batch_size, length=options.max_seq_length, folder=model.path,
        open_tokenizer=open_tokenizer,
    )  # fmt: skip
    if samples.notice:
        notes.append(samples.notice)
    return samples


def evaluate_models(
    dense: SavedProgram, compressed: SavedProgram | None, samples: Samples, options: Options,
    *, progress: Progress = silent,
) -> dict:  # fmt: skip
    """One or two programs on the same samples: `evaluate_samples.evaluate_programs`'s report."""
    models = {"dense": dense} | ({} if compressed is None else {"compressed": compressed})
    return evaluate_programs(
        dense.program, compressed and compressed.program, samples,
        EvaluateConfig(seed=options.seed), progress=progress,
        folders={name: model.path for name, model in models.items()},
    )  # fmt: skip


def real_case(path: Path, program: Program, data: str | Path | None) -> Case | None:
    """A few evaluation samples to compare an export on; None where `data` holds no samples.

    `path` is the folder of the program.
    """
    if data is None or not holds_samples(data, program):
        return None
    options = Options(eval_samples=CASE, batch_size=CASE)
    samples = read_evaluation(SavedProgram(path, program), data, options, [])
    feeds = dict(zip(program.inputs, map(np.array, samples.batches[0]), strict=True))
    return Case(samples.path.name, feeds)


def _calibration(model: SavedProgram, options: Options, data, kept, progress) -> Calibration:
    return shrink.on_samples(
        model.program, data, options, [], folder=model.path, kept=kept, progress=progress,
        open_tokenizer=open_tokenizer,
    )  # fmt: skip


def _check_carrier(model: SavedProgram, carrier: str | None) -> None:
    if carrier is not None:
        raise InputError(
            f"--carrier {carrier}: {model.path} is a saved program, which holds any widths; leave "
            "it out."
        )
