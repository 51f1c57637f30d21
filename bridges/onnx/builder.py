"""Build an ONNX graph: handles, views that cost nothing, weights known by recipe.

    with Builder(graph, names, ...) as builder:
        y = emit("Add", x, constant(1.0))

A rule of `ops.py` works on handles. A handle is a tensor of the ONNX graph, or a *static* value
(what parameters and constants alone determine: a recipe, computed when the file is written), or a
*view* of other handles (`views.py`), which becomes nodes only if a node reads it so.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
from onnx import NodeProto, TensorProto, helper

from ...execute import execute
from ...graph import Graph, with_outputs
from ...stream import Fetch

FLOAT, HALF, INT32, INT64, BOOL = (
    TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL,
)  # fmt: skip
FLOATS = (FLOAT, HALF)
# ONNX Runtime computes with few integer types: narrow ones are widened.
INTEGERS = {
    mx.bool_: BOOL, mx.int8: INT32, mx.int16: INT32, mx.int32: INT32, mx.int64: INT64,
    mx.uint8: INT32, mx.uint16: INT32, mx.uint32: INT64, mx.uint64: INT64,
}  # fmt: skip
_CURRENT: ContextVar["Builder"] = ContextVar("builder")


@dataclass(frozen=True)
class Static:
    """A value of the graph or a recipe of the builder, then `steps` (key, NumPy function) on it."""

    value: int | str
    steps: tuple[tuple[str, Callable[[np.ndarray], np.ndarray]], ...] = ()

    @property
    def key(self) -> tuple:
        return self.value, *(name for name, _ in self.steps)


@dataclass(frozen=True)
class View:
    """How a handle follows from others. `write()` adds the nodes, once something reads it so."""

    kind: str
    parents: tuple["Handle", ...]
    detail: tuple
    write: Callable[[], "Handle"]


@dataclass(eq=False)
class Handle:
    """A tensor: its shape, of ints and `Size`s, and its ONNX type. `tensor(handle)` names it.

    `value` is the id of the graph's value that it stands for, where it does.
    """

    shape: tuple
    dtype: int
    name: str | None = None
    static: Static | None = None
    view: View | None = None
    value: int | None = None

    def open_view(self, kind: str) -> View | None:
        """The view, if it is of this kind and not written yet."""
        held = self.view
        return held if held is not None and held.kind == kind and self.name is None else None


class Builder:
    """The ONNX graph under construction; `with builder:` makes it the one that rules write to.

    `names` are those of the graph's inputs. `floats` maps MLX's floating dtypes to ONNX types.
    Sizes in `may_be_zero` are not left to ONNX to infer. `accuracy_level` is MatMulNBits' own.
    `buffer` positions is what a cache of fixed buffers can hold at most; 0 for one that grows.
    `recipes` are further static values, by the name of their weight.
    """

    def __init__(
        self, graph: Graph, names: Sequence[str], floats: Mapping[mx.Dtype, int], fetch: Fetch,
        *, may_be_zero=frozenset(), accuracy_level: int = 0, buffer: int = 0,
    ):  # fmt: skip
        self.graph, self.floats, self.fetch = graph, dict(floats), fetch
        self.may_be_zero, self.accuracy_level = frozenset(may_be_zero), accuracy_level
        self.buffer = buffer
        self.nodes: list[NodeProto] = []
        self.count = 0
        self.weights: dict[str, Handle] = {}
        self.recipes: dict[str, Callable[[], mx.array | np.ndarray]] = {}
        self.arrays: dict[str, np.ndarray] = {}
        self.notes: list[str] = []
        self.memo: dict[tuple, Handle] = {}
        self.paths = {number: path for path, number in reversed(graph.parameters.items())}
        self.tables = {n.inputs[0] for n in graph.nodes if n.op == "Gather"} & self.paths.keys()
        self.readers = Counter([*(i for n in graph.nodes for i in n.inputs), *graph.outputs])
        self.inputs = {
            i: Handle(graph.values[i].shape, self.type_of(graph.values[i].dtype), name)
            for i, name in zip(graph.inputs, names, strict=True)
        }

    def __enter__(self) -> "Builder":
        self._token = _CURRENT.set(self)
        return self

    def __exit__(self, *_) -> None:
        _CURRENT.reset(self._token)

    def type_of(self, dtype: mx.Dtype) -> int:
        return INTEGERS[dtype] if dtype in INTEGERS else self.floats[dtype]

    def static(self, value: int) -> Handle:
        held = self.graph.values[value]
        return Handle(held.shape, self.type_of(held.dtype), static=Static(value))

    def array(self, value: int | str) -> mx.array | np.ndarray:
        """The contents of a static value: a recipe's, or what parameters and constants make."""
        if value in self.recipes:
            return self.recipes[value]()
        part = with_outputs(self.graph, [value])
        read = {value, *(i for node in part.nodes for i in node.inputs)}
        paths = {i: path for path, i in self.graph.parameters.items() if i in read}
        arrays = self.fetch(list(paths.values()))
        known = {i: a for i, a in self.graph.constants.items() if i in read}
        known |= {i: arrays[path].astype(self.graph.values[i].dtype) for i, path in paths.items()}
        del arrays
        (result,), _ = execute(self.graph, part.nodes, known, outputs=[value])
        return result

    def contents(self, handle: Handle) -> np.ndarray:
        """A static handle's array, in its type; nothing of it stays in memory."""
        array, kind = self.array(handle.static.value), helper.tensor_dtype_to_np_dtype(handle.dtype)
        if isinstance(array, mx.array):
            if mx.issubdtype(array.dtype, mx.floating):
                array = array.astype({2: mx.float16, 4: mx.float32}[kind.itemsize])
            array = np.array(array)
        for _, step in handle.static.steps:
            array = step(array)
        return array.astype(kind, copy=False)

    def remember(self, key: tuple, make: Callable):
        """What `make()` returned when the key was first asked for."""
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]

    def name_of(self, handle: Handle) -> str:
        """The name of a tensor of the ONNX graph that holds this; adds the nodes it takes."""
        if handle.name is None:
            if handle.static:
                handle.name = self._initializer(handle)
            else:
                handle.name = self.name_of(handle.view.write())
        return handle.name

    def _initializer(self, handle: Handle) -> str:
        name = self.label(handle)
        if self.weights.get(name, handle).dtype != handle.dtype:
            name += f".{TensorProto.DataType.Name(handle.dtype).lower()}"
        self.weights.setdefault(name, handle)
        return name

    def label(self, handle: Handle) -> str:
        """What a static handle is called: by the parameter's path where it is one."""
        base = self.paths.get(handle.static.value, handle.static.value)
        base = base if isinstance(base, str) else f"value.{base}"
        return ".".join([base, *(key for key, _ in handle.static.steps)])

    def unique(self, stem: str) -> str:
        self.count += 1
        return f"{stem}_{self.count}"

    def rename(self, old: str, new: str) -> None:
        """Call a tensor otherwise, wherever it is made or read."""
        for node in with_inner(self.nodes):
            for names in (node.input, node.output):
                for k, name in enumerate(names):
                    if name == old:
                        names[k] = new


