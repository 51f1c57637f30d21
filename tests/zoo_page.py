"""The page of exported architectures: `make exports` writes docs/exports.md.

Rows that are done are kept in build/exports.jsonl, so an interrupted run goes on where it stopped.
"""

import json
import re
import tempfile
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

import zoo
from zoo_coreml import check_coreml
from zoo_exports import OK, check_onnx

ROOT = Path(__file__).parent.parent
PAGE, STATE = ROOT / "docs" / "exports.md", ROOT / "build" / "exports.jsonl"
CHECKS = {"ONNX": check_onnx, "Core ML": check_coreml}
HEADER = """\
# Exports

Every architecture of mlx-lm {mlx_lm} that `tests/zoo.py` builds, tiny and with random weights, as
ONNX and as a Core ML program. `make exports` writes this page.

- *ONNX*, run by ONNX Runtime {onnxruntime} on the CPU: with its KV cache as inputs and outputs,
  logits and caches equal MLX's at three sizes (at most 1e-4 of the largest entry), and 16 tokens
  decoded greedily are stock mlx-lm's.
- *Core ML*, checked by a NumPy evaluator of the program, since Core ML itself runs on a Mac only:
  with open sizes, logits and caches equal MLX's at two sizes, and with the cache kept in states, 16
  tokens are stock mlx-lm's. `ok without a cache`: the logits of 7 tokens are equal.
- Anything else is what stands in the way.

{counts}

| architecture | ONNX | Core ML |
|---|---|---|
"""


def cell(said: str) -> str:
    """One line, without what lies on this machine."""
    said = re.sub(r"\S*/site-packages/(\S+):\d+", r"\1", said.splitlines()[0])
    return said.partition("): [")[0].replace("|", "/").partition(" [eval]")[0]


def row(name: str) -> dict[str, str]:
    """What each check says of an architecture."""
    said = {"architecture": name}
    for target, check in CHECKS.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                said[target] = cell(check(name, Path(folder)))
            except Exception as error:  # some code fails on any cache but its own
                said[target] = cell(f"its own code fails: {error}")
    return said


def page(rows: list[dict[str, str]]) -> str:
    counts = ", ".join(
        f"{target}: {sum(r[target].startswith(OK) for r in rows)} of {len(rows)} ok"
        for target in CHECKS
    )
    body = "".join(f"| {' | '.join(r[k] for k in ('architecture', *CHECKS))} |\n" for r in rows)
    versions = {"mlx_lm": version("mlx-lm"), "onnxruntime": version("onnxruntime")}
    return HEADER.format(counts=counts + ".", **versions) + body


def read_page(text: str) -> dict[str, list[str]]:
    """By architecture, what the page says of each target."""
    rows = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {r[0]: r[1:] for r in rows if r[0] != "architecture"}


def main() -> None:
    mx.disable_compile()
    STATE.parent.mkdir(exist_ok=True)
    lines = STATE.read_text().splitlines() if STATE.exists() else []
    done = {r["architecture"]: r for r in map(json.loads, lines)}
    for name in zoo.CONFIGS:
        if name not in done:
            done[name] = row(name)
            with STATE.open("a") as out:
                out.write(json.dumps(done[name]) + "\n")
    PAGE.write_text(page([done[name] for name in zoo.CONFIGS]), encoding="utf8")


if __name__ == "__main__":
    main()
