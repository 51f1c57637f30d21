"""Open anything that can be exported as a program: four kinds of model, one way in.

    a folder with graph.json       a saved program (`archive.py`)
    a folder that mlx-lm knows     a decoder with its cache, or without one
    another Hugging Face folder    through transformers and torch.export
    a .pt2 file                    a program that torch.export wrote
"""

import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import mlx.core as mx

from ..archive import is_program, load_program
from ..errors import InputError
from ..parity import Parity, compare, random_cases
from ..program import Program, program_of
from ..sizes import solve
from .decoder import EXAMPLE, GRIDS, fetcher, module_program
from .mlx_lm import LanguageModel, is_known, open_model, read_config, trace_logits

FORWARD = ("batch", "length")


def open_program(
    name: str | Path,
    *,
    cached: bool = True,
    dtype: mx.Dtype | None = mx.float32,
    sizes: Mapping[str, int] | None = None,
    trust_remote_code: bool = False,
) -> Program:
    """The program of a folder, a hub repository or a .pt2 file.

    `cached` gives a language model its cache as inputs and outputs; `dtype` is that of its
    weights; `sizes` are used where its code leaves none open. Raises `InputError` for what cannot
    be opened.
    """
    path = Path(name).expanduser()
    if path.suffix == ".pt2":
        return torch_program(path)
    if path.is_dir() and is_program(path):
        return load_program(path)
    if path.is_dir() and not is_known(read_config(path)):
        return torch_program(path, trust_remote_code=trust_remote_code)
    model = open_model(name, trust_remote_code=trust_remote_code)
    make = partial(model.module, dequantised=False)
    if cached:
        return module_program(make, dtype=dtype, metadata=_about(model))
    return forward_program(model, dtype=dtype, sizes=sizes)


def forward_program(
    model: LanguageModel, *, dtype: mx.Dtype | None, sizes: Mapping[str, int] | None = None
) -> Program:
    """Tokens in, logits out, for every architecture; its sizes stay open where the code lets them.

    Where it does not (a loop over the tokens), they are those of `sizes`.
    """
    module = model.module(dequantised=False)

    def at(batch: int, length: int):
        return trace_logits(module, mx.zeros((batch, length), mx.int32), dtype=dtype)

    example = {name: (sizes or {}).get(name, EXAMPLE[name]) for name in FORWARD}
    try:
        graph = solve(at, [{name: grid[name] for name in FORWARD} for grid in GRIDS])
    except InputError:
        graph, example = at(**example), {}

    fetch = fetcher(partial(model.module, dequantised=False), dtype)
    limits = {"input_ids": graph.values[graph.outputs[0]].shape[-1]}
    return Program(graph, fetch, ("input_ids",), ("logits",), example, limits, _about(model))


def _about(model: LanguageModel) -> dict[str, str]:
    """The model's name, and the tokens that end a text, as JSON."""
    stop = None
    for name in ("generation_config.json", "config.json"):
        file = model.path / name
        if stop is None and file.is_file():
            stop = json.loads(file.read_text(encoding="utf8")).get("eos_token_id")
    stop = [] if stop is None else stop if isinstance(stop, list) else [stop]
    return {"model": model.path.name, "stop_tokens": json.dumps(stop)}


def torch_program(path: Path, *, trust_remote_code: bool = False) -> Program:
    """The program of a .pt2 file, or of a folder that transformers opens. Imports torch."""
    from .torch import from_hf, from_torch

    if path.suffix == ".pt2":
        imported = from_torch(path)
    else:
        imported = from_hf(path, trust_remote_code=trust_remote_code)
    return imported_program(imported, metadata={"model": path.name})


def imported_program(imported, *, metadata: Mapping[str, str] | None = None) -> Program:
    """The program of what `from_torch` made (`bridges.torch.Imported`)."""
    example = dict(zip((spec.name for spec in imported.inputs), imported.example, strict=True))
    names = _readable(imported.inputs)
    dynamic = {
        spec.name: {axis: names[n] for axis, n in enumerate(spec.shape) if n in names}
        for spec in imported.inputs
    }
    return program_of(
        imported,
        example,
        outputs=imported.outputs,
        parameters=imported.parameters,
        dynamic=dynamic,
        metadata=metadata,
    )


def _readable(inputs) -> dict[str, str]:
    """Names for open sizes: a .pt2 forgets those that were given, and has symbols such as s31."""
    names: dict[str, str] = {}
    for axis, size in ((k, n) for spec in inputs for k, n in enumerate(spec.shape)):
        if isinstance(size, str) and size not in names:
            usual = FORWARD[axis] if axis < len(FORWARD) else size
            symbol = re.fullmatch(r"s\d+", size) and usual not in names.values()
            names[size] = usual if symbol else size
    return names


def compare_with_torch(
    program: Program, path: Path, *, trust_remote_code: bool = False
) -> list[Parity]:
    """How far an imported program is from what torch computes, on random inputs."""
    from .torch import source_runner

    runner = source_runner(path, program.outputs, trust_remote_code=trust_remote_code)
    return compare(program, runner, random_cases(program))
