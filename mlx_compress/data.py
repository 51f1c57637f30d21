"""Token batches: text from a folder or a file, as windows of token ids.

Calibration and evaluation never read the same text: each has its own split of `--data`, and where
only one file is given, calibration has its first half and evaluation its second.

Shape suffixes: N windows, T tokens in a window, S tokens in a stream.
"""

import codecs
import json
import mmap
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import InputError

SPLITS = {"calibration": ("train", "valid", "test"), "evaluation": ("test", "valid", "train")}
SUFFIXES = (".jsonl", ".txt")
FORMATS = {("prompt", "completion"): str, ("messages",): list, ("text",): str}
PIECE_BYTES = 16_384
READ_BYTES = 64 * 2**20
# Random windows are drawn from this many times the tokens needed: enough places, little tokenised.
OVERSAMPLE = 4


@dataclass(frozen=True)
class Split:
    """Records of one split: a `str` is a piece of running text, a `dict` is one document.

    `notice` says in words what the reader did not ask for, and is empty otherwise.
    """

    records: list[str | dict]
    path: Path
    notice: str = ""


@dataclass(frozen=True)
class Windows:
    """Token ids int32 [N, T]; UTF-8 bytes of each window's targets int64 [N]; source; notice."""

    tokens: np.ndarray
    target_bytes: np.ndarray
    path: Path
    notice: str = ""


def load_windows(
    data: str | Path, split: str, tokenizer, *, length: int, count: int, seed: int = 0
) -> Windows:
    """At most `count` windows of `length` tokens: random for calibration, in order for evaluation.

    `tokenizer` is a Hugging Face tokenizer or mlx-lm's wrapper of one. Only as much text is
    tokenised as the windows need. Raises `InputError` for all that can be wrong with the data.
    """
    if length < 2 or count < 1:
        raise InputError(
            f"--max-seq-length {length} and {count} windows: a window needs at least 2 tokens "
            "(one to read, one to predict), and there must be at least 1 window."
        )
    found = read_split(data, split)
    random = split == "calibration"
    records, needed = found.records, length * count
    if random:
        order = np.random.default_rng(seed).permutation(len(records))
        records, needed = [records[i] for i in order], needed * OVERSAMPLE
    arrays = tokenize(records, tokenizer, max_tokens=needed, source=str(found.path))
    tokens_NT = token_windows(
        arrays, length=length, count=count, seed=seed if random else None, source=str(found.path)
    )
    notice = found.notice
    if len(tokens_NT) < count:
        short = f"{found.path}: {split} has {len(tokens_NT)} of the {count} windows asked for."
        notice = f"{notice} {short}".strip()
    return Windows(tokens_NT, target_bytes(tokens_NT, tokenizer), found.path, notice)


def read_split(data: str | Path, split: str) -> Split:
    """Records for `split`, "calibration" or "evaluation", from a folder or a single file.

    A folder holds `train`, `valid`, `test` as `.jsonl` (mlx-lm's records: text, prompt and
    completion, or messages with optional tools) or `.txt`. Calibration takes the first there is of
    train, valid, test; evaluation of test, valid, train; where both come to the same file, the
    first half is calibration's and the second evaluation's. At most 64 MiB of text are read.

    Raises `InputError`, one line with file, value and remedy: nothing there, no split, an empty
    or binary file, a line that is not JSON, a record of no known format.
    """
    path, half, notice = locate(Path(data), split)
    records, more = read_records(path, half)
    return Split(records, path, f"{notice} {more}".strip())


def read_records(
    path: Path, half: int | None = None, check: Callable[[str, object], dict] | None = None
) -> tuple[list[str | dict], str]:
    """Records of a .jsonl or pieces of a .txt, of its first (0) or second (1) half, and a notice.

    `check(where, record)` returns what one JSON record is read as, or raises `InputError`; by
    default it must be of a known format. Raises `InputError` as `read_split` does.
    """
    try:
        size = path.stat().st_size
        records = _read(path, half, check or known_record) if size else []
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from error
    if not records:
        raise InputError(_nothing(path, size, half))
    if size <= READ_BYTES * (2 if half is not None else 1):
        return records, ""
    return records, f"{path}: of {size / 2**20:.0f} MiB only {READ_BYTES >> 20} MiB are read."


