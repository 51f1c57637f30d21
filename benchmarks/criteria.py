"""What each method loses: perplexity of a model with 20 to 50 % of its blocks removed, untrained.

    python -P -m mlx_compress.benchmarks.criteria --model M --data D

The default table compares `compress` with published methods (`baselines.py`), `--criteria` the
criteria among themselves, cut plainly and with the kept weights refitted in closed form. All read
the same calibration windows, remove as many parameters, and are measured on the same windows as
the dense model.

Finished rows are kept in the JSON file, so an interrupted run goes on where it stopped.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import mlx.core as mx
import numpy as np
from rich.console import Console
from rich.table import Table

from ..allocate import prunable, request
from ..axes import Dimension, NamedAxes, named_axes
from ..bridges.mlx_lm import LanguageModel, open_model
from ..budget import block_parameters
from ..calibrate import calibrate
from ..data import Windows
from ..errors import exit_on_error
from ..evaluate import bootstrap_interval, compare_scores, perplexity, score_tokens
from ..expressible import snap
from ..importance import CRITERIA, Sources
from ..layers import dropped_parameters
from ..options import Options
from ..report import write_report
from ..samples import Samples
from ..scoring import as_samples, inspect, on_text, read_windows
from .baselines import (
    FITTED,
    METHODS,
    OURS,
    WITHOUT_REFIT,
    Aim,
    Bench,
    Pruned,
    float32,
    method,
)
from .begun import begun

EVAL_BATCH = 8
OFF = 0.005  # by how much the fraction removed may miss what was asked for, unsaid
RIVAL = "OSSCAR"


@dataclass(frozen=True)
class Settings:
    """What a result stands on; rows of other settings are not mixed with it."""

    model: str
    data: str
    removed: tuple[float, ...] = (0.2, 0.35, 0.5)
    methods: tuple[str, ...] = tuple(METHODS)
    random_seeds: int = 3
    dims: tuple[str, ...] = Options.dims
    calibration_samples: int = 128
    eval_samples: int = 96
    max_seq_length: int = 256
    batch_size: int = Options.batch_size

    def options(self, **changes) -> Options:
        return Options(
            dims=self.dims,
            calibration_samples=self.calibration_samples,
            eval_samples=self.eval_samples,
            max_seq_length=self.max_seq_length,
            batch_size=self.batch_size,
            **changes,
        )

    def runs(self) -> list[tuple[str, int, float]]:
        """Every row: the method, the seed, and the fraction to remove."""
        return [
            (name, seed, removed)
            for name in self.methods
            for seed in range(self.random_seeds if name.removesuffix(FITTED) == "random" else 1)
            for removed in self.removed
        ]


def measure(model: LanguageModel, data: str, settings: Settings, out: Path, say=print) -> dict:
    """Fill in the rows that `out` does not hold yet, writing it after each; returns its content."""
    result = begun(out, asdict(settings))
    done = {(r["method"], r["seed"], r["asked"]) for r in result["rows"]}
    todo = [run for run in settings.runs() if run not in done]
    if not todo:
        return result
    windows = read_windows(model, data, "evaluation", settings.options(), [])
    named = inspect(model)
    aims = {removed: aim_at(model, named, removed, settings) for removed in settings.removed}
    dense = score_tokens(float32(model.module()), windows.tokens, EVAL_BATCH)
    result["dense"] = asdict(perplexity(dense[0], windows.target_bytes))
    bench, result["statistics"] = prepared(model, named, data, settings, list(aims.values()))
    for name, seed, removed in todo:
        pruned, cost = _timed(partial(method(name), bench, aims[removed], seed))
        row = {"method": name, "seed": seed, "asked": removed, **cost}
        row |= _measured(named, pruned, aims[removed].dims, windows, dense)
        result["rows"].append(row)
        write_report(result, out)
        say(f"{name} {removed:g}: {row['nats_per_token']:.3f} nats/token, {row['seconds']:.1f} s")
    return result


def aim_at(model, named: NamedAxes, removed: float, settings: Settings) -> Aim:
    """The counts that remove this fraction of the block parameters, where a config can say them."""
    options = settings.options(params=1 - removed)
    dims = prunable(named, options)
    dims, wanted = snap(model, named, dims, request(named, dims, options), options)
    return Aim(options, dims, wanted)


def prepared(
    model: LanguageModel, named: NamedAxes, data: str | Path | Windows, settings: Settings,
    aims: list[Aim],
) -> tuple[Bench, dict]:  # fmt: skip
    """All that any method reads, of every dimension that any aim prunes, and what it cost."""
    windows = read_windows(model, data, "calibration", settings.options(), [])
    samples = as_samples(windows, settings.batch_size)
    calibration = on_text(model, windows, aims[0].options, [])
    dims = list({d.name: d for aim in aims for d in aim.dims}.values())
    mx.clear_cache()
    mx.reset_peak_memory()
    sources, cost = _timed(partial(_sources, model, samples, dims))
    cost["peak_bytes"] = mx.get_peak_memory()
    for aim in aims if set(OURS) & set(settings.methods) else ():
        calibration.statistics(aim.dims)  # so that no row's seconds count it
    return Bench(model, named, calibration, sources, samples.batches), cost


def _timed(work: Callable) -> tuple[object, dict[str, float]]:
    """What `work()` gives, and its seconds by the clock and of all cores together."""
    started = time.perf_counter(), time.process_time()
    found = work()
    seconds = time.perf_counter() - started[0], time.process_time() - started[1]
    return found, dict(zip(("seconds", "cpu_seconds"), seconds, strict=True))


def _sources(model, samples: Samples, dims: list[Dimension]) -> Sources:
    named = named_axes(model.trace(samples.batches[0][0], dtype=mx.float32))
    statistics = calibrate(
        named, samples.batches, model.fetch, dims=[d.name for d in dims],
        loss=lambda b, outputs: samples.loss(b, outputs).sum(), second={},
    )  # fmt: skip
    return Sources(named, tuple(dims), model.fetch, statistics)


def _measured(named, pruned: Pruned, dims: list[Dimension], windows: Windows, dense) -> dict:
    plan, counts = pruned.plan, pruned.plan.counts()
    losses = score_tokens(pruned.module, windows.tokens, EVAL_BATCH)
    kept = block_parameters(named, counts, dropped_parameters(named, plan))
    return {
        "removed": 1 - kept / block_parameters(named),
        **asdict(perplexity(losses[0], windows.target_bytes)),
        "paired": compare_scores(dense, losses, windows.target_bytes),
        "by_window": [round(float(loss), 5) for loss in losses[0].mean(axis=1, dtype=np.float64)],
        "kept": {d.name: d.size for d in dims} | counts,
        **pruned.about,
    }


# ---- tables


def summary(result: dict) -> tuple[list[str], list[list[str]]]:
    """Head and body of the table. Seeds of `random` are averaged, ends of intervals too."""
    order = {name: k for k, name in enumerate(result["settings"]["methods"])}
    rows = sorted(result["rows"], key=lambda r: order[r["method"]])
    aims = sorted(result["settings"]["removed"])
    head = ["method", *(f"{100 * aim:g} % removed" for aim in aims), "CPU, s"]
    body = []
    for name, group in groupby(rows, key=lambda r: r["method"]):
        group = list(group)
        cells = [_cell([r for r in group if r["asked"] == aim]) for aim in aims]
        body.append([name, *cells, f"{np.mean([r['cpu_seconds'] for r in group]):.1f}"])
    return head, body


def _cell(rows: list[dict]) -> str:
    """Perplexity, and the paired difference in nats per token with its 95 % interval."""
    if not rows:
        return ""
    paired = [r["paired"]["nats_per_token"] for r in rows]
    mean = {key: np.mean([p[key] for p in paired]) for key in paired[0]}
    worse = "{estimate:+.3f} ({low:.3f} to {high:.3f})".format(**mean)
    removed = np.mean([r["removed"] for r in rows])
    off = f" at {100 * removed:.1f} %" if abs(removed - rows[0]["asked"]) > OFF else ""
    return f"{np.exp(min(_nats(rows), 700)):,.1f}{off}\n{worse}"


def _nats(rows: list[dict]) -> float:
    return float(np.mean([r["nats_per_token"] for r in rows]))


def ratios(result: dict) -> tuple[list[str], list[list[str]]]:
    """How ours compare: with the best that refits nothing, and with OSSCAR, window by window."""
    found = {}
    for row in result["rows"]:
        found.setdefault((row["asked"], row["method"]), []).append(row)
    asked = sorted(result["settings"]["removed"])
    aims = [aim for aim in asked if {(aim, RIVAL), (aim, OURS[0])} <= found.keys()]
    dense = result["dense"]["nats_per_token"]
    best = {
        aim: min((n for n in WITHOUT_REFIT if (aim, n) in found), default=RIVAL,
                 key=lambda name, aim=aim: _nats(found[aim, name]))
        for aim in aims
    }  # fmt: skip
    rivals = {f"the best without refit ({', '.join(dict.fromkeys(best.values()))})": best,
              RIVAL: dict.fromkeys(aims, RIVAL)}  # fmt: skip
    body = [
        [f"{ours} against {name}",
         *(_against(found[aim, ours], found[aim, rival[aim]], dense) for aim in aims)]
        for ours in OURS if all((aim, ours) in found for aim in aims)
        for name, rival in rivals.items()
    ]  # fmt: skip
    return ["", *(f"{100 * aim:g} % removed" for aim in aims)], body


def _against(ours: list[dict], theirs: list[dict], dense: float) -> str:
    """Ratio of perplexities, of the nats that were lost, and the paired difference in nats."""
    one, two = _nats(ours), _nats(theirs)
    losses = [np.mean([r["by_window"] for r in rows], axis=0) for rows in (ours, theirs)]
    each = bootstrap_interval(losses[0] - losses[1], np.ones(len(losses[0])))
    nats = "{estimate:+.3f} ({low:.3f} to {high:.3f})".format(**each)
    return f"x {np.exp(one - two):.3f}; lost x {(one - dense) / (two - dense):.2f}\n{nats}"


def markdown(result: dict) -> str:
    """The tables for the README."""
    parts = [_lines(*summary(result)), _caption(result)]
    head, body = ratios(result)
    return "\n\n".join([*parts, _lines(head, body)] if len(head) > 1 else parts)


def _lines(head: list[str], body: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    lines += ["| " + " | ".join(cell.replace("\n", "<br>") for cell in row) + " |" for row in body]
    return "\n".join(lines)


def _table(head: list[str], body: list[list[str]], caption: str | None = None) -> Table:
    table = Table(caption=caption, caption_justify="left")
    for k, title in enumerate(head):
        table.add_column(title, justify="right" if k else "left")
    for row in body:
        table.add_row(*row)
    return table


def _caption(result: dict) -> str:
    s, dense, cost = result["settings"], result["dense"], result["statistics"]
    ours = [f"{100 * r['asked']:g} % {r['criterion']}, {r['refit'].get('method')}"
            for r in result["rows"] if r["method"] == OURS[0]]  # fmt: skip
    return (
        f"{s['model']}, {'+'.join(s['dims'])}, by the block parameters removed: perplexity, and "
        f"nats/token above the dense model's {dense['nats_per_token']:.3f} (perplexity "
        f"{dense['perplexity']:.2f}) with the 95 % bootstrap interval. Calibration "
        f"{s['calibration_samples']}, evaluation {s['eval_samples']} windows of "
        f"{s['max_seq_length']} tokens; random: mean of {s['random_seeds']} seeds. CPU seconds of "
        f"a plan and its refit, without the statistics that all share: {cost['cpu_seconds']:.0f}, "
        f"{cost['peak_bytes'] / 1e6:.0f} MB at the peak, on {result['chip']} "
        f"({result['device']}, {result['machine']})."
    ) + (f" Chosen by auto: {'; '.join(ours)}." if ours else "")


# ---- command line


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a model folder")
    parser.add_argument("--data", required=True, help="a folder with train and test, or valid")
    parser.add_argument("--out", type=Path, help="JSON [benchmarks/results/methods-MODEL.json]")
    parser.add_argument("--dims", default=",".join(Settings.dims))
    parser.add_argument("--methods", default=",".join(Settings.methods))
    parser.add_argument("--criteria", help="compare these instead, plain and refitted; or: all")
    parser.add_argument("--removed", default=",".join(map(str, Settings.removed)))
    parser.add_argument("--random-seeds", type=int, default=Settings.random_seeds)
    parser.add_argument("--samples", type=int, default=Settings.calibration_samples)
    parser.add_argument("--eval-samples", type=int, default=Settings.eval_samples)
    parser.add_argument("--max-seq-length", type=int, default=Settings.max_seq_length)
    parser.add_argument("--markdown", action="store_true", help="print the tables as markdown")
    args = parser.parse_args(argv)
    with exit_on_error():
        _run(args)


def _run(args) -> None:
    model = open_model(args.model)
    settings = Settings(
        model=model.path.resolve().name,
        data=Path(args.data).resolve().name,
        removed=tuple(map(float, args.removed.split(","))),
        methods=_methods(args),
        random_seeds=args.random_seeds,
        dims=tuple(args.dims.split(",")),
        calibration_samples=args.samples,
        eval_samples=args.eval_samples,
        max_seq_length=args.max_seq_length,
    )
    kind = "criteria" if args.criteria else "methods"
    out = args.out or Path(__file__).parent / "results" / f"{kind}-{settings.model}.json"
    console = Console()
    result = measure(model, args.data, settings, out, say=console.print)
    if args.markdown:
        print(markdown(result))
        return
    console.print(_table(*summary(result), _caption(result)))
    if len(ratios(result)[0]) > 1:
        console.print(_table(*ratios(result)))


def _methods(args) -> tuple[str, ...]:
    """Names for `baselines.method`. Raises `InputError` for one that is neither kind."""
    names = (args.criteria or args.methods).split(",")
    if args.criteria:
        names = list(CRITERIA) if args.criteria == "all" else names
        names = [name + fitted for fitted in ("", FITTED) for name in names]
    for name in names:
        method(name)
    return tuple(names)


if __name__ == "__main__":
    main()
