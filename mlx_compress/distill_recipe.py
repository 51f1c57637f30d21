"""Distillation in order: open, compare tokenizers, read text, train, save, prove, measure."""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .bridges.measure import check_memory, evaluate_folders, fit_together, loaded_bytes
from .bridges.mlx_lm import LanguageModel, open_model
from .bridges.students import (
    common_tokens,
    continued,
    explained_teacher,
    student_of,
    teacher_bytes,
    teacher_of,
    trained_fetch,
)
from .calibrate import check_parameter
from .checkpoint import RECORD, check_free, parent_record
from .data import Windows
from .distill_text import Live, NextToken, Teacher
from .errors import InputError
from .explained import Explainer, Traced
from .gate import LOSS, Figure, rejected, require_drop
from .inner import inside_bytes
from .options import DIVERGENCES, OF_THE_MEASURING, DistillOptions, among
from .plan import PrunePlan
from .recipe import Planned, save_pruned
from .report import machine, write_report
from .scoring import read_windows
from .store import store_key
from .stream import Progress, silent
from .teacher_targets import TargetFolder
from .training import train
from .training_memory import require_memory
from .training_state import Training, TrainingFolder
from .training_text import Text, read_training
from .workers import ALONE, Workers

PRUNED = ("plan", "parent", "kept_block_parameters")
MORE = "train longer (--iters), take a larger student, or allow more"


def distill(
    teacher: LanguageModel,
    student: LanguageModel,
    options: DistillOptions,
    data: str | Path,
    out: str | Path,
    *,
    work: Path | None = None,
    target_dir: Path | None = None,
    dense: LanguageModel | None = None,
    team: Workers = ALONE,
    told: Callable[[dict], None] = lambda point: None,
    on_notes: Callable[[list[str]], None] = lambda notes: None,
    progress: Progress = silent,
) -> dict:
    """Train the student on what the teacher says of `data`; save it to `out`, proven and measured.

    Returns the report, which is also written into the folder as `report.json`: the teacher, or
    `dense` where it is given, beside the student as "compressed". The state of the run is kept in
    `work`, by default `OUT.training`, until all is done; the same call goes on from it. `told`
    hears of each held-out measurement, `on_notes` of what is worth knowing before the training
    begins. With a `target_dir` the teacher is asked once for all that is trained on, and its
    answers are kept there: the two need not be in memory together. Of a `team` of processes, each
    of which calls this, the first one saves, and the others return no report.

    Raises `InputError` for other tokenizers, no or too little text, or a `work` folder of another
    run, `ResourceError` where it would not fit into memory, and `GateFailed` where a loss is not
    finite or more is lost than the gate allows.
    """
    _check(options, target_dir)
    out, started = Path(out), time.perf_counter()
    work = training_place(out) if work is None else work
    check_free(out)
    if options.max_drop is not None:
        check_free(rejected(out))
    team.check(options.batch_size)
    asked = _asked(teacher, student, options, data)
    windows = read_windows(student, data, "evaluation", options.measuring, asked.notes)
    _require_memory(teacher, student, options, with_teacher=target_dir is None)
    on_notes(asked.notes)
    run = _run(teacher, student, options, asked, target_dir)
    folder = TrainingFolder(work, run)
    if target_dir is None:
        answers = Live(_asked_of(teacher))
    else:
        answers = _cached(teacher, asked, options, target_dir, team, progress)
    objective = NextToken(
        _finite("--model", student, student_of(student, options)), answers, asked.train,
        asked.held_out, options, asked.count, team, _explainer(teacher, answers, options),
        continued,
    )  # fmt: skip
    training = train(objective, options, folder, workers=team, told=told, progress=progress)
    team.wait()
    if not team.first:
        return {}
    history = history_of(options, training, objective.judged_by)
    training.weights, training.optimizer = {}, {}  # the best ones are on disk
    del answers, objective
    mx.clear_cache()

    def finish(place: Path) -> dict:
        report = _measured(dense or teacher, open_model(place), windows, options, asked, progress)
        report["distillation"] = history | {"losses": training.losses}
        report["seconds"] = time.perf_counter() - started
        write_report(report, place / "report.json")
        return {k: report[k] for k in ("dense", "compressed", "paired") if k in report}

    made = made_from(teacher.path, student.path) | {"distillation": history}
    planned = Planned(PrunePlan({}), student.config, 1.0, asked.notes, made=made)
    fetch = trained_fetch(student, options, folder.best(training))
    save_pruned(student, planned, out, fetch=fetch, finish=finish, progress=progress)
    shutil.rmtree(work)
    report = json.loads((out / "report.json").read_text(encoding="utf8"))
    require_gate(report, LOSS, options, out)
    return report


def keep_targets(
    teacher: LanguageModel, student: LanguageModel, options: DistillOptions, data: str | Path,
    target_dir: Path, *, progress: Progress = silent,
) -> list[str]:  # fmt: skip
    """Only ask the teacher, for a later `distill` by the same options; returns notes."""
    _check(options, target_dir)
    asked = _asked(teacher, student, options, data)
    _cached(teacher, asked, options, target_dir, ALONE, progress)
    return asked.notes


def _check(options: DistillOptions, target_dir: Path | None) -> None:
    """Refuse what does not go together, before the long part."""
    if options.loss is not None:
        among("--loss", (options.loss,), DIVERGENCES)
    if target_dir is not None and options.live_only:
        raise InputError(
            f"{options.live_only[0]}: asks the teacher itself; not together with --target-dir."
        )
    if options.grad_checkpoint and options.held_only:
        raise InputError(
            f"{options.held_only[0]}: needs what --grad-checkpoint does not hold; leave one out."
        )
    if options.on_policy and options.hard_labels == 1:
        raise InputError("--on-policy: the student's own text has no labels; lower --hard-labels.")


