"""Second moments X^T X at the input of a contraction, of two halves of the data.

The rows of X are tokens; for a convolution they are the patches that its kernel meets, with a
column for each channel at each position. Where experts are picked, each has its own.
"""

import itertools
import math
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Hashable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from .errors import ResourceError
from .graph import Graph, Node

WIDEST = 2**14  # a contraction over more slots keeps no second moments
FINE = 2**11  # up to so many slots they are added up in float64


@dataclass(frozen=True)
class Window:
    """How a convolution takes patches: per spatial axis, in MLX's words."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    low: tuple[int, ...]
    high: tuple[int, ...]
    dilation: tuple[int, ...]


def window_of(graph: Graph, node: Node) -> Window | None:
    """The window of a plain convolution; None for a grouped or transposed one."""
    if node.op != "Convolution":
        return None
    stride, low, high, dilation, spread, groups, flip = node.attributes
    if groups != 1 or flip or any(n != 1 for n in spread):
        return None
    kernel = graph.values[node.inputs[1]].shape[1:-1]
    return Window(tuple(kernel), *map(tuple, (stride, low, high, dilation)))


def patches(value: mx.array, window: Window | None) -> mx.array:
    """The rows of X: [..., n] flattened, or for [N, *space, C] [rows, positions * C]."""
    if window is None:
        return value.reshape(-1, value.shape[-1])
    pads = [(0, 0), *zip(window.low, window.high, strict=True), (0, 0)]
    padded = mx.pad(value, pads)
    places = []
    for offset in itertools.product(*map(range, window.kernel)):
        cut = [slice(None)]
        for k, start in enumerate(offset):
            reach = (window.kernel[k] - 1) * window.dilation[k]
            first = start * window.dilation[k]
            cut.append(slice(first, padded.shape[k + 1] - reach + first, window.stride[k]))
        places.append(padded[tuple(cut)])
    return mx.concatenate(places, axis=-1).reshape(-1, len(places) * value.shape[-1])


class OnDisk(MutableMapping):
    """Arrays by key, each in a .npy file of its own that is read whenever it is asked for.

    They lie in a temporary folder that is gone with the object, or in `folder`, where files stay:
    a new value is a new file beside the old one. `owner` lives as long as the mapping, `variable`
    names the environment variable that says where the folder lies.

    Raises `ResourceError` when the disk is full.
    """

    def __init__(
        self, folder: Path | None = None, *, owner: object = None, variable: str = "TMPDIR"
    ):
        self.temporary = folder is None
        self.folder = folder or Path(tempfile.mkdtemp(prefix="mlx-compress-moments-"))
        self.owner, self.variable = owner, variable
        self.files: dict[Hashable, Path] = {}
        if self.temporary:
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    def __getitem__(self, key: Hashable) -> np.ndarray:
        return np.load(self.files[key], allow_pickle=False)

    def __setitem__(self, key: Hashable, array: np.ndarray) -> None:
        remedy = f"point {self.variable} to a larger disk, or give --no-refit."
        free = shutil.disk_usage(self.folder).free
        if array.nbytes > free:
            raise ResourceError(
                f"{self.folder}: statistics need {array.nbytes / 1e9:.3g} GB more, "
                f"{free / 1e9:.3g} GB are free; {remedy}"
            )
        old, file = self.files.get(key), self.folder / f"{uuid.uuid4().hex}.npy"
        try:
            np.save(file, array, allow_pickle=False)
        except OSError as error:
            raise ResourceError(f"{file}: cannot be written ({error}); {remedy}") from error
        self.files[key] = file
        if old and self.temporary:
            old.unlink()

    def __delitem__(self, key: Hashable) -> None:
        file = self.files.pop(key)
        if self.temporary:
            file.unlink()

    def __contains__(self, key: object) -> bool:
        return key in self.files  # a mapping's own way would read the file

    def __iter__(self):
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


class SecondMoments:
    """Adds batches up; a place's sums go to `held` when the last batch of a pass has come.

    One batch after the other is added to what `held` has, in the dtype of the sums: how batches
    are divided into passes, and where `held` keeps its arrays, shows in no bit.
    """

    def __init__(self, held: MutableMapping[tuple, np.ndarray], places: Mapping[tuple, object]):
        self.held, self.places = held, dict(places)
        self.sums: dict[tuple, np.ndarray] = {}

    def add(self, place, value: mx.array, index, *, last: bool) -> None:
        """`index` is (rows, experts) of a routed product, as in `calibrate`."""
        key = place.second_key
        batch = self._of(place, value.astype(mx.float32), index)
        if batch is None:
            return
        if key in self.sums:
            self.sums[key] += batch
        else:
            self.sums[key] = self.held[key] + batch if key in self.held else batch
        if last:
            self.held[key] = self.sums.pop(key)

    def _of(self, place, value: mx.array, index) -> np.ndarray | None:
        rows, experts = index
        if experts is not None:
            return self._routed(place, value, rows, experts)
        x = patches(value, place.window)
        return None if x.shape[1] > WIDEST else _halves(x)

    def _routed(self, place, value: mx.array, rows, experts) -> np.ndarray:
        flat = value.reshape(-1, *value.shape[-2:])
        picked = (flat if rows is None else flat[rows.reshape(-1)]).reshape(-1, value.shape[-1])
        whose = np.repeat(np.array(experts).reshape(-1), value.shape[-2])
        count = sum(dim.size for dim in place.expert_axis)
        each = [_halves(picked[mx.array(np.flatnonzero(whose == e))]) for e in range(count)]
        return np.stack(each, axis=1)


def _halves(x: mx.array) -> np.ndarray:
    """X^T X of the first and of the second half of the rows, [2, n, n]; float32 beyond `FINE`."""
    middle = x.shape[0] // 2
    parts = [part.T @ part for part in (x[:middle], x[middle:])]
    mx.eval(parts)
    return np.stack([np.array(part, dtype=np.float64 if x.shape[1] <= FINE else np.float32)
                     for part in parts])  # fmt: skip


def as_matrices(array: mx.array, place, halves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A weight as its contraction reads it, float64 [e, n, m], and its moments as they are held,
    [e, 2, n, n].

    `e` counts experts, 1 without; `n` counts slots at all positions of a patch.
    """
    moved = np.array(array.astype(mx.float32).transpose(place.layout), dtype=np.float64)
    ends = (place.leading, place.leading + place.contracted)
    lead, inner = moved.shape[: ends[0]], moved.shape[slice(*ends)]
    matrices = moved.reshape(math.prod(lead), math.prod(inner), -1)
    return matrices, halves.swapaxes(0, 1) if place.leading else halves[None]
