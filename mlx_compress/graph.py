"""Trace an MLX callable to a plain graph: the one view of a model that every engine reads.

Nothing is evaluated: MLX builds its computation lazily, and `export_function` hands over every
primitive of it. Parameters become graph inputs known by their path, so that a graph holds no
weights: the same graph serves a model whatever its weights are and wherever they lie.

Tracing runs on the CPU stream, where the `mx.fast` operations appear as the primitives that they
are made of. So a graph is the same on every machine, and one table of primitives serves everywhere.
"""

import contextlib
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from .errors import InputError


@dataclass(frozen=True)
class Value:
    """An array in the graph: its shape and dtype, never its contents."""

    shape: tuple[int, ...]
    dtype: mx.Dtype


@dataclass(frozen=True)
class Node:
    """One primitive. `inputs` and `outputs` are value ids; `attributes` are MLX's own, in order."""

    op: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    attributes: tuple = ()


@dataclass(frozen=True)
class Graph:
    """Primitives in topological order.

    `values` maps an id to its shape and dtype; `inputs` and `outputs` are ids in call order;
    `parameters` maps a parameter's path to its id; `constants` holds the arrays that the traced
    code made by itself (scalars, rotary frequencies).
    """

    nodes: tuple[Node, ...]
    values: Mapping[int, Value]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    parameters: Mapping[str, int]
    constants: Mapping[int, mx.array]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter."""
        return {path: self.values[i].shape for path, i in self.parameters.items()}


class TraceError(InputError):
    """The callable cannot be written as a graph: it looks at values while it runs."""


def trace(
    fn: Callable,
    *inputs: mx.array,
    parameters: Mapping[str, mx.array] | None = None,
    dtype: mx.Dtype | None = None,
) -> Graph:
    """Trace `fn(*inputs)` to a `Graph`; shapes are those of `inputs`, contents do not matter.

    `fn` is an `nn.Module`, whose parameters become the graph's, or a function of `(parameters,
    *inputs)` when `parameters` is given. It returns an array or any tree of arrays, which is
    flattened in order. `dtype` replaces the dtype of floating-point parameters. Weights are
    neither read nor changed, and a module's parameters are restored whatever happens.

    Raises `TraceError` when `fn` evaluates an array on its way (`.item()`, `if array:`).
    """
    call, items = _as_function(fn, parameters)
    places = _distinct(items)
    stand_ins = [_stand_in(array, dtype) for array in {id(a): a for a in items.values()}.values()]
    count = len(inputs)

    def flat(*arrays):
        named = {path: arrays[count + place] for path, place in places.items()}
        out = call(named, *arrays[:count])
        return [leaf for _, leaf in tree_flatten([out]) if isinstance(leaf, mx.array)]

    records: list[dict] = []
    with _restored(fn), _capturable(), mx.stream(mx.cpu):
        try:
            mx.export_function(records.append, flat, *inputs, *stand_ins)
        except (ValueError, RuntimeError) as error:
            raise TraceError(_explain(fn, error)) from error
    return _read(records, count, places)


def save_function(path: str, fn: Callable, examples: Sequence[Sequence[mx.array]]) -> None:
    """Write `fn(*inputs)` as MLX's own exported function, with a trace for each of the examples.

    The arrays that `fn` closes over are written with it. `mx.import_function` opens the file.
    """
    with mx.exporter(path, fn) as exporter:
        for arrays in examples:
            exporter(*arrays)


SHAPE_ONLY = frozenset(
    ("Broadcast", "ExpandDims", "Flatten", "Reshape", "Squeeze", "Transpose", "Unflatten")
)


def signature(graph: Graph) -> list[tuple]:
    """What two spellings of one computation share: its primitives and their output shapes.

    Left out are casts, what only moves or views data, and axes of size 1: code may take another
    path to the same arithmetic (one query head per KV head needs no groups).
    """

    def shape(value: int) -> tuple[int, ...]:
        return tuple(n for n in graph.values[value].shape if n != 1)

    plain = SHAPE_ONLY | {"AsType"}
    return [(n.op, *map(shape, n.outputs)) for n in graph.nodes if n.op not in plain]


def dynamic_values(graph: Graph) -> set[int]:
    """The ids of the values that depend on the graph's inputs, these included."""
    dynamic = set(graph.inputs)
    for node in graph.nodes:
        if dynamic.intersection(node.inputs):
            dynamic.update(node.outputs)
    return dynamic


def with_outputs(graph: Graph, outputs: Sequence[int]) -> Graph:
    """The same graph with other values as outputs; nodes that they do not need are dropped."""
    needed, kept = set(outputs), []
    for node in reversed(graph.nodes):
        if needed.intersection(node.outputs):
            needed.update(node.inputs)
            kept.append(node)
    return replace(graph, nodes=tuple(reversed(kept)), outputs=tuple(outputs))


def _as_function(fn, parameters):
    if parameters is not None:
        return fn, dict(parameters)
    if not isinstance(fn, nn.Module):
        return (lambda _, *inputs: fn(*inputs)), {}
    mx.eval(_private_arrays(fn))

    def call(named, *inputs):
        fn.update(tree_unflatten(list(named.items())))
        return fn(*inputs)

    return call, dict(tree_flatten(fn.parameters()))


def _private_arrays(module: nn.Module) -> list[mx.array]:
    """Arrays a module holds outside its parameters; left lazy, their making would be traced too."""
    named = {id(leaf) for _, leaf in tree_flatten(module.parameters())}
    held = (leaf for _, leaf in tree_flatten(module) if isinstance(leaf, mx.array))
    return [leaf for leaf in held if id(leaf) not in named]


def _stand_in(array: mx.array, dtype: mx.Dtype | None) -> mx.array:
    floating = mx.issubdtype(array.dtype, mx.floating)
    return mx.zeros(array.shape, dtype if dtype is not None and floating else array.dtype)


@contextlib.contextmanager
def _restored(fn):
    """Put a module back as it was: tracing leaves stand-ins in its parameters and its caches."""
    modules = fn.modules() if isinstance(fn, nn.Module) else []
    attributes = [(module, dict(vars(module))) for module in modules]
    contents = [(c, list(c) if isinstance(c, list) else dict(c)) for c in _containers(fn)]
    try:
        yield
    finally:
        for container, held in contents:
            container.clear()
            container.extend(held) if isinstance(held, list) else dict.update(container, held)
        for module, held in attributes:
            vars(module).clear()
            vars(module).update(held)


def _containers(entry) -> Iterator[dict | list]:
    """The dicts and lists within a module, itself and its submodules among them."""
    if isinstance(entry, dict | list):
        yield entry
    if isinstance(entry, dict | list | tuple):
        for child in entry.values() if isinstance(entry, dict) else entry:
            yield from _containers(child)


@contextlib.contextmanager
def _capturable():
    """Let pass what `export_function` refuses although it does not change a value."""
    held = {name: getattr(mx, name) for name in ("contiguous", "eval", "async_eval")}
    mx.contiguous = lambda array, *_, **__: array
    mx.eval = mx.async_eval = lambda *_: None
    try:
        yield
    finally:
        for name, function in held.items():
            setattr(mx, name, function)


ADVICE = {
    "eval an array": " A traced call must not look at the contents of an array: leave what depends "
    "on them an array, or compute it before the call.",
    "Unable to get state": " MLX cannot record it: write it with other operations.",
}


def _explain(fn, error: Exception) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    where = f" at {frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else ""
    name = getattr(fn, "__name__", type(fn).__name__)
    reason = str(error).strip().splitlines()[0]
    advice = next((text for sign, text in ADVICE.items() if sign in reason), "")
    return f"{name} cannot be traced{where}: {reason}{advice}"


def _distinct(items: Mapping[str, mx.array]) -> dict[str, int]:
    """The place of each path among the distinct arrays: what is shared is one parameter."""
    order: dict[int, int] = {}
    return {path: order.setdefault(id(array), len(order)) for path, array in items.items()}


def _read(records: list[dict], count: int, places: Mapping[str, int]) -> Graph:
    ids: dict[str, int] = {}
    values: dict[int, Value] = {}

    def add(name, shape, dtype) -> int:
        number = ids.setdefault(name, len(ids))
        values.setdefault(number, Value(tuple(shape), dtype))
        return number

    def of_type(kind: str) -> list[dict]:
        return [record for record in records if record["type"] == kind]

    arguments = [add(*entry) for entry in of_type("inputs")[0]["inputs"]]
    constants = {
        add(name, array.shape, array.dtype): array
        for record in of_type("constants")
        for name, array in record["constants"]
    }
    nodes = tuple(
        Node(
            op=record["name"],
            inputs=tuple(ids[entry[0]] for entry in record["inputs"]),
            outputs=tuple(add(*entry) for entry in record["outputs"]),
            attributes=tuple(record["arguments"]),
        )
        for record in of_type("primitive")
    )
    return Graph(
        nodes=nodes,
        values=values,
        inputs=tuple(arguments[:count]),
        outputs=tuple(add(*entry) for entry in of_type("outputs")[0]["outputs"]),
        parameters={path: arguments[count + place] for path, place in places.items()},
        constants=constants,
    )
