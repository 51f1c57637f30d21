"""What a step of distillation costs: beside its bare passes, and at the size of a real model.

    python -P -m mlx_compress.benchmarks.training_cost --parts overhead,size

overhead: a step (loss, gradients, clipping, AdamW) against the teacher's forward pass and the
student's forward and backward pass with nothing but a sum behind them, in turn, in one process.

size: a teacher with the shape of Llama-3.2-3B in 4 bits and a student of 500M parameters, random,
each step in a fresh process: with the teacher beside the student, then the teacher alone writing
what it says to disk, then the student alone reading that. On the CPU, where packed weights are some
30 times slower, the teacher's time says nothing about a Mac.

    tokens/s = F / (2 P_teacher + 6 P_student)

predicts a real run, with F the floating-point operations a second of the teacher's forward pass
(overhead tells how near that comes); from disk the teacher's term is left out.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from rich.console import Console
from rich.table import Table

from ..bridges.mlx_lm import open_model
from ..bridges.students import student_of, teacher_of
from ..distill_text import Live, NextToken
from ..options import DistillOptions
from ..report import machine, write_report
from ..teacher_targets import TargetFolder
from ..training import advanced, first_state
from ..training_state import TrainingFolder
from ..training_text import Text
from .lean import Size, write_model

RESULTS = Path(__file__).parent / "results"
TEACHER = Size(layers=28, hidden=3072, ffn=8192, heads=24, kv_heads=8, vocab=128256)
STUDENT = Size(layers=16, hidden=1280, ffn=4608, heads=20, kv_heads=4, vocab=128256)
MIDDLE = (
    Size(layers=8, hidden=1536, ffn=6144, heads=12, kv_heads=4),
    Size(layers=8, hidden=768, ffn=3072, heads=12, kv_heads=4),
)
STEPS = ("direct", "ask the teacher", "from disk")


def parameters(size: Size) -> int:
    return sum(int(np.prod(shape)) for shard in size.shards() for shape in shard.values())


def text(vocabulary: int, windows: int, length: int) -> Text:
    tokens = np.random.default_rng(0).integers(0, vocabulary, (windows, length)).astype(np.int32)
    return Text("train", tokens, np.ones(tokens.shape, bool))


def overhead(repeats: int, batch: int, length: int) -> dict:
    """Seconds of each, in turn, and tokens a second as predicted and as they were."""
    options = DistillOptions(batch_size=batch, max_seq_length=length, iters=repeats + 1)
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch, name) for name in ("teacher", "student")]
        for folder, size in zip(folders, MIDDLE, strict=True):
            write_model(folder, size)
        opened = [open_model(folder) for folder in folders]
        teacher, student = teacher_of(opened[0]), student_of(opened[1], options)
        words = text(MIDDLE[0].vocab, batch, length)
        goal = NextToken(student, Live(teacher), words, words, options)
        state, kept = first_state(goal.start(), options), TrainingFolder(Path(scratch, "state"), {})
        inputs = mx.array(words.tokens[:, :-1])
        mx.eval(teacher.parameters(), student.parameters())
        times = {"teacher": [], "bare": [], "step": []}
        for _ in range(repeats + 1):
            started = time.perf_counter()
            mx.eval(teacher(inputs))
            times["teacher"].append(time.perf_counter() - started)
            mx.eval(nn.value_and_grad(student, lambda: student(inputs).sum())())
            times["bare"].append(time.perf_counter() - started)
            started = time.perf_counter()
            state = advanced(goal, state, options, kept)
            times["step"].append(time.perf_counter() - started)
    times = {name: each[1:] for name, each in times.items()}
    theirs, own = map(parameters, MIDDLE)
    tokens = batch * (length - 1)
    flops = 2 * theirs * tokens / np.median(times["teacher"])
    return {
        "options": asdict(options), "apart": goal.apart is not None, **times,
        "ratio": float(np.median(np.divide(times["step"], times["bare"]))),
        "tokens_per_second": float(tokens / np.median(times["step"])),
        "predicted": float(flops / (2 * theirs + 6 * own)),
    }  # fmt: skip


def step(name: str, place: Path, length: int) -> dict:
    """One measurement, in this process."""
    options = DistillOptions(
        batch_size=1, max_seq_length=length, iters=1, val_samples=1, grad_checkpoint=True
    )
    words = text(STUDENT.vocab, 1, length)
    targets = TargetFolder(place / "targets", "teacher", [words], 64)
    started = time.perf_counter()
    if name == "ask the teacher":
        targets.write(teacher_of(open_model(place / "teacher")), batch_size=1)
    else:
        student = student_of(open_model(place / "student"), options)
        live = name == "direct"
        said = Live(teacher_of(open_model(place / "teacher"))) if live else targets.teacher()
        goal = NextToken(student, said, words, words, options)
        state = first_state(goal.start(), options)
        mx.eval(state.weights)
        started = time.perf_counter()
        advanced(goal, state, options, TrainingFolder(place / "state", {}))
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "step": name, "seconds": time.perf_counter() - started,
        "tokens": length - 1, "peak_bytes": mx.get_peak_memory(),
        "rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    }  # fmt: skip


def sized(length: int, scratch: Path) -> dict:
    weights = {
        "teacher": write_model(scratch / "teacher", TEACHER, bits=4),
        "student": write_model(scratch / "student", STUDENT),
    }
    rows = []
    for name in STEPS:
        command = [sys.executable, "-P", "-m", "mlx_compress.benchmarks.training_cost"]
        command += ["--step", name, "--place", str(scratch), "--length", str(length)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    counts = {"teacher": parameters(TEACHER), "student": parameters(STUDENT)}
    return {"weight_bytes": weights, "parameters": counts, "steps": rows}


def table(result: dict) -> Table:
    out = Table("", "s", "tokens/s", "peak, GB", "RSS, GB")
    for row in result["steps"]:
        out.add_row(row["step"], f"{row['seconds']:.1f}", f"{row['tokens'] / row['seconds']:.1f}",
                    f"{row['peak_bytes'] / 1e9:.1f}", f"{row['rss_bytes'] / 1e9:.1f}")  # fmt: skip
    return out


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default="overhead,size")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--length", type=int, default=129)
    parser.add_argument("--out", type=Path, default=RESULTS / "training-cost.json")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.step:
        print(json.dumps(step(args.step, args.place, args.length)))
        return
    result = json.loads(args.out.read_text()) if args.out.exists() else {}
    console = Console(width=120)
    if "overhead" in args.parts:
        found = overhead(args.repeats, args.batch_size, args.length)
        result["overhead"] = found | machine()
        write_report(result, args.out)
        console.print(
            f"a step takes {found['ratio']:.2f} x its bare passes; {found['tokens_per_second']:.0f}"
            f" tokens/s, predicted {found['predicted']:.0f}"
        )
    if "size" in args.parts:
        with tempfile.TemporaryDirectory() as scratch:
            result["size"] = sized(args.length, Path(scratch)) | machine()
        write_report(result, args.out)
        console.print(table(result["size"]))


if __name__ == "__main__":
    main()
