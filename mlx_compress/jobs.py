"""What each command does and prints. Results go to stdout, progress and notes to stderr.

A saved program and a language model take the same road, by functions of the same names.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from . import program_recipe, recipe
from .axes import named_axes
from .bridges.measure import evaluate_folders
from .checkpoint import RECORD, check_free
from .choice import LAYERS
from .errors import InputError
from .gate import Rejected
from .options import Options
from .plan import diff as plan_diff
from .report import comparison_table, write_report
from .scoring import inspect as inspect_axes
from .scoring import read_windows
from .screen import axes_document, axes_table, plan_table, table, verdict_table
from .stream import Progress as Advance

out = Console()
err = Console(stderr=True)


@contextmanager
def progress_bars() -> Iterator[Advance]:
    """A bar with an ETA for each stage, on stderr; gone when the stage is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), "eta",
               TimeRemainingColumn())  # fmt: skip
    # To a file it would write an empty line.
    hidden = not err.is_terminal
    with Progress(*columns, console=err, transient=True, disable=hidden) as bars:
        tasks: dict[str, int] = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield advance


def compress(
    model: str, mlx_path: Path, data: Path, options: Options,
    *, plan, carrier, biases, kept, trust,
) -> None:  # fmt: skip
    """The whole job, with the closing table. `kept` is where statistics are kept, or None."""
    check_free(mlx_path)
    road = _road(model)
    source = _open(model, trust, biases)
    saved = recipe.read_plan(plan) if plan else None
    heard = 0

    def on_plan(planned) -> None:
        nonlocal heard
        heard = tell_plan(planned)

    with told_if_rejected(), progress_bars() as progress:
        report = road.compress(
            source, options, data, mlx_path, plan=saved, carrier=carrier, kept=kept,
            on_plan=on_plan, progress=progress,
        )  # fmt: skip
    tell_report(report)
    tell_notes(report["notes"][heard:])
    tell_saved(mlx_path)


@contextmanager
def told_if_rejected() -> Iterator[None]:
    """Show what a model is like that the gate rejects."""
    try:
        yield
    except Rejected as kept_aside:
        report = (kept_aside.folder / "report.json").read_text(encoding="utf8")
        tell_report(json.loads(report))
        raise


def prune(
    model: str, mlx_path: Path | None, data: Path | None, options: Options,
    *, plan, save_plan, carrier, biases, kept, trust, as_json,
) -> None:  # fmt: skip
    """Make or read a plan, show it, and save the pruned model unless it is a dry run."""
    if mlx_path is not None:
        check_free(mlx_path)
    road = _road(model)
    source = _open(model, trust, biases)
    saved = recipe.read_plan(plan) if plan else None
    with progress_bars() as progress:
        more = {"carrier": carrier, "kept": kept, "progress": progress}
        if saved:
            planned = road.apply_plan(source, saved, options, data, **more)
        else:
            planned = road.make_plan(source, options, data, **more)
        heard = _show_plan(planned, save_plan, as_json)
        if mlx_path is not None:
            road.save_pruned(source, planned, mlx_path, progress=progress)
    if mlx_path is not None:
        tell_notes(planned.notes[heard:])
        tell_saved(mlx_path)


def _road(model: str):
    """The steps for a model of this kind."""
    return program_recipe if program_recipe.is_saved(model) else recipe


def _open(model: str, trust: bool, biases: bool):
    """The model, with every bias that it can hold where that was asked for."""
    road = _road(model)
    source = road.open_model(model, trust_remote_code=trust)
    if not biases:
        return source
    if road is program_recipe:
        raise InputError(f"--biases: {model} is a saved program, which has no config to ask.")
    from .bridges.biases import with_biases

    return with_biases(source)


def _show_plan(planned, save_plan: Path | None, as_json: bool) -> int:
    if as_json:
        print(json.dumps(planned.plan.to_json(), indent=1))
    else:
        out.print(plan_table(planned.plan))
    heard = tell_plan(planned)
    if save_plan:
        planned.plan.save(save_plan)
        err.print(f"Plan written to {save_plan}.", soft_wrap=True)
    return heard


