"""What the commands that train do and print."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from . import distill_recipe, program_recipe, recipe
from .checkpoint import check_free
from .distill_stages import Heard, Stage, read_stages, roads, run_stages
from .errors import InputError
from .jobs import (
    err,
    out,
    progress_bars,
    table,
    tell_notes,
    tell_plan,
    tell_report,
    tell_saved,
    told_if_rejected,
)
from .options import FRACTIONS, DistillOptions, Options
from .program_recipe import SavedProgram
from .workers import ALONE, Workers, told_when_lost, workers


def distill(
    teacher: str, model: str, mlx_path: Path | None, data: Path, options: DistillOptions,
    *, target_dir: Path | None, trust: bool,
) -> None:  # fmt: skip
    """Train a student on a teacher, with a line for each measurement and the closing table.

    Without an `mlx_path` the teacher is only asked, and its answers are kept in `target_dir`.
    """
    if mlx_path is not None:
        check_free(mlx_path)
    models = [_open(teacher, trust), _open(model, trust)]
    if isinstance(models[0], SavedProgram) is not isinstance(models[1], SavedProgram):
        raise InputError(
            f"--teacher {teacher}, --model {model}: one is a saved program and one a language "
            "model; give two of a kind."
        )
    _, road = roads(models[0])
    if mlx_path is None:
        if road is not distill_recipe:
            raise InputError("--targets-only: is for language models; leave it out.")
        _require_alone("--targets-only")
        with progress_bars() as progress:
            notes = distill_recipe.keep_targets(
                *models, options, data, target_dir, progress=progress
            )
        tell_notes(notes)
        err.print(f"What the teacher says is kept in {target_dir}.", soft_wrap=True)
        return
    heard: list[str] = []

    def on_notes(notes: list[str]) -> None:
        heard.extend(notes)
        tell_notes(notes)

    team = _team(road)
    with told_if_rejected(), _kept_if_stopped(mlx_path, team), progress_bars() as progress:
        report = road.distill(
            *models, options, data, mlx_path, target_dir=target_dir, team=team, told=_tell_point,
            on_notes=on_notes, progress=progress,
        )  # fmt: skip
    if team.first:
        _tell_end(report, mlx_path, heard)


def _require_alone(what: str) -> None:
    if workers().count > 1:
        raise InputError(f"{what}: is for one process; start it without mlx.launch.")


def _team(road) -> Workers:
    """This process and its like; all but the first are silent."""
    team = workers()
    if team.count > 1 and road is not distill_recipe:
        raise InputError("a saved program is trained by one process; start it without mlx.launch.")
    err.quiet = out.quiet = not team.first
    return team


def distill_in_stages(
    teacher: str, file: Path, mlx_path: Path, data: Path, options: DistillOptions, *, trust: bool
) -> None:  # fmt: skip
    """Several students, one after the other."""
    _require_alone("--stages")
    stages = read_stages(file, options, _pruning(options))
    _in_stages(_open(teacher, trust), stages, mlx_path, data, None, trust)


def prune_and_distill(
    model: str, mlx_path: Path, data: Path, pruning: Options, training: DistillOptions,
    *, rounds: int, kept: Path | None, trust: bool,
) -> None:  # fmt: skip
    """Prune a part and distil, `rounds` times."""
    _require_alone("--methods prune,distill")
    last = training
    first = replace(training, max_drop=None)  # the gate is on what comes out
    part = replace(pruning, **_part(pruning, rounds), max_drop=None)
    stages = [Stage(last if n == rounds else first, pruning=part) for n in range(1, rounds + 1)]
    _in_stages(_open(model, trust), stages, mlx_path, data, kept, trust)


def _part(pruning: Options, rounds: int) -> dict[str, float]:
    """What each of several rounds keeps, so that together they keep what was asked for."""
    if rounds == 1:
        return {}
    if pruning.pruning_ratio is not None:
        return {"pruning_ratio": 1 - (1 - pruning.pruning_ratio) ** (1 / rounds)}
    name, value = pruning.budget
    if name not in FRACTIONS:
        raise InputError(f"--target {name}: is no fraction to divide among {rounds} rounds.")
    return {name: value ** (1 / rounds)}


def _pruning(options: DistillOptions) -> Options:
    return Options(
        max_seq_length=options.max_seq_length, batch_size=options.batch_size, seed=options.seed
    )


def _in_stages(teacher, stages: list[Stage], mlx_path: Path, data, kept, trust: bool) -> None:
    told: list[str] = []

    def on_notes(notes: list[str]) -> None:
        new = [note for note in notes if note not in told]
        told.extend(new)
        tell_notes(new)

    with told_if_rejected(), _kept_if_stopped(mlx_path), progress_bars() as progress:
        heard = Heard(
            stage=lambda name: err.rule(name) if len(stages) > 1 else None,
            plan=tell_plan, notes=on_notes, point=_tell_point, progress=progress,
        )  # fmt: skip
        report = run_stages(
            teacher, stages, data, mlx_path, kept=kept, heard=heard, trust_remote_code=trust
        )
    if len(stages) > 1:
        out.print(_stages_table(report["stages"]))
    _tell_end(report, mlx_path, told)


def _open(name: str, trust: bool):
    road = program_recipe if program_recipe.is_saved(name) else recipe
    return road.open_model(name, trust_remote_code=trust)


@contextmanager
def _kept_if_stopped(mlx_path: Path, team: Workers = ALONE) -> Iterator[None]:
    work = distill_recipe.training_place(mlx_path)
    advice = f"the last measured state is kept in {work}: the same command goes on from there."
    try:
        with told_when_lost(team, advice):
            yield
    except KeyboardInterrupt:
        if work.exists():
            err.print(f"Kept in {work}; the same command goes on from there.", soft_wrap=True)
        raise


def _tell_point(point: dict) -> None:
    """A held-out measurement on the way."""
    named = {
        "cross_entropy": "{:.4f} nats/token held out", "loss": "loss {:.4f} held out",
        "score": "score {:.4f}", "divergence": "{:.4f} from the teacher",
    }  # fmt: skip
    told = [words.format(point[key]) for key, words in named.items() if key in point]
    err.print(f"step {point['step']}: {', '.join(told)}", highlight=False, soft_wrap=True)


def _stages_table(rows: list[dict]):
    """What each stage brought."""
    shown = table("stage", "parameters", "held out", "before", "after", "measured loss", "s")
    for row in rows:
        shown.add_row(
            str(row["stage"]), f"{row['parameters']:,}", row["judged_by"], f"{row['before']:.4f}",
            f"{row['after']:.4f}", f"{row['loss']:.4f}", f"{row['seconds']:.0f}",
        )  # fmt: skip
    return shown


def _tell_end(report: dict, mlx_path: Path, heard: list[str]) -> None:
    tell_report(report)
    tell_notes([note for note in report["notes"] if note not in heard])
    tell_saved(mlx_path)
