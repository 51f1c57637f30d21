"""What a saved program is calibrated and measured on: inputs, and what should come out.

    .npz     an array for each of the program's inputs, and `labels` (labelled.py)
    .jsonl   pairs of sentences and how alike they are (pairs.py)

Files and splits are found as text is (data.py): calibration and evaluation never read the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import mlx.core as mx
import numpy as np

from .data import locate
from .errors import InputError
from .labelled import has_labels, read_labelled
from .padding import MASK
from .pairs import read_pairs
from .program import Program
from .sizes import sizes_of
from .tasks import Task

SUFFIXES = (".npz", ".jsonl")


@dataclass(frozen=True)
class Samples:
    """Batches of one shape, so that one graph serves, and the target of each sample.

    `batches` hold the inputs in the program's order, `size` samples each, with one row for a
    sample, or two for a pair: all first sentences, then all second ones. A last batch may be
    filled up with samples that `targets` [N] lacks; these are computed, and count nowhere. `mask`
    is the number of the input that says which tokens count, if there is one.
    """

    batches: list[list[mx.array]]
    targets: np.ndarray
    size: int
    task: Task
    path: Path
    notice: str = ""
    mask: int | None = None

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def measure(self) -> str:
        return self.task.measure

    @property
    def higher_is_better(self) -> bool:
        return self.task.higher_is_better

    def loss(self, b: int, outputs: Sequence[mx.array]) -> mx.array:
        """Float32, one for each sample of batch `b`, in the task's unit; differentiable."""
        return self.task.loss(self._read(b, outputs), mx.array(self._targets(b)))

    def answers(self, b: int, outputs: Sequence[mx.array]) -> np.ndarray:
        """What `score` judges, one for each sample of batch `b`: its class, or its cosine."""
        return np.array(self.task.answer(self._read(b, outputs)))

    def score(self, answers: np.ndarray, chosen: np.ndarray | None = None) -> float:
        """The measure over all answers [N], or over those at the positions `chosen`."""
        if chosen is None:
            return self.task.score(answers, self.targets)
        return self.task.score(answers[chosen], self.targets[chosen])

    @property
    def masks(self) -> list[mx.array] | None:
        """Of each batch: which tokens count, [rows, tokens]."""
        return None if self.mask is None else [batch[self.mask] for batch in self.batches]

    def sizes(self, program: Program) -> dict[str, int]:
        """The program's sizes at a batch, for `program.at`. Raises `InputError` for another's."""
        return sizes_of(program.graph, [array.shape for array in self.batches[0]])

    def split(self, first: int) -> tuple["Samples", "Samples"]:
        """The first so many batches, and the others."""
        at = first * self.size
        return (
            replace(self, batches=self.batches[:first], targets=self.targets[:at]),
            replace(self, batches=self.batches[first:], targets=self.targets[at:]),
        )

    def pick(self, places: Sequence[int]) -> "Samples":
        """One batch of the samples at these places."""
        rows = mx.array(np.asarray(places))
        blocks = [array[rows].swapaxes(0, 1) for array in self._by_sample]
        batch = [block.reshape(-1, *block.shape[2:]) for block in blocks]
        return replace(self, batches=[batch], targets=self.targets[places], size=len(places))

    @cached_property
    def _by_sample(self) -> list[mx.array]:
        """Of each input, [N, rows of a sample, ...]."""
        parts = []
        for arrays in zip(*self.batches, strict=True):
            split = [a.reshape(self.task.rows, self.size, *a.shape[1:]) for a in arrays]
            parts.append(mx.concatenate([block.swapaxes(0, 1) for block in split]))
        return parts

    def _targets(self, b: int) -> np.ndarray:
        return self.targets[b * self.size : (b + 1) * self.size]

    def _read(self, b: int, outputs: Sequence[mx.array]) -> mx.array:
        return self.task.read(self.batches[b], outputs)[: len(self._targets(b))]