def evaluate(
    model: str, dense: str | None, data: Path, options: Options, *, output, trust, as_json
) -> None:
    """One model's figures, or two side by side."""
    road = _road(model)
    if dense and _road(dense) is not road:
        kinds = [_kind(name) for name in (dense, model)]
        raise InputError(f"--dense {dense}: is {kinds[0]}, but {model} {kinds[1]}.")
    opened = road.open_model(model, trust_remote_code=trust)
    parent = road.open_model(dense, trust_remote_code=trust) if dense else None
    pair = (parent, opened) if parent else (opened, None)
    notes: list[str] = []
    if road is program_recipe:
        measure, judged = road.evaluate_models, road.read_evaluation(opened, data, options, notes)
    else:
        measure, judged = evaluate_folders, read_windows(opened, data, "evaluation", options, notes)
    tell_notes(notes)
    with progress_bars() as progress:
        report = measure(*pair, judged, options, progress=progress)
    if output:
        write_report(report, output)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        out.print(comparison_table(report))


def _kind(model: str) -> str:
    return "a saved program" if program_recipe.is_saved(model) else "a language model"


def inspect(model: str, *, parameters: bool, trust: bool, as_json: bool) -> None:
    """The dimensions of a model."""
    if program_recipe.is_saved(model):
        named = named_axes(program_recipe.open_model(model).program.at())
    else:
        named = inspect_axes(recipe.open_model(model, trust_remote_code=trust))
    if as_json:
        print(json.dumps(axes_document(named), indent=1))
        return
    out.print(axes_table(named))
    if parameters:
        rows = table("parameter", "shape", "axes")
        for path, shape in named.graph.shapes().items():
            words = " × ".join(f"({word})" for word in named.describe(path))
            rows.add_row(path, str(shape), words)
        out.print(rows)
    for op, count in named.unknown.items():
        err.print(f"note: no rule for primitive {op} ({count} times); what it touches is frozen.")


def diff(left: Path, right: Path, *, as_json: bool) -> None:
    """The difference of two plans."""
    found = plan_diff(recipe.read_plan(left), recipe.read_plan(right))
    if as_json:
        print(json.dumps(found, indent=1))
        return
    rows = table("dimension", f"only {left.name} keeps", f"only {right.name} keeps")
    for name, sides in found.items():
        rows.add_row(name, str(len(sides["left"])), str(len(sides["right"])))
    out.print(rows if found else "The plans keep the same units.")


def tell_report(report: dict) -> None:
    """The closing table, and what each language model makes of the same words."""
    out.print(comparison_table(report))
    for name in ("dense", "compressed"):
        text = report[name].get("sample")
        if text:
            words = [_flat(text[key]) for key in ("prompt", "continuation")]
            out.print(f"[bold]{name}[/]: {words[0]} [italic]{words[1]}")


def _flat(text: str) -> str:
    return " ".join(text.split()).replace("[", "\\[")


def tell_plan(planned) -> int:
    """Why this plan, what is worth knowing about it, and what is left; how many notes it has."""
    for about, verdict in planned.verdicts.items():
        err.print(verdict_table(verdict, "layers by" if about == LAYERS else "criterion"))
    tell_notes(planned.notes)
    share = f"{100 * planned.kept_parameters:.1f} %"
    err.print(f"Keeps {share} of the block parameters.", highlight=False)
    return len(planned.notes)


def tell_notes(notes: list[str]) -> None:
    for note in notes:
        err.print(f"note: {note}", highlight=False, soft_wrap=True, markup=False)


def tell_saved(path: Path) -> None:
    """Where it is, what was proven of it, and what to do with it."""
    if program_recipe.is_saved(str(path)):
        how = f"compress export --model {path} --to onnx -o {path}-onnx"
        proven = _proof(json.loads((path / RECORD).read_text(encoding="utf8"))["verified"])
    else:
        how = f"mlx_lm.generate --model {path} --prompt 'Once'"
        proven = "verified with stock mlx-lm"
    for line in (f"Saved to {path}: {proven}.", f"  {how}"):
        err.print(line, highlight=False, soft_wrap=True, markup=False)


def _proof(verified: dict) -> str:
    """What was proven of a saved program."""
    if "error_of_the_saved" in verified:
        return "what is read back computes what was trained"
    if verified["error_against_zeroing"] is None:
        return "not compared, as removing here is not zeroing"
    return "the dense program with the removed units zeroed computes the same"
