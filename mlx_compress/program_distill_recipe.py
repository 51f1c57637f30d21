"""The road of distillation for saved programs: what `distill_recipe.py` does for language models,
under the same names. Samples take the place of text.
"""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np

from .archive import load_program, save_program
from .bridges.exports import copy_tokenizer
from .bridges.tokenizers import open_tokenizer
from .checkpoint import NotLoadable, check_free, new_folder, parent_record, write_record
from .distill_recipe import (
    history_of,
    identity,
    made_from,
    options_of,
    require_finite,
    require_gate,
    short,
    training_place,
)
from .distill_samples import Answers
from .errors import InputError
from .gate import figure_of, rejected
from .inner import without_projections
from .options import DistillOptions
from .parity import TOLERANCE, error_of
from .plan import PrunePlan
from .program import Program, with_weights
from .program_recipe import SavedProgram, evaluate_models, read_evaluation
from .report import record_of, write_report
from .samples import Samples, read_samples
from .shrink import ProgramPlan
from .store import store_key
from .stream import Progress, silent
from .training import train
from .training_state import TrainingFolder, Weights
from .workers import ALONE, Workers

# What only language models have.
OF_TEXT = ("mask_prompt", "grad_checkpoint", "lora_rank", "dtype", "top_k", "on_policy")


def distill(
    teacher: SavedProgram,
    student: SavedProgram,
    options: DistillOptions,
    data: str | Path,
    out: str | Path,
    *,
    work: Path | None = None,
    target_dir: Path | None = None,
    dense: SavedProgram | None = None,
    team: Workers = ALONE,
    told: Callable[[dict], None] = lambda point: None,
    on_notes: Callable[[list[str]], None] = lambda notes: None,
    progress: Progress = silent,
) -> dict:
    """Train the student on what the teacher answers to the samples of `data`; save it to `out`.

    As `distill_recipe.distill`, by one process. The teacher answers each sample once, before the
    training, so there is no `target_dir`; what is inside it is computed at each step.
    """
    _check(options, target_dir)
    out, started, notes = Path(out), time.perf_counter(), []
    work = training_place(out) if work is None else work
    check_free(out)
    if options.max_drop is not None:
        check_free(rejected(out))
    samples = read_evaluation(student, data, options.measuring, notes)
    learnt, held_out = read_training(student, data, options)
    on_notes(notes)
    folder = TrainingFolder(work, _run(teacher, student, options, (learnt, held_out)))
    for flag, model in (("--teacher", teacher), ("--model", student)):
        weights = model.program.fetch(list(model.program.graph.parameters))
        require_finite(flag, model.path, weights)
    objective = Answers(student.program, teacher.program, learnt, held_out, options, progress)
    training = train(objective, options, folder, told=told, progress=progress)
    history = history_of(options, training, objective.judged_by)
    trained = _trained(student.program, without_projections(folder.best(training)))
    training.weights, training.optimizer = {}, {}
    made = made_from(teacher.path, student.path) | {"distillation": history}
    with new_folder(out) as place:
        verified = {"error_of_the_saved": _saved(trained, student, place)}
        planned = ProgramPlan(PrunePlan({}), 1.0, notes)
        record = record_of(planned, parent_record(student.path), verified) | made
        pair = (dense or teacher, SavedProgram(place, trained))
        report = evaluate_models(*pair, samples, options.measuring, progress=progress)
        report["distillation"] = history | {"losses": training.losses}
        report |= {"notes": notes, "seconds": time.perf_counter() - started}
        write_report(report, place / "report.json")
        record["metrics"] = {k: report[k] for k in ("dense", "compressed", "paired")}
        write_record(place, record)
    shutil.rmtree(work)
    require_gate(report, figure_of(samples), options, out)
    return report


def read_training(
    student: SavedProgram, data: str | Path, options: DistillOptions
) -> tuple[Samples, Samples]:
    """Samples to train on, and some of the same split that are held out. Raises `InputError`."""
    found = read_samples(
        student.program, data, "calibration", count=options.windows + options.val_samples,
        batch_size=options.batch_size, seed=options.seed, length=options.max_seq_length,
        folder=student.path, open_tokenizer=open_tokenizer,
    )  # fmt: skip
    batches = len(found.batches)
    if batches < 2:
        raise InputError(
            f"{found.path}: {len(found)} samples make one batch of {found.size}, too little to "
            "train on one part and hold another out; give more, or lower --batch-size."
        )
    held = min(max(1, round(options.val_samples / found.size)), batches // 2)
    return found.split(batches - held)


def _check(options: DistillOptions, target_dir: Path | None) -> None:
    plain = DistillOptions()
    for name in OF_TEXT:
        if getattr(options, name) != getattr(plain, name):
            raise InputError(f"--{name.replace('_', '-')}: is for language models; leave it out.")
    if target_dir is not None:
        raise InputError("--target-dir: is for language models; leave it out.")
    if options.attribution == "weights" and not options.looks_inside:
        raise InputError(
            "--attribution weights: weighs a saved program's blocks; give --hidden-weight or "
            "--attention-weight too."
        )


def _run(teacher, student, options: DistillOptions, parts: tuple[Samples, ...]) -> dict:
    """What a run depends on."""
    arrays = [np.array(array) for s in parts for batch in s.batches for array in batch]
    return {
        "--teacher": identity(teacher.path),
        "--model": identity(student.path),
        **options_of(options),
        "--data": short(store_key(*arrays, *(s.targets for s in parts))),  # as the options read it
    }


def _trained(program: Program, best: Weights) -> Program:
    graph = program.graph
    held = program.fetch([path for path in graph.parameters if path not in best])
    dtypes = {path: graph.values[i].dtype for path, i in graph.parameters.items()}
    return with_weights(program, held | {path: a.astype(dtypes[path]) for path, a in best.items()})


def _saved(trained: Program, student: SavedProgram, place: Path) -> float:
    """Write it, and how far what is read back is from what was written."""
    save_program(trained, place)
    copy_tokenizer(student.path)(place)
    feeds = trained.feeds()
    pairs = zip(load_program(place).run(feeds), trained.run(feeds), strict=True)
    error = max(error_of(np.array(got), np.array(want))[0] for got, want in pairs)
    if not error <= TOLERANCE[mx.float32]:
        raise NotLoadable(f"what was saved differs from what was trained by {error:.1e}.")
    return error
