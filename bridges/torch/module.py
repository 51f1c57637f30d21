"""A graph as a torch module, and as a .pt2 file.

The module interprets the graph over the table `TORCH`. One code path serves the CPU, CUDA and MPS:
the device is that of the weights. Sizes that the graph leaves open are read from the inputs, in a
way that torch.export can follow, so a .pt2 serves every batch and length too.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import torch

from ...errors import InputError
from ...execute import require_supported
from ...graph import Graph, Node, Value
from ...patterns import recognise
from ...program import Program
from ...sizes import Size, is_symbolic, resolve, sizes_of
from . import exported
from .arrays import CARRIERS, to_torch_tensor
from .primitives import TORCH, result_dtype

PACKED = ("QuantizedMatmul", "GatherQMM", "View")  # these read unsigned integers bit by bit


class GraphModule(torch.nn.Module):
    """Computes a graph: `module(*inputs)` gives a tensor, or a tuple where there are several.

    Its state dict has the parameters' paths for keys. Floating-point parameters can be trained;
    integer ones are buffers.
    """

    def __init__(self, graph: Graph):
        super().__init__()
        self._steps = [_with_scalars(graph, node) for node in graph.nodes]
        self._values, self._outputs = dict(graph.values), graph.outputs
        self._graph, self._symbolic = replace(graph, constants={}), is_symbolic(graph)
        self._paths: dict[int, str] = {}

    def hold(self, path: str, value: int, tensor: torch.Tensor, *, persistent: bool = True) -> None:
        """Register a tensor under a dotted path as the contents of a value of the graph."""
        *parents, name = path.split(".")
        owner = self
        for parent in parents:
            if parent not in owner._modules:
                owner.add_module(parent, torch.nn.Module())
            owner = owner._modules[parent]
        if persistent and tensor.is_floating_point():
            owner.register_parameter(
                name,
                tensor if isinstance(tensor, torch.nn.Parameter) else torch.nn.Parameter(tensor),
            )
        else:
            owner.register_buffer(name, tensor, persistent=persistent)
        self._paths[value] = path

    def forward(self, *inputs: torch.Tensor):
        """Raises `InputError` for another number of inputs, or for shapes that do not fit."""
        if len(inputs) != len(self._graph.inputs):
            raise InputError(
                f"{len(inputs)} inputs given, but the graph takes {len(self._graph.inputs)}."
            )
        sizes = sizes_of(self._graph, [tuple(x.shape) for x in inputs])
        known = {value: self._held(path) for value, path in self._paths.items()}
        known |= dict(zip(self._graph.inputs, inputs, strict=True))
        last = {i: k for k, node in enumerate(self._steps) for i in node.inputs}
        for k, node in enumerate(self._steps):
            results = self._step(node, [known[i] for i in node.inputs], sizes, inputs[0].device)
            known |= dict(zip(node.outputs, results, strict=True))
            for i in node.inputs:
                if last[i] == k and i not in self._outputs:
                    known.pop(i, None)
        outputs = tuple(known[i] for i in self._outputs)
        return outputs if len(outputs) > 1 else outputs[0]

    def _held(self, path: str) -> torch.Tensor:
        owner = self
        *parents, name = path.split(".")
        for parent in parents:
            owner = owner._modules[parent]
        parameter = owner._parameters.get(name)
        return owner._buffers[name] if parameter is None else parameter

    def _step(self, node: Node, tensors, sizes: Mapping, device) -> list[torch.Tensor]:
        out = [self._values[i] for i in node.outputs]
        attributes = node.attributes
        if self._symbolic:
            out = [Value(resolve(v.shape, sizes), v.dtype) for v in out]
            attributes = resolve(attributes, sizes)
        if node.op not in PACKED:
            tensors = [t.to(CARRIERS.get(t.dtype, t.dtype)) for t in tensors]
        result = TORCH[node.op](tensors, attributes, out)
        results = result if isinstance(result, list) else [result]
        if not node.inputs:
            results = [r.to(device) for r in results]
        return [r.to(result_dtype(v.dtype)) for r, v in zip(results, out, strict=True)]


def _with_scalars(graph: Graph, node: Node) -> Node:
    """Padding by a known number takes it as an attribute: torch wants it before it runs."""
    value = graph.constants.get(node.inputs[1]) if node.op == "Pad" else None
    if value is None or value.size != 1:
        return node
    return replace(node, attributes=(*node.attributes, value.item()))


def to_torch(
    graph: Graph, parameters: Mapping[str, mx.array], *, device: str | torch.device = "cpu"
) -> GraphModule:
    """The graph as a torch module on a device ("cpu", "cuda", "mps").

    The weights share the memory of `parameters` where the device is the same, so training the
    module changes them. Constants that the graph made by itself are not in the state dict.

    Raises `InputError` naming all primitives that have no rule, a parameter that is missing or of
    another shape, or a device that is not there.
    """
    require_supported(graph, TORCH)
    module, tensors = GraphModule(graph), {}
    for path, value in graph.parameters.items():
        if path not in parameters:
            raise InputError(f"{path}: the graph expects it, but no array is given.")
        array = parameters[path]
        if array.shape != graph.values[value].shape:
            raise InputError(
                f"{path}: shape {array.shape}, but the graph expects {graph.values[value].shape}."
            )
        if value not in tensors:  # one tensor for parameters that are tied
            tensor = to_torch_tensor(array.astype(graph.values[value].dtype))
            floating = tensor.is_floating_point()
            tensors[value] = torch.nn.Parameter(tensor) if floating else tensor
        module.hold(path, value, tensors[value])
    for value, array in graph.constants.items():
        module.hold(f"_constant_{value}", value, to_torch_tensor(array), persistent=False)
    try:
        return module.eval().to(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"device {device}: torch cannot use it ({reason}); try cpu.") from error


def save_torch(program: Program, path: str | Path, *, seed: int = 0) -> None:
    """Write the program as a .pt2, which `torch.export.load` opens without this package.

    Every size that the program names stays open. The names of inputs and outputs, and the
    metadata, are in the extra file `program.json`. The file appears when it is complete.

    Raises `InputError` when torch.export cannot follow, or the file cannot be written.
    """
    path, graph = Path(path), recognise(program.graph)
    module = to_torch(graph, program.fetch(list(graph.parameters)))
    example, axes = [], []
    feeds = program.feeds(_at_least_two(program.sizes), seed)
    for number, array in zip(graph.inputs, feeds.values(), strict=True):
        value = graph.values[number]
        example.append(torch.from_numpy(array).to(result_dtype(value.dtype)))
        axes.append({k: str(n) for k, n in enumerate(value.shape) if isinstance(n, Size)})
    _write(exported.export(module, example, axes), path, program)


def _at_least_two(sizes: Mapping[str, int]) -> dict[str, int]:
    """Different numbers above 1, so that torch takes none for a constant or for another."""
    return {name: max(n, 3) + k for k, (name, n) in enumerate(sizes.items())}


def _write(program: torch.export.ExportedProgram, path: Path, source: Program) -> None:
    record = {
        "inputs": source.inputs, "outputs": source.outputs, "metadata": dict(source.metadata)
    }  # fmt: skip
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            work = Path(folder, "model.pt2")
            torch.export.save(program, work, extra_files={"program.json": json.dumps(record)})
            os.replace(work, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}).") from error
