"""Several distillations in a row: a family's models one after the other, or prune a little, distil
a little, repeated.

A YAML file lists the stages. Each names its student: a model, or how much of the model before it
is to be kept, and how that is chosen. What else it says replaces the options of the command for
that stage alone.

    - target: params=0.7        # of the teacher's blocks: prune, then distil
      dims: layers              # whole layers; as `compress` spells it
      iters: 300
    - target: params=0.7        # of the blocks that the first stage left
      teacher: previous         # the first stage's model instead of the command's --teacher
      max-drop: 0.1
    - model: MODEL_DIR          # another checkpoint with the same tokens
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import yaml

from . import distill_recipe, program_distill_recipe, program_recipe, recipe
from .bridges.mlx_lm import LanguageModel
from .checkpoint import check_free
from .errors import InputError
from .gate import Rejected, rejected
from .options import BUDGETS, DistillOptions, Options, read_target
from .program_recipe import SavedProgram
from .report import write_report
from .stream import Progress, silent
from .training_state import require_same

Model = LanguageModel | SavedProgram
STAGES = "stages.json"
TEACHERS = ("first", "previous")
TRAINED = {f.name for f in fields(DistillOptions)}
PRUNED = {f.name for f in fields(Options)} - TRAINED - {*BUDGETS, "pruning_ratio"}


@dataclass(frozen=True)
class Stage:
    """One student: `model`, or by `pruning` what is left of the model before it."""

    options: DistillOptions
    model: str | None = None
    pruning: Options | None = None
    teacher: str = "first"


@dataclass
class Heard:
    """What a caller wants to hear of a stage: its start, what was decided, its measurements."""

    stage: Callable[[str], None] = lambda name: None
    plan: Callable[[object], None] = lambda planned: None
    notes: Callable[[list[str]], None] = lambda notes: None
    point: Callable[[dict], None] = lambda point: None
    progress: Progress = field(default=silent)


def run_stages(
    teacher: Model, stages: list[Stage], data: str | Path, out: str | Path,
    *, kept: Path | None = None, heard: Heard | None = None, trust_remote_code: bool = False,
) -> dict:  # fmt: skip
    """Run the stages; the last one's model is `out`, measured beside the first teacher.

    Each stage has its own gate. What is done is kept in `OUT.training`, and the same call goes on
    there. Returns the last report, with a row for each stage under "stages": what training it
    brought to what it is judged by. `kept` is where statistics of pruning are kept. Raises as
    `distill_recipe.distill`.
    """
    out, heard = Path(out), heard or Heard()
    work = distill_recipe.training_place(out)
    if not (out.exists() and work.exists()):  # as a run leaves them that was cut off at the end
        check_free(out)
    if stages[-1].options.max_drop is not None:
        check_free(rejected(out))
    _require_same(work, teacher, stages, data)
    pruning_road, training_road = roads(teacher)
    previous, rows = teacher, []
    for number, stage in enumerate(stages, start=1):
        place = out if number == len(stages) else work / f"stage-{number}"
        heard.stage(f"Stage {number} of {len(stages)}")
        if place.exists():
            report = json.loads((place / "report.json").read_text(encoding="utf8"))
        else:
            student = _student(pruning_road, stage, previous, data, work / f"student-{number}",
                               kept, heard, trust_remote_code)  # fmt: skip
            if place != out:  # a stage that its gate rejected is tried again
                shutil.rmtree(rejected(place), ignore_errors=True)
            try:
                report = training_road.distill(
                    previous if stage.teacher == "previous" else teacher, student, stage.options,
                    data, place, work=work / f"training-{number}", dense=teacher,
                    told=heard.point, on_notes=heard.notes, progress=heard.progress,
                )  # fmt: skip
            except Rejected:
                if place == out:  # what comes out is kept aside, and nothing is left to go on with
                    shutil.rmtree(work)
                raise
        rows.append(_row(number, report))
        previous = pruning_road.open_model(place, trust_remote_code=trust_remote_code)
    report["stages"] = rows
    write_report(report, out / "report.json")
    shutil.rmtree(work, ignore_errors=True)
    return report


def roads(model: Model):
    """How models of this kind are pruned, and how they are trained."""
    if isinstance(model, SavedProgram):
        return program_recipe, program_distill_recipe
    return recipe, distill_recipe


def _student(
    road, stage: Stage, previous: Model, data, place: Path, kept, heard: Heard, trust: bool
) -> Model:
    if stage.model is not None:
        return road.open_model(stage.model, trust_remote_code=trust)
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        planned = road.make_plan(previous, stage.pruning, data, kept=kept, progress=heard.progress)
        heard.plan(planned)
        road.save_pruned(previous, planned, place, progress=heard.progress)
    return road.open_model(place)


def _require_same(work: Path, teacher: Model, stages: list[Stage], data) -> None:
    """Raise `InputError` where `work` holds stages of something else; else say what it holds."""
    run = {"--teacher": distill_recipe.identity(teacher.path), "--data": str(Path(data).resolve())}
    for number, stage in enumerate(stages, start=1):
        run |= {
            f"stage {number} {name}": value for name, value in {
                **distill_recipe.options_of(stage.options), "--teacher": stage.teacher,
                "--model": stage.model, "pruning": stage.pruning and asdict(stage.pruning),
            }.items()
        }  # fmt: skip
    run, file = json.loads(json.dumps(run)), work / STAGES
    if file.exists() and len(list(work.iterdir())) > 1:
        require_same(work, json.loads(file.read_text(encoding="utf8")), run)
        return
    work.mkdir(parents=True, exist_ok=True)
    write_report(run, file)


def _row(number: int, report: Mapping) -> dict:
    """Whether a stage paid."""
    done, judged = report["distillation"], report["distillation"]["judged_by"]
    by_step = {point["step"]: point[judged] for point in done["held_out"]}
    last = report.get("compressed", report["dense"])
    return {
        "stage": number,
        "parameters": last["parameters"],
        "judged_by": judged,
        "before": by_step[0],
        "after": by_step[done["best_step"]],
        "loss": last.get("nats_per_token", last.get("loss")),
        "seconds": report["seconds"],
    }


def read_stages(path: Path, options: DistillOptions, pruning: Options) -> list[Stage]:
    """The stages of a YAML file, over the options of the command. Raises `InputError`."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--stages {path}: not readable as YAML ({reason}).") from error
    if not isinstance(document, list) or not all(isinstance(each, dict) for each in document):
        raise InputError(f"--stages {path}: must be a list of stages, each with target or model.")
    if not document:
        raise InputError(f"--stages {path}: is empty; list the stages.")
    stages = [_stage(f"--stages {path}, stage {n}", each, options, pruning)
              for n, each in enumerate(document, start=1)]  # fmt: skip
    if stages[0].teacher == "previous":
        raise InputError(f"--stages {path}, stage 1: teacher: previous, but there is none before.")
    return stages


