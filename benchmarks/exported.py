"""Real models, dense, pruned and quantised, as torch, ONNX and Core ML: parity, and the task.

    python -P -m mlx_compress.benchmarks.exported --data FOLDER --markdown

The books model by its loss on held-out text, ResNet-56 by its accuracy on CIFAR-10, MiniLM by its
rank correlation on STS-B. Each export is compared with MLX on random inputs, then does the task.
Core ML's programs are run by a NumPy evaluator where there is no Mac; it is slow, so the task is
a part of the data, the same for every column.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..bridges.exports import export, runner_of
from ..bridges.programs import imported_program, open_program
from ..errors import exit_on_error
from ..options import ExportOptions, Options
from ..parity import Runner, random_cases
from ..program import Program
from ..quantize import quantize_program
from ..report import machine, write_report
from ..shrink import plan_program, save_pruned_program
from ..tasks import spearman
from .networks import cifar10_test, sentence_pairs, similarities, trained_resnet

TARGETS = ("torch", "onnx", "coreml")
RATIO, IMAGES, PAIRS, WINDOWS, TOKENS = 0.3, 200, 100, 8, 64
Task = Callable[[Runner], float]


@dataclass(frozen=True)
class Row:
    """`task` is the measure on MLX and by target; `error` the largest one, `bytes` of the files."""

    model: str
    measure: str
    task: Mapping[str, float]
    error: Mapping[str, float]
    bytes: Mapping[str, int]


def measure(name: str, what: str, program: Program, task: Task, sizes: Mapping) -> Row:
    """Export to every target, and do the task with each."""

    def on_mlx(feeds):
        return [np.array(array) for array in program.run(feeds)]

    done, errors, held = {"mlx": task(on_mlx)}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for target in TARGETS:
            options = ExportOptions(sizes=sizes if target == "coreml" else {})
            place = Path(folder, target)
            made = export(program, target, place, options, random_cases(program, options.example))
            held[target] = made.bytes
            errors[target] = max(p.max_error for p in made.parity)
            done[target] = task(runner_of(target, place, options))
    return Row(name, what, done, errors, held)


def rows(data: Path, encoder: Path, done: Container[str] = ()) -> Iterator[Row]:
    """One row after the other, but for the models that are `done`."""
    for models in (_books(data / "lm-books5m"), _resnet(data), _minilm(data, encoder)):
        for name, *case in models:
            if name not in done:
                yield measure(name, *case)


def pruned(program: Program) -> Program:
    """By magnitude: this measures exports, not criteria."""
    options = Options(pruning_ratio=RATIO, importance="magnitude")
    with tempfile.TemporaryDirectory() as folder:
        planned = plan_program(program, options)
        return save_pruned_program(program, planned, Path(folder, "pruned"))


def _books(folder: Path) -> Iterator[tuple]:
    from ..bridges.mlx_lm import load_tokenizer
    from ..data import load_windows

    program = open_program(folder)
    windows = load_windows(
        folder, "evaluation", load_tokenizer(folder), length=TOKENS, count=WINDOWS
    ).tokens

    def loss(run: Runner) -> float:
        return float(np.mean([_loss(program, run, window[None]) for window in windows]))

    smaller = pruned(program)
    packed, _ = quantize_program(smaller, bits=4, group_size=32)
    models = {"books5m": program, "books5m, pruned": smaller, "books5m, pruned, int4": packed}
    sizes = {"batch": 1, "length": (1, TOKENS), "past": 0}
    for name, each in models.items():
        yield name, "nats/token", each, loss, sizes


def _loss(program: Program, run: Runner, tokens: np.ndarray) -> float:
    feeds = program.feeds({"batch": 1, "length": tokens.shape[1], "past": 0})
    feeds["input_ids"] = tokens
    logits = np.asarray(run(feeds)[0], dtype=np.float64)[0, :-1]
    logits -= logits.max(axis=-1, keepdims=True)
    picked = logits[np.arange(len(logits)), tokens[0, 1:]]
    return float(np.mean(np.log(np.exp(logits).sum(axis=-1)) - picked))


def _resnet(data: Path) -> Iterator[tuple]:
    import torch

    from ..bridges.torch import from_torch

    images, labels = cifar10_test(data, IMAGES)
    module = trained_resnet(data, 56)
    program = imported_program(from_torch(module, [torch.from_numpy(images[:2])]))

    def accuracy(run: Runner) -> float:
        (name,) = program.inputs
        batches = np.split(images, IMAGES // 50)
        logits = np.concatenate([run({name: batch})[0] for batch in batches])
        return float((logits.argmax(-1) == labels).mean())

    for name, each in {"ResNet-56": program, "ResNet-56, pruned": pruned(program)}.items():
        yield name, "top-1", each, accuracy, {"batch": (1, 50)}


def _minilm(data: Path, folder: Path) -> Iterator[tuple]:
    from ..bridges.torch import from_hf

    program = imported_program(from_hf(folder))
    pairs = sentence_pairs(data)[:PAIRS]

    def correlation(run: Runner) -> float:
        def hidden(ids, mask):
            return run(dict(zip(program.inputs, (ids.numpy(), mask.numpy()), strict=True)))[0]

        return spearman(*similarities(folder, hidden, pairs))

    for name, each in {"MiniLM": program, "MiniLM, pruned": pruned(program)}.items():
        yield name, "Spearman", each, correlation, {"batch": (1, 64), "length": (1, 128)}


def markdown(found: list[Row]) -> str:
    heads = ["model", "measure", "MLX", *(f"{t}, error, MB" for t in TARGETS)]
    lines = ["| " + " | ".join(heads) + " |", "|---|---" + "|---:" * (len(heads) - 2) + "|"]
    for row in found:
        cells = [
            f"{row.task[t]:.4f}, {row.error[t]:.0e}, {row.bytes[t] / 1e6:.1f}" for t in TARGETS
        ]
        cells = [row.model, row.measure, f"{row.task['mlx']:.4f}", *cells]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder with models and data")
    parser.add_argument("--encoder", type=Path, help="a folder [the installed all-MiniLM-L6-v2]")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/exported.json")
    args = parser.parse_args(argv)
    found: list[Row] = []
    if args.out.exists():  # an interrupted run goes on where it stopped
        found = [Row(**row) for row in json.loads(args.out.read_text())["rows"]]
    with exit_on_error():
        from .imported import installed_encoder

        done = {row.model for row in found}
        for row in rows(args.data, args.encoder or installed_encoder(), done):
            found.append(row)
            write_report({**machine(), "rows": [asdict(r) for r in found]}, args.out)
    print(markdown(found))


if __name__ == "__main__":
    main()
