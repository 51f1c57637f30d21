"""Open a Core ML package and run it, which takes a Mac; or have NumPy compute it.

    model = load("model.mlpackage", compute_units="CPU_AND_NE")
    model.run({"input_ids": tokens, ...})              {output: array}
    state = model.state(); model.run(feeds, state)     for a package that keeps its cache

What is wrong with a package or with inputs is found before Core ML is asked, on any machine.
"""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from ...errors import InputError
from .package import SPEC, WEIGHTS, feature_name
from .quiet import ct

UNITS = ("ALL", "CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE")
EVALUATED = 2**30  # bytes of weights; NumPy is too slow for more
SENTINEL = 0xDEADBEEF  # starts the head of every array in the file of weights
HEAD = np.dtype([("sentinel", "<u4"), ("type", "<u4"), ("bytes", "<u8"), ("offset", "<u8")])
TYPES = {65568: np.float32, 65552: np.float16, 131104: np.int32}  # Core ML's own numbers


class Model:
    """A package that Core ML has opened."""

    def __init__(self, spec, opened):
        self.spec, self.opened = spec, opened

    def state(self):
        """An empty cache, for one conversation."""
        return self.opened.make_state()

    def run(self, feeds: Mapping[str, np.ndarray], state=None) -> dict[str, np.ndarray]:
        """The outputs by name. Raises `InputError` for inputs that the package does not take."""
        feeds = checked_feeds(self.spec, feeds)
        try:
            return self.opened.predict(feeds, **({} if state is None else {"state": state}))
        except Exception as error:  # Core ML raises RuntimeErrors of its own
            raise InputError(f"Core ML cannot run it: {_one_line(error)}") from error


def load(path: str | Path, *, compute_units: str = "ALL") -> Model:
    """Open a package. Raises `InputError` if it is damaged, and on any system but macOS."""
    if compute_units not in UNITS:
        known = ", ".join(UNITS)
        raise InputError(f"compute_units {compute_units!r} is not known; choose of {known}.")
    spec = read_package(path)
    if sys.platform != "darwin":
        raise InputError(f"{path}: Core ML runs on macOS only; open the package on a Mac.")
    try:
        opened = ct.models.MLModel(str(path), compute_units=ct.ComputeUnit[compute_units])
    except Exception as error:
        raise InputError(f"{path}: Core ML cannot open it: {_one_line(error)}") from error
    return Model(spec, opened)


def run_coreml(
    path: str | Path, feeds: Mapping[str, np.ndarray], *, compute_units: str = "ALL"
) -> dict[str, np.ndarray]:
    """Open a package, run it once, and return its outputs by name."""
    return load(path, compute_units=compute_units).run(feeds)


def comparer(path: str | Path, *, compute_units: str = "ALL"):
    """A function from a program's inputs to the outputs in order, for `parity.compare`.

    Core ML runs the package on a Mac; elsewhere the NumPy evaluator does, up to a size.
    """
    spec = read_package(path)
    if sys.platform == "darwin":
        return in_order(load(path, compute_units=compute_units))
    if (Path(path) / WEIGHTS).exists() and (Path(path) / WEIGHTS).stat().st_size > EVALUATED:
        return None
    return in_order(Evaluated(path, spec))


class Evaluated:
    """A package as NumPy computes it (`reference.py`), in the manner of `Model`."""

    def __init__(self, path: str | Path, spec):
        from .reference import Package

        self.spec, self.package = spec, Package(path)

    def state(self) -> dict[str, np.ndarray]:
        return self.package.state()

    def run(self, feeds: Mapping[str, np.ndarray], state=None) -> dict[str, np.ndarray]:
        return self.package(checked_feeds(self.spec, feeds), state)


