"""What is kept of trained ResNets at fewer MACs, with nothing trained.

    python -P -m mlx_compress.benchmarks.vision --data FOLDER --depths 20,56 --speedups 2.1,3

ResNet-20 and -56 for CIFAR-10, imported from torch, with the channels inside each block pruned:
random units and magnitude as they are, and with new statistics of the batch norms; the weights
refitted in closed form; refitted layer after layer, by a criterion or by the one that is judged
best; and with counts of their own for each layer, found by search. Calibrated on the first training
images, shifted and mirrored as in training; top-1 on 1,000 test images. `peers.py` measures
torch-pruning on the same ones, and its best criterion is shown where its results are there.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ..archive import load_program, save_program
from ..bridges.programs import imported_program
from ..bridges.torch import from_torch
from ..calibration import fit
from ..cost import cost
from ..edit import edit_graph
from ..errors import InputError, exit_on_error
from ..evaluate_samples import score_samples
from ..options import Options
from ..program import Program, prune_program
from ..report import write_report
from ..samples import Samples, read_samples
from ..shrink import on_samples, plan_program
from .begun import begun
from .networks import as_in_training, cifar10_test, cifar10_train, trained_resnet

RESULTS = Path(__file__).parent / "results"
BATCH = 50


@dataclass(frozen=True)
class Method:
    """What is not `fitted` is only cut; without `refit` batch norms alone are measured anew.
    `searched`: counts of each layer are found by trials; else the same share everywhere."""

    name: str
    importance: str
    fitted: bool = True
    refit: bool = True
    searched: bool = False


METHODS = (
    Method("random", "random", fitted=False, refit=False),
    Method("magnitude", "magnitude", fitted=False, refit=False),
    Method("magnitude, batch norms anew", "magnitude", refit=False),
    Method("magnitude, refitted", "magnitude"),
    Method("second order, refitted", "osscar"),
    Method("auto, refitted", "auto"),
    Method("magnitude, refitted, searched", "magnitude", searched=True),
    Method("second order, refitted, searched", "osscar", searched=True),
)


@dataclass(frozen=True)
class Row:
    """`speedup` is in MACs; `closed` is the accuracy after the closed form alone, if refitted."""

    depth: int
    asked: float
    method: str
    speedup: float
    parameters: float
    accuracy: float
    closed: float | None
    seconds: float


def write_data(data: Path, folder: Path, images: int) -> None:
    """train.npz of the first `images` and test.npz, as `compress --data` takes them."""
    train, labels = (array[:images] for array in cifar10_train(data))
    np.savez(folder / "train.npz", x=as_in_training(train, seed=0), labels=labels)
    test, labels = cifar10_test(data)
    np.savez(folder / "test.npz", x=test, labels=labels)


def write_network(data: Path, depth: int, folder: Path) -> Program:
    """The trained network, imported, as `compress import` leaves it."""
    module = trained_resnet(data, depth)
    if module is None:
        raise InputError(f"{data}: no weights of ResNet-{depth} in cnn-resnet-cifar10.")
    example = torch.from_numpy(cifar10_test(data, 2)[0])
    folder.mkdir()
    save_program(imported_program(from_torch(module, [example])), folder)
    return load_program(folder)


def measure(
    program: Program, folder: Path, data: Path, depth: int, speedup: float, method: Method,
    samples: int, trials: int,
) -> Row:  # fmt: skip
    """One method at one speed-up."""
    started = time.perf_counter()
    options = Options(
        macs=1 / speedup, importance=method.importance, refit=method.refit, dims=("channels",),
        calibration_samples=samples, batch_size=BATCH, max_trials=trials * method.searched,
    )  # fmt: skip
    calibration = on_samples(program, data, options, [], folder=folder, kept=folder / "statistics")
    planned = plan_program(program, options, calibration=calibration)
    if method.fitted:
        fit(planned)
    seconds = time.perf_counter() - started
    test = read_samples(program, data, "evaluation", count=1000, batch_size=100)
    closed = None
    if method.refit:
        cut = calibration.closed_form(planned.plan, planned.dims)
        closed = _accuracy(prune_program(program, planned.plan, cut), test)
    pruned = prune_program(program, planned.plan, planned.cut)
    dense, left = cost(calibration.named.graph), cost(edit_graph(calibration.named, planned.plan))
    return Row(
        depth, speedup, method.name, dense.macs / left.macs, left.parameters / dense.parameters,
        _accuracy(pruned, test), closed, seconds,
    )  # fmt: skip


def _accuracy(program: Program, test: Samples) -> float:
    return test.score(score_samples(program, test)[1])


def rows(
    data: Path, depths, speedups, samples: int, trials: int, names: list[str], done: list[Row]
) -> Iterator[Row]:
    """What is not done yet."""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        write_data(data, place, samples)
        for depth in depths:
            folder = place / f"resnet{depth}"
            program = write_network(data, depth, folder)
            for speedup in speedups:
                for method in (m for m in METHODS if m.name in names):
                    key = (depth, speedup, method.name)
                    if key not in {(r.depth, r.asked, r.method) for r in done}:
                        yield measure(
                            program, folder, place, depth, speedup, method, samples, trials
                        )


def peers() -> dict[tuple[int, float], tuple[str, float, float]]:
    """By depth and speed-up: the best criterion of torch-pruning with new statistics of its batch
    norms, its accuracy so, and the best accuracy as networks come out."""
    file = RESULTS / "peers.json"
    if not file.exists():
        return {}
    found = {}
    for network in json.loads(file.read_text())["networks"]:
        best = max(network["rows"], key=lambda row: row["accuracy_bn"])
        plain = max(row["accuracy"] for row in network["rows"])
        found[network["depth"], network["speedup"]] = best["criterion"], best["accuracy_bn"], plain
    return found


def table(result: list[Row]) -> Table:
    out = Table("", "MACs", "method", "top-1", "closed form", "parameters", "s")
    best = peers()
    for key in dict.fromkeys((r.depth, r.asked) for r in result):
        if key in best:
            name, fresh, plain = best[key]
            label = f"torch-pruning, best as it comes ({name} with new BN statistics)"
            out.add_row(f"ResNet-{key[0]}", f"{key[1]:g}x", label, f"{plain:.3f} ({fresh:.3f})")
        for r in (r for r in result if (r.depth, r.asked) == key):
            closed = "" if r.closed is None else f"{r.closed:.3f}"
            out.add_row(f"ResNet-{r.depth}", f"{r.speedup:.2f}x", r.method, f"{r.accuracy:.3f}",
                        closed, f"{r.parameters:.2f}", f"{r.seconds:.0f}")  # fmt: skip
    return out


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder with the networks")
    parser.add_argument("--depths", default="20,56")
    parser.add_argument("--speedups", default="2.1,3", help="of MACs")
    parser.add_argument("--samples", type=int, default=1000, help="images to calibrate on")
    parser.add_argument("--trials", type=int, default=24, help="of a search, after its table")
    names = [method.name for method in METHODS]
    parser.add_argument("--method", action="append", choices=names, metavar="NAME",
                        help=f"one of: {'; '.join(names)}. May be repeated")  # fmt: skip
    parser.add_argument("--out", type=Path, default=RESULTS / "vision.json")
    args = parser.parse_args(argv)
    with exit_on_error():
        depths, speedups = map(int, args.depths.split(",")), map(float, args.speedups.split(","))
        document = begun(args.out, {"samples": args.samples, "trials": args.trials})
        result = [Row(**row) for row in document["rows"]]
        console = Console(width=140)
        asked = (list(depths), list(speedups), args.samples, args.trials, args.method or names)
        for row in rows(args.data, *asked, result):
            result.append(row)
            document["rows"].append(asdict(row))
            write_report(document, args.out)
            console.print(f"{row.method}: {row.accuracy:.3f}")
        console.print(table(result))


if __name__ == "__main__":
    main()
