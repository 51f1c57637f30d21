"""How time and memory grow with a model's layers, and what a second question costs.

    python -P -m mlx_compress.benchmarks.growth

Random Llamas with the shape of 1B and 2 to 16 layers, float16 on disk. Each step is a fresh
process: a first question (statistics of all kinds are collected and kept, a plan made by Taylor
scores), a second one (another ratio, from the statistics on disk), and the whole job with the
refit, saved and proven. Times are seconds of CPU, of all cores together, which other work on the
machine disturbs least. A JSON and a plot come out. What the JSON has already, of the same steps,
size, is not measured again: remove it when the code has changed.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import mlx.core as mx
from rich.console import Console
from rich.table import Table

from ..errors import exit_on_error
from ..report import write_report
from .begun import begun
from .lean import Size, write_model

RESULTS = Path(__file__).parent / "results"
STEPS = ("first", "second", "whole")
RATIOS = {"first": 0.25, "second": 0.4, "whole": 0.25}


def step(name: str, folder: Path, size: Size) -> dict:
    """One measurement: seconds of CPU and by the clock, and peaks in bytes."""
    started = time.perf_counter()
    from ..bridges.mlx_lm import open_model
    from ..options import Options
    from ..recipe import make_plan, save_pruned

    options = Options(
        pruning_ratio=RATIOS[name], importance="taylor", batch_size=size.batch_size,
        calibration_samples=size.samples, max_seq_length=size.length,
    )  # fmt: skip
    model = open_model(folder)
    planned = make_plan(model, options, size.windows(), kept=folder.parent / "statistics")
    if name == "whole":
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            save_pruned(model, planned, Path(scratch, "pruned"))
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "seconds": time.process_time(),
        "elapsed": time.perf_counter() - started,
        "peak_bytes": mx.get_peak_memory(),
        "rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    }


def in_fresh_process(name: str, folder: Path, size: Size) -> dict:
    command = [sys.executable, "-P", "-m", "mlx_compress.benchmarks.growth", "--step", name]
    command += ["--folder", str(folder), "--size", json.dumps(asdict(size))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(size: Size, steps: tuple[str, ...]) -> dict:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "model")
        weights = write_model(folder, size)
        rows = {name: in_fresh_process(name, folder, size) for name in steps}
        held = sum(file.stat().st_size for file in Path(scratch, "statistics").rglob("*.npy"))
    return {"layers": size.layers, "weight_bytes": weights, "statistics_bytes": held, **rows}


def table(rows: list[dict]) -> Table:
    out = Table("layers", "weights, GB", "first, CPU s", "second", "second/first", "whole",
                "peak, GB", "x weights", "statistics, GB")  # fmt: skip
    for row in rows:
        peak = max(row[name]["peak_bytes"] for name in STEPS if name in row)
        seconds = [row[name]["seconds"] if name in row else float("nan") for name in STEPS]
        out.add_row(
            str(row["layers"]), f"{row['weight_bytes'] / 1e9:.2f}", f"{seconds[0]:.1f}",
            f"{seconds[1]:.1f}", f"{seconds[1] / seconds[0]:.3f}", f"{seconds[2]:.1f}",
            f"{peak / 1e9:.2f}", f"{peak / row['weight_bytes']:.2f}",
            f"{row['statistics_bytes'] / 1e9:.2f}",
        )  # fmt: skip
    return out


def plot(rows: list[dict], file: Path) -> None:
    """Seconds and peak memory against layers, with straight lines through zero layers' rest."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    layers = [row["layers"] for row in rows]
    names = {"whole": "plan, refit, save, prove", "first": "first question",
             "second": "second question"}  # fmt: skip
    for name, label in names.items():
        if all(name in row for row in rows):
            left.plot(layers, [row[name]["seconds"] for row in rows], "o-", label=label)
    peaks = [max(row[n]["peak_bytes"] for n in STEPS if n in row) / 1e9 for row in rows]
    right.plot(layers, peaks, "o-", label="peak memory")
    right.plot(layers, [r["weight_bytes"] / 1e9 for r in rows], "--", label="weights on disk")
    for axes, what in ((left, "CPU seconds"), (right, "GB")):
        axes.set(xlabel="layers", ylabel=what, xticks=layers, ylim=(0, None), xlim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", default="2,4,8,16")
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument("--out", type=Path, default=RESULTS / "growth.json")
    parser.add_argument("--plot", type=Path, help="a picture to draw")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--size", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.step:
        print(json.dumps(step(args.step, args.folder, Size(**json.loads(args.size)))))
        return
    console, asked = Console(width=120), set(args.steps.split(","))
    with exit_on_error():
        document = begun(args.out, asdict(Size()))
    rows = [row for row in document["rows"] if asked <= row.keys()]
    for layers in map(int, args.layers.split(",")):
        if any(row["layers"] == layers for row in rows):
            continue
        row = measure(replace(Size(), layers=layers, refit=1), tuple(args.steps.split(",")))
        rows = sorted([*rows, row], key=lambda each: each["layers"])
        write_report(document | {"rows": rows}, args.out)
        console.print(f"{layers} layers: first {row['first']['seconds']:.0f} s")
    console.print(table(rows))
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
