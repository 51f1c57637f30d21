"""What training brings back to vision nets and sentence encoders that were made smaller.

    python -P -m mlx_compress.benchmarks.recovery_samples --data FOLDER --task encoder

encoder: all-MiniLM-L6-v2 with half of its block parameters, against its first three layers, each
learning the embeddings that the whole encoder gives to the sentences of STS-B's training split;
Spearman on the test split. resnet (`--task resnet`): ResNet-56 at 2.1x fewer MACs, learning the
class scores of the whole one or the labels alone, on 5,000 training images, each shifted and
mirrored several times; top-1 on 1,000 test images. Runs of one task are equally long.

Runs are kept beside the JSON file, step by step, so an interrupted benchmark goes on.
"""

import argparse
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from .. import program_recipe
from ..archive import load_program, save_program
from ..bridges.exports import copy_tokenizer
from ..bridges.programs import imported_program
from ..bridges.tokenizers import open_tokenizer
from ..bridges.torch import from_hf
from ..distill_samples import Answers
from ..errors import exit_on_error
from ..evaluate import EvaluateConfig
from ..evaluate_samples import compare_samples, score_samples
from ..options import DistillOptions, Options
from ..program import Program, with_weights
from ..program_distill_recipe import read_training
from ..program_recipe import SavedProgram
from ..report import write_report
from ..samples import read_samples
from ..training import train
from ..training_state import TrainingFolder
from .begun import begun
from .encoders import write_data, write_encoder
from .imported import installed_encoder
from .networks import as_in_training, cifar10_test, cifar10_train
from .vision import write_network

RESULTS = Path(__file__).parent / "results"
COMPARED = "pruned, distilled"
COPIES = 4  # of each image, shifted and mirrored anew


@dataclass(frozen=True)
class Method:
    """How a student is made, and trained; without `training` it is measured as it is."""

    task: str
    student: str
    training: str | None = None
    options: Mapping[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.student}, {self.training or 'as it is'}"


METHODS = (
    Method("encoder", "first layers"),
    Method("encoder", "pruned"),
    Method("encoder", "pruned", "distilled"),
    Method("encoder", "first layers", "distilled"),
    Method("encoder", "pruned", "distilled, hidden states too", {"hidden_weight": 1.0}),
    Method("encoder", "pruned", "distilled, attributions aligned", {"attribution": "align"}),
    Method("resnet", "pruned"),
    Method("resnet", "pruned", "fine-tuned", {"hard_labels": 1.0}),
    Method("resnet", "pruned", "distilled"),
    Method("resnet", "pruned", "distilled, half labels", {"hard_labels": 0.5}),
)
PRUNING = {
    "encoder": Options(params=0.5, calibration_samples=512, batch_size=32, max_seq_length=48),
    "resnet": Options(macs=1 / 2.1, importance="osscar", dims=("channels",),
                      calibration_samples=1000, batch_size=50),
}  # fmt: skip
TRAINING = {
    "encoder": {"learning_rate": 3e-4, "max_seq_length": 32},
    "resnet": {"learning_rate": 2e-4},
}


def write_task(task: str, data: Path, place: Path) -> tuple[Path, Path]:
    """The dense program and the data; returns their folders."""
    dense, samples = place / task, place / f"{task}-data"
    if not dense.exists():
        samples.mkdir(exist_ok=True)
        if task == "encoder":
            write_data(data, samples)
            write_encoder(dense)
        else:
            images, labels = cifar10_train(data)
            copies = [as_in_training(images, seed=seed) for seed in range(COPIES)]
            np.savez(samples / "train.npz", x=np.concatenate(copies),
                     labels=np.tile(labels, COPIES))  # fmt: skip
            images, labels = cifar10_test(data)
            np.savez(samples / "test.npz", x=images, labels=labels)
            write_network(data, 56, dense)
    return dense, samples


def write_student(method: Method, dense: Path, samples: Path, place: Path) -> Path:
    folder = place / f"{method.task}-{method.student}".replace(" ", "-")
    if folder.exists():
        return folder
    if method.student == "pruned":
        model = program_recipe.open_model(dense)
        planned = program_recipe.make_plan(model, PRUNING[method.task], samples)
        program_recipe.save_pruned(model, planned, folder)
        return folder
    source, config = installed_encoder(), place / "first"
    shutil.copytree(source, config, dirs_exist_ok=True)
    document = json.loads((source / "config.json").read_text())
    document["num_hidden_layers"] //= 2
    (config / "config.json").write_text(json.dumps(document))
    folder.mkdir()
    save_program(imported_program(from_hf(config)), folder)
    copy_tokenizer(source)(folder)
    return folder