def read_samples(
    program: Program,
    data: str | Path,
    split: str,
    *,
    count: int,
    batch_size: int,
    seed: int = 0,
    length: int | None = None,
    folder: Path | None = None,
    open_tokenizer: Callable[[Path], Callable] | None = None,
) -> Samples:
    """At most `count` samples for "calibration" or "evaluation", at most `batch_size` a batch.

    Calibration draws them by `seed` and keeps whole batches; evaluation draws the same ones every
    time, and fills up its last batch. Sentence pairs need the program's `folder`, of which
    `open_tokenizer(folder)` gives a Hugging Face tokenizer, and are at most `length` tokens long.

    Raises `InputError`, one line with file, value and remedy, for all that can be wrong.
    """
    if count < 1 or batch_size < 1:
        raise InputError(f"{count} samples in batches of {batch_size}: both must be at least 1.")
    path, half, notice = locate(Path(data), split, SUFFIXES)
    choose = partial(_choose, count=count, seed=seed if split == "calibration" else None)
    if path.suffix == ".npz":
        found = read_labelled(path, half, program, choose)
    else:
        found = read_pairs(
            path, half, program, choose, length=length, folder=folder,
            open_tokenizer=open_tokenizer,
        )  # fmt: skip
    held = len(found.targets)
    short = f"{path}: {split} has {held} of the {count} samples asked for." if held < count else ""
    size = _batch_samples(path, program, found.task.rows, min(batch_size, held))
    if split == "calibration":
        held = held // size * size
        if not held:
            raise InputError(
                f"{path}: {len(found.targets)} samples do not fill a batch of {size}, which is the "
                "program's; give more."
            )
    notice = " ".join(filter(None, (notice, found.notice, short)))
    batches = _batches(program, found.inputs, held, size)
    mask = program.inputs.index(MASK) if MASK in program.inputs else None
    samples = Samples(batches, found.targets[:held], size, found.task, path, notice, mask)
    try:
        samples.sizes(program)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return samples


def holds_samples(data: str | Path, program: Program) -> bool:
    """Whether `data` is labelled arrays or sentence pairs for this program, and no bare arrays."""
    try:
        path, _, _ = locate(Path(data), "evaluation", SUFFIXES)
    except InputError:
        return False
    return has_labels(path) if path.suffix == ".npz" else MASK in program.inputs


def _choose(there: int, *, count: int, seed: int | None) -> np.ndarray:
    """Positions of the samples to take: in random order, or without a seed in that of the file.

    Without a seed they are drawn as well, for a file may be sorted by its labels.
    """
    drawn = np.random.default_rng(seed or 0).permutation(there)[:count]
    return np.sort(drawn) if seed is None else drawn


def _batch_samples(path: Path, program: Program, rows: int, wanted: int) -> int:
    """Samples of a batch: as many as are wanted, unless the program's first axis is fixed."""
    fixed = program.graph.values[program.graph.inputs[0]].shape[0]
    if not isinstance(fixed, int):
        return wanted
    if fixed % rows:
        raise InputError(
            f"{path}: a pair takes {rows} rows, but the program takes batches of {fixed}; "
            "import it with an open or an even batch."
        )
    return fixed // rows


def _batches(program: Program, inputs, held: int, size: int) -> list[list[mx.array]]:
    """Of arrays [N, rows of a sample, ...], in the dtypes of the program's inputs."""
    dtypes = [program.graph.values[i].dtype for i in program.graph.inputs]
    batches = []
    for start in range(0, held, size):
        places = np.resize(np.arange(start, min(start + size, held)), size)
        blocks = [np.swapaxes(array[places], 0, 1) for array in inputs]
        batches.append([
            mx.array(block.reshape(-1, *block.shape[2:])).astype(dtype)
            for block, dtype in zip(blocks, dtypes, strict=True)
        ])  # fmt: skip
    return batches
