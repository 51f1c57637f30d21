"""What all-MiniLM-L6-v2 keeps of STS-B with fewer parameters, and nothing trained.

    python -P -m mlx_compress.benchmarks.encoders --data FOLDER --kept 0.75,0.5

Random units and magnitude as they are, and the first layers alone; then ours: the criterion chosen
on held-out pairs, with the weights refitted. Calibrated on pairs of STS-B's training split;
Spearman's rank correlation on its test split.
"""

import argparse
import csv
import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..archive import load_program, save_program
from ..bridges.exports import copy_tokenizer
from ..bridges.programs import imported_program
from ..bridges.tokenizers import open_tokenizer
from ..bridges.torch import from_hf
from ..calibration import fit
from ..errors import InputError, exit_on_error
from ..evaluate_samples import score_samples
from ..options import Options
from ..program import Program, prune_program
from ..report import write_report
from ..samples import Samples, read_samples
from ..shrink import on_samples, plan_program
from .begun import begun
from .imported import installed_encoder

RESULTS = Path(__file__).parent / "results"
SPLITS = ("train", "test")


@dataclass(frozen=True)
class Method:
    name: str
    importance: str
    refit: bool = False


METHODS = (
    Method("random", "random"),
    Method("magnitude", "magnitude"),
    Method("magnitude, refitted", "magnitude", refit=True),
    Method("ours", "auto", refit=True),
)


@dataclass(frozen=True)
class Row:
    """`kept` is the fraction of block parameters that is left, `closed` after closed form alone."""

    method: str
    asked: float
    kept: float
    spearman: float
    closed: float | None
    chosen: str
    seconds: float


def write_data(data: Path, folder: Path) -> None:
    """train.jsonl and test.jsonl, as `compress --data` takes them."""
    for split in SPLITS:
        file = data / "enc-stsb" / f"stsb-en-{split}.csv"
        if not file.exists():
            raise InputError(f"{file}: no such file; --data is the folder that holds enc-stsb.")
        with file.open(encoding="utf8", newline="") as stream:
            records = [
                {"sentence1": row[0], "sentence2": row[1], "score": float(row[2])}
                for row in csv.reader(stream)
            ]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf8")


def write_encoder(folder: Path) -> Program:
    """The installed encoder, imported, as `compress import` leaves it."""
    source = installed_encoder()
    folder.mkdir()
    save_program(imported_program(from_hf(source)), folder)
    copy_tokenizer(source)(folder)
    return load_program(folder)


def measure(program, folder: Path, data: Path, method: Method, kept: float, pairs: int) -> Row:
    started = time.perf_counter()
    options = Options(
        params=kept, importance=method.importance, refit=method.refit,
        calibration_samples=pairs, batch_size=32, max_seq_length=48,
    )  # fmt: skip
    calibration = on_samples(
        program, data, options, [], folder=folder, kept=folder / "statistics",
        open_tokenizer=open_tokenizer,
    )  # fmt: skip
    planned = plan_program(program, options, calibration=calibration)
    if method.refit:
        fit(planned)
    seconds = time.perf_counter() - started
    test = _test(program, folder, data)
    closed = None
    if planned.refit:
        cut = calibration.closed_form(planned.plan, planned.dims)
        closed = _spearman(prune_program(program, planned.plan, cut), test)
    score = _spearman(prune_program(program, planned.plan, planned.cut), test)
    chosen = planned.plan.recipe.get("chosen", "")
    return Row(method.name, kept, planned.kept_parameters, score, closed, chosen, seconds)


def truncated(dense: Program, folder: Path, data: Path, kept: float) -> Row:
    """The first layers alone, rounded up; of a BERT each is as large as another."""
    started = time.perf_counter()
    config = json.loads((installed_encoder() / "config.json").read_text())
    layers = config["num_hidden_layers"]
    left = math.ceil(layers * kept)
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "first")
        shutil.copytree(installed_encoder(), source)
        (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": left}))
        program = imported_program(from_hf(source))
    seconds = time.perf_counter() - started
    score = _spearman(program, _test(dense, folder, data))
    return Row("first layers", kept, left / layers, score, None, "", seconds)


def _test(program: Program, folder: Path, data: Path) -> Samples:
    return read_samples(
        program, data, "evaluation", count=10_000, batch_size=50, length=128, folder=folder,
        open_tokenizer=open_tokenizer,
    )  # fmt: skip


def _spearman(program: Program, test: Samples) -> float:
    return test.score(score_samples(program, test)[1])


def rows(data: Path, kept: list[float], pairs: int, done: list[Row]) -> Iterator[Row]:
    """What is not done yet."""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        write_data(data, place)
        program = write_encoder(place / "encoder")
        known = {(r.method, r.asked) for r in done}
        for share in kept:
            if ("first layers", share) not in known:
                yield truncated(program, place / "encoder", place, share)
            for method in METHODS:
                if (method.name, share) not in known:
                    yield measure(program, place / "encoder", place, method, share, pairs)


def table(result: list[Row]) -> Table:
    out = Table("block parameters", "method", "Spearman", "closed form", "chosen", "s")
    for r in result:
        closed = "" if r.closed is None else f"{r.closed:.4f}"
        out.add_row(f"{100 * r.kept:.1f} %", r.method, f"{r.spearman:.4f}", closed, r.chosen,
                    f"{r.seconds:.0f}")  # fmt: skip
    return out


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder with enc-stsb")
    parser.add_argument("--kept", default="0.75,0.5", help="of the block parameters")
    parser.add_argument("--pairs", type=int, default=512, help="to calibrate on")
    parser.add_argument("--out", type=Path, default=RESULTS / "encoders.json")
    args = parser.parse_args(argv)
    with exit_on_error():
        document = begun(args.out, {"pairs": args.pairs})
        result = [Row(**row) for row in document["rows"]]
        console = Console(width=120)
        for row in rows(args.data, list(map(float, args.kept.split(","))), args.pairs, result):
            result.append(row)
            document["rows"].append(asdict(row))
            write_report(document, args.out)
            console.print(f"{row.method} at {row.kept:.2f}: {row.spearman:.4f}")
        console.print(table(result))


if __name__ == "__main__":
    main()
