"""MLX's quantised weights in ONNX, without loss.

An affine group of MLX is code * scale + bias; a block of MatMulNBits is (code - zero) * scale, and
is fast only where the zero is a whole number of the code's range. Most groups of MLX are so. What
is left, `bias + zero * scale`, is a small matrix on the sums of the groups' inputs; where it is
nothing, it is not written. Codes of 2 and 3 bits are stored in 4, those of 5 and 6 in 8.

Other kinds (mxfp4, mxfp8, nvfp4, routed experts) become plain weights; the notes say so.
"""

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np
from onnx import TensorProto

from ...errors import InputError
from ...execute import QUANTISATION_MODES, execute
from ...graph import Graph, Node, with_outputs
from ...sizes import instantiate
from . import contractions, experts
from .builder import Handle, Static, cast, constant, current, emit, tensor
from .extents import ints
from .views import reshape, transpose

UINT8 = TensorProto.UINT8
NOTHING = 1e-6  # of the largest weight: what float32 rounds away
SMALL = {"batch": 2, "length": 3, "past": 4}  # sizes to try a lookup at


def matmul(x, a, out):
    group, bits, mode, transposed = a
    if _in_blocks(x[1:], a) and len(x[1].shape) == 2:
        return contractions.joinable(_by_blocks, x, (group, bits), out[0].shape)
    return contractions.product(x[0], _plain(x[1:], a), out[0].shape)


def gather_qmm(x, a, out):
    group, bits = a[:2]
    *parts, left_place, place = x[1:]
    if not _in_blocks(parts, a) or len(parts[0].shape) != 3:
        return contractions.gather_mm([x[0], _plain(parts, a), left_place, place], (), out)
    blocks = _blocks(parts, group, bits)
    stacks = [h for h in blocks if h is not None]

    def multiply(rows: Handle, expert: Handle) -> Handle:
        mine = [h and experts.picked(h, expert) for h in blocks]
        rows.shape = (None, *x[0].shape[-2:])
        return _product(rows, mine, group, bits, (None, *out[0].shape[-2:]))

    left = cast(x[0], blocks[1].dtype)
    return experts.routed(left, [left_place, place], out[0].shape, multiply, stacks)


def _in_blocks(parts: Sequence[Handle], a: tuple) -> bool:
    """Whether MatMulNBits can hold the weight."""
    group, _, mode, transposed = a[:4]
    return QUANTISATION_MODES[mode] == "affine" and transposed and group >= 16


def _by_blocks(x, a, shape: tuple) -> Handle:
    blocks = _blocks(x[1:], *a)
    return _product(cast(x[0], blocks[1].dtype), blocks, *a, shape)


def _product(left: Handle, blocks, group: int, bits: int, shape: tuple) -> Handle:
    codes, scales, zeros, rest = blocks
    y = emit(
        "MatMulNBits", left, codes, scales, zeros, shape=shape, domain="com.microsoft",
        K=left.shape[-1], N=codes.shape[0], bits=_container(bits), block_size=group,
        accuracy_level=current().accuracy_level,
    )  # fmt: skip
    if rest is None:
        return y
    sums = _group_sums(left, group)
    return emit("Add", y, emit("MatMul", sums, transpose(rest, (1, 0))), shape=shape)


