"""What each criterion loses: perplexity of a model with 10 to 50 % of its blocks removed.

    python -P -m mlx_compress.benchmarks.criteria --model M --data D

All criteria score by the same statistics, collected once; plans at all fractions come from the same
scores, and all pruned models are measured on the same windows as the dense one: cut plainly, and
with the kept weights refitted in closed form. Nothing is trained.

Finished rows are kept in the JSON file, so an interrupted run goes on where it stopped.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path

import mlx.core as mx
import numpy as np
from rich.console import Console
from rich.table import Table

from ..allocate import block_parameters, choose, prunable, request
from ..axes import Dimension, NamedAxes
from ..bridges.mlx_lm import LanguageModel, open_model
from ..data import Windows
from ..errors import InputError, exit_on_error
from ..evaluate import compare_scores, perplexity, score_tokens
from ..expressible import fitted_config, snap
from ..importance import CRITERIA, Sources
from ..options import Options
from ..plan import PrunePlan
from ..prune import Cutter, pruned_fetch, pruner
from ..refit import refit
from ..report import machine, write_report
from ..scoring import Text, inspect, read_windows

EVAL_BATCH = 8


@dataclass(frozen=True)
class Settings:
    """What a result stands on; rows of other settings are not mixed with it."""

    model: str
    data: str
    removed: tuple[float, ...] = (0.1, 0.2, 0.35, 0.5)
    criteria: tuple[str, ...] = tuple(CRITERIA)
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


@dataclass
class Aim:
    """One fraction to remove: the counts to keep, as stock configs can express them."""

    options: Options
    dims: list[Dimension]
    wanted: object


def measure(model: LanguageModel, data: str, settings: Settings, out: Path, say=print) -> dict:
    """Fill in the rows that `out` does not hold yet, writing it after each; returns its content."""
    result = _begin(settings, out)
    done = {(r["criterion"], r["seed"], r["asked"], r["refit"]) for r in result["rows"]}
    every = [(removed, fitted) for removed in settings.removed for fitted in (False, True)]
    runs = [
        (criterion, seed, [case for case in every if (criterion, seed, *case) not in done])
        for criterion in settings.criteria
        for seed in range(settings.random_seeds if criterion == "random" else 1)
    ]
    runs = [run for run in runs if run[-1]]
    if not runs:
        return result
    windows = read_windows(model, data, "evaluation", settings.options(), [])
    named = inspect(model)
    aims = {removed: _aim(model, named, removed, settings) for removed in settings.removed}
    dense = score_tokens(_float32(model.module()), windows.tokens, EVAL_BATCH)
    result["dense"] = asdict(perplexity(dense[0], windows.target_bytes))
    options = replace(next(iter(aims.values())).options, importance="taylor")
    sources = _collected(Text(model, data, options, []), list(aims.values()), result)
    for criterion, seed, todo in runs:
        started = time.perf_counter()
        scores = CRITERIA[criterion](replace(sources, seed=seed))
        seconds = time.perf_counter() - started
        for removed, fitted in todo:
            row = {"criterion": criterion, "seed": seed, "asked": removed, "refit": fitted,
                   "seconds": seconds}  # fmt: skip
            plan = choose(named, aims[removed].dims, scores, aims[removed].wanted,
                          aims[removed].options)  # fmt: skip
            cut = refit(sources.named, plan, sources.statistics) if fitted else None
            row |= _measured(model, named, plan, cut, aims[removed], windows, dense)
            result["rows"].append(row)
            write_report(result, out)
            say(f"{_label(row)} {removed:g}: {row['nats_per_token']:.3f} nats/token")
    return result


def _begin(settings: Settings, out: Path) -> dict:
    fresh = {**machine(), "settings": json.loads(json.dumps(asdict(settings))), "rows": []}
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        return fresh
    held = json.loads(out.read_text())
    if held["settings"] != fresh["settings"]:
        raise InputError(f"{out}: made with other settings; remove it, or name another --out.")
    return held


def _aim(model, named: NamedAxes, removed: float, settings: Settings) -> Aim:
    options = settings.options(params=1 - removed)
    dims = prunable(named, options)
    dims, wanted = snap(model, named, dims, request(named, dims, options), options)
    return Aim(options, dims, wanted)


def _collected(text: Text, aims: list[Aim], result: dict) -> Sources:
    """All that any criterion reads, of every dimension that any aim prunes, and what it cost."""
    dims = list({d.name: d for aim in aims for d in aim.dims}.values())
    mx.clear_cache()
    mx.reset_peak_memory()
    started = time.perf_counter()
    sources = text.sources(dims)
    seconds = time.perf_counter() - started
    result["statistics"] = {"seconds": seconds, "peak_bytes": mx.get_peak_memory()}
    return sources


def _label(row: dict) -> str:
    return row["criterion"] + (" + refit" if row["refit"] else "")


def _measured(model, named, plan, cut, aim: Aim, windows: Windows, dense) -> dict:
    counts = {cut.name: cut.kept for cut in plan}
    losses = score_tokens(pruned_module(model, named, plan, cut), windows.tokens, EVAL_BATCH)
    paired = compare_scores(dense, losses, windows.target_bytes)
    return {
        "removed": 1 - block_parameters(named, counts) / block_parameters(named),
        **asdict(perplexity(losses[0], windows.target_bytes)),
        "paired": paired,
        "kept": {d.name: counts.get(d.name, d.size) for d in aim.dims},
    }


def pruned_module(
    model: LanguageModel, named: NamedAxes, plan: PrunePlan, cut: Cutter | None = None
):
    """The stock model that a plan leaves, in float32, in memory."""
    module = model.build(fitted_config(model, named, plan))
    pruned = pruned_fetch(model.fetch, cut or pruner(named, plan))(named.graph.parameters)
    return _float32(module.load_weights(list(pruned.items())))


def _float32(module):
    module.set_dtype(mx.float32)  # the CPU has no fast half precision
    mx.eval(module.parameters())
    return module


def summary(result: dict) -> tuple[list[str], list[list[str]]]:
    """Head and body of the table. Seeds of `random` are averaged, ends of intervals too."""
    order = {name: k for k, name in enumerate(CRITERIA)}
    rows = sorted(result["rows"], key=lambda r: (r["refit"], order[r["criterion"]]))
    aims = sorted({r["asked"] for r in rows})
    removed = [f"{100 * next(r['removed'] for r in rows if r['asked'] == a):.1f} %" for a in aims]
    head = ["criterion", *removed, "scoring, s"]
    body = []
    for label, group in groupby(rows, key=_label):
        group = list(group)
        cells = [_cell([r for r in group if r["asked"] == aim]) for aim in aims]
        seconds = np.mean([r["seconds"] for r in group])
        body.append([label, *cells, f"{seconds:.1f}"])
    return head, body


def _cell(rows: list[dict]) -> str:
    """Perplexity, and the paired difference in nats per token with its 95 % interval."""
    if not rows:
        return ""
    paired = [r["paired"]["nats_per_token"] for r in rows]
    mean = {key: np.mean([p[key] for p in paired]) for key in paired[0]}
    nats = np.mean([r["nats_per_token"] for r in rows])
    worse = "{estimate:+.3f} ({low:.3f} to {high:.3f})".format(**mean)
    return f"{np.exp(min(nats, 700)):,.1f}\n{worse}"


def markdown(result: dict) -> str:
    """The table for the README."""
    head, body = summary(result)
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    lines += ["| " + " | ".join(cell.replace("\n", "<br>") for cell in row) + " |" for row in body]
    return "\n".join([*lines, "", _caption(result)])


def _table(result: dict) -> Table:
    head, body = summary(result)
    table = Table(caption=_caption(result), caption_justify="left")
    for k, title in enumerate(head):
        table.add_column(title, justify="right" if k else "left")
    for row in body:
        table.add_row(*row)
    return table


def _caption(result: dict) -> str:
    s, dense, cost = result["settings"], result["dense"], result["statistics"]
    return (
        f"{s['model']}, {'+'.join(s['dims'])}, by the block parameters removed: perplexity, and "
        f"nats/token above the dense model's {dense['nats_per_token']:.3f} (perplexity "
        f"{dense['perplexity']:.2f}) with the 95 % bootstrap interval. Calibration "
        f"{s['calibration_samples']}, evaluation {s['eval_samples']} windows of "
        f"{s['max_seq_length']} tokens; random: mean of {s['random_seeds']} seeds. Statistics "
        f"for all criteria and refits: {cost['seconds']:.0f} s, {cost['peak_bytes'] / 1e6:.0f} MB "
        f"at the peak, on {result['chip']} ({result['device']}, {result['machine']})."
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a model folder")
    parser.add_argument("--data", required=True, help="a folder with train and test, or valid")
    parser.add_argument("--out", type=Path, help="JSON [benchmarks/results/criteria-MODEL.json]")
    parser.add_argument("--dims", default=",".join(Settings.dims))
    parser.add_argument("--criteria", default=",".join(Settings.criteria))
    parser.add_argument("--removed", default=",".join(map(str, Settings.removed)))
    parser.add_argument("--random-seeds", type=int, default=Settings.random_seeds)
    parser.add_argument("--samples", type=int, default=Settings.calibration_samples)
    parser.add_argument("--eval-samples", type=int, default=Settings.eval_samples)
    parser.add_argument("--max-seq-length", type=int, default=Settings.max_seq_length)
    parser.add_argument("--markdown", action="store_true", help="print the table as markdown")
    args = parser.parse_args(argv)
    with exit_on_error():
        _run(args)


def _run(args) -> None:
    model = open_model(args.model)
    settings = Settings(
        model=model.path.resolve().name,
        data=Path(args.data).resolve().name,
        removed=tuple(map(float, args.removed.split(","))),
        criteria=tuple(args.criteria.split(",")),
        random_seeds=args.random_seeds,
        dims=tuple(args.dims.split(",")),
        calibration_samples=args.samples,
        eval_samples=args.eval_samples,
        max_seq_length=args.max_seq_length,
    )
    out = args.out or Path(__file__).parent / "results" / f"criteria-{settings.model}.json"
    console = Console()
    result = measure(model, args.data, settings, out, say=console.print)
    print(markdown(result)) if args.markdown else console.print(_table(result))


if __name__ == "__main__":
    main()
