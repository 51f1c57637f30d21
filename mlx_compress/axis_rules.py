"""The table from primitive to what it says about axes.

A rule reads the axes of a node's inputs, unifies the ones that must agree and returns those of the
outputs. What a rule cannot follow it freezes, with the reason; a primitive without a rule freezes
all that it touches and is named. So nothing is ever wrong for lack of a rule, only not prunable.
"""

import math
from collections.abc import Iterator

from .dims import (
    Axis,
    Misaligned,
    cut_axis,
    factors,
    freeze,
    is_wild,
    new_axis,
    size_of,
    split,
    sum_axis,
)
from .execute import ELEMENTWISE, window
from .graph import Node
from .inference import Axes, Inference, freeze_all

INPUT = "the model's input"
INDEXED = "indexed by position"


def elementwise(ctx: Inference, node: Node, x: list[Axes]) -> list[Axes]:
    shape = ctx.shape(node.outputs[0])
    rank = len(shape)
    out = []
    for k, size in enumerate(shape):
        offsets = [(axes, k - rank + len(axes)) for axes in x]
        out.append(ctx.join([axes[j] for axes, j in offsets if j >= 0], size))
    _carry_indices(ctx, node)
    return [[list(axis) for axis in out] for _ in node.outputs]


def _carry_indices(ctx: Inference, node: Node) -> None:
    """Indices stay indices when copied, cast, moved about or picked from."""
    if node.op in INDEX_PRESERVING and node.inputs[0] in ctx.index_of:
        for value in node.outputs:
            ctx.index_of[value] = ctx.index_of[node.inputs[0]]


def broadcast(ctx: Inference, node: Node, x: list[Axes]) -> list[Axes]:
    source = ctx.shape(node.inputs[0])
    out = ctx.fresh(node.outputs[0], wild=True)
    for k in range(1, len(source) + 1):
        if source[-k] == ctx.shape(node.outputs[0])[-k]:
            out[-k] = x[0][-k]
    _carry_indices(ctx, node)
    return [out]


def regroup(ctx: Inference, node: Node, x: list[Axes]) -> list[Axes]:
    """Reshape and its kin: the row-major factors are dealt out to the new axes."""
    out: Axes = []
    for axes, sizes in _blocks(x[0], ctx.shape(node.outputs[0])):
        try:
            out += _deal([dim for axis in axes for dim in axis], sizes)
        except Misaligned:
            why = f"{node.op} cuts it in a way that does not fit"
            freeze_all(axes, why)
            out += [new_axis(size, frozen=why) for size in sizes]
    _carry_indices(ctx, node)
    return [out]


def _blocks(axes: Axes, sizes: tuple[int, ...]) -> Iterator[tuple[Axes, list[int]]]:
    """The shortest runs of old axes and new sizes that hold equally many slots."""
    old, new = list(axes), list(sizes)
    if 0 in new:
        yield old, new
        return
    while old or new:
        before, after = [], []
        while not (before or after) or math.prod(map(size_of, before)) != math.prod(after):
            if old and math.prod(map(size_of, before)) <= math.prod(after):
                before.append(old.pop(0))
            else:
                after.append(new.pop(0))
        yield before, after


