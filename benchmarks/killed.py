"""Kill a compression again and again; what comes out must be what an undisturbed one gives.

    python -P -m mlx_compress.benchmarks.killed --model lm-books5m --data lm-books5m

`compress prune`, with the criterion chosen on held-out text and the weights refitted, runs once
undisturbed; then, from nothing, in processes that are killed (SIGKILL) at random moments, and once
more to the end. Weights, config and plan are compared byte for byte, and no output folder may be
there before its time.
"""

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ..errors import GateFailed, exit_on_error
from ..report import machine, write_report


def command(model: str, data: str, out: Path, statistics: Path, samples: int) -> list[str]:
    run = "from mlx_compress.cli import main; main()"
    return [
        sys.executable, "-P", "-c", run, "prune", "--model", model, "--data", data,
        "--target", "params=0.7", "--mlx-path", str(out), "--statistics", str(statistics),
        "--calibration-samples", str(samples), "--max-trials", "4",
    ]  # fmt: skip


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of weights and config, and of the plan without what was noted on the way."""
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    found = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    plan = json.loads((folder / "compression.json").read_text())["plan"]
    found["plan"] = hashlib.sha256(json.dumps(plan).encode()).hexdigest()
    return found


def measure(model: str, data: str, samples: int, kills: int, seed: int, say=print) -> dict:
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        started = time.perf_counter()
        arguments = command(model, data, place / "whole", place / "s1", samples)
        subprocess.run(arguments, check=True, capture_output=True)
        seconds = time.perf_counter() - started
        say(f"undisturbed: {seconds:.0f} s")
        arguments = command(model, data, place / "killed", place / "s2", samples)
        rng, moments = random.Random(seed), []
        for _ in range(kills):
            # So that all of them together take about as long as the whole.
            moments.append(_kill(arguments, rng.uniform(0, 2 * seconds / kills)))
            if (place / "killed").exists():
                break
            say(f"killed after {moments[-1]:.0f} s")
        if not (place / "killed").exists():
            subprocess.run(arguments, check=True, capture_output=True)
        same = digests(place / "whole") == digests(place / "killed")
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
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/killed.json")
    args = parser.parse_args(argv)
    with exit_on_error():
        result = measure(args.model, args.data, args.samples, args.kills, args.seed)
        write_report({**machine(), **result}, args.out)
        if not result["same"]:
            raise GateFailed("what was killed and resumed differs from what was not.")
        print(f"the same after {len(result['killed_after'])} kills")


if __name__ == "__main__":
    main()
