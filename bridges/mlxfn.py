"""MLX's own exported function: any program, with its weights, opened by `mx.import_function`.

The shapes are those of the program's example sizes, and of the sizes that are asked for.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..errors import InputError
from ..execute import execute, require_supported
from ..graph import save_function
from ..program import Program
from ..sizes import instantiate, sizes_of


def export_mlxfn(program: Program, path: Path, *, sizes: Sequence[Mapping[str, int]] = ()) -> None:
    """Write the program; its inputs are positional, in the program's order."""
    require_supported(program.graph)
    weights = dict(program.fetch(list(program.graph.parameters)))
    mx.eval(weights)

    def call(*arrays: mx.array) -> list[mx.array]:
        graph = instantiate(program.graph, sizes_of(program.graph, [a.shape for a in arrays]))
        known = dict(graph.constants)
        known |= zip(graph.inputs, arrays, strict=True)
        known |= {number: weights[p] for p, number in graph.parameters.items()}
        return execute(graph, graph.nodes, known, outputs=graph.outputs)[0]

    asked = [{**program.sizes, **each} for each in sizes] or [dict(program.sizes)]
    examples = [[mx.array(a) for a in program.feeds(each).values()] for each in asked]
    save_function(str(path), call, examples)


def load_mlxfn(path: Path):
    """The function over inputs in the order of the program. `InputError` if it is damaged."""
    try:
        function = mx.import_function(str(path))
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{path}: cannot be opened ({error}).") from error

    def run(feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        return [np.array(a) for a in function(*(mx.array(a) for a in feeds.values()))]

    return run