def _deal(rest: Axis, sizes: list[int]) -> Axes:
    out: Axes = []
    for size in sizes:
        axis: Axis = [] if size else new_axis(0, wild=True)
        while size_of(axis) < size:
            rest = factors(rest)
            wanted, dim = size // size_of(axis), rest[0]
            if wanted % dim.size == 0:
                axis.append(rest.pop(0))
            elif dim.size % wanted == 0:
                split(dim, wanted, dim.size // wanted)
            else:
                raise Misaligned
        out.append(axis)
    return out


def transpose(ctx: Inference, node: Node, x: list[Axes]) -> list[Axes]:
    _carry_indices(ctx, node)
    return [[x[0][k] for k in node.attributes[0]]]


def matmul(ctx: Inference, node: Node, x: list[Axes]) -> list[Axes]:
    a, b = x[0], x[1]
    ctx.unify(a[-1], b[-2])
    shape = ctx.shape(node.outputs[0])
    out: Axes = []
    for k in range(len(shape), 2, -1):
        batch = [axes[-k] for axes in (a, b) if len(axes) >= k]
        out.append(ctx.join(batch, shape[-k]))
    out += [a[-2], b[-1]]
    for k, axis in enumerate(reversed(x[2] if len(x) > 2 else []), start=1):
        if size_of(axis) == shape[-k]:
            ctx.unify(axis, out[-k])
    return [out]


def gather_mm(ctx: Inference, node: Node, x: list[Axes]) -> list[Axes]:
    """x [..., M, K] and w [E, K, N], batches picked by indices: an expert layer."""
    a, b, left, right = x
    ctx.unify(a[-1], b[-2])
    _point_into(ctx, node.inputs[3], b[0])
    freeze_all([*a[:-2], *b[1:-2]], INDEXED)
    ctx.routed.append((b[0], node.inputs[3]))
    shape = ctx.shape(node.outputs[0])
    out = [ctx.join([p, q], n) for p, q, n in zip(left, right, shape, strict=False)]
    return [[*out, a[-2], b[-1]]]


def _point_into(ctx: Inference, indices: int, axis: Axis) -> None:
    """The values of `indices` are positions on `axis`: they must come from ranking that axis."""
    if indices in ctx.index_of:
        ctx.unify(ctx.index_of[indices], axis)
    else:
        freeze(axis, INDEXED)


def gather(ctx: Inference, node: Node, x: list[Axes]) -> list[Axes]:
    axes, sizes = node.attributes
    source = ctx.shape(node.inputs[0])
    for axis, indices in zip(axes, node.inputs[1:], strict=True):
        _point_into(ctx, indices, x[0][axis])
    taken: Axes = []
    for k, (size, n) in enumerate(zip(sizes, source, strict=True)):
        if size != n and size != 1:
            freeze(x[0][k], "gathered in part")
        taken.append(x[0][k] if size == n and n != 1 else new_axis(size, frozen="gathered"))
    rank = len(ctx.shape(node.outputs[0])) - len(taken)
    shape = ctx.shape(node.outputs[0])
    lead = [
        ctx.join([a[k - rank + len(a)] for a in x[1:] if k - rank + len(a) >= 0], shape[k])
        for k in range(rank)
    ]
    _carry_indices(ctx, node)
    return [[*lead, *taken]]


def gather_axis(ctx: Inference, node: Node, x: list[Axes]) -> list[Axes]:
    axis = node.attributes[0]
    _point_into(ctx, node.inputs[1], x[0][axis])
    out = [
        x[1][k] if k == axis else ctx.join([x[0][k], x[1][k]], size)
        for k, size in enumerate(ctx.shape(node.outputs[0]))
    ]
    _carry_indices(ctx, node)
    return [out]


def scatter_axis(ctx: Inference, node: Node, x: list[Axes]) -> list[Axes]:
    axis = node.attributes[1]
    _point_into(ctx, node.inputs[1], x[0][axis])
    out = []
    for k, size in enumerate(ctx.shape(node.outputs[0])):
        out.append(x[0][k] if k == axis else ctx.join([axes[k] for axes in x], size))
    if is_wild(out[axis]) and node.inputs[1] in ctx.index_of:
        out[axis] = ctx.index_of[node.inputs[1]]
        ctx.unify(x[0][axis], out[axis])
    return [out]


def scatter(ctx: Inference, node: Node, x: list[Axes]) -> list[Axes]:
    """Updates [indices..., slice...] put into a source along some axes; the others pass."""
    axes = node.attributes[1]
    updates, rank = x[-1], len(x[0])
    lead = len(updates) - rank
    out = []
    for k in range(rank):
        if k in axes:
            why, size = "scattered into by position", size_of(x[0][k])
            freeze(x[0][k], why)
            out.append(new_axis(size, frozen=why) if is_wild(x[0][k]) else x[0][k])
        else:
            out.append(ctx.join([x[0][k], updates[lead + k]], size_of(x[0][k])))
    return [out]


def slices(ctx: Inference, node: Node, x: list[Axes]) -> list[Axes]:
    start, end, stride = node.attributes
    source = ctx.shape(node.inputs[0])
    out = [_slice_axis(ctx, *p) for p in zip(x[0], source, start, end, stride, strict=True)]
    _carry_indices(ctx, node)
    return [out]


def _slice_axis(ctx: Inference, axis: Axis, n: int, start: int, end: int, stride: int) -> Axis:
    cut = window(n, start, end, stride)
    kept = range(n)[cut]
    if len(kept) == n and stride == 1:
        return axis
    if is_wild(axis):
        return new_axis(len(kept), wild=True)
    if stride == 1 and len(kept):
        sizes = [size for size in (kept.start, len(kept), n - kept.stop) if size]
        return cut_axis(axis, sizes)[1 if kept.start else 0]
    if n % stride == 0 and len(kept) == n // stride:
        lead, step = new_axis(n // stride), new_axis(stride, frozen="strided slice")
        ctx.unify(axis, [*lead, *step])
        return lead
    freeze(axis, "strided slice")
    return new_axis(len(kept), frozen="strided slice")


def slice_update(ctx: Inference, node: Node, x: list[Axes]) -> list[Axes]:
    _, start, end, stride = node.attributes
    source = ctx.shape(node.inputs[0])
    out = []
    for k, n in enumerate(source):
        axis = x[0][k]
        if is_wild(axis) and not is_wild(x[1][k]):
            axis = new_axis(n)
            ctx.unify(x[0][k], axis)
        ctx.unify(_slice_axis(ctx, axis, n, start[k], end[k], stride[k]), x[1][k])
        out.append(axis)
    return [out]


def split_rule(ctx: Inference, node: Node, x: list[Axes]) -> list[Axes]:
    points, axis = node.attributes
    n = ctx.shape(node.inputs[0])[axis]
    bounds = [0, *points, n]
    segments = cut_axis(x[0][axis], [q - p for p, q in zip(bounds, bounds[1:], strict=False)])
    _carry_indices(ctx, node)
    return [[*x[0][:axis], segment, *x[0][axis + 1 :]] for segment in segments]


def concatenate(ctx: Inference, node: Node, x: list[Axes]) -> list[Axes]:
    axis = node.attributes[0]
    shape = ctx.shape(node.outputs[0])
    return [
        [
            sum_axis([ctx.solid(a[k]) for a in x]) if k == axis else ctx.join([a[k] for a in x], n)
            for k, n in enumerate(shape)
        ]
    ]


def pad(ctx: Inference, node: Node, x: list[Axes]) -> list[Axes]:
    out = list(x[0])
    for axis, low, high in zip(*node.attributes, strict=True):
        if low or high:
            before, after = [new_axis(low)] if low else [], [new_axis(high)] if high else []
            out[axis] = sum_axis([*before, ctx.solid(x[0][axis]), *after])
    return [out]


def reduce(ctx: Inference, node: Node, x: list[Axes]) -> list[Axes]:
    axes = node.attributes[1]
    ctx.reduced += [x[0][k] for k in axes]
    return [[[] if k in axes else axis for k, axis in enumerate(x[0])]]


def mix_last(ctx: Inference, node: Node, x: list[Axes]) -> list[Axes]:
    ctx.reduced.append(x[0][-1])
    last = x[0][-1] if node.op == "Softmax" else []
    return [[*x[0][:-1], last]]


def ordered(ctx: Inference, node: Node, x: list[Axes]) -> list[Axes]:
    """Sort, Partition, Scan: the order along the axis has a meaning."""
    axis = {"Sort": node.attributes[0], "Hadamard": -1}.get(node.op, node.attributes[-1])
    axis = node.attributes[1] if node.op == "Scan" else axis
    freeze(x[0][axis], f"{node.op} runs along it")
    return [list(x[0])]


def rank_axis(ctx: Inference, node: Node, x: list[Axes]) -> list[Axes]:
    """ArgSort, ArgPartition, ArgReduce: positions on the axis, ordered by rank."""
    axis = node.attributes[0] if node.op == "ArgSort" else node.attributes[1]
    ctx.reduced.append(x[0][axis])
    ctx.index_of[node.outputs[0]] = x[0][axis]
    n = ctx.shape(node.outputs[0])[axis]
    return [[new_axis(n, frozen="rank") if k == axis else a for k, a in enumerate(x[0])]]


def convolution(ctx: Inference, node: Node, x: list[Axes]) -> list[Axes]:
    """x [N, spatial..., C], w [O, kernel..., C / groups]."""
    data, weight = x
    groups = node.attributes[5]
    for axis in (*data[1:-1], *weight[1:-1]):
        freeze(axis, "convolved")
    out = [data[0], *ctx.fresh(node.outputs[0], frozen="convolved")[1:-1]]
    if groups == 1:
        ctx.unify(data[-1], weight[-1])
    else:
        inputs, outputs = ctx.shape(node.inputs[0])[-1], ctx.shape(node.inputs[1])[0]
        group, within = new_axis(groups), new_axis(inputs // groups)
        ctx.unify(data[-1], [*group, *within])
        ctx.unify(weight[0], [*group, *new_axis(outputs // groups)])
        ctx.unify(within, weight[-1])
    return [[*out, weight[0]]]


def as_strided(ctx: Inference, node: Node, x: list[Axes]) -> list[Axes]:
    """Sliding windows over flattened rows: only the innermost axis can be followed."""
    shape, strides, offset = node.attributes
    inner = x[0][-1] if len(x[0]) > 1 else None
    dims = factors(x[0][0]) if inner is None else []
    last = dims[-1:] if inner is None else factors(inner)
    follows = strides[-1] == 1 and size_of(last) == shape[-1] and offset % shape[-1] == 0
    follows = follows and all(stride % shape[-1] == 0 for stride in strides[:-1])
    for axis in x[0][:-1] if inner is not None else [dims[:-1]]:
        freeze(axis, "seen through windows")
    out = ctx.fresh(node.outputs[0], frozen="seen through windows")
    if follows:
        return [[*out[:-1], last]]
    freeze_all(x[0], "seen through windows")
    return [out]


def view(ctx: Inference, node: Node, x: list[Axes]) -> list[Axes]:
    same = ctx.shape(node.inputs[0]) == ctx.shape(node.outputs[0])
    return elementwise(ctx, node, x) if same else None


def positions(ctx: Inference, node: Node, x: list[Axes]) -> list[Axes]:
    return [ctx.fresh(node.outputs[0], frozen="positions are counted along it")]


def passes(ctx: Inference, node: Node, x: list[Axes]) -> list[Axes]:
    _carry_indices(ctx, node)
    return [list(axes) for axes in x[: len(node.outputs)]]


INDEX_PRESERVING = {
    "AsType", "Broadcast", "Contiguous", "Copy", "Depends", "ExpandDims", "Flatten", "Gather",
    "GatherAxis", "Reshape", "Slice", "Split", "Squeeze", "StopGradient", "Transpose", "Unflatten",
}  # fmt: skip

RULES = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys(("AsType", "BitwiseBinary", "DivMod", "Equal", "Log", "Sqrt"), elementwise),
    **dict.fromkeys(("Broadcast", "Full"), broadcast),
    **dict.fromkeys(("Reshape", "Flatten", "Unflatten", "ExpandDims", "Squeeze"), regroup),
    **dict.fromkeys(("Matmul", "AddMM"), matmul),
    **dict.fromkeys(("Hadamard", "Partition", "Scan", "Sort"), ordered),
    **dict.fromkeys(("ArgSort", "ArgPartition", "ArgReduce"), rank_axis),
    **dict.fromkeys(("Softmax", "LogSumExp"), mix_last),
    "Arange": positions,
    "AsStrided": as_strided,
    "Concatenate": concatenate,
    "Convolution": convolution,
    "Depends": passes,
    "Gather": gather,
    "GatherAxis": gather_axis,
    "GatherMM": gather_mm,
    "Pad": pad,
    "Reduce": reduce,
    "Scatter": scatter,
    "ScatterAxis": scatter_axis,
    "Slice": slices,
    "SliceUpdate": slice_update,
    "Split": split_rule,
    "Transpose": transpose,
    "View": view,
}
