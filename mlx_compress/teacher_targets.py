"""What a teacher says of a text, kept on disk: its likeliest next tokens, and how likely.

    DIR/
        targets.json              whose they are, of which text, how many windows are done
        train.indices.npy         [N, T - 1, K] tokens, likeliest first
        train.log_probs.npy       [N, T - 1, K] float16, among all of the vocabulary
        train.rest.npy            [N, T - 1] float16, the logarithm of what they leave over
        held-out...

Files are memory-mapped, so a student reads only its batches, and teacher and student need never be
in memory together. Of the rest `losses.bucketed` makes one class. Windows are named as done only
once they are written, so a run that was cut off goes on.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
from numpy.lib.format import open_memmap

from .checkpoint import is_disk_full
from .distill_text import Teacher
from .errors import InputError, ResourceError
from .heads import first_array
from .losses import log_probs
from .report import write_report
from .stream import Progress, silent
from .training_text import Text

FORMAT = 1
RECORD = "targets.json"
# What differs, where its name does not say how to mend it.
SAID = {
    "windows": "other numbers of windows ({}, now {}), as --iters, --batch-size and --val-samples "
    "make them: give those again",
    "--data": "another --data, --seed or --max-seq-length",
}
STEP = 16  # batches between two entries of what is done


class TargetFolder:
    """The targets of some texts, in `folder`; `teacher` is what names whose they are. Its first
    `count` logits matter, or all."""

    def __init__(
        self, folder: Path, teacher: str, texts: Sequence[Text], top_k: int,
        count: int | None = None,
    ):  # fmt: skip
        self.folder, self.texts = folder, {text.name: text for text in texts}
        self.top_k, self.count = top_k, count
        self.about = {
            "format": FORMAT, "--teacher": teacher, "--top-k": top_k, "vocabulary": count,
            "windows": {text.name: len(text.tokens) for text in texts},
            "--data": {text.name: text.key for text in texts},
        }  # fmt: skip

    def done(self) -> dict[str, int]:
        """How many windows of each text are there.

        Raises `InputError` where the folder holds what another teacher said, or of another text.
        """
        file = self.folder / RECORD
        if not file.exists():
            return dict.fromkeys(self.texts, 0)
        try:
            held = json.loads(file.read_text(encoding="utf8"))
            done = {name: int(held["done"][name]) for name in self.texts if name in held["done"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file}: damaged ({error}); remove {self.folder}.") from error
        for key, own in self.about.items():
            if held.get(key) != own:
                told = SAID.get(key, f"another {key}").format(held.get(key), own)
                raise InputError(
                    f"--target-dir {self.folder}: holds targets of {told}; name another folder, or "
                    "remove this one."
                )
        return dict.fromkeys(self.texts, 0) | done

    @property
    def complete(self) -> bool:
        done = self.done()
        return all(done[name] == len(text.tokens) for name, text in self.texts.items())

    def write(
        self, model: Callable[[mx.array], object], *, batch_size: int, progress: Progress = silent
    ) -> None:
        """Ask the teacher `model` for all that is not there.

        Raises `ResourceError` where the disk has too little room.
        """
        done = self.done()
        self._require_room(done)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for text in self.texts.values():
                self._write(model, text, done, batch_size, progress)
        except OSError as error:
            if not is_disk_full(error):
                raise
            raise self._full("the disk is full") from error

    def teacher(self) -> Teacher:
        """Answers from the disk alone."""
        files = {name: self._open(name, "r") for name in self.texts}

        def targets(text: Text, rows: np.ndarray, inputs_BT: mx.array) -> tuple[mx.array, ...]:
            indices, kept, rest = (file[rows] for file in files[text.name])
            return mx.array(indices.astype(np.int32)), mx.array(kept), mx.array(rest)

        return targets

    def bytes(self) -> int:
        """Of all targets together."""
        tokens = sum(text.tokens[:, 1:].size for text in self.texts.values())
        return tokens * (self.top_k * (4 + 2) + 2)

    def _write(self, model, text: Text, done, batch_size, progress) -> None:
        name, total = text.name, len(text.tokens)
        if done[name] == total:
            return
        files = self._open(name, "r+" if done[name] else "w+")
        starts = range(done[name], total, batch_size)
        for number, start in enumerate(starts, start=1):
            rows = slice(start, min(start + batch_size, total))
            logits = first_array(model(mx.array(text.tokens[rows, :-1])))[..., : self.count]
            for file, found in zip(files, likeliest(logits, self.top_k), strict=True):
                file[rows] = found
            if number % STEP == 0 or rows.stop == total:
                for file in files:
                    file.flush()
                done[name] = rows.stop
                write_report(self.about | {"done": done}, self.folder / RECORD)
            progress(f"teacher on {name} text", rows.stop, total)

    def _open(self, name: str, mode: str) -> tuple[np.memmap, ...]:
        rows, length = self.texts[name].tokens.shape
        shape, stem = (rows, length - 1, self.top_k), name.replace(" ", "-")
        kinds = {"indices": (np.uint32, shape), "log_probs": (np.float16, shape),
                 "rest": (np.float16, shape[:-1])}  # fmt: skip
        try:
            return tuple(
                open_memmap(self.folder / f"{stem}.{kind}.npy", mode, dtype=dtype,
                            shape=size if mode == "w+" else None)
                for kind, (dtype, size) in kinds.items()
            )  # fmt: skip
        except (FileNotFoundError, ValueError) as error:
            raise InputError(
                f"--target-dir {self.folder}: {error}; remove the folder to make it anew."
            ) from error

    def _require_room(self, done: dict[str, int]) -> None:
        if any(done.values()):
            return  # the files have their size from the first
        above = next(p for p in (self.folder, *self.folder.absolute().parents) if p.exists())
        free = shutil.disk_usage(above).free
        if self.bytes() > free:
            fits = self.top_k * free // self.bytes()
            raise self._full(
                f"{self.bytes() / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free"
                + (f"; --top-k {fits} would fit" if fits else "")
            )

    def _full(self, reason: str) -> ResourceError:
        with contextlib.suppress(OSError):
            if not any(self.done().values()):
                shutil.rmtree(self.folder, ignore_errors=True)
        return ResourceError(
            f"--target-dir {self.folder}: {reason}; name a folder on a larger disk, or give fewer "
            "--iters."
        )


def likeliest(logits: mx.array, top_k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The `top_k` likeliest tokens of logits [..., V], likeliest first, their log-probabilities
    among all V, and the logarithm of what they leave over [...], -inf for nothing."""
    logs = log_probs(logits)
    order = mx.argpartition(-logs, top_k - 1, axis=-1)
    found, others = order[..., :top_k], order[..., top_k:]
    rest = mx.full(logs.shape[:-1], -mx.inf)
    if others.shape[-1]:
        rest = mx.logsumexp(mx.take_along_axis(logs, others, axis=-1), axis=-1)
    kept = mx.take_along_axis(logs, found, axis=-1)
    order = mx.argsort(-kept, axis=-1)
    found, kept = (mx.take_along_axis(each, order, axis=-1) for each in (found, kept))
    return np.array(found), np.array(kept.astype(mx.float16)), np.array(rest.astype(mx.float16))