def _group_sums(left: Handle, group: int) -> Handle:
    def make() -> Handle:
        *lead, width = left.shape
        split = emit("Reshape", left, ints([0] * len(lead) + [width // group, group]))
        return emit("ReduceSum", split, ints([-1]), keepdims=0)

    return current().remember(("sums", tensor(left), group), make)


def _plain(parts: Sequence[Handle], a: tuple) -> Handle:
    """The weight itself [..., in, out], computed when the file is written."""
    builder = current()
    group, bits, mode, transposed = a[:4]
    packed = parts[0]
    _require_static(parts)
    name = f"{_name(packed)}.dequantized"
    width = packed.shape[-1] * 32 // bits
    shape = (*packed.shape[:-1], width)

    def make() -> mx.array:
        arrays = [builder.array(h.static.value) for h in parts]
        biases = arrays[2] if len(arrays) > 2 else None
        return mx.dequantize(*arrays[:2], biases, group, bits, QUANTISATION_MODES[mode])

    builder.recipes[name] = make
    builder.notes.append(
        f"{_name(packed)}: {QUANTISATION_MODES[mode]} {bits}-bit is written as a plain weight"
    )
    weight = Handle(shape, builder.type_of(mx.float32), static=Static(name))
    rank = len(shape)
    return transpose(weight, (*range(rank - 2), rank - 1, rank - 2)) if transposed else weight


def _name(handle: Handle) -> str:
    value = handle.static.value
    name = current().paths.get(value, value)
    return name if isinstance(name, str) else f"value.{name}"


def _require_static(parts: Sequence[Handle]) -> None:
    if any(h.static is None or h.static.steps for h in parts):
        raise InputError("a quantised weight that depends on the input has no rule in ONNX.")


def _container(bits: int) -> int:
    return 4 if bits <= 4 else 8


def _blocks(parts: Sequence[Handle], group: int, bits: int):
    """Codes uint8 [..., out, blocks, bytes], scales [..., out, blocks], zeros, and what is left.

    The last two are None where they say nothing: zeros in the middle of the range, and no rest.
    """
    _require_static(parts)
    builder = current()
    packed, scales, _ = parts
    name, (*lead, blocks) = _name(packed), scales.shape
    room = _container(bits)
    ids = [h.static.value for h in parts]

    def pair() -> tuple[np.ndarray, np.ndarray]:
        scale, bias = (np.array(builder.array(i).astype(mx.float32)) for i in ids[1:])
        return scale, bias

    def rest() -> np.ndarray:
        scale, bias = pair()
        return bias + _zeros(scale, bias, room) * scale

    def needless() -> dict[str, bool]:
        scale, bias = pair()
        largest = np.abs(scale).max() * 2**bits
        middle = bool((_zeros(scale, bias, room) == 2 ** (room - 1)).all())
        return {"zeros": middle, "rest": bool(np.abs(rest()).max() <= NOTHING * largest)}

    kind = builder.type_of(mx.float32)
    made = {
        "codes": ((blocks, group * room // 8), UINT8,
                  lambda: _codes(builder.array(ids[0]), blocks, group, bits)),
        "scales": ((blocks,), kind, lambda: pair()[0]),
        "zeros": ((-(-blocks * room // 8),), UINT8, lambda: _packed(_zeros(*pair(), room), room)),
        "rest": ((blocks,), kind, rest),
    }  # fmt: skip
    out = []
    for suffix, (last, dtype, make) in made.items():
        builder.recipes[f"{name}.{suffix}"] = make
        out.append(Handle((*lead, *last), dtype, static=Static(f"{name}.{suffix}")))
    left_out = builder.remember(("needless", name), needless)
    return [None if left_out.get(k) else h for k, h in zip(made, out, strict=True)]


def _zeros(scale: np.ndarray, bias: np.ndarray, bits: int) -> np.ndarray:
    """The nearest zero of the code's range to -bias / scale."""
    safe = np.where(scale == 0, 1, scale)
    return np.clip(np.rint(-bias / safe), 0, 2**bits - 1)


def _packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Two codes of 4 bits in a byte, the first one low; each row for itself."""
    codes = codes.astype(np.uint8)
    if bits == 8:
        return codes
    even = np.pad(codes, (*[(0, 0)] * (codes.ndim - 1), (0, codes.shape[-1] % 2)))
    return even[..., ::2] | even[..., 1::2] << 4


def _codes(weight: mx.array, blocks: int, group: int, bits: int) -> np.ndarray:
    """MLX packs 4 and 8 bits as ONNX Runtime does; the others are packed anew."""
    lead = weight.shape[:-1]
    if bits in (4, 8):
        return np.array(weight).view(np.uint8).reshape(*lead, blocks, -1)
    one = mx.ones((*lead, blocks))
    codes = np.array(mx.dequantize(weight, one, 0 * one, group, bits))
    return _packed(codes, _container(bits)).reshape(*lead, blocks, -1)


# ---- embeddings


def lookup(x, a, out):
    """Rows of a quantised table: the codes are picked, and only these are dequantised."""
    group, bits = a
    *parts, index = x
    _require_static(parts)
    builder = current()
    codes = _blocks(parts, group, bits)[0]
    picked = [_rows(h, index) for h in (codes, *parts[1:])]
    lead, blocks = index.shape, codes.shape[1]
    entries = picked[0]
    if _container(bits) == 4:
        low = emit("BitwiseAnd", entries, constant(np.array(15, np.uint8)))
        high = emit("BitShift", entries, constant(np.array(4, np.uint8)), direction="RIGHT")
        pair = [emit("Unsqueeze", h, ints([-1])) for h in (low, high)]
        entries = emit("Concat", *pair, axis=-1, shape=(*lead, blocks, group // 2, 2))
        entries = reshape(entries, (*lead, blocks, group))
    entries = cast(entries, builder.type_of(mx.float32))
    scale, bias = (reshape(h, (*lead, blocks, 1)) for h in picked[1:])
    y = emit("Add", emit("Mul", entries, scale), bias, shape=(*lead, blocks, group))
    return reshape(y, out[0].shape)


def _rows(table: Handle, index: Handle) -> Handle:
    return emit("Gather", table, index, axis=0, shape=(*index.shape, *table.shape[1:]))


def with_lookups(graph: Graph) -> Graph:
    """Nodes `Lookup` (weight, scales, biases, index), attributes (group_size, bits), in place of
    what MLX makes of `dequantize(weight[index], ...)`."""
    for gather in graph.nodes:
        if gather.op == "Gather" and graph.values[gather.inputs[0]].dtype == mx.uint32:
            graph = _with_lookup(graph, gather)
    return graph


def _with_lookup(graph: Graph, gather: Node) -> Graph:
    index = gather.inputs[-1]
    gathers = [n for n in graph.nodes if n.op == "Gather" and n.inputs[1:] == (index,)]
    picked = {n.outputs[0]: n for n in gathers}
    reach = {gather.outputs[0]: {gather.outputs[0]}}  # a value -> the gathers that it comes from
    for node in graph.nodes:
        known = [reach.get(i, {i} if i in picked else None) for i in node.inputs]
        if node in gathers or not any(known):
            continue
        free = [i for i, k in zip(node.inputs, known, strict=True) if k is None]
        if not set(free) <= graph.constants.keys():
            continue
        sources = set().union(*(k for k in known if k))
        if gather.outputs[0] not in sources and not sources <= picked.keys():
            continue
        reach[node.outputs[0]] = sources
        found = _affine(graph, node.outputs[0], gather, sources - {gather.outputs[0]}, picked)
        if found:
            composite = Node("Lookup", *found[:1], node.outputs, found[1])
            nodes = tuple(composite if n is node else n for n in graph.nodes)
            return with_outputs(replace(graph, nodes=nodes), graph.outputs)
    return graph


def _affine(graph: Graph, value: int, gather: Node, others: set[int], picked):
    """Inputs and attributes of a Lookup that computes `value`, or None if none does."""
    width = graph.values[value].shape[-1:]
    if len(others) != 2 or not width or not isinstance(width[0], int):
        return None
    weight, index = gather.inputs
    columns = graph.values[weight].shape[1]
    tables = {o: picked[o].inputs[0] for o in sorted(others)}
    blocks = {graph.values[t].shape[-1] for t in tables.values()}
    bits, rest = divmod(32 * columns, width[0])
    if rest or len(blocks) != 1 or width[0] % min(blocks) or not 2 <= bits <= 8:
        return None
    group = width[0] // blocks.pop()
    for order in (sorted(others), sorted(others, reverse=True)):
        if _computes(graph, value, gather.outputs[0], order, group, bits):
            return (weight, *(tables[o] for o in order), index), (group, bits)
    return None


def _computes(graph: Graph, value: int, codes: int, order, group: int, bits: int) -> bool:
    """Whether `value` is what `dequantize` makes of random rows."""
    part = with_outputs(instantiate(graph, SMALL), [value])
    cut = {codes, *order}
    nodes = [n for n in part.nodes if not cut.intersection(n.outputs)]
    packed = mx.random.randint(0, 2**31, part.values[codes].shape, key=mx.random.key(1))
    known = {i: graph.constants[i] for n in nodes for i in n.inputs if i in graph.constants}
    known[codes] = packed.astype(mx.uint32)
    for k, i in enumerate(order):
        shape, dtype = part.values[i].shape, part.values[i].dtype
        known[i] = mx.random.normal(shape, key=mx.random.key(k)).astype(dtype)
    want_shape = part.values[value].shape
    rows = [known[i].reshape(-1, known[i].shape[-1]) for i in (codes, *order)]
    try:
        (got,), _ = execute(part, nodes, dict(known), outputs=[value])
        want = mx.dequantize(*rows, group, bits).reshape(want_shape)
    except (ValueError, KeyError):
        return False
    return mx.allclose(got, want, rtol=1e-3, atol=1e-3).item()
