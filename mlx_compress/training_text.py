"""Text to train on, and text that is held out to choose the best weights by.

N windows, T tokens in a window.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .data import SPLITS, SUFFIXES, locate, read_records, read_split, token_windows, tokenize
from .errors import InputError
from .options import DistillOptions
from .store import store_key


@dataclass(frozen=True)
class Text:
    """Token ids int32 [N, T]; `mask` bool [N, T] is False at tokens that are not to be predicted.

    `name` tells one text of a run from another.
    """

    name: str
    tokens: np.ndarray
    mask: np.ndarray

    @property
    def key(self) -> str:
        """A name for what it says."""
        return store_key(self.tokens, self.mask)


def read_training(
    data: str | Path, tokenizer, options: DistillOptions, notes: list[str]
) -> tuple[Text, Text]:
    """Windows to train on and windows held out, of one length, at random places.

    Records are packed one behind the other. Training reads what `data.read_split` calls
    calibration. Held out are windows of the `valid` split where measuring has another, else some
    windows of the training text that are then not trained on. Raises `InputError` for no text, too
    little of it, or `mask_prompt` on records that have no answer.
    """
    found = read_split(data, "calibration")
    notes += [found.notice] if found.notice else []
    apart = _validation(Path(data))
    held, extra = options.val_samples, 0 if apart else options.val_samples
    count = options.windows + extra
    train = _windows("train", found.records, tokenizer, options, count, found.path)
    if apart:
        records, notice = read_records(apart)
        notes += [notice] if notice else []
        return train, _windows("held out", records, tokenizer, options, held, apart)
    held = min(held, len(train.tokens) // 2)
    if not held:
        raise InputError(
            f"{found.path}: {len(train.tokens)} window of {options.max_seq_length} tokens is too "
            "little to train on one part and hold another out; give more text, or lower "
            "--max-seq-length."
        )
    parts = (("train", slice(held, None)), ("held out", slice(held)))
    return tuple(Text(name, train.tokens[part], train.mask[part]) for name, part in parts)


def _validation(data: Path) -> Path | None:
    """The validation file of a folder, where it is not the one that measuring or training reads."""
    used = {locate(data, split)[0] for split in SPLITS}
    files = [data / f"valid{suffix}" for suffix in SUFFIXES]
    return next((file for file in files if file.is_file() and file not in used), None)


def _windows(name, records, tokenizer, options: DistillOptions, count: int, path: Path) -> Text:
    order = np.random.default_rng(options.seed).permutation(len(records))
    length, source = options.max_seq_length, str(path)
    # Where the last window ends is not known before: one more than asked for.
    arrays = tokenize(
        [records[i] for i in order], tokenizer, max_tokens=length * (count + 1), source=source
    )
    masks = [np.ones(len(array), np.int32) for array in arrays]
    if options.mask_prompt:
        for mask, i in zip(masks, order, strict=False):
            mask[: _prompt_length(records[i], tokenizer, source)] = 0
    tokens, mask = (_packed(each, length, count, options.seed, source) for each in (arrays, masks))
    return Text(name, tokens, mask.astype(bool))


def _packed(arrays: Sequence[np.ndarray], length, count, seed, source) -> np.ndarray:
    return token_windows(arrays, length=length, count=count, seed=seed, source=source)


def _prompt_length(record: str | dict, tokenizer, source: str) -> int:
    """Tokens before a record's last answer, with those that open it."""
    if isinstance(record, str) or not ("completion" in record or "messages" in record):
        raise InputError(
            f"{source}: --mask-prompt needs records of prompt and completion, or of messages."
        )
    if "completion" in record:
        messages = [{"role": "user", "content": record["prompt"]}]
    else:
        messages = record["messages"][:-1]
    try:
        return len(tokenizer.apply_chat_template(
            messages, tools=record.get("tools"), add_generation_prompt=True, return_dict=False
        ))  # fmt: skip
    except Exception as error:  # a template is a program: it may raise anything
        reason = textwrap.shorten(str(error), 90, placeholder=" ...")
        raise InputError(
            f"{source}: --mask-prompt: a record without its answer does not pass the chat template "
            f"({reason}); leave such records out."
        ) from error