def in_order(model: Model | Evaluated):
    """The model as a function of a program's inputs, in its names; empty ones are left out.

    One that keeps its cache starts with an empty one, and gives the logits alone.
    """
    names = [feature.name for feature in model.spec.description.output]
    keeps = bool(model.spec.description.state)

    def run(feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        held = {feature_name(name): array for name, array in feeds.items() if np.size(array)}
        if keeps:
            length = held["input_ids"].shape[1]
            held = {"input_ids": held["input_ids"],
                    "causal_mask": np.zeros((1, 1, length, length), np.float32)}  # fmt: skip
        got = model.run(held, model.state() if keeps else None)
        return [got[name] for name in names]

    return run


def read_package(path: str | Path):
    """The description of a package, after a look at all of its parts.

    Raises `InputError` for a package that is not there, damaged, or without its weights.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such Core ML package.")
    spec = ct.proto.Model_pb2.Model()
    try:
        whole = (path / "Manifest.json").is_file() and spec.ParseFromString(
            (path / SPEC).read_bytes()
        )
    except Exception:  # the parser has errors of its own
        whole = False
    if not whole or spec.WhichOneof("Type") != "mlProgram":
        raise InputError(f"{path}: damaged, or no ML program; export it again.")
    _check_weights(path / WEIGHTS, sorted(set(_offsets(spec.mlProgram))))
    return spec


def _offsets(message) -> Iterator[int]:
    """Where in the file of weights the arrays of a program start."""
    for _, field in message.ListFields():
        entries = field.values() if isinstance(field, Mapping) else field
        for entry in entries if hasattr(entries, "__len__") else [entries]:
            if hasattr(entry, "ListFields"):
                if entry.DESCRIPTOR.name == "BlobFileValue":
                    yield entry.offset
                else:
                    yield from _offsets(entry)


def _check_weights(path: Path, offsets: list[int]) -> None:
    if offsets and not path.is_file():
        raise InputError(f"{path}: the weights are missing; export the package again.")
    size = path.stat().st_size if offsets else 0
    for offset in offsets:
        head = np.zeros(1, HEAD)
        if offset + HEAD.itemsize <= size:
            head = np.fromfile(path, HEAD, 1, offset=offset)
        if head["sentinel"][0] != SENTINEL or head["offset"][0] + head["bytes"][0] > size:
            raise InputError(f"{path}: the weights are damaged; export the package again.")


def checked_feeds(spec, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inputs in the types that a package takes; `InputError` naming one that does not fit."""
    wanted = {f.name: f.type.multiArrayType for f in spec.description.input}
    if feeds.keys() != wanted.keys():
        name = min(feeds.keys() ^ wanted.keys())
        what = "is missing" if name in wanted else "is no input"
        raise InputError(f"input {name}: {what}; the package takes {', '.join(wanted)}.")
    out = {}
    for name, array in feeds.items():
        array, kind = np.asarray(array), wanted[name]
        if not _fits(kind, array.shape):
            raise InputError(f"input {name}: shape {array.shape}, but {_words(kind)} is expected.")
        out[name] = array.astype(TYPES[kind.dataType], copy=False)
    return out


def _fits(kind, shape: tuple[int, ...]) -> bool:
    which = kind.WhichOneof("ShapeFlexibility")
    if which == "enumeratedShapes":
        return shape in [tuple(s.shape) for s in kind.enumeratedShapes.shapes]
    if which == "shapeRange":
        ranges = kind.shapeRange.sizeRanges
        return len(ranges) == len(shape) and all(
            r.lowerBound <= n <= r.upperBound for r, n in zip(ranges, shape, strict=True)
        )
    return tuple(kind.shape) == shape


def _words(kind) -> str:
    which = kind.WhichOneof("ShapeFlexibility")
    if which == "enumeratedShapes":
        return " or ".join(str(tuple(s.shape)) for s in kind.enumeratedShapes.shapes)
    if which == "shapeRange":
        spans = [(r.lowerBound, r.upperBound) for r in kind.shapeRange.sizeRanges]
        return f"({', '.join(str(a) if a == b else f'{a} to {b}' for a, b in spans)})"
    return str(tuple(kind.shape))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
