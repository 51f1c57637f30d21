"""A program: a graph with names for its inputs and outputs, and its weights. What exporters take.

Its graph may be symbolic (`sizes.py`). `run` is the reference that every export must equal.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from .axes import named_axes
from .edit import edit_graph
from .errors import InputError
from .execute import run as run_graph
from .graph import SHAPE_ONLY, Graph, trace
from .plan import PrunePlan
from .prune import Cutter, pruned_fetch, pruner
from .sizes import instantiate, sizes_of, solve
from .stream import Fetch


@dataclass(frozen=True)
class Program:
    """`graph` with `inputs` and `outputs` named in its order.

    `fetch(paths)` hands out weights that are not read yet, anew at each call: ask for one, write
    it, drop it. `sizes` holds an example of each named size. `limits` bounds integer inputs
    (token ids lie below the vocabulary). `metadata` is free text for whoever opens an export.
    """

    graph: Graph
    fetch: Fetch
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sizes: Mapping[str, int] = field(default_factory=dict)
    limits: Mapping[str, int] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    def at(self, sizes: Mapping[str, int] | None = None) -> Graph:
        """The concrete graph; sizes that are not given are the examples."""
        return instantiate(self.graph, {**self.sizes, **(sizes or {})})

    def feeds(self, sizes: Mapping[str, int] | None = None, seed: int = 0) -> dict[str, np.ndarray]:
        """Random inputs: standard normal, or integers below their limit."""
        rng = np.random.default_rng(seed)
        graph = self.at(sizes)
        return {
            name: self._draw(rng, name, graph.values[i])
            for name, i in zip(self.inputs, graph.inputs, strict=True)
        }

    def _draw(self, rng, name: str, value) -> np.ndarray:
        kind = np.dtype(str(value.dtype).rpartition(".")[2].replace("bfloat16", "float32"))
        if mx.issubdtype(value.dtype, mx.floating):
            return rng.standard_normal(value.shape).astype(kind)
        return rng.integers(0, self.limits.get(name, 2), value.shape).astype(kind)

    def run(self, feeds: Mapping[str, np.ndarray | mx.array]) -> list[mx.array]:
        """Compute on MLX, lazily. Raises `InputError` for an input that is missing or misshapen."""
        missing = [name for name in self.inputs if name not in feeds]
        if missing:
            raise InputError(f"input {missing[0]}: is missing; give {', '.join(self.inputs)}.")
        arrays = [mx.array(feeds[name]) for name in self.inputs]
        graph = instantiate(self.graph, sizes_of(self.graph, [a.shape for a in arrays]))
        return run_graph(graph, arrays, self.fetch(list(graph.parameters)))[0]


def program_of(
    fn: Callable,
    example: Mapping[str, mx.array],
    *,
    outputs: Sequence[str],
    parameters: Mapping[str, mx.array] | None = None,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    limits: Mapping[str, int] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Program:
    """The program of a module, or of `fn(parameters, *inputs)`; `example` names its inputs.

    `dynamic` names axes whose size stays open: `{"pixels": {0: "batch"}}`. Raises `InputError` if
    the code does not leave them open.
    """
    dynamic = dynamic or {}
    sizes = {
        name: example[key].shape[axis] for key, axes in dynamic.items()
        for axis, name in axes.items()
    }  # fmt: skip

    def at(**corner: int) -> Graph:
        arrays = []
        for key, array in example.items():
            shape = list(array.shape)
            for axis, name in dynamic.get(key, {}).items():
                shape[axis] = corner[name]
            arrays.append(mx.zeros(shape, array.dtype))
        return trace(fn, *arrays, parameters=parameters)

    grids = [dict(zip(sizes, spans, strict=False)) for spans in SPANS]
    graph = solve(at, grids) if sizes else at()
    held = dict(tree_flatten(fn.parameters())) if parameters is None else parameters
    return Program(
        graph, of_arrays(held), tuple(example), tuple(outputs), sizes,
        {**_rows_of_tables(graph, tuple(example)), **(limits or {})},
        metadata or {},
    )  # fmt: skip


def _rows_of_tables(graph: Graph, names: Sequence[str]) -> dict[str, int]:
    """For inputs that pick rows of a table (token ids), how many rows there are."""
    origin = dict(zip(graph.inputs, names, strict=True))
    limits: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "AsType" or node.op in SHAPE_ONLY:
            if node.inputs[0] in origin:
                origin[node.outputs[0]] = origin[node.inputs[0]]
        elif node.op == "Gather" and tuple(node.attributes[0]) == (0,):
            name, rows = origin.get(node.inputs[1]), graph.values[node.inputs[0]].shape[0]
            if name is not None and isinstance(rows, int):
                limits[name] = min(rows, limits.get(name, rows))
    return limits


# Different sizes at each corner, and no 1, which broadcasts.
SPANS = (((2, 3), (5, 7), (11, 13), (17, 19)), ((4, 6), (23, 29), (31, 37), (41, 43)))


def of_arrays(parameters: Mapping[str, mx.array]) -> Fetch:
    """A fetch of arrays that are held in memory."""
    return lambda paths: {path: parameters[path] for path in paths}


def prune_program(program: Program, plan: PrunePlan, cut: Cutter | None = None) -> Program:
    """The program after pruning, without any config: from the edited graph.

    `cut` says how parameters are cut, if not simply to what is kept. The plan is made for
    `named_axes(program.at())`. Raises `InputError` for another model's.
    """
    cut = cut or pruner(named_axes(program.at()), plan)

    def at(**corner: int) -> Graph:
        return edit_graph(named_axes(instantiate(program.graph, corner)), plan)

    grids = [dict(zip(program.sizes, spans, strict=False)) for spans in SPANS]
    graph = solve(at, grids) if program.sizes else at()
    return replace(program, graph=graph, fetch=pruned_fetch(program.fetch, cut))


def with_weights(program: Program, parameters: Mapping[str, mx.array]) -> Program:
    """The same program with other weights, held in memory."""
    return replace(program, fetch=of_arrays(parameters))

