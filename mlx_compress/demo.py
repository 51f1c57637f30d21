"""The demo: the embedded model through the whole road, every criterion beside random, no network.

inspect, calibrate once, prune by each criterion, evaluate, save the best, verify, generate.
"""

import shutil
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import mlx.core as mx

from . import jobs, recipe
from .allocate import choose
from .checkpoint import check_free
from .edit import edit_graph
from .evaluate import compare_scores, score_tokens
from .execute import run
from .importance import CRITERIA, Sources
from .options import Options
from .plan import PrunePlan
from .prune import prune_parameters
from .scoring import Text, collect, inspect, read_windows

OPTIONS = Options(
    params=0.7, calibration_samples=32, eval_samples=32, batch_size=8, importance="taylor"
)


def run_demo(mlx_path: Path | None) -> None:
    """Run it; `mlx_path` keeps the pruned model."""
    if mlx_path is not None:
        check_free(mlx_path)
    started = time.perf_counter()
    folder = Path(str(files("mlx_compress") / "assets"))
    model = recipe.open_model(folder / "books5m")
    jobs.out.rule("What can be pruned in a Llama of 5.5M parameters")
    jobs.out.print(jobs.axes_table(inspect(model)))
    jobs.out.rule("Keep 70 % of the block parameters, by each criterion")
    plans = _compare(model, folder / "books")
    best = min(plans, key=lambda name: plans[name][0])
    jobs.out.rule(f"Prune by {best}, save, verify, measure")
    with _place(mlx_path) as out:
        with jobs.progress_bars() as progress:
            report = recipe.compress(
                model, replace(OPTIONS, importance=best), folder / "books", out,
                plan=plans[best][1], on_plan=jobs.tell_plan, progress=progress,
            )  # fmt: skip
        jobs.tell_report(report)
    jobs.out.print(f"[bold]Done in {time.perf_counter() - started:.0f} s.[/]")
    if mlx_path is not None:
        jobs.tell_saved(mlx_path)


def _compare(model, data: Path) -> dict[str, tuple[float, PrunePlan]]:
    """Loss after pruning by each criterion, on one calibration; prints the table."""
    test = read_windows(model, data, "evaluation", OPTIONS, [])
    table = jobs.table("criterion", "nats/token", "perplexity", "more than dense (95 %)", "s")
    with jobs.progress_bars() as progress:
        text = Text(model, data, OPTIONS, [], progress)
        named, tokens = text.named, test.tokens
        dims, wanted = recipe.units(model, inspect(model), OPTIONS)
        started = time.perf_counter()
        sources = Sources(named, tuple(dims), model.fetch, collect(text, dims))
        calibrated = time.perf_counter() - started
        weights = _in_float32(model, named)
        dense = score_tokens(_logits(named.graph, weights), tokens, OPTIONS.batch_size)
        table.add_row("(dense)", *_figures(dense, dense, test))
        plans = {}
        for k, name in enumerate(CRITERIA):
            started = time.perf_counter()
            plan = choose(named, dims, CRITERIA[name](sources), wanted, OPTIONS)
            seconds = time.perf_counter() - started
            pruned = prune_parameters(named, plan, weights)
            logits = _logits(edit_graph(named, plan), pruned)
            scores = score_tokens(logits, tokens, OPTIONS.batch_size)
            plans[name] = (float(scores[0].mean()), plan)
            table.add_row(name, *_figures(dense, scores, test), f"{seconds:.1f}")
            progress("criteria", k + 1, len(CRITERIA))
    jobs.out.print(table)
    jobs.out.print(f"One calibration for all: {calibrated:.1f} s, {tokens.size:,} tokens.")
    return plans


def _in_float32(model, named):
    arrays = model.fetch(named.graph.parameters)
    weights = {path: array.astype(mx.float32) for path, array in arrays.items()}
    mx.eval(weights)
    return weights


def _logits(graph, weights):
    return lambda tokens: run(graph, [tokens], weights)[0][0]


def _figures(dense, scores, test) -> list[str]:
    nats = float(scores[0].mean())
    found = compare_scores(dense, scores, test.target_bytes)["nats_per_token"]
    change = f"{found['estimate']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"
    perplexity = f"{2.718281828459045**nats:.1f}"
    return [f"{nats:.3f}", perplexity, "" if scores is dense else change]


@contextmanager
def _place(mlx_path: Path | None):
    if mlx_path is not None:
        yield mlx_path
        return
    scratch = Path(tempfile.mkdtemp(prefix="mlx-compress-demo-"))
    try:
        yield scratch / "pruned"
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
