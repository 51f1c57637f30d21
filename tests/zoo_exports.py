"""Every architecture of the zoo exported with its cache, and what came out of it.

    check_onnx("llama", folder)     export, compare, decode: "ok" or the reason why not
    main()                          a table of all; `names` picks some

"ok" means: logits and caches equal the MLX program's at three shapes (relative to the largest
entry, at most 1e-4), and 16 tokens decoded greedily, from a prompt of several tokens and from a
single one, are those of stock mlx-lm with its own cache.
"""

import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_compress.bridges.decoder import module_program
from mlx_compress.bridges.onnx.runner import RunError

import zoo
from mlx_compress.errors import InputError
from mlx_compress.program import Program

SHAPES = (
    {"batch": 2, "length": 5, "past": 0},
    {"batch": 1, "length": 1, "past": 6},
    {"batch": 2, "length": 3, "past": 4},
)
PROMPTS = ([5, 17, 3, 42, 8], [7])
TOLERANCE = 1e-4
TOKENS = 16
OK = "ok"
Runner = Callable[[dict], list[np.ndarray]]


def check_onnx(name: str, folder: Path) -> str:
    """Export to ONNX below `folder`, and run it with ONNX Runtime on the CPU."""
    from mlx_compress.bridges.onnx.export import export_onnx
    from mlx_compress.bridges.onnx.runner import load

    return check(name, lambda program: load(export_onnx(program, folder / f"{name}.onnx").path).run)


CHECKS = {"ONNX": check_onnx}


def check(name: str, export: Callable[[Program], Runner]) -> str:
    module = zoo.build(name)
    try:
        program = module_program(lambda: module)
    except (InputError, AttributeError) as refused:  # a cache of a kind of its own
        return str(refused).partition(" (for ")[0]
    run = export(program)
    for k, sizes in enumerate(SHAPES):
        feeds = program.feeds(sizes, seed=k)
        error = worst(run(feeds), program.run(feeds))
        if not error <= TOLERANCE:
            return f"differs by {error:.0e} at {sizes}"
    return next((said for prompt in PROMPTS if (said := decodes(program, run, prompt, module))), OK)


def decodes(program: Program, run: Runner, prompt: list[int], module) -> str | None:
    """None, or what is to say about decoding from a prompt."""
    try:
        got = decode(program, run, prompt)
    except RunError as error:  # sparse attention that picks more keys than there are
        node = re.search(r"running (\w+) node", str(error))
        if len(prompt) > 1 or node is None:
            raise
        return f"{OK} from 2 tokens on; with one and no past, {node[1]} fails"
    if got == stock_decode(module, prompt):
        return None
    if got == stock_decode(module, prompt, cached=False):
        return f"{OK}, as mlx-lm without a cache: with its own, mlx-lm computes something else"
    return "decodes other tokens"


def worst(got: list[np.ndarray], want: list[mx.array]) -> float:
    """The largest difference of any output over that output's largest entry."""
    errors = [0.0]
    for g, w in zip(got, map(np.array, want), strict=True):
        if g.shape != w.shape:
            return float("inf")
        if w.size:
            with np.errstate(invalid="ignore"):
                off = np.where(g == w, 0, np.abs(g - w)).max()
            errors.append(off / max(np.abs(w[np.isfinite(w)]).max(initial=0), 1e-30))
    return float(np.max(errors))


def decode(program: Program, run: Runner, prompt: list[int]) -> list[int]:
    """Tokens chosen greedily; the first step has no past."""
    feeds = program.feeds({"batch": 1, "length": len(prompt), "past": 0})
    feeds["input_ids"] = np.array([prompt], np.int32)
    chosen: list[int] = []
    while len(chosen) < TOKENS:
        logits, *state = run(feeds)
        chosen.append(int(logits[0, -1].argmax()))
        feeds = dict(zip(program.inputs, [np.array([chosen[-1:]], np.int32), *state], strict=True))
    return chosen


def stock_decode(module, prompt: list[int], *, cached: bool = True) -> list[int]:
    """The same by mlx-lm, with the cache that it makes itself, or from the whole text each time."""
    from mlx_lm.models.cache import make_prompt_cache

    cache, tokens, chosen = make_prompt_cache(module), prompt, []
    while len(chosen) < TOKENS:
        given = {"cache": cache} if cached else {}
        out = module(mx.array([tokens if cached else prompt + chosen], mx.int32), **given)
        logits = out[0] if isinstance(out, tuple | list) else out
        tokens = [int(mx.argmax(logits[0, -1]).item())]
        chosen += tokens
    return chosen


def main(names: list[str] | None = None) -> None:
    mx.disable_compile()
    print(f"| architecture | {' | '.join(CHECKS)} |\n|{'---|' * (1 + len(CHECKS))}")
    good = dict.fromkeys(CHECKS, 0)
    for name in names or zoo.CONFIGS:
        said = {}
        for target, run in CHECKS.items():
            with tempfile.TemporaryDirectory() as folder:
                said[target] = run(name, Path(folder))
            good[target] += said[target].startswith(OK)
        cells = [text.replace("|", "/").replace("\n", " ") for text in said.values()]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    print(f"\n{', '.join(f'{target}: {count} ok' for target, count in good.items())}")


if __name__ == "__main__":
    main(sys.argv[1:])
