"""Pairs of sentences with scores from a .jsonl: {"sentence1": ..., "sentence2": ..., "score": ...}.

Scores lie in 0 to 1, or in 0 to 5 as those of STS-B do.

Cer et al., 2017, https://arxiv.org/abs/1708.00055
"""

import json
import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from .data import read_records
from .errors import InputError
from .labelled import Choose, Found
from .padding import MASK
from .program import Program
from .tasks import similarity

SENTENCES, SCORE = ("sentence1", "sentence2"), "score"
SCALES = (1.0, 5.0)
POOLING = Path("1_Pooling", "config.json")
POOLINGS = {"mean": "mean", "mean_tokens": "mean", "cls": "cls", "cls_token": "cls"}
UNBOUNDED = 2**20  # tokenizers without a limit give a number far above this


def read_pairs(
    path: Path,
    half: int | None,
    program: Program,
    choose: Choose,
    *,
    length: int | None = None,
    folder: Path | None = None,
    open_tokenizer: Callable[[Path], Callable] | None = None,
) -> Found:
    """The pairs of a .jsonl, or of one of its halves, that `choose(there)` picks, as token ids.

    All are padded to the longest, which has at most `length` tokens. Raises `InputError` for a
    line that is no pair, for scores beyond 5, for a program that takes no text or a folder without
    its tokenizer, and for a pooling that is neither mean nor CLS.
    """
    if folder is None or open_tokenizer is None:
        raise InputError(f"{path}: sentences need a tokenizer; give the program as a folder.")
    if MASK not in program.inputs:
        raise InputError(
            f"{path}: sentences of unequal length need an input {MASK}, but the program takes "
            f"{', '.join(program.inputs)}."
        )
    _check_output(path, program)
    records, notice = read_records(path, half, pair)
    scale, said = _scale(path, [record[SCORE] for record in records])
    chosen = [records[i] for i in choose(len(records))]
    texts = [record[name] for name in SENTENCES for record in chosen]
    encoded, cut = _encode(folder, open_tokenizer(folder), texts, _limit(program, length))
    inputs = [_sides(folder, encoded, name, program) for name in program.inputs]
    scores = np.array([record[SCORE] / scale for record in chosen], np.float32)
    task = similarity(program.inputs.index(MASK), pooling(folder))
    return Found(inputs, scores, task, " ".join(filter(None, (notice, said, cut))))


def pair(where: str, record) -> dict:
    """A record, checked."""
    if not isinstance(record, dict) or not {*SENTENCES, SCORE} <= record.keys():
        found = list(record) if isinstance(record, dict) else type(record).__name__
        raise InputError(
            f'{where}: {found} is no pair; it must have "sentence1", "sentence2" and "score".'
        )
    for name in SENTENCES:
        if not isinstance(record[name], str) or not record[name].strip():
            raise InputError(f"{where}: {name!r} is {record[name]!r}; it must be a text.")
    score = record[SCORE]
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        raise InputError(f"{where}: {SCORE!r} is {score!r}; it must be a number.")
    return record


def pooling(folder: Path) -> str:
    """How a folder of sentence-transformers makes one vector of a text: "mean" (by default), "cls".

    Raises `InputError` for another way.
    """
    file = Path(folder) / POOLING
    if not file.is_file():
        return "mean"
    try:
        config = json.loads(file.read_text(encoding="utf8"))
        modes = [k.removeprefix("pooling_mode_") for k, v in config.items() if v is True]
        modes = [config["pooling_mode"]] if "pooling_mode" in config else modes
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{file}: cannot be read ({error}); fetch it anew.") from error
    known = {POOLINGS.get(mode) for mode in modes if mode != "include_prompt"}
    if len(known) != 1 or None in known:
        raise InputError(f"{file}: pools by {modes}; only by mean or CLS is known here.")
    return known.pop()


def _check_output(path: Path, program: Program) -> None:
    shape = program.graph.values[program.graph.outputs[0]].shape
    if len(shape) not in (2, 3):
        raise InputError(
            f"{path}: sentences need embeddings, (rows, width) or (rows, tokens, width), but the "
            f"program's output {program.outputs[0]} is ({', '.join(map(str, shape))})."
        )


def _scale(path: Path, scores: Sequence[float]) -> tuple[float, str]:
    """What scores are divided by, and a notice."""
    least, most = min(scores), max(scores)
    fitting = [scale for scale in SCALES if most <= scale]
    if least < 0 or not fitting:
        raise InputError(
            f"{path}: scores go from {least:g} to {most:g}; give them from 0 to 1, or 0 to 5."
        )
    scale = fitting[0]
    return scale, "" if scale == 1 else f"{path}: scores are taken to go from 0 to {scale:g}."


def _limit(program: Program, length: int | None) -> tuple[int | None, bool]:
    """The most tokens, and whether the program takes just so many."""
    shape = program.graph.values[program.graph.inputs[program.inputs.index(MASK)]].shape
    fixed = shape[1] if len(shape) == 2 and isinstance(shape[1], int) else None
    return fixed or length, fixed is not None


def _encode(folder: Path, tokenizer, texts: list[str], limit) -> tuple[dict, str]:
    """Arrays [texts, T] by name, and a notice of texts that were cut."""
    (most, exact), own = limit, tokenizer.model_max_length
    most = most if exact else min(most or own, own)
    try:
        long = sum(len(ids) > most for ids in tokenizer(texts, verbose=False)["input_ids"])
        encoded = tokenizer(
            texts, padding="max_length" if exact else True, truncation=most < UNBOUNDED,
            max_length=most if most < UNBOUNDED else None, padding_side="right",
            return_tensors="np",
        )  # fmt: skip
    except Exception as error:  # a tokenizer may raise anything
        reason = textwrap.shorten(str(error), 90, placeholder=" ...")
        raise InputError(f"{folder}: the tokenizer cannot read them ({reason}).") from error
    cut = f"{long} of {len(texts)} sentences were cut to {most} tokens." if long else ""
    return dict(encoded), cut


def _sides(folder: Path, encoded: dict, name: str, program: Program) -> np.ndarray:
    """One input [N, 2, T], from texts of which all first sentences come first."""
    if name not in encoded:
        raise InputError(
            f"{folder}: its tokenizer gives {', '.join(encoded)}, but the program takes {name}."
        )
    array, limit = encoded[name], program.limits.get(name)
    if limit is not None and array.max() >= limit:
        raise InputError(
            f"{folder}: token id {array.max()} is beyond the {limit} rows of the program's table; "
            "use the tokenizer that belongs to it."
        )
    return np.swapaxes(array.reshape(2, -1, array.shape[1]), 0, 1)