def _typed(where: str, name: str, value):
    """YAML reads 1e-4 as a word."""
    kind = get_type_hints(DistillOptions if name in TRAINED else Options)[name]
    if get_origin(kind) is tuple:
        words = value if isinstance(value, list) else str(value).split(",")
        return tuple(str(word).strip() for word in words)
    kind = next((each for each in get_args(kind) if each is not type(None)), kind)
    try:
        if kind is bool and not isinstance(value, bool):
            raise ValueError
        if kind is int and value is not None and int(value) != float(value):
            raise ValueError
        return None if value is None else kind(value)
    except (TypeError, ValueError):
        raise InputError(f"{where}: {name}: {value}: is no {kind.__name__}.") from None


def _stage(where: str, entries: Mapping, options: DistillOptions, pruning: Options) -> Stage:
    entries = {str(key).lstrip("-").replace("-", "_"): value for key, value in entries.items()}
    model, target = entries.pop("model", None), entries.pop("target", None)
    teacher = entries.pop("teacher", "first")
    if teacher not in TEACHERS:
        raise InputError(f"{where}: teacher {teacher}: choose from {', '.join(TEACHERS)}.")
    if (model is None) == (target is None):
        raise InputError(f"{where}: give either target (as {BUDGETS['params'][0]}) or model.")
    known = TRAINED | (PRUNED if model is None else set())
    unknown = set(entries) - known
    if unknown:
        listed = ", ".join(sorted({"model", "target", "teacher", *known}))
        raise InputError(f"{where}: {min(unknown)!r} is no option here; known: {listed}.")
    said = {name: _typed(where, name, value) for name, value in entries.items()}
    wanted = replace(options, **{name: said[name] for name in said if name in TRAINED})
    if model is not None:
        return Stage(wanted, model=str(model), teacher=teacher)
    pruning = replace(
        pruning, **read_target(str(target)), batch_size=wanted.batch_size, seed=wanted.seed,
        max_seq_length=wanted.max_seq_length,
        **{name: said[name] for name in said if name in PRUNED},
    )  # fmt: skip
    return Stage(wanted, pruning=pruning, teacher=teacher)
