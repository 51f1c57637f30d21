"""The demo: the embedded model through the whole road, no network.

inspect, calibrate once, prune by each criterion, keep the best, refit, save, verify, measure.
"""

import shutil
import tempfile
import time
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

from . import jobs, recipe
from .checkpoint import check_free
from .options import Options
from .scoring import inspect

OPTIONS = Options(params=0.7, calibration_samples=64, eval_samples=32, batch_size=8)


def run_demo(mlx_path: Path | None) -> None:
    """Run it; `mlx_path` keeps the pruned model."""
    if mlx_path is not None:
        check_free(mlx_path)
    started, heard = time.perf_counter(), []
    folder = Path(str(files("mlx_compress") / "assets"))
    model = recipe.open_model(folder / "books5m")
    jobs.out.rule("What can be pruned in a Llama of 5.5M parameters")
    jobs.out.print(jobs.axes_table(inspect(model)))
    jobs.out.rule("Keep 70 % of the block parameters by the best criterion, refit, save, verify")
    with _place(mlx_path) as out:
        with jobs.progress_bars() as progress:
            report = recipe.compress(
                model, OPTIONS, folder / "books", out,
                on_plan=lambda planned: heard.append(jobs.tell_plan(planned)), progress=progress,
            )  # fmt: skip
        jobs.tell_report(report)
        jobs.tell_notes(report["notes"][heard[-1] :])
    jobs.out.print(f"[bold]Done in {time.perf_counter() - started:.0f} s.[/]")
    if mlx_path is not None:
        jobs.tell_saved(mlx_path)


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
