"""What a distillation loss takes with whole logits, and a few tokens at a time.

    python -P -m mlx_compress.benchmarks.fused

Reverse KL between a student and a teacher, from hidden states and heads of random numbers in
float32, with the gradients by the student's hidden states and head:

- whole: both models' logits, the loss in plain MLX, `mx.value_and_grad`;
- fused: `mx.value_and_grad` of `kernels.projected.projected_loss` of `kernels.kl`, with as many
  tokens at a time as `compress distill` takes;
- stepwise: the same by `kernels.projected.projected_grads`, which evaluates each chunk in its turn.

Every row is a fresh process. Memory is MLX's peak less what the inputs take (hidden states, heads,
mask), so it holds the gradients that come out: the head's alone is `vocabulary x width` in float32.
Goal: the peak of fused at most 1/8 of whole.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from rich.console import Console
from rich.table import Table

from ..distill_text import chunk_of
from ..kernels import kl
from ..kernels.projected import projected_grads, projected_loss
from ..report import machine, write_report

RESULT = Path(__file__).parent / "results" / "fused.json"
WAYS = ("whole", "fused", "stepwise")
GOAL = 1 / 8
SIZES = "32000:2048,152000:512"  # vocabulary and tokens


@dataclass(frozen=True)
class Size:
    vocabulary: int
    tokens: int
    width: int = 256

    @property
    def chunk(self) -> int:
        return chunk_of(self.tokens, self.vocabulary)


def reverse_kl(student_logits: mx.array, teacher_logits: mx.array) -> mx.array:
    """As anybody would write it."""
    log_q, log_p = (nn.log_softmax(each, axis=-1) for each in (student_logits, teacher_logits))
    return (mx.exp(log_q) * (log_q - log_p)).sum(axis=-1)


def inputs(size: Size) -> tuple[mx.array, ...]:
    """The student's hidden states and head, the teacher's, and a mask that leaves a fourth out."""
    keys = mx.random.split(mx.random.key(0), 4)
    rows = (size.tokens, size.vocabulary) * 2
    arrays = [
        mx.random.normal((count, size.width), scale=scale, key=key)
        for count, scale, key in zip(rows, (1.0, 0.1) * 2, keys, strict=True)
    ]
    return *arrays, (mx.arange(size.tokens) % 4 > 0).astype(mx.float32)


def step(way: str, size: Size) -> dict:
    """Seconds and peak bytes of the loss with both gradients, and numbers to compare them by."""
    hidden, head, states, teacher_head, mask = arrays = inputs(size)
    mx.eval(arrays)
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    started = time.perf_counter()
    nats, by_hidden, by_head = results = _run(way, size, hidden, head, states, teacher_head, mask)
    mx.eval(results)
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "peak_bytes": mx.get_peak_memory() - before,
        "input_bytes": before,
        "output_bytes": by_hidden.nbytes + by_head.nbytes,
        "nats": nats.item() / mask.sum().item(),
        "gradient_norms": [mx.linalg.norm(by_hidden).item(), mx.linalg.norm(by_head).item()],
    }


def _run(way, size, hidden, head, states, teacher_head, mask):
    choices = {
        "loss": lambda logits, rows: kl.reverse_kl(logits, rows @ teacher_head.T),
        "per_token": [states],
        "chunk": size.chunk,
    }
    if way == "stepwise":
        nats, grads = projected_grads(hidden, head, mask, **choices)
        return nats, grads["hidden"], grads["head"]

    def whole(hidden, head):
        return (reverse_kl(hidden @ head.T, states @ teacher_head.T) * mask).sum()

    def fused(hidden, head):
        return projected_loss(hidden, head, mask, **choices)

    function = {"whole": whole, "fused": fused}[way]
    nats, grads = mx.value_and_grad(function, (0, 1))(hidden, head)
    return nats, *grads


def in_fresh_process(way: str, size: Size) -> dict:
    command = [sys.executable, "-P", "-m", "mlx_compress.benchmarks.fused", "--step", way]
    command += ["--size", json.dumps(asdict(size))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{way}: exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(size: Size) -> dict:
    """The rows of one vocabulary, each beside the whole logits."""
    rows = {way: in_fresh_process(way, size) for way in WAYS}
    for row in rows.values():
        row["of_whole"] = row["peak_bytes"] / rows["whole"]["peak_bytes"]
        row["times_whole"] = row["seconds"] / rows["whole"]["seconds"]
        row["differs"] = max(
            abs(got / want - 1)
            for got, want in zip(_numbers(row), _numbers(rows["whole"]), strict=True)
        )
    return {
        "size": asdict(size) | {"chunk": size.chunk},
        "logit_bytes": 4 * size.tokens * size.vocabulary,
        "rows": rows,
        "met": rows["fused"]["of_whole"] <= GOAL,
    }


def _numbers(row: dict) -> list[float]:
    return [row["nats"], *row["gradient_norms"]]


def table(cases: list[dict]) -> Table:
    out = Table(
        "vocabulary", "tokens", "chunk", "", "peak, MB", "gradients", "of whole", "goal",
        "time, s", "x whole", "differs",
        caption="Peak memory above the inputs; the gradients that come out are part of it.",
    )  # fmt: skip
    for case in cases:
        for way, row in case["rows"].items():
            goal = f"<= 1/8 {'met' if case['met'] else 'MISSED'}" if way == "fused" else ""
            out.add_row(
                *(str(case["size"][key]) for key in ("vocabulary", "tokens", "chunk")), way,
                f"{row['peak_bytes'] / 1e6:.0f}", f"{row['output_bytes'] / 1e6:.0f}",
                f"1/{1 / row['of_whole']:.1f}", goal, f"{row['seconds']:.1f}",
                f"{row['times_whole']:.2f}", f"{row['differs']:.0e}",
            )  # fmt: skip
    return out


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default=SIZES, help="vocabulary:tokens, by commas")
    parser.add_argument("--width", type=int, default=Size.width)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--step", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--size", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.step:
        print(json.dumps(step(args.step, Size(**json.loads(args.size)))))
        return
    console, cases = Console(width=120), []
    for each in args.sizes.split(","):
        size = Size(*map(int, each.split(":")), width=args.width)
        cases.append(measure(size))
        console.print(f"{each}: {'met' if cases[-1]['met'] else 'MISSED'}")
    write_report({**machine(), "goal": GOAL, "cases": cases}, args.out)
    console.print(table(cases))


if __name__ == "__main__":
    main()