def _read(path: Path, half: int | None, check) -> list[str | dict]:
    return _read_jsonl(path, half, check) if path.suffix == ".jsonl" else _read_text(path, half)


def tokenize(
    records: Iterable[str | dict],
    tokenizer,
    *,
    max_tokens: int | None = None,
    source: str = "the data",
) -> list[np.ndarray]:
    """Token ids, one int32 array a record; stops once it has `max_tokens`.

    Documents end with EOS as in mlx-lm (a chat template brings its own ends); pieces of running
    text do not, and only the first of them gets a BOS.

    Raises `InputError` where the tokenizer has no chat template and a record needs one.
    """
    arrays, total = [], 0
    for index, record in enumerate(records):
        ids = np.asarray(_encode(record, tokenizer, index, source), dtype=np.int32)
        arrays.append(ids)
        total += len(ids)
        if max_tokens is not None and total >= max_tokens:
            break
    return arrays


def token_windows(
    arrays: Sequence[np.ndarray],
    *,
    length: int,
    count: int,
    seed: int | None = None,
    source: str = "the data",
) -> np.ndarray:
    """At most `count` disjoint windows int32 [N, T] of the packed arrays, T = `length`.

    In order from the start when `seed` is None, else at random places and in random order.
    Raises `InputError` when there is not one window; `source` is what it names.
    """
    stream_S = np.concatenate([np.zeros(0, np.int32), *arrays]).astype(np.int32)
    if len(stream_S) < length:
        raise InputError(
            f"{source}: {len(stream_S)} tokens are less than one sequence of {length}; "
            f"give more text, or lower --max-seq-length to {max(len(stream_S), 2)}."
        )
    starts_N = np.arange(len(stream_S) // length) * length
    if seed is not None:
        rng = np.random.default_rng(seed)
        starts_N = rng.permutation(starts_N + rng.integers(len(stream_S) % length + 1))
    return stream_S[starts_N[:count, None] + np.arange(length)]


def target_bytes(tokens_NT: np.ndarray, tokenizer) -> np.ndarray:
    """UTF-8 bytes int64 [N] that the targets of each window (all tokens but the first) stand for.

    The text of the whole window less that of its first token: decoding the targets alone would
    lose a leading space with SentencePiece tokenizers. Special tokens stand for no bytes. Where an
    edge of the window cuts a character it comes out as U+FFFD, which counts one byte: off by at
    most 2 bytes a window.
    """

    def size(ids):
        text = tokenizer.decode(
            ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return len(text.encode()) - 2 * text.count("\ufffd")

    return np.array([size(row) - size(row[:1]) for row in tokens_NT], dtype=np.int64)


def locate(
    data: Path, split: str, suffixes: Sequence[str] = SUFFIXES
) -> tuple[Path, int | None, str]:
    """The file of a split, which half of it (0, 1, or None for all), and a notice.

    `data` is a folder or a file, as for `read_split`; of two suffixes the first goes before.
    Raises `InputError` where there is no such file.
    """
    assert split in SPLITS, split
    if data.is_file():
        if data.suffix not in suffixes:
            suffix, known = data.suffix or "no suffix", " or ".join(reversed(suffixes))
            raise InputError(f"{data}: {suffix} is not read; give a {known} file.")
        return data, _half(split), f"{data}: {_HALVES}"
    if not data.is_dir():
        raise InputError(
            f"{data}: no such file or folder; --data takes a folder with train, valid or test "
            f"as {' or '.join(suffixes)}, or one such file."
        )
    path = _first(data, split, suffixes)
    if all(_first(data, other, suffixes) == path for other in SPLITS):
        return path, _half(split), f"{data}: only {path.name} is here; {_HALVES}"
    if split == "calibration" and path.stem != "train":
        return path, None, f"{data}: no train split, so calibration reads {path.name}."
    return path, None, ""


_HALVES = "calibration reads its first half, evaluation its second."


def _half(split: str) -> int:
    return list(SPLITS).index(split)


def _first(folder: Path, split: str, suffixes: Sequence[str]) -> Path:
    names = [f"{name}{suffix}" for name in SPLITS[split] for suffix in suffixes]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise InputError(
        f"{folder}: no data in this folder (looked for {', '.join(sorted(names))}); "
        "name a file so, or give the file itself as --data."
    )


def _nothing(path: Path, size: int, half: int | None) -> str:
    if size and half is not None:
        return (
            f"{path}: too little text to divide between calibration and evaluation; "
            "give a folder with train.txt and test.txt."
        )
    return f"{path}: the file is empty ({size} bytes, no text); give a file with text."


def _read_text(path: Path, half: int | None) -> list[str]:
    """Pieces of about `PIECE_BYTES`, cut before white space; together they are the text."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
        start = len(codecs.BOM_UTF8) if buffer[:3] == codecs.BOM_UTF8 else 0
        end = len(buffer)
        if half is not None:
            middle = _cut(buffer, (start + end) // 2)
            start, end = ((start, middle), (middle, end))[half]
        end = min(end, _cut(buffer, start + READ_BYTES))
        pieces = list(_pieces(path, buffer, start, end))
    return pieces if any(piece.strip() for piece in pieces) else []


def _pieces(path: Path, buffer, start: int, end: int) -> Iterator[str]:
    while start < end:
        stop = min(end, _cut(buffer, start + PIECE_BYTES))
        yield _decode(path, buffer[start:stop], start)
        start = stop


def _cut(buffer, at: int) -> int:
    """The first place from `at` on where text may be cut: before white space, or a character."""
    if at >= len(buffer):
        return len(buffer)
    space = re.compile(rb"\s").search(buffer, at, at + PIECE_BYTES)
    if space:
        return space.start()
    while at < len(buffer) and buffer[at] & 0xC0 == 0x80:
        at += 1
    return at


def _decode(path: Path, raw: bytes, offset: int) -> str:
    """UTF-8 text; a NUL counts as binary, for no text holds one."""
    try:
        text = raw.decode()
        bad = raw.find(b"\0")
    except UnicodeDecodeError as error:
        bad = error.start
    if bad >= 0:
        raise InputError(
            f"{path}: byte 0x{raw[bad]:02x} at offset {offset + bad} is not UTF-8 text; "
            "give plain text (convert other encodings with iconv)."
        )
    return text


def _read_jsonl(path: Path, half: int | None, check) -> list[dict]:
    records, offset, limit = [], 0, READ_BYTES * (2 if half is not None else 1)
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text = _decode(path, line, offset).lstrip("\ufeff")
            if text.strip():
                where = f"{path}:{number}"
                records.append(check(where, _json(where, text)))
            offset += len(line)
            if offset >= limit:
                break
    middle = (len(records) + 1) // 2
    return records if half is None else (records[:middle], records[middle:])[half]


def _json(where: str, line: str):
    try:
        record = json.loads(line)
        if "\\u" in line:
            json.dumps(record, ensure_ascii=False).encode()  # fails on half a surrogate pair
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{where}: not JSON ({error}); each line must be one JSON object."
        ) from error
    return record


def known_record(where: str, record) -> dict:
    """One record of text, of a known format."""
    keys = list(record) if isinstance(record, dict) else []
    wanted = next((names for names in FORMATS if set(names) <= set(keys)), None)
    if wanted is None:
        raise InputError(
            f'{where}: {keys or type(record).__name__} is no known record; it must have "text", '
            '"prompt" and "completion", or "messages".'
        )
    for key in wanted:
        if not isinstance(record[key], FORMATS[wanted]):
            raise InputError(
                f"{where}: {key!r} is a {type(record[key]).__name__}; "
                f"it must be a {FORMATS[wanted].__name__}."
            )
    return record


def _encode(record: str | dict, tokenizer, index: int, source: str) -> list[int]:
    if isinstance(record, str):
        return tokenizer.encode(record, add_special_tokens=index == 0, verbose=False)
    if "prompt" in record and "completion" in record:
        turns = (("user", record["prompt"]), ("assistant", record["completion"]))
        messages = [{"role": role, "content": content} for role, content in turns]
    elif "messages" in record:
        messages = record["messages"]
    else:
        ids, eos = tokenizer.encode(record["text"], verbose=False), tokenizer.eos_token_id
        return ids if eos is None or (ids and ids[-1] == eos) else [*ids, eos]
    try:
        return tokenizer.apply_chat_template(messages, tools=record.get("tools"), return_dict=False)
    except Exception as error:  # a template is a program: it may raise anything
        reason = textwrap.shorten(str(error), 90, placeholder=" ...")
        raise InputError(
            f"{source}: record {index + 1} does not pass the chat template ({reason}); "
            'give records with "text", or a model with a chat template.'
        ) from error
