"""Export a program to ONNX: for ONNX Runtime, or whatever reads opset 23.

    written = export_onnx(open_program("model"), "model.onnx")

Sizes that the program leaves open stay open. The cache of a language model comes in and goes out
as `past_key_values.*` and `present.*`; attention reads and extends it in one operator.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path

import mlx.core as mx

from ...errors import InputError
from ...execute import require_supported
from ...graph import Graph, Node
from ...patterns import recognise
from ...program import Program
from ...sizes import Size
from ..decoder import caches
from .buffers import CAPACITY, require_buffers, with_buffers
from .builder import FLOAT, HALF, Builder, Handle, cast, emit
from .ops import OPS
from .quantized import with_lookups
from .write import Written, write

HALVES = (mx.float16, mx.bfloat16)
FOLDED = 2**16  # values without weights may grow to so many entries when they are stored
VIEWS = ("Transpose", "Reshape", "Flatten", "Unflatten", "ExpandDims", "Squeeze", "Copy")


@dataclass(frozen=True)
class OnnxOptions:
    """How to write it.

    `dtype` is that of weights and of computing, "float32" or "float16". `external_bytes`: larger
    weights go to a file beside the model's (over 2 GB they always do). `accuracy_level` of 4-bit
    and 8-bit weights: 0 computes in float, 4 rounds activations to int8, which is much faster.
    `cache`: one that "grow"s by what goes out being fed again, for any batch; or in a "buffer" of
    at most `positions` (see `buffers.py`), which decodes faster behind a long past.
    """

    dtype: str = "float32"
    external_bytes: int = 2**28
    accuracy_level: int = 4
    cache: str = "grow"
    positions: int = 4096

    def __post_init__(self):
        if self.dtype not in ("float32", "float16"):
            raise InputError(f"dtype {self.dtype}: is not known; choose float32 or float16.")
        if self.accuracy_level not in (0, 1, 2, 3, 4):
            raise InputError(f"accuracy_level {self.accuracy_level}: choose 0 to 4.")
        if self.cache not in ("grow", "buffer"):
            raise InputError(f"cache {self.cache}: is not known; choose grow or buffer.")


def export_onnx(
    program: Program, path: str | Path, options: OnnxOptions | None = None, **changes
) -> Written:
    """Write the program to `path`; keywords change single options.

    Inputs and outputs are float32, but a cache is of the type that the model computes in.
    Raises `InputError` for primitives without a rule, all of them at once.
    """
    options = OnnxOptions(**{**(asdict(options) if options else {}), **changes})
    path = Path(path)
    graph = with_lookups(recognise(program.graph))
    require_supported(replace(graph, nodes=_computed(graph)), OPS)
    builder = Builder(
        graph, program.inputs, _floats(graph, options.dtype), program.fetch,
        may_be_zero={name for name, n in program.sizes.items() if n == 0},
        accuracy_level=options.accuracy_level,
        buffer=options.positions if options.cache == "buffer" else 0,
    )  # fmt: skip
    with builder:
        if builder.buffer:
            with_buffers(builder)
        outputs = _named(builder, program, lower(builder))
        if builder.buffer:
            require_buffers(builder)
    return write(
        builder, program, outputs, path,
        metadata=_metadata(program, options), external_bytes=options.external_bytes,
    )  # fmt: skip


def _floats(graph: Graph, dtype: str) -> dict[mx.Dtype, int]:
    """ONNX types of MLX's. What a half-precision model computes in float32 stays so in float16."""
    wanted = HALF if dtype == "float16" else FLOAT
    half = any(graph.values[i].dtype in HALVES for i in graph.parameters.values())
    return {mx.float32: FLOAT if half else wanted, **dict.fromkeys(HALVES, wanted)}


def lower(builder: Builder) -> list[Handle]:
    """Add all nodes of the builder's graph; returns the handles of its outputs."""
    graph = builder.graph
    known = dict(builder.inputs)
    known |= {i: builder.static(i) for i in (*graph.parameters.values(), *graph.constants)}
    known |= {i: _narrowed(builder, h) for i, h in builder.inputs.items()}
    for node in graph.nodes:
        x, out = [known[i] for i in node.inputs], [graph.values[i] for i in node.outputs]
        if node.op not in VIEWS and _foldable(node, x, out):
            results = [builder.static(i) for i in node.outputs]
        else:
            results = OPS[node.op](x, node.attributes, out)
            results = results if isinstance(results, list) else [results]
        for number, handle, value in zip(node.outputs, results, out, strict=True):
            handle.shape, handle.value = value.shape, number
            known[number] = handle
    return [known[i] for i in graph.outputs]


def _narrowed(builder: Builder, handle: Handle) -> Handle:
    """An input in the type to compute in; it is declared as float32, but for a cache."""
    if handle.dtype != HALF or handle.name.startswith("past_key_values."):
        return handle
    handle.dtype = FLOAT
    return cast(handle, HALF)


def _computed(graph: Graph) -> tuple[Node, ...]:
    """The nodes that are not known when the file is written."""
    dynamic, nodes = set(graph.inputs), []
    for node in graph.nodes:
        if dynamic.intersection(node.inputs) or _open(node.attributes):
            dynamic.update(node.outputs)
            nodes.append(node)
    return tuple(nodes)


def _foldable(node: Node, x: list[Handle], out) -> bool:
    """Whether a node's outputs are known when the file is written, and are not much larger."""
    if any(h.static is None for h in x) or _open(node.attributes):
        return False
    size = sum(prod(value.shape) for value in out)
    return node.op != "Broadcast" and size <= max(FOLDED, sum(prod(h.shape) for h in x))


def _open(entry) -> bool:
    return isinstance(entry, Size) or isinstance(entry, tuple | list) and any(map(_open, entry))


def _named(builder: Builder, program: Program, handles: list[Handle]) -> list[Handle]:
    """The outputs under the program's names, float32 but for a cache."""
    outputs, taken = [], set(program.inputs) | builder.weights.keys() | builder.arrays.keys()
    for name, handle in zip(program.outputs, handles, strict=True):
        if handle.dtype == HALF and not name.startswith("present."):
            handle = cast(handle, FLOAT)
        old = builder.name_of(handle)
        if old in taken:
            old = emit("Identity", handle).name
        builder.rename(old, name)
        taken.add(name)
        shape = handle.shape
        if builder.buffer and name.startswith("present."):
            shape = (*shape[:2], CAPACITY, *shape[3:])
        outputs.append(Handle(shape, handle.dtype, name))
        handle.name = name
    return outputs


def _metadata(program: Program, options: OnnxOptions) -> Mapping[str, str]:
    return {
        **program.metadata,
        "mlx_compress.dtype": options.dtype,
        "mlx_compress.sizes": json.dumps(dict(program.sizes)),
        "mlx_compress.limits": json.dumps(dict(program.limits)),
        "mlx_compress.cache": json.dumps(dict(caches(program))),
        **({"mlx_compress.positions": str(options.positions)} if options.cache == "buffer" else {}),
    }
