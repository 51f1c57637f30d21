"""Inputs to compare an export on: random ones at several sizes, and real ones."""

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..data import load_windows
from ..errors import InputError
from ..parity import Case, random_cases
from ..program import Program
from .decoder import caches

# Any text will do: it gives a model likely tokens, and a cache filled by them.
TEXT = (
    "The river ran low in August, and the boats that had carried grain all spring lay on the sand. "
    "Every morning the ferryman walked down to look at them, counted the planks, and went home. "
)
SPANS = ((0, 32), (16, 16))  # tokens before, and tokens given


def parity_cases(
    program: Program, tokenizer=None, data: Path | None = None,
    *, sizes: Mapping[str, int] | None = None, seed: int = 0,
) -> list[Case]:  # fmt: skip
    """Random cases, and real ones: text for a language model, the arrays of an .npz for others.

    Without `data`, a language model that has a tokenizer reads a few sentences of our own. The
    first random case has the `sizes`; where these name a length, text has it too.
    """
    real = _real_cases(program, tokenizer, data, sizes or {}, seed)
    return [*random_cases(program, sizes, seed=seed), *real]


def _real_cases(program: Program, tokenizer, data: Path | None, sizes, seed: int) -> list[Case]:
    if data is not None and Path(data).suffix == ".npz":
        return [Case(Path(data).name, read_arrays(program, data))]
    cached = [name for name, _ in caches(program)]
    reads_text = program.inputs == ("input_ids", *cached) and "length" in program.sizes
    if not reads_text or tokenizer is None:
        if data is not None:
            raise InputError(
                f"--data {data}: this model reads {', '.join(program.inputs)}; give an .npz file "
                "with arrays of these names."
            )
        return []
    spans = [(sizes.get("past", 0), sizes["length"])] if "length" in sizes else SPANS
    spans = spans if cached else [(0, spans[0][1])]
    ids = _ids(tokenizer, data, max(map(sum, spans)), seed)
    words = ("text, {1} tokens", "text, {1} tokens after {0}")
    return [
        Case(words[past > 0].format(past, new), _after(program, ids[:, : past + new], past))
        for past, new in spans
    ]


def _ids(tokenizer, data: Path | None, length: int, seed: int) -> np.ndarray:
    """Token ids [1, length]."""
    if data is not None:
        split = load_windows(data, "evaluation", tokenizer, length=length, count=1, seed=seed)
        return split.tokens
    ids: list[int] = []
    while len(ids) < length:
        ids += tokenizer.encode(TEXT)
    return np.array([ids[:length]], dtype=np.int32)


def _after(program: Program, ids: np.ndarray, past: int) -> dict[str, np.ndarray]:
    """Inputs for the ids from `past` on, with the cache that the ids before them fill."""
    feeds = program.feeds({"batch": 1, "length": past, "past": 0})
    state = {name: feeds[name] for name, _ in caches(program)}
    if past:
        held = program.run({"input_ids": ids[:, :past], **state})
        named = dict(zip(program.outputs, held, strict=True))
        state = {name: np.array(named[present]) for name, present in caches(program)}
    return {"input_ids": ids[:, past:], **state}


def read_arrays(program: Program, file: Path) -> dict[str, np.ndarray]:
    """The program's inputs from an .npz. Raises `InputError` for one that is missing."""
    try:
        with np.load(file, allow_pickle=False) as held:
            arrays = {name: held[name] for name in held.files}
    except (OSError, ValueError) as error:
        raise InputError(f"--data {file}: cannot be read as .npz ({error}).") from error
    missing = [name for name in program.inputs if name not in arrays]
    if missing:
        raise InputError(
            f"--data {file}: has no array {missing[0]!r}; it holds {', '.join(arrays) or 'none'}."
        )
    kinds = {n: program.graph.values[i].dtype for n, i in zip(program.inputs, program.graph.inputs,
             strict=True)}  # fmt: skip
    return {name: np.array(mx.array(arrays[name]).astype(kinds[name])) for name in program.inputs}