def measured(
    method: Method, data: Path, place: Path, seed: int, args, before: list[dict], say
) -> dict:
    """The row of one method; `before` are those that there are."""
    dense, samples = write_task(method.task, data, place)
    folder = write_student(method, dense, samples, place)
    program, started = load_program(folder), time.perf_counter()
    row: dict = {"task": method.task, "method": method.name, "seed": seed}
    if method.training:
        options = DistillOptions(
            iters=args.iters, batch_size=args.batch_size, seed=seed,
            steps_per_eval=max(1, args.iters // 8), val_samples=256,
            **TRAINING[method.task], **method.options,
        )  # fmt: skip
        learnt, held_out = read_training(SavedProgram(folder, program), samples, options)
        objective = Answers(program, load_program(dense), learnt, held_out, options)
        kept = TrainingFolder(place / f"{method.task} {method.name} {seed}".replace(" ", "-"),
                              asdict(options))  # fmt: skip
        done = train(objective, options, kept,
                     told=lambda point: say(f"{method.name}: {point}"))  # fmt: skip
        others = [path for path in program.graph.parameters if path not in done.weights]
        program = with_weights(program, program.fetch(others) | kept.best(done))
        row |= {"steps": done.step, "best_step": done.best_step, "held_out": done.curve}
    test = read_samples(
        program, samples, "evaluation", count=10_000, batch_size=50, length=128, folder=folder,
        open_tokenizer=open_tokenizer,
    )  # fmt: skip
    whole, scored = load_program(dense), score_samples(program, test)
    row["answers"], row["losses"] = (each.tolist() for each in (scored[1], scored[0]))
    other = next((r for r in before if r["method"] == COMPARED and r["seed"] == seed), None)
    if other and "answers" in other and method.training:
        theirs = np.array(other["losses"]), np.array(other["answers"])
        row["more"] = compare_samples(test, theirs, scored, EvaluateConfig())["score"]
    return row | {
        "score": test.score(scored[1]), "dense": test.score(score_samples(whole, test)[1]),
        "parameters": _parameters(program) / _parameters(whole),
        "seconds": time.perf_counter() - started,
    }  # fmt: skip


def _parameters(program: Program) -> int:
    return sum(array.size for array in program.fetch(list(program.graph.parameters)).values())


def rows(args, result: dict, place: Path, say) -> Iterator[dict]:
    """What is not done yet."""
    known = {(r["method"], r["seed"]) for r in result["rows"]}
    for seed in range(args.seeds):
        for method in METHODS:
            if method.task != args.task or (seed and not method.training):
                continue
            if (method.name, seed) not in known:
                yield measured(method, args.data, place, seed, args, result["rows"], say)


def table(result: dict) -> Table:
    out = Table("method", "parameters", "steps", "score", "more than distilled (95 %)", "dense",
                "s")  # fmt: skip
    for r in result["rows"]:
        more = (
            "{estimate:+.3f} ({low:+.3f} to {high:+.3f})".format(**r["more"]) if "more" in r else ""
        )
        out.add_row(r["method"], f"{r['parameters']:.2f}", str(r.get("steps", "")),
                    f"{r['score']:.3f}", more,
                    f"{r['dense']:.3f}", f"{r['seconds']:.0f}")  # fmt: skip
    return out


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder with enc-stsb ...")
    parser.add_argument("--task", choices=list(PRUNING), required=True)
    parser.add_argument("--iters", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a file [results/recovery-TASK.json]")
    args = parser.parse_args(argv)
    out = args.out or RESULTS / f"recovery-{args.task}.json"
    with exit_on_error():
        console, place = Console(width=120), out.with_suffix("")
        place.mkdir(parents=True, exist_ok=True)
        result = begun(out, {"iters": args.iters, "batch_size": args.batch_size})
        for row in rows(args, result, place, console.print):
            result["rows"].append(row)
            write_report(result, out)
        console.print(table(result))


if __name__ == "__main__":
    main()
