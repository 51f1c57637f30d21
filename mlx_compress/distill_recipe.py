"""Distillation in order: open, compare tokenizers, read text, train, save, prove, measure."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx

from .bridges.measure import evaluate_folders, loaded_bytes
from .bridges.mlx_lm import LanguageModel, open_model
from .bridges.students import common_tokens, student_of, teacher_of, trained_fetch
from .checkpoint import RECORD, check_free, parent_record
from .data import Windows
from .distill import distil, live
from .options import DistillOptions
from .plan import PrunePlan
from .recipe import Planned, save_pruned
from .report import machine, write_report
from .scoring import read_windows
from .store import store_key
from .stream import Progress, silent
from .training_memory import require_memory
from .training_state import Training, TrainingFolder
from .training_text import Text, read_training

# What does not change how a run goes: it may differ when one goes on.
OF_THE_MEASURING = ("eval_samples",)


def distill(
    teacher: LanguageModel,
    student: LanguageModel,
    options: DistillOptions,
    data: str | Path,
    out: str | Path,
    *,
    work: Path | None = None,
    told: Callable[[dict], None] = lambda point: None,
    on_notes: Callable[[list[str]], None] = lambda notes: None,
    progress: Progress = silent,
) -> dict:
    """Train the student on what the teacher says of `data`; save it to `out`, proven and measured.

    Returns the report, which is also written into the folder as `report.json`: the teacher as
    "dense", the student as "compressed". The state of the run is kept in `work`, by default
    `OUT.training`, until all is done; the same call goes on from it. `told` hears of each held-out
    measurement, `on_notes` of what is worth knowing before the training begins.

    Raises `InputError` for other tokenizers, no or too little text, or a `work` folder of another
    run, `ResourceError` where it would not fit into memory, and `GateFailed` where a loss is not
    finite.
    """
    out, started = Path(out), time.perf_counter()
    work = training_place(out) if work is None else work
    check_free(out)
    count = common_tokens(teacher, student)
    notes = [*teacher.notes, *student.notes]
    windows = read_windows(student, data, "evaluation", options.measuring, notes)
    train, held = read_training(data, student.tokenizer(), options, notes)
    _require_memory(teacher, student, options)
    on_notes(notes)
    folder = TrainingFolder(work, _run(teacher, student, options, train, held))
    module = student_of(student, options)
    training = distil(
        module, live(teacher_of(teacher)), train, held, options, folder,
        count=count, told=told, progress=progress,
    )  # fmt: skip
    del module
    mx.clear_cache()
    report = _save(
        teacher, student, options, training, folder, windows, out, notes, started, progress
    )
    shutil.rmtree(work)
    return report


def training_place(out: Path) -> Path:
    """Where the state of a run is kept until its result is at `out`."""
    return out.with_name(f"{out.name}.training")


def _run(teacher, student, options: DistillOptions, train: Text, held: Text) -> dict:
    """What a run depends on."""
    chosen = {k: v for k, v in asdict(options).items() if k not in OF_THE_MEASURING}
    return {
        "--teacher": _short(*parent_record(teacher.path)["sha256"].values()),
        "--model": _short(*parent_record(student.path)["sha256"].values()),
        "--data": _short(train.key, held.key),
        **{"--" + name.replace("_", "-"): value for name, value in chosen.items()},
    }


def _short(*parts: str) -> str:
    return store_key(*parts)[:12]


def _require_memory(teacher: LanguageModel, student: LanguageModel, options) -> None:
    window = mx.zeros((1, options.max_seq_length - 1), mx.int32)
    asked = options.hard_labels < 1
    require_memory(
        student.trace(window, dtype=mx.float32), loaded_bytes(teacher) if asked else 0, options,
        machine()["memory_bytes"], layers=len(getattr(student.module(), "layers", ())) or 1,
    )  # fmt: skip


def _save(
    teacher, student, options, training: Training, folder: TrainingFolder, windows: Windows,
    out: Path, notes: list[str], started: float, progress: Progress,
) -> dict:  # fmt: skip
    history = {
        "options": asdict(options),
        "steps": training.step,
        "best_step": training.best_step,
        "held_out": training.curve,
    }
    made = {"distillation": history, "teacher": parent_record(teacher.path)}
    made |= {"student": _record(student.path)} if _record(student.path) else {}
    planned = Planned(PrunePlan({}), student.config, 1.0, notes, made=made)
    report: dict = {}

    def finish(place: Path) -> dict:
        report.update(evaluate_folders(
            teacher, open_model(place), windows, options.measuring, progress=progress
        ))  # fmt: skip
        report["distillation"] = history | {"losses": training.losses}
        report["notes"], report["seconds"] = notes, time.perf_counter() - started
        write_report(report, place / "report.json")
        return {k: report[k] for k in ("dense", "compressed", "paired")}

    fetch = trained_fetch(student, options, folder.best(training))
    save_pruned(student, planned, out, fetch=fetch, finish=finish, progress=progress)
    return report


def _record(folder: Path) -> dict | None:
    """How a model was made, where it says so."""
    try:
        return json.loads((folder / RECORD).read_text(encoding="utf8"))
    except (OSError, ValueError):
        return None
