"""Kill a job again and again; what comes out must be what an undisturbed one gives.

    python -P -m mlx_compress.benchmarks.killed --model lm-books5m --data lm-books5m
    python -P -m mlx_compress.benchmarks.killed --model lm-books5m --data lm-books5m --student DIR

`compress prune`, with the criterion chosen on held-out text and the weights refitted, or with a
student `compress distill`, runs once undisturbed; then, from nothing, in processes that are killed
(SIGKILL) at random moments, and once more to the end. Weights, config and plan, or the loss of each
step, are compared byte for byte, and no output folder may be there before its time.
"""

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from ..errors import GateFailed, exit_on_error
from ..report import machine, write_report


@dataclass(frozen=True)
class Job:
    """What is killed: `compress prune` of `model`, or `compress distill` from it to `student`."""

    model: str
    data: str
    samples: int = 32
    student: str | None = None
    iters: int = 60

    def command(self, out: Path, statistics: Path) -> list[str]:
        run = "from mlx_compress.cli import main; main()"
        start = [sys.executable, "-P", "-c", run]
        shared = ["--data", self.data, "--mlx-path", str(out)]
        if self.student is None:
            return [
                *start, "prune", "--model", self.model, *shared, "--target", "params=0.7",
                "--statistics", str(statistics), "--calibration-samples", str(self.samples),
                "--max-trials", "4",
            ]  # fmt: skip
        return [
            *start, "distill", "--teacher", self.model, "--model", self.student, *shared,
            "--iters", str(self.iters), "--steps-per-eval", "5", "--val-samples", "4",
            "--loss", "taid", "--eval-samples", "8", "--max-seq-length", "128",
        ]  # fmt: skip

    def digests(self, folder: Path) -> dict[str, str]:
        """SHA-256 of weights and config, and of the plan without what was noted on the way, or of
        the losses."""
        files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
        found = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
        pruned = self.student is None
        file, key = ("compression.json", "plan") if pruned else ("report.json", "distillation")
        document = json.loads((folder / file).read_text())[key]
        found[key] = hashlib.sha256(json.dumps(document).encode()).hexdigest()
        return found


def measure(job: Job, kills: int, seed: int, say=print) -> dict:
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        started = time.perf_counter()
        subprocess.run(job.command(place / "whole", place / "s1"), check=True, capture_output=True)
        seconds = time.perf_counter() - started
        say(f"undisturbed: {seconds:.0f} s")
        arguments = job.command(place / "killed", place / "s2")
        rng, moments = random.Random(seed), []
        for _ in range(kills):
            # So that all of them together take about as long as the whole.
            moments.append(_kill(arguments, rng.uniform(0, 2 * seconds / kills)))
            if (place / "killed").exists():
                break
            say(f"killed after {moments[-1]:.0f} s")
        if not (place / "killed").exists():
            subprocess.run(arguments, check=True, capture_output=True)
        same = job.digests(place / "whole") == job.digests(place / "killed")
        left = [file.name for file in place.iterdir() if file.name.startswith(".")]
    return {"seconds": seconds, "killed_after": moments, "same": same, "left_behind": len(left)}


def _kill(arguments: list[str], after: float) -> float:
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(timeout=after)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return after


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--student", help="distil to it, instead of pruning")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--iters", type=int, default=60)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/killed.json")
    args = parser.parse_args(argv)
    with exit_on_error():
        job = Job(args.model, args.data, args.samples, args.student, args.iters)
        result = measure(job, args.kills, args.seed)
        write_report({**machine(), **result}, args.out)
        if not result["same"]:
            raise GateFailed("what was killed and resumed differs from what was not.")
        print(f"the same after {len(result['killed_after'])} kills")


if __name__ == "__main__":
    main()
