"""Every architecture of the zoo as a Core ML package, and what came out of it.

    check_coreml("llama", folder)    export, evaluate, decode: "ok" or the reason why not
    main()                           a table of all; names pick some

The packages are evaluated by the bridge's `reference.py`; Core ML itself runs on a Mac only. "ok"
means: in float32, logits and caches equal the MLX program's at two shapes of a package with open
sizes (relative to the largest entry, at most 1e-4), and a package that keeps its cache in states
decodes 16 tokens greedily, each of which is stock mlx-lm's own choice, or as good but for the
rounding of a float16 cache. "ok without a cache": the logits of 7 tokens are equal.
"""

import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_compress.bridges.coreml.export import export_coreml
from mlx_compress.bridges.coreml.reference import Package
from mlx_compress.bridges.decoder import module_program
from mlx_compress.bridges.mlx_lm import trace_logits

import zoo
from mlx_compress.errors import InputError
from mlx_compress.program import Program, of_arrays
from zoo_exports import OK, TOKENS, worst

TOLERANCE = 1e-4
TIE = 2e-3  # of the largest logit
LENGTH = 7
PROMPT = [5, 17, 3, 42, 8]
CONTEXT = 32
SHAPES = ({"batch": 1, "length": 5, "past": 6}, {"batch": 1, "length": 1, "past": 9})
OPEN = {"batch": 1, "length": (1, 16), "past": (1, CONTEXT)}


def check_coreml(name: str, folder: Path) -> str:
    """Export to Core ML below `folder`, and evaluate what was written."""
    module = zoo.build(name)
    try:
        program = module_program(lambda: module)
    except Exception as refused:  # the code of some architectures asks for its own cache
        return _without_cache(module, folder / "fixed.mlpackage", str(refused))
    try:
        said = _differs(program, folder / "open.mlpackage")
    except InputError as refused:
        return str(refused)
    try:
        return said or _decodes(program, module, folder / "states.mlpackage")
    except InputError as refused:
        return f"{OK}, but not in states: {refused}"


def _without_cache(module, path: Path, reason: str) -> str:
    try:
        graph = trace_logits(module, mx.zeros((1, LENGTH), mx.int32), dtype=mx.float32)
        fetch = of_arrays(dict(tree_flatten(module.parameters())))
        limits = {"input_ids": graph.values[graph.outputs[0]].shape[-1]}
        program = Program(graph, fetch, ("input_ids",), ("logits",), limits=limits)
        export_coreml(program, path, dtype="float32")
    except InputError as refused:
        return str(refused)
    error = _error(program, Package(path), {})
    return f"{OK} without a cache" if error <= TOLERANCE else f"differs by {error:.0e}"


def _differs(program: Program, path: Path) -> str:
    """Empty where a package with open sizes equals the program."""
    export_coreml(program, path, dtype="float32", shapes=OPEN)
    package = Package(path)
    for sizes in SHAPES:
        error = _error(program, package, sizes)
        if not error <= TOLERANCE:
            return f"differs by {error:.0e} at {sizes}"
    return ""


def _error(program: Program, package: Package, sizes: dict) -> float:
    feeds = program.feeds(sizes, seed=3)
    named = {name.replace(".", "_"): array for name, array in feeds.items()}
    return worst(list(package(named).values()), program.run(feeds))


def _decodes(program: Program, module, path: Path) -> str:
    shapes = {"batch": 1, "length": (1, 16)}
    export_coreml(
        program, path, dtype="float32", shapes=shapes, stateful=True, context=CONTEXT
    )
    chosen = decode(Package(path), PROMPT)
    short = shortfalls(module, PROMPT, chosen)
    if max(short) <= TIE:
        return OK
    return f"decodes another token at {next(k for k, gap in enumerate(short) if gap > TIE)}"


def shortfalls(module, prompt: list[int], chosen: list[int]) -> list[float]:
    """By how much stock mlx-lm likes each token less than its own favourite, given those before.

    Over the largest logit: 0 where the tokens are the same.
    """
    from mlx_lm.models.cache import make_prompt_cache

    cache, out = make_prompt_cache(module), []
    for tokens, token in zip([prompt, *([t] for t in chosen)], chosen, strict=False):
        logits = module(mx.array([tokens], mx.int32), cache=cache)
        logits = np.array((logits[0] if isinstance(logits, tuple | list) else logits)[0, -1])
        out.append(float((logits.max() - logits[token]) / np.abs(logits).max()))
    return out


def decode(package: Package, prompt: list[int], count: int = TOKENS) -> list[int]:
    """Tokens chosen greedily by a package with states; each step has the new tokens alone."""
    state, tokens, chosen, total = package.state(), prompt, [], 0
    while len(chosen) < count:
        total += len(tokens)
        mask = np.zeros((1, 1, len(tokens), total), np.float32)
        feeds = {"input_ids": np.array([tokens], np.int32), "causal_mask": mask}
        tokens = [int(package(feeds, state)["logits"][0, -1].argmax())]
        chosen += tokens
    return chosen


def main(names: list[str] | None = None) -> None:
    mx.disable_compile()
    good = 0
    print("| architecture | Core ML |\n|---|---|")
    for name in names or zoo.CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            said = check_coreml(name, Path(folder))
        good += said.startswith(OK)
        print(f"| {name} | {said.replace('|', '/').splitlines()[0]} |", flush=True)
    print(f"\n{good} ok")


if __name__ == "__main__":
    main(sys.argv[1:])
