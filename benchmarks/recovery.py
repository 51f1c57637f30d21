"""What training brings back: a model with half of its blocks removed, recovered in several ways.

    python -P -m mlx_compress.benchmarks.recovery --model M --data D

The student is what `compress --target params=0.5` leaves. Each method trains it on the same
windows in the same order for a stated number of tokens; plain fine-tuning, which asks no teacher,
gets as many steps more as its steps are shorter. All are measured on text that none was trained on,
at the weights of the best held-out loss. Then each model writes on from the first words of that
text: how likely the dense model finds it, and how many of its n-grams are distinct.

Runs are kept beside the JSON file, step by step, so an interrupted benchmark goes on.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from rich.console import Console
from rich.table import Table

from .. import recipe
from ..bridges.mlx_lm import LanguageModel, open_model
from ..bridges.students import common_tokens, explained_teacher, student_of, teacher_of
from ..distill_stages import Heard, Stage, run_stages
from ..distill_text import Live, NextToken
from ..errors import exit_on_error
from ..evaluate import bootstrap_interval, token_losses
from ..explained import Explainer, Traced
from ..options import DIVERGENCES, DistillOptions, Options
from ..report import write_report
from ..scoring import read_windows
from ..token_loss import Batch, gradients
from ..training import train
from ..training_state import TrainingFolder
from ..training_text import Text, read_training
from .begun import begun

RESULTS = Path(__file__).parent / "results"
PLAIN, STAGES = "fine-tuning", "reverse-kl + two stages"
METHODS: dict[str, dict] = {
    "none": {},
    PLAIN: {"hard_labels": 1.0},
    **{name: {"loss": name} for name in DIVERGENCES},
    "reverse-kl + half hard labels": {"loss": "reverse-kl", "hard_labels": 0.5},
    STAGES: {"loss": "reverse-kl"},
    "reverse-kl + attribution aligned": {"loss": "reverse-kl", "attribution": "align"},
    "reverse-kl + attribution as weights": {"loss": "reverse-kl", "attribution": "weights"},
}
TIMED = 5  # steps
PROMPT, WRITTEN, GRAM = 16, 64, 4  # tokens
LAST = WRITTEN - GRAM + 1


@dataclass
class Bench:
    """What all methods share. `nats` of the dense model on each test window."""

    teacher: LanguageModel
    student: LanguageModel
    options: DistillOptions
    count: int
    train: Text
    held_out: Text
    test: np.ndarray
    dense_nats: np.ndarray
    kept: float
    data: str


def prepared(args, place: Path) -> Bench:
    teacher = open_model(args.model)
    folder = place / "student"
    if not folder.exists():
        recipe.compress(teacher, Options(params=args.kept), args.data, folder)
    student = open_model(folder)
    options = DistillOptions(
        iters=args.iters, batch_size=args.batch_size, learning_rate=args.learning_rate,
        max_seq_length=args.max_seq_length, steps_per_eval=max(1, args.iters // 8),
        eval_samples=args.eval_samples,
    )  # fmt: skip
    train, held_out = read_training(args.data, student.tokenizer(), options, [])
    test = read_windows(teacher, args.data, "evaluation", options.measuring, []).tokens
    nats = scored(teacher_of(teacher), test)
    count = common_tokens(teacher, student)
    return Bench(
        teacher, student, options, count, train, held_out, test, nats, args.kept, args.data
    )


def scored(logits, tokens_NT: np.ndarray) -> np.ndarray:
    """Nats per token of each window."""
    return token_losses(logits, tokens_NT, batch_size=8).mean(axis=1)


def time_ratio(bench: Bench) -> float:
    """How many steps of fine-tuning take as long as one with a teacher."""
    seconds = {}
    teacher = Live(teacher_of(bench.teacher))
    for name in ("reverse-kl", PLAIN):
        options = replace(bench.options, **METHODS[name])
        module = student_of(bench.student, options)
        module.set_dtype(mx.float32)
        times = []
        for step in range(TIMED):
            rows = np.arange(options.batch_size) + step * options.batch_size
            tokens = mx.array(bench.train.tokens[rows])
            started = time.perf_counter()
            told = () if name == PLAIN else teacher(bench.train, rows, tokens[:, :-1])
            gradients(Traced(module), [Batch(tokens, mx.ones(tokens.shape), told)], options)
            times.append(time.perf_counter() - started)
        seconds[name] = np.median(times[1:])
    return float(seconds["reverse-kl"] / seconds[PLAIN])


def recovered(bench: Bench, name: str, seed: int, ratio: float, place: Path, say) -> dict:
    """The row of one method: train by it, and measure."""
    started = time.perf_counter()
    options = replace(bench.options, **METHODS[name], seed=seed)
    if name == PLAIN:
        steps = round(options.iters * ratio)
        options = replace(options, iters=steps, steps_per_eval=max(1, steps // 8))
    kept = place / f"{name}-{seed}".replace(" ", "-")
    told = lambda point: say(f"{name}, seed {seed}: {point}")  # noqa: E731
    row: dict = {"method": name, "seed": seed}
    if name == "none":
        module = student_of(bench.student, options)
    elif name == STAGES:
        module, history = in_stages(bench, options, kept, told)
        row |= history
    else:
        module, history = trained(bench, options, kept, told)
        row |= history
    module.set_dtype(mx.float32)
    row |= {"nats": scored(module, bench.test).tolist(), "seconds": time.perf_counter() - started}
    return row | writing(bench, module)


def trained(bench: Bench, options: DistillOptions, kept: Path, told) -> tuple[nn.Module, dict]:
    """The student at its best weights, and how it got there."""
    module, folder = student_of(bench.student, options), TrainingFolder(kept, asdict(options))
    explainer = Explainer(Traced(explained_teacher(bench.teacher)), options)
    objective = NextToken(
        module, Live(teacher_of(bench.teacher)), bench.train, bench.held_out, options,
        bench.count, explainer=explainer,
    )  # fmt: skip
    done = train(objective, options, folder, told=told)
    module.update(tree_unflatten(list(folder.best(done).items())))
    tokens = options.windows * (options.max_seq_length - 1)
    return module, {"steps": done.step, "best_step": done.best_step, "tokens": tokens,
                    "held_out": done.curve}  # fmt: skip


def in_stages(bench: Bench, options: DistillOptions, kept: Path, told) -> tuple[nn.Module, dict]:
    """Half of what is to go and half of the steps, twice."""
    half = replace(options, iters=options.iters // 2)
    stage = Stage(half, pruning=Options(params=bench.kept**0.5))
    if not kept.exists():
        run_stages(bench.teacher, [stage] * 2, bench.data, kept, heard=Heard(point=told))
    report = json.loads((kept / "report.json").read_text())
    tokens = options.windows * (options.max_seq_length - 1)
    module = student_of(open_model(kept), options)
    return module, {"steps": options.iters, "tokens": tokens, "stages": report["stages"]}


def writing(bench: Bench, module: nn.Module) -> dict:
    """What a model writes on from the first words of each test window, judged."""
    mx.random.seed(0)
    tokens = mx.array(bench.test[:, :PROMPT])
    for _ in range(WRITTEN):
        logits = module(tokens)[:, -1, : bench.count]
        tokens = mx.concatenate([tokens, mx.random.categorical(logits)[:, None]], axis=1)
        mx.eval(tokens)
    written = np.array(tokens)
    nats = token_losses(teacher_of(bench.teacher), written, batch_size=8)[:, PROMPT - 1 :]
    grams = [tuple(row[k : k + GRAM]) for row in written for k in range(PROMPT, PROMPT + LAST)]
    return {
        "teacher_nats_of_samples": float(nats.mean()),
        "distinct_4_grams": len(set(grams)) / len(grams),
    }


def measured(args, out: Path, say) -> dict:
    """What is in the file, with the rows that it lacks; written after each."""
    place = out.with_suffix("")
    place.mkdir(parents=True, exist_ok=True)
    bench = prepared(args, place)
    named = ("kept", "iters", "batch_size", "max_seq_length", "learning_rate", "eval_samples")
    result = begun(out, {name: getattr(args, name) for name in named})
    ratio = result.get("steps_of_fine_tuning") or time_ratio(bench)
    result |= {"steps_of_fine_tuning": ratio, "dense": bench.dense_nats.tolist()}
    known = {(row["method"], row["seed"]) for row in result["rows"]}
    for seed in range(args.seeds):
        for name in args.methods.split(",") if args.methods else METHODS:
            if (name, seed) in known or name == "none" and seed:
                continue
            result["rows"].append(recovered(bench, name, seed, ratio, place, say))
            write_report(result, out)
    return result


def table(result: dict) -> Table:
    out = Table("method", "steps", "seeds", "perplexity (of each seed)", "gap closed, % (95 %)",
                "nats more than fine-tuning (95 %)", "of its text: nats to the dense model",
                "distinct 4-grams, %")  # fmt: skip
    nats = {name: np.mean([r["nats"] for r in rows], axis=0) for name, rows in _by(result).items()}
    dense, none = np.array(result["dense"]), nats["none"]
    out.add_row("dense", "", "", f"{np.exp(dense.mean()):.1f}", "", "", "", "")
    for name, rows in sorted(_by(result).items(), key=lambda item: nats[item[0]].mean()):
        closed = _interval(100 * (none - nats[name]), none - dense, 0) if name != "none" else ""
        behind = ""
        if PLAIN in nats and name not in (PLAIN, "none"):
            behind = _interval(nats[name] - nats[PLAIN], np.ones(len(dense)), 3)
        judged = [np.mean([r[key] for r in rows]) for key in (
            "teacher_nats_of_samples", "distinct_4_grams"
        )]  # fmt: skip
        out.add_row(
            name, str(rows[0].get("steps", "")), str(len(rows)),
            _perplexities(rows), closed, behind, f"{judged[0]:.2f}",
            f"{100 * judged[1]:.0f}",
        )  # fmt: skip
    return out


def _perplexities(rows: list[dict]) -> str:
    """By the mean loss of the seeds, and from the lowest to the highest of them."""
    losses = [np.mean(row["nats"]) for row in rows]
    spread = f" ({np.exp(min(losses)):.1f} to {np.exp(max(losses)):.1f})" if len(rows) > 1 else ""
    return f"{np.exp(np.mean(losses)):.1f}{spread}"


def _by(result: dict) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for row in result["rows"]:
        found.setdefault(row["method"], []).append(row)
    return found


def _interval(numerator: np.ndarray, denominator: np.ndarray, digits: int) -> str:
    each = bootstrap_interval(numerator, denominator)
    shown = [f"{each[key]:.{digits}f}" for key in ("estimate", "low", "high")]
    return "{} ({} to {})".format(*shown)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="the dense model, which is the teacher")
    parser.add_argument("--data", required=True)
    parser.add_argument("--kept", type=float, default=0.5, help="of the block parameters")
    parser.add_argument("--iters", type=int, default=400, help="of a method with a teacher")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-seq-length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--eval-samples", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--methods", help=f"of {', '.join(METHODS)}; commas between")
    parser.add_argument("--out", type=Path, default=RESULTS / "recovery.json")
    args = parser.parse_args(argv)
    with exit_on_error():
        console = Console(width=140)
        console.print(table(measured(args, args.out, console.print)))


if __name__ == "__main__":
    main()
