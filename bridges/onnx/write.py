"""Write an ONNX file: weights computed one at a time, beside the file where they are large.

Nothing appears under its final name before it is whole.
"""

import contextlib
import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from ...errors import InputError, ResourceError
from ...program import Program
from ...sizes import Size
from .builder import Builder, Handle, with_inner

OPSET = 23
IR_VERSION = 11  # the first that knows opset 23
PAGE = 4096  # readers map external weights where they begin on a page
INLINE_BYTES = 1024  # smaller ones stay in the file: shape inference reads some of them
LARGEST_FILE = 2**31 - 2**20  # what protobuf can hold


@dataclass(frozen=True)
class Written:
    """The files of an export, the bytes of its weights, and what there is to say about it."""

    path: Path
    data: Path | None
    weight_bytes: int
    nodes: Mapping[str, int]
    notes: tuple[str, ...]


def write(
    builder: Builder, program: Program, outputs: Sequence[Handle], path: Path,
    *, metadata: Mapping[str, str], external_bytes: int,
) -> Written:  # fmt: skip
    """Write what `builder` holds. Weights go beside the file when they exceed `external_bytes`."""
    nodes = _needed(builder.nodes, [h.name for h in outputs])
    read = {name for node in with_inner(nodes) for name in node.input} | {h.name for h in outputs}
    weights = {name: w for name, w in builder.weights.items() if name in read}
    arrays = {name: a for name, a in builder.arrays.items() if name in read}
    total = sum(map(_bytes, weights.values())) + sum(a.nbytes for a in arrays.values())
    external = total > min(external_bytes, LARGEST_FILE)
    data = path.with_name(path.name + ".data") if external else None
    model = _model(builder, program, outputs, nodes, path.stem, metadata)
    model.graph.initializer.extend(
        helper.make_tensor(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape, a.tobytes(), True)
        for n, a in arrays.items()
    )
    with _partial(path, data) as (file, data_file):
        tensors = _tensors(builder, weights, data_file, data)
        model.graph.initializer.extend(tensors)
        file.write(model.SerializeToString())
    counts: dict[str, int] = {}
    for node in with_inner(nodes):
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return Written(path, data, total, counts, tuple(dict.fromkeys(builder.notes)))


def _needed(nodes: list[NodeProto], outputs: list[str]) -> list[NodeProto]:
    needed, kept = set(outputs), []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(name for part in with_inner([node]) for name in part.input)
            kept.append(node)
    return kept[::-1]


def _bytes(weight: Handle) -> int:
    return prod(weight.shape) * helper.tensor_dtype_to_np_dtype(weight.dtype).itemsize


def _model(builder, program, outputs, nodes, name: str, metadata) -> ModelProto:
    domains = {node.domain for node in with_inner(nodes) if node.domain}
    graph = helper.make_graph(
        nodes, name,
        [_info(h.name, h) for h in builder.inputs.values()],
        [_info(n, h) for n, h in zip(program.outputs, outputs, strict=True)],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", OPSET), *(helper.make_opsetid(d, 1) for d in sorted(domains))]
    model = helper.make_model(
        graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="mlx-compress"
    )
    helper.set_model_props(model, dict(metadata))
    return model


def _info(name: str, handle: Handle):
    shape = [str(n) if isinstance(n, Size) else n for n in handle.shape]
    return helper.make_tensor_value_info(name, handle.dtype, shape)


def _tensors(builder, weights, data_file, data: Path | None) -> Iterator[TensorProto]:
    for name, weight in weights.items():
        array = np.asarray(builder.contents(weight), order="C")
        assert array.shape == weight.shape, (name, array.shape, weight.shape)
        tensor = TensorProto(name=name, dims=array.shape, data_type=weight.dtype)
        if data is None or array.nbytes < INLINE_BYTES:
            tensor.raw_data = array.tobytes()
        else:
            data_file.seek(-(-data_file.tell() // PAGE) * PAGE)
            place = {"location": data.name, "offset": data_file.tell(), "length": array.nbytes}
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
            data_file.write(array.data)
        yield tensor


@contextlib.contextmanager
def _partial(path: Path, data: Path | None):
    """Files to write to, that take their names when all went well."""
    names = [path] if data is None else [path, data]
    partials = [n.with_name(f".{n.name}.{os.getpid()}.partial") for n in names]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(partial.open("wb")) for partial in partials]
            yield files[0], files[-1]
        for partial, name in reversed(list(zip(partials, names, strict=True))):
            partial.replace(name)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"{path}: the disk is full; free some space.") from error
        raise InputError(f"{path}: cannot be written ({error.strerror or error}).") from error
    finally:
        for partial in partials:
            with contextlib.suppress(OSError):
                partial.unlink()