@dataclass
class _Asked:
    """What the teacher is asked about: texts, and how many of its logits count."""

    train: Text
    held_out: Text
    count: int
    notes: list[str]


def _asked(teacher, student, options: DistillOptions, data) -> _Asked:
    count = common_tokens(teacher, student)
    notes = [*teacher.notes, *student.notes]
    return _Asked(*read_training(data, student.tokenizer(), options, notes), count, notes)


def _finite(flag: str, model: LanguageModel, module: nn.Module) -> nn.Module:
    require_finite(flag, model.path, dict(tree_flatten(module.parameters())))
    return module


def _asked_of(teacher: LanguageModel) -> nn.Module:
    return _finite("--teacher", teacher, teacher_of(teacher))


def require_finite(flag: str, folder: Path, weights: Mapping[str, mx.array]) -> None:
    """Raise `InputError` that names a weight which holds NaN or infinity."""
    for path, array in weights.items():
        try:
            check_parameter(path, array)
        except InputError as error:
            raise InputError(f"{flag} {folder}: {error}") from error


def _explainer(teacher: LanguageModel, live: Live, options: DistillOptions) -> Explainer | None:
    if options.attribution is None:
        return None
    # The same model where it is float32 already.
    same = teacher_bytes(teacher) == loaded_bytes(teacher)
    return Explainer(Traced(live.model if same else explained_teacher(teacher)), options)


def _cached(
    teacher, asked: _Asked, options: DistillOptions, place: Path, team: Workers, progress: Progress
) -> Teacher:
    """A teacher that answers from disk, after it was asked for what is not there yet."""
    top_k = min(options.top_k, asked.count)
    texts = (asked.train, asked.held_out)
    targets = TargetFolder(place, identity(teacher.path), texts, top_k, asked.count)
    if team.first and not targets.complete:
        check_memory(teacher)
        targets.write(_asked_of(teacher), batch_size=options.batch_size, progress=progress)
        mx.clear_cache()
    team.wait()
    return targets.teacher()


def training_place(out: Path) -> Path:
    """Where the state of a run is kept until its result is at `out`."""
    return out.with_name(f"{out.name}.training")


def _run(teacher, student, options: DistillOptions, asked: _Asked, target_dir) -> dict:
    """What a run depends on."""
    return {
        "--teacher": identity(teacher.path),
        "--model": identity(student.path),
        "--target-dir": "not given" if target_dir is None else "given",
        **options_of(options),
        "--data": short(asked.train.key, asked.held_out.key),  # as the options read it
    }


def options_of(options: DistillOptions) -> dict:
    """The options that a run depends on, by their flags."""
    chosen = {k: v for k, v in asdict(options).items() if k not in OF_THE_MEASURING}
    return {"--" + name.replace("_", "-"): value for name, value in chosen.items()}


def identity(folder: Path) -> str:
    """A short name for the config and the weights of a folder."""
    return short(*parent_record(folder)["sha256"].values())


def short(*parts: str) -> str:
    return store_key(*parts)[:12]


def _require_memory(teacher, student, options: DistillOptions, *, with_teacher: bool) -> None:
    window = mx.zeros((1, options.max_seq_length - 1), mx.int32)
    asked = options.hard_labels < 1 or options.looks_inside
    beside = teacher_bytes(teacher) if with_teacher and asked else 0
    if options.attribution is not None and beside != loaded_bytes(teacher):
        beside += loaded_bytes(teacher)
    if options.looks_inside:
        beside += inside_bytes(teacher.trace(window), options) * options.batch_size
    module, trained = student.module(), None
    if options.lora_rank:
        adapted = tree_flatten(student_of(student, options).trainable_parameters())
        trained = sum(array.size for _, array in adapted)
    require_memory(
        student.trace(window, dtype=mx.float32), beside, options, machine()["memory_bytes"],
        layers=len(getattr(module, "layers", ())) or 1, trained=trained,
    )  # fmt: skip


def _measured(
    dense: LanguageModel, distilled: LanguageModel, windows: Windows, options: DistillOptions,
    asked: _Asked, progress: Progress,
) -> dict:  # fmt: skip
    """The report of both, or of the distilled one where memory holds only one of them."""
    together = fit_together(dense, distilled)
    if not together:
        asked.notes.append("the dense model does not fit beside the other, and was not measured")
    pair = (dense, distilled) if together else (distilled, None)
    report = evaluate_folders(*pair, windows, options.measuring, progress=progress)
    return report | {"notes": asked.notes}


def history_of(options: DistillOptions, training: Training, judged_by: str) -> dict:
    """How a training went, for record and report."""
    return {
        "options": asdict(options),
        "steps": training.step,
        "best_step": training.best_step,
        "judged_by": judged_by,
        "held_out": training.curve,
    }


def made_from(teacher: Path, student: Path) -> dict:
    """Where the model comes from, for its record.

    A student that was pruned from this teacher is still what its plan says, and has its parent.
    """
    made: dict = {"teacher": parent_record(teacher)}
    before = _record(student)
    if before is None:
        return made
    if before.get("parent", {}).get("sha256") == made["teacher"]["sha256"]:
        made |= {key: before[key] for key in PRUNED if key in before}
    return made | {"student": before}


def require_gate(report: dict, figure: Figure, options: DistillOptions, out: Path) -> None:
    """Set a model aside that loses more than the options allow. Raises `Rejected`."""
    if "compressed" in report:
        require_drop(report, figure, options, out, lambda: MORE)


def _record(folder: Path) -> dict | None:
    """How a model was made, where it says so."""
    try:
        return json.loads((folder / RECORD).read_text(encoding="utf8"))
    except (OSError, ValueError):
        return None
