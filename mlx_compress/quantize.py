"""Quantise the weights of a program's linear layers: any graph, no module needed.

Affine quantisation in groups, as MLX packs it, so that a quantised export holds MLX's own bits. The
layers are found in the graph (`Linear` of `patterns.py`); embeddings and convolutions stay as they
are. A weight that is read in another way as well (a tied embedding) is kept beside its packed form.
"""

from dataclasses import replace

import mlx.core as mx

from .errors import InputError
from .graph import Graph, Node, Value
from .patterns import recognise
from .program import Program
from .stream import Fetch

GROUP_SIZES = (128, 64, 32)
BITS = (2, 3, 4, 5, 6, 8)


def quantize_program(
    program: Program, *, bits: int = 4, group_size: int = 64
) -> tuple[Program, list[str]]:
    """The program with packed weights, and notes on the layers that stay as they are.

    A layer whose input is no multiple of `group_size` takes smaller groups where these fit. Raises
    `InputError` if no layer can be quantised.
    """
    if bits not in BITS:
        raise InputError(f"bits {bits}: MLX has no such width; choose from {BITS}.")
    if group_size not in GROUP_SIZES:
        sizes = ", ".join(map(str, GROUP_SIZES))
        raise InputError(f"--q-group-size {group_size}: MLX has {sizes}.")
    graph = recognise(program.graph)
    paths = {number: path for path, number in graph.parameters.items()}
    packer = _Packer(graph, bits)
    nodes: list[Node] = []
    left = []
    for node in graph.nodes:
        path = paths.get(node.inputs[1]) if node.op == "Linear" else None
        group = path and _group_size(graph.values[node.inputs[1]].shape[1], group_size)
        if group:
            nodes += packer.packed(node, path, group)
        else:
            left += [path] if path else []
            nodes.append(node)
    if not packer.groups:
        raise InputError("no linear layer can be quantised: none has groups of 32 inputs.")
    read = {i for node in nodes for i in node.inputs}
    parameters = {p: i for p, i in graph.parameters.items() if i in read} | packer.parameters
    packed = replace(
        graph, nodes=tuple(nodes), parameters=parameters, values={**graph.values, **packer.values}
    )
    notes = [f"{path}: not quantised, its rows have no groups of 32" for path in left]
    return replace(program, graph=packed, fetch=_fetcher(program.fetch, packer.groups, bits)), notes


def _group_size(width: int, wanted: int) -> int | None:
    return next((size for size in GROUP_SIZES if size <= wanted and width % size == 0), None)


class _Packer:
    """New values and parameters, as layers are packed."""

    def __init__(self, graph: Graph, bits: int):
        self.graph, self.bits = graph, bits
        self.next_id = max(graph.values) + 1
        self.values: dict[int, Value] = {}
        self.parameters: dict[str, int] = {}
        self.groups: dict[str, int] = {}  # the path of a weight -> its group size

    def packed(self, node: Node, path: str, group: int) -> list[Node]:
        x, weight, *bias = node.inputs
        rows, columns = self.graph.values[weight].shape
        dtype = self.graph.values[weight].dtype
        self.groups[path] = group
        parts = [
            self._parameter(name, shape, kind)
            for name, shape, kind in zip(
                part_names(path),
                ((rows, columns * self.bits // 32), (rows, columns // group),
                 (rows, columns // group)),
                (mx.uint32, dtype, dtype), strict=True,
            )
        ]  # fmt: skip
        out = self._value(self.graph.values[node.outputs[0]]) if bias else node.outputs[0]
        product = Node("QuantizedMatmul", (x, *parts), (out,), (group, self.bits, 0, True))
        return [product, Node("Add", (out, *bias), node.outputs)] if bias else [product]

    def _parameter(self, path: str, shape: tuple[int, ...], dtype: mx.Dtype) -> int:
        if path not in self.parameters:
            self.parameters[path] = self._value(Value(shape, dtype))
        return self.parameters[path]

    def _value(self, value: Value) -> int:
        self.values[self.next_id] = value
        self.next_id += 1
        return self.next_id - 1


def part_names(path: str) -> tuple[str, str, str]:
    """Of packed weights, scales and biases: beside the weight, never below it."""
    stem = path.removesuffix(".weight") + ("." if path.endswith(".weight") else "_")
    return f"{stem}packed", f"{stem}scales", f"{stem}biases"


def _fetcher(fetch: Fetch, groups: dict[str, int], bits: int) -> Fetch:
    """Quantise a weight when one of its parts is asked for; the others wait to be asked for."""
    waiting: dict[str, mx.array] = {}
    owners = {name: weight for weight in groups for name in part_names(weight)}

    def one(path: str) -> mx.array:
        weight = owners.get(path)
        if weight is None:
            return fetch([path])[path]
        if path not in waiting:
            held = fetch([weight])[weight]
            parts = mx.quantize(held, group_size=groups[weight], bits=bits)
            waiting.update(zip(part_names(weight), parts, strict=True))
        return waiting.pop(path)

    return lambda paths: {path: one(path) for path in paths}
