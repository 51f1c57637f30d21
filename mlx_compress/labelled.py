"""Labelled arrays from a .npz: one for each of a program's inputs, and `labels`.

Arrays are taken as they are: an image is normalised, and has its axes in order, or is refused.
"""

import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from .errors import InputError
from .program import Program
from .tasks import CLASSIFICATION, Task

LABELS = "labels"
DAMAGED = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error)
Choose = Callable[[int], np.ndarray]


@dataclass(frozen=True)
class Found:
    """`inputs` [N, rows of a sample, ...] in the program's order, and `targets` [N]."""

    inputs: list[np.ndarray]
    targets: np.ndarray
    task: Task
    notice: str = ""


def read_labelled(path: Path, half: int | None, program: Program, choose: Choose) -> Found:
    """The samples of a .npz, or of its first (0) or second (1) half, that `choose(there)` picks.

    Each array is read whole, one at a time. Raises `InputError` for a damaged file, for arrays
    that are missing or do not fit the inputs, for labels that are no classes of the first output,
    and for NaN or infinity among the samples that are taken.
    """
    names = _names(path, program)
    labels = _labels(path, _classes(path, program))
    start, end = _bounds(path, len(labels), half)
    rows = start + choose(end - start)
    inputs = [
        _input(path, name, program, k, len(labels), rows)[:, None] for k, name in enumerate(names)
    ]
    notice = ""
    if half is not None and labels[0] != labels[-1] and (np.diff(labels) >= 0).all():
        notice = f"{path}: is sorted by label, so that its halves hold other classes; shuffle it."
    return Found(inputs, labels[rows], CLASSIFICATION, notice)


def has_labels(path: Path) -> bool:
    """Whether a .npz has an array of labels. Raises `InputError` for a damaged one."""
    with _opened(path) as file:
        return LABELS in file.files


@contextmanager
def _opened(path: Path) -> Iterator[np.lib.npyio.NpzFile]:
    with ExitStack() as stack:
        try:
            stream = stack.enter_context(path.open("rb"))  # np.load leaves a damaged one open
            file = np.load(stream, allow_pickle=False)
        except DAMAGED as error:
            raise InputError(f"{path}: not a readable .npz ({_reason(error)}).") from error
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise InputError(f"{path}: holds a single array; save it by name with np.savez.")
        yield stack.enter_context(file)


def _array(path: Path, name: str) -> np.ndarray:
    with _opened(path) as file:
        try:
            return file[name]
        except DAMAGED as error:
            raise InputError(
                f"{path}: array {name} cannot be read ({_reason(error)}); save plain numbers."
            ) from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _names(path: Path, program: Program) -> list[str]:
    """The array of each input, by its name; that of a single input may have any."""
    with _opened(path) as file:
        held = list(file.files)
    if LABELS not in held:
        raise InputError(
            f"{path}: has no array {LABELS!r} (but {', '.join(held) or 'nothing'}); add the class "
            "of each sample, integers [N]."
        )
    others = [name for name in held if name != LABELS]
    missing = [name for name in program.inputs if name not in others]
    if missing and len(program.inputs) == len(others) == 1:
        return others
    if missing:
        raise InputError(
            f"{path}: has no array {missing[0]!r} (but {', '.join(held)}); give one for each "
            f"input of the program: {', '.join(program.inputs)}."
        )
    return list(program.inputs)


def _classes(path: Path, program: Program) -> int:
    shape = program.graph.values[program.graph.outputs[0]].shape
    if len(shape) != 2 or not isinstance(shape[1], int):
        raise InputError(
            f"{path}: labels need a row of class scores for each sample, but the program's output "
            f"{program.outputs[0]} is ({', '.join(map(str, shape))})."
        )
    return shape[1]


def _labels(path: Path, classes: int) -> np.ndarray:
    labels = _array(path, LABELS)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        remedy = "labels.argmax(-1)" if labels.ndim == 2 else "labels.astype('int32')"
        raise InputError(
            f"{path}: {LABELS} are {labels.dtype} {labels.shape}, integers [N] are needed; "
            f"save {remedy} if that is what they mean."
        )
    strange = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(strange):
        raise InputError(
            f"{path}: {LABELS}[{strange[0]}] is {labels[strange[0]]}, but the program has "
            f"{classes} classes, 0 to {classes - 1}; leave such samples out."
        )
    return labels.astype(np.int32)


def _bounds(path: Path, there: int, half: int | None) -> tuple[int, int]:
    if there < (1 if half is None else 2):
        raise InputError(
            f"{path}: {there} samples are too few to read" + ("." if half is None else
            " a half for calibration and one for evaluation; give a folder with train.npz and "
            "test.npz.")
        )  # fmt: skip
    middle = (there + 1) // 2
    return ((0, there) if half is None else ((0, middle), (middle, there))[half])


def _input(path, name: str, program: Program, k: int, count: int, rows) -> np.ndarray:
    """Rows of an array, which must be as the program's input is but for its first axis."""
    value = program.graph.values[program.graph.inputs[k]]
    array = _array(path, name)
    _check_shape(path, name, array.shape, value.shape)
    _check_kind(path, name, array.dtype, value.dtype)
    if len(array) != count:
        raise InputError(
            f"{path}: {len(array)} rows of {name}, but {count} of {LABELS}; both need one for "
            "each sample."
        )
    taken = array[rows]
    if np.issubdtype(taken.dtype, np.floating):
        return _finite(path, name, taken, rows)
    limit = program.limits.get(program.inputs[k])
    return _within(path, name, taken, rows, limit)


def _check_shape(path, name: str, found, expected) -> None:
    """The program may leave an axis open: then any size will do here."""
    fits = len(found) == len(expected) > 0 and all(
        not isinstance(want, int) or have == want
        for have, want in zip(found[1:], expected[1:], strict=True)
    )
    if not fits:
        raise InputError(
            f"{path}: array {name} is {found}, but the program takes "
            f"({', '.join(map(str, expected))}); give its axes and sizes as it was trained."
        )


def _check_kind(path, name: str, found: np.dtype, expected: mx.Dtype) -> None:
    words = str(expected).rpartition(".")[2]
    if mx.issubdtype(expected, mx.floating):
        if not np.issubdtype(found, np.floating):
            raise InputError(
                f"{path}: array {name} is {found}, but the program takes {words}; scale it as the "
                "program was trained (for pixels often x / 255, less a mean, over a deviation)."
            )
    elif not np.issubdtype(found, np.integer) and found != np.bool_:
        raise InputError(f"{path}: array {name} is {found}, but the program takes {words}.")


def _finite(path, name: str, taken: np.ndarray, rows) -> np.ndarray:
    with np.errstate(over="ignore"):
        taken = taken.astype(np.float32)
    bad = np.argwhere(~np.isfinite(taken))
    if len(bad):
        first, *rest = bad[0].tolist()
        raise InputError(
            f"{path}: array {name} holds {taken[tuple(bad[0])]} at {[int(rows[first]), *rest]}; "
            "only finite numbers can be computed with."
        )
    return taken


def _within(path, name: str, taken: np.ndarray, rows, limit: int | None) -> np.ndarray:
    bad = np.argwhere((taken < 0) | (taken >= limit)) if limit is not None else []
    if len(bad):
        first, *rest = bad[0].tolist()
        raise InputError(
            f"{path}: array {name} holds {taken[tuple(bad[0])]} at {[int(rows[first]), *rest]}, "
            f"but the program's table has {limit} rows."
        )
    return taken
