"""What each command does and prints. Results go to stdout, progress and notes to stderr."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from . import recipe, shrink
from .allocate import family
from .archive import is_program, load_program
from .axes import NamedAxes, named_axes
from .bridges.exports import copy_tokenizer
from .bridges.measure import evaluate_folders
from .checkpoint import check_free
from .choice import Verdict
from .options import Options
from .plan import PrunePlan
from .plan import diff as plan_diff
from .report import comparison_table, write_report
from .scoring import inspect as inspect_axes
from .scoring import read_windows
from .stream import Progress as Advance

out = Console()
err = Console(stderr=True)


@contextmanager
def progress_bars() -> Iterator[Advance]:
    """A bar with an ETA for each stage, on stderr; gone when the stage is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), "eta",
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=err, transient=True) as bars:
        tasks: dict[str, int] = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield advance


def compress(model: str, mlx_path: Path, data: Path, options: Options, *, plan, carrier, trust):
    """The whole job, with the closing table."""
    check_free(mlx_path)
    source = recipe.open_model(model, trust_remote_code=trust)
    saved = recipe.read_plan(plan) if plan else None
    with progress_bars() as progress:
        report = recipe.compress(
            source, options, data, mlx_path, plan=saved, carrier=carrier, on_plan=tell_plan,
            progress=progress,
        )  # fmt: skip
    tell_report(report)
    tell_saved(mlx_path)


def prune(
    model: str, mlx_path: Path | None, data: Path | None, options: Options,
    *, plan, save_plan, carrier, trust, as_json,
) -> None:  # fmt: skip
    """Make or read a plan, show it, and save the pruned model unless it is a dry run."""
    if mlx_path is not None:
        check_free(mlx_path)
    saved = recipe.read_plan(plan) if plan else None
    if is_program(Path(model)):
        source = load_program(model)
        planned = shrink.plan_program(source, options, saved)
        _show_plan(planned, save_plan, as_json)
        if mlx_path is not None:
            shrink.save_pruned_program(source, planned, mlx_path)
            copy_tokenizer(Path(model))(mlx_path)
            err.print(f"Saved to {mlx_path}; it equals the model with the removed units zeroed.")
        return
    source = recipe.open_model(model, trust_remote_code=trust)
    with progress_bars() as progress:
        if saved:
            planned = recipe.apply_plan(
                source, saved, options, data, carrier=carrier, progress=progress
            )
        else:
            planned = recipe.make_plan(source, options, data, carrier=carrier, progress=progress)
        _show_plan(planned, save_plan, as_json)
        if mlx_path is not None:
            recipe.save_pruned(source, planned, mlx_path, progress=progress)
    if mlx_path is not None:
        tell_saved(mlx_path)


def _show_plan(planned, save_plan: Path | None, as_json: bool) -> None:
    if as_json:
        print(json.dumps(planned.plan.to_json(), indent=1))
    else:
        out.print(plan_table(planned.plan))
    tell_plan(planned)
    if save_plan:
        planned.plan.save(save_plan)
        err.print(f"Plan written to {save_plan}.")


def evaluate(
    model: str, dense: str | None, data: Path, options: Options, *, output, trust, as_json
) -> None:
    """One model's figures, or two side by side."""
    opened = recipe.open_model(model, trust_remote_code=trust)
    parent = recipe.open_model(dense, trust_remote_code=trust) if dense else None
    notes: list[str] = []
    windows = read_windows(opened, data, "evaluation", options, notes)
    for note in notes:
        err.print(f"note: {note}")
    with progress_bars() as progress:
        pair = (parent, opened) if parent else (opened, None)
        report = evaluate_folders(*pair, windows, options, progress=progress)
    if output:
        write_report(report, output)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        out.print(comparison_table(report))


def inspect(model: str, *, parameters: bool, trust: bool, as_json: bool) -> None:
    """The dimensions of a model."""
    if is_program(Path(model)):
        named = named_axes(load_program(model).at())
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


def axes_document(named: NamedAxes) -> dict:
    """`inspect --json`: every dimension, every parameter's axes, primitives without a rule."""
    return {
        "dimensions": [
            {
                "name": d.name,
                "kind": d.kind,
                "size": d.size,
                "free": d.free,
                "why_not": d.frozen,
                "within": d.within,
                "exact": d.exact,
                "slots": [list(slot) for slot in d.slots],
            }
            for d in named.dimensions.values()
        ],
        "parameters": {path: named.describe(path) for path in named.graph.parameters},
        "unknown_primitives": named.unknown,
    }


def axes_table(named: NamedAxes) -> Table:
    """One row for each place in the model; layers that are alike share a row."""
    rows: dict[tuple, list] = {}
    for d in named.dimensions.values():
        where = family(d)[0]
        status = f"fixed: {d.frozen}" if not d.free else "free" if d.exact else "free, normalised"
        rows.setdefault((where, d.size, status), []).append(d)
    shown = table("dimension", "size", "times", "status")
    shown.columns[0].no_wrap = True
    for (where, size, status), same in rows.items():
        shown.add_row(where, str(size), str(len(same)), status)
    return shown


def plan_table(plan: PrunePlan) -> Table:
    """What a plan keeps, layer by layer."""
    shown = table("dimension", "kept", "of", "removed")
    for cut in plan:
        gone = sorted(set(range(cut.size)) - set(cut.keep)) if not cut.within else None
        shown.add_row(cut.name, str(cut.kept), str(cut.size), _few(gone))
    return shown


def _few(units: list[int] | None) -> str:
    if units is None:
        return "chosen anew for each"
    return ", ".join(map(str, units[:8])) + (f", ... ({len(units)})" if len(units) > 8 else "")


def table(*columns: str) -> Table:
    """An empty table; the first column is text, as are those called status or axes."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for k, name in enumerate(columns):
        left = k == 0 or name in ("status", "axes", "removed")
        made.add_column(name, overflow="fold", justify="left" if left else "right")
    return made


def _flat(text: str) -> str:
    return " ".join(text.split()).replace("[", "\\[")


def tell_report(report: dict) -> None:
    """The closing table, and what each model makes of the same words."""
    out.print(comparison_table(report))
    for name in ("dense", "compressed"):
        text = report[name]["sample"]
        out.print(f"[bold]{name}[/]: {_flat(text['prompt'])} [italic]{_flat(text['continuation'])}")


def verdict_table(verdict: Verdict) -> Table:
    """Every criterion on held-out calibration text, and how far it is behind the best."""
    rows = table("criterion", "nats/token", "more than the best (95 %)", "status")
    for candidate in verdict.candidates:
        ends = verdict.behind[candidate.name]
        behind = "{:+.3f} ({:+.3f} to {:+.3f})".format(*ends) if any(ends) else ""
        chosen = "chosen" if candidate is verdict.winner else ""
        rows.add_row(candidate.name, f"{candidate.mean:.3f}", behind, chosen)
    return rows


def tell_plan(planned) -> None:
    if getattr(planned, "verdict", None) is not None:
        err.print(verdict_table(planned.verdict))
    for note in planned.notes:
        err.print(f"note: {note}", highlight=False)
    share = f"{100 * planned.kept_parameters:.1f} %"
    err.print(f"Keeps {share} of the block parameters.", highlight=False)


def tell_saved(path: Path) -> None:
    print(f"Saved and verified with stock mlx-lm: {path}", file=sys.stderr)
    print(f"  mlx_lm.generate --model {path} --prompt 'Once'", file=sys.stderr)