def with_inner(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """Nodes, and those of the branches and loops in them."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            yield from with_inner(attribute.g.node)


def current() -> Builder:
    return _CURRENT.get()


def tensor(handle: Handle) -> str:
    return current().name_of(handle)


def emit(
    op: str, *inputs: Handle | None, shape=None, dtype=None, outputs=1, domain="", **attributes
):  # fmt: skip
    """Add a node; returns its output, or a list of them, of the first input's type unless given.

    `shape` and `dtype` are of the outputs (lists for more than one). An input of None is left out.
    """
    builder = current()
    first = next((h.dtype for h in inputs if h is not None), None)
    shapes = shape if outputs > 1 and shape is not None else [shape] * outputs
    dtypes = dtype if isinstance(dtype, list) else [first if dtype is None else dtype] * outputs
    names = ["" if h is None else builder.name_of(h) for h in inputs]
    name = builder.unique(op)
    results = [
        Handle(s, d, name + (f".{k}" if k else ""))
        for k, (s, d) in enumerate(zip(shapes, dtypes, strict=True))
    ]
    attributes = {k: v for k, v in attributes.items() if v is not None}
    node = helper.make_node(
        op, names, [r.name for r in results], name=name, domain=domain, **attributes
    )  # fmt: skip
    builder.nodes.append(node)
    return results if outputs > 1 else results[0]


def constant(array, dtype: int | None = None) -> Handle:
    """A small array that a rule needs; equal ones are one initializer."""
    array = np.asarray(array)
    if dtype is not None:
        array = array.astype(helper.tensor_dtype_to_np_dtype(dtype))
    builder = current()
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    name = f"c.{array.dtype}.{'x'.join(map(str, array.shape))}.{len(builder.arrays)}"

    def make() -> Handle:
        builder.arrays[name] = array
        return Handle(array.shape, kind, name)

    return builder.remember(("constant", array.dtype.str, array.shape, array.tobytes()), make)


def cast(handle: Handle, dtype: int) -> Handle:
    if handle.dtype == dtype:
        return handle
    if handle.static and handle.dtype in FLOATS and dtype in FLOATS:
        return replace(handle, dtype=dtype, name=None)
    key = ("cast", tensor(handle), dtype)
    return current().remember(
        key, lambda: emit("Cast", handle, shape=handle.shape, dtype=dtype, to=dtype)
    )


def dynamic_float(handles: Sequence[Handle], otherwise: int) -> int:
    """The floating type to compute in: half where a computed half takes part."""
    kinds = {h.dtype for h in handles if h.dtype in FLOATS and not h.static}
    if not kinds:
        return otherwise
    return HALF if HALF in kinds else FLOAT
