"""What stands beside an exported language model: a script that runs it, and a page about it."""

import shutil
from pathlib import Path

from ...program import Program
from . import bpe, runner

README = """\
# {name}

A language model for ONNX Runtime. It runs without MLX:

    pip install onnxruntime numpy
    python generate.py "Once upon a time" --max-tokens 100
    python generate.py "Once upon a time" --temperature 0.8 --top-p 0.95 --seed 1

From Python:

    from generate import generate
    for text in generate("{file}", "Once upon a time", max_tokens=100):
        print(text, end="", flush=True)

`generate.py` reads tokenizer.json with the package tokenizers where that is installed, and else by
itself (`bpe.py`) if it is a byte-level BPE. Without a tokenizer.json, give it tokens: a list of
numbers in place of the text, and a `tokenizer` with `encode` and `decode`.

| input | shape |
|---|---|
{inputs}

| output | shape |
|---|---|
{outputs}

{cache}
The file's metadata hold these pairs and the tokens that end a text.
"""
CACHE = {
    "grow": "`present.*` go in as `past_key_values.*` in the next step; the first step has a past "
    "of length 0.",
    "buffer": "The caches are buffers for `capacity` tokens, as many as you like up to the "
    "`mlx_compress.positions` of the metadata, for one sequence. `past_length`, one int64, says "
    "how many are filled; new keys and values are written behind them, and `present.*` may be "
    "the same memory as `past_key_values.*`.",
}


def add_scripts(path: Path, program: Program, cache: str = "grow") -> None:
    """Write generate.py, bpe.py and README.md beside a language model that has a cache.

    `cache` is how the file keeps it (`OnnxOptions`).
    """
    if "past_key_values.0.key" not in program.inputs:
        return
    shutil.copyfile(runner.__file__, path.with_name("generate.py"))
    shutil.copyfile(bpe.__file__, path.with_name("bpe.py"))
    graph = program.graph
    page = README.format(
        name=program.metadata.get("model", path.stem), file=path.name,
        inputs=_table(program.inputs, graph.inputs, graph.values, cache),
        outputs=_table(program.outputs, graph.outputs, graph.values, cache),
        cache=CACHE[cache],
    )  # fmt: skip
    path.with_name("README.md").write_text(page, encoding="utf8")


def _table(names, ids, values, cache: str) -> str:
    """The first three, and how many more there are."""

    def shape(name: str, value) -> str:
        sizes = list(map(str, value.shape))
        if cache == "buffer" and name.startswith((runner.PAST, runner.PRESENT)):
            sizes[2] = "capacity"
        return ", ".join(sizes)

    rows = [
        f"| {name} | {shape(name, values[i])} |" for name, i in zip(names[:3], ids, strict=False)
    ]
    more = len(names) - len(rows)
    return "\n".join(rows + [f"| and {more} more, a pair for each layer | |"] * (more > 0))
