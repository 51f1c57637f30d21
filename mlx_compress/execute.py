"""Run a graph on MLX: the table from primitive to `mx` operation, and an interpreter over it.

This is the first of the tables that read a graph (the axes, the costs and the exporters are the
others): a new primitive is one line in each, and so is a new composite of `patterns.py`. Shapes are
taken from the graph, so an edited graph runs as it stands. Everything stays lazy and
differentiable. MLX leaves `stop_gradient` out of what it traces, so a gradient through a graph
passes there.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn

from .errors import InputError
from .graph import Graph, Node, Value


def run(
    graph: Graph,
    inputs: Sequence[mx.array],
    parameters: Mapping[str, mx.array],
    *,
    taps: Iterable[int] = (),
    replace: Mapping[int, Callable[[mx.array], mx.array]] | None = None,
) -> tuple[list[mx.array], dict[int, mx.array]]:
    """Run `graph`; returns its outputs and the values whose ids are in `taps`, all lazy.

    `inputs` and `parameters` must have the shapes of the trace; a parameter of another dtype is
    cast to the trace's. `replace` maps a value's id to a function applied to it before its readers
    (and `taps`) see it. Raises `InputError` naming every primitive that has no rule.
    """
    require_supported(graph)
    known = bind(graph, inputs, parameters)
    return execute(graph, graph.nodes, known, outputs=graph.outputs, taps=taps, replace=replace)


def bind(graph: Graph, inputs, parameters) -> dict[int, mx.array]:
    """Values that are known before the first node runs: constants, inputs, parameters."""
    if len(inputs) != len(graph.inputs):
        raise InputError(f"{len(inputs)} inputs given, but the graph takes {len(graph.inputs)}.")
    missing = [path for path in graph.parameters if path not in parameters]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{missing[0]}{more}: the graph expects it, but no array is given.")
    known = dict(graph.constants)
    for k, number in enumerate(graph.inputs):
        known[number] = _of_shape(f"input {k}", inputs[k], graph.values[number])
    for path, number in graph.parameters.items():
        value = graph.values[number]
        known[number] = _of_shape(path, parameters[path], value).astype(value.dtype)
    return known


def _of_shape(name: str, array: mx.array, value: Value) -> mx.array:
    if array.shape != value.shape:
        raise InputError(f"{name}: shape {array.shape}, but the graph expects {value.shape}.")
    return array


def execute(graph, nodes, known, *, outputs, taps=(), replace=None):
    """Run `nodes` from the values in `known`, forgetting each value after its last reader.

    `known` is used up: what is left in it are results, and values that no node reads.
    """
    replace, taps = replace or {}, tuple(taps)
    keep = {*outputs, *taps}
    last = {i: k for k, node in enumerate(nodes) for i in node.inputs}
    for number in set(replace) & set(known):
        known[number] = replace[number](known[number])
    for k, node in enumerate(nodes):
        results = apply_node(graph, node, [known[i] for i in node.inputs])
        for number, array in zip(node.outputs, results, strict=True):
            known[number] = replace[number](array) if number in replace else array
        for number in {*node.inputs, *node.outputs}:
            if number not in keep and last.get(number, k) <= k:
                known.pop(number, None)
    return [known[i] for i in outputs], {i: known[i] for i in taps}


def apply_node(graph: Graph, node: Node, arrays: Sequence[mx.array]) -> list[mx.array]:
    """The outputs of one node."""
    result = OPS[node.op](arrays, node.attributes, [graph.values[i] for i in node.outputs])
    return result if isinstance(result, list) else [result]


def require_supported(graph: Graph, table: Mapping[str, object] | None = None) -> None:
    """Raise `InputError` naming all primitives of `graph` that `table` does not know, at once."""
    missing = sorted({node.op for node in graph.nodes} - set(OPS if table is None else table))
    if missing:
        raise InputError(f"no rule for primitive {', '.join(missing)} of the traced graph.")


# A rule takes x, the input arrays; a, the attributes; and out, the `Value`s of the outputs.


def _elementwise(fn):
    return lambda x, a, out: fn(*x)


def _to_shape(x, a, out):
    return mx.reshape(x[0], out[0].shape)


def _reduce(x, a, out):
    code, axes = a
    return (mx.all, mx.any, mx.sum, mx.prod, mx.min, mx.max)[code](x[0], axes, keepdims=True)


def _scan(x, a, out):
    code, axis, reverse, inclusive = a
    function = (mx.cummax, mx.cummin, mx.cumsum, mx.cumprod)[code]
    return function(x[0], axis=axis, reverse=reverse, inclusive=inclusive)


def _arg_reduce(x, a, out):
    code, axis = a
    return (mx.argmin, mx.argmax)[code](x[0], axis=axis, keepdims=True)


def _bitwise(x, a, out):
    functions = (mx.bitwise_and, mx.bitwise_or, mx.bitwise_xor, mx.left_shift, mx.right_shift)
    return functions[a[0]](*x)


def window(size: int, start: int, end: int, stride: int) -> slice:
    """MLX's slice of an axis as Python's.

    The start is a position; it is -1 or less where a reversed slice is empty. A negative end
    counts from the end of the axis, and may lie before its start.
    """
    end = end + size if end < 0 else end
    if stride > 0:
        return slice(start, max(end, 0), stride)
    return slice(start, end if end >= 0 else None, stride) if start >= 0 else slice(0, 0, stride)


def _windows(array, start, end, stride) -> tuple[slice, ...]:
    return tuple(map(window, array.shape, start, end, stride))


def _slice(x, a, out):
    return x[0][_windows(x[0], *a)]


UPDATES = ("maximum", "minimum", "add", "multiply")


def _slice_update(x, a, out):
    code, where = a[0], _windows(x[0], *a[1:])
    if code < len(UPDATES):
        return getattr(x[0].at[where], UPDATES[code])(x[1])
    updated = mx.array(x[0])
    updated[where] = x[1]
    return updated


def _gather(x, a, out):
    axes, sizes = a
    source, indices = x[0], x[1:]
    if len(axes) == 1 and all(
        size == (1 if k == axes[0] else n)
        for k, (size, n) in enumerate(zip(sizes, source.shape, strict=True))
    ):
        taken = mx.take(source, indices[0], axis=axes[0])
        lead = indices[0].ndim
        order = [
            *range(axes[0], axes[0] + lead),
            *range(axes[0]),
            *range(axes[0] + lead, taken.ndim),
        ]
        return mx.reshape(mx.transpose(taken, order), out[0].shape)
    if any(sizes[k] != (1 if k in axes else source.shape[k]) for k in range(source.ndim)):
        raise InputError(f"Gather of partial slices {sizes} of {source.shape} has no rule.")
    rest = [k for k in range(source.ndim) if k not in axes]
    moved = mx.transpose(source, [*axes, *rest])
    return mx.reshape(moved[tuple(mx.broadcast_arrays(*indices))], out[0].shape)


def _gather_axis(x, a, out):
    return mx.take_along_axis(x[0], x[1], axis=a[0])


def _scatter(x, a, out):
    """Updates [indices..., window...], put where the indices say that each window starts."""
    code, axes = a
    source, starts, updates = x[0], x[1:-1], x[-1]
    lead, order = updates.ndim - source.ndim, [*axes]
    order += [k for k in range(source.ndim) if k not in axes]
    moved = mx.transpose(source, order)
    updates = mx.transpose(updates, [*range(lead), *(lead + k for k in order)])
    steps = mx.meshgrid(*map(mx.arange, updates.shape[lead : lead + len(axes)]), indexing="ij")
    where = tuple(
        mx.reshape(start, (*start.shape, *[1] * len(axes))) + step
        for start, step in zip(starts, steps, strict=True)
    )
    if code < len(UPDATES):
        moved = getattr(moved.at[where], UPDATES[code])(updates)
    else:
        moved = mx.array(moved)
        moved[where] = updates
    return mx.transpose(moved, [order.index(k) for k in range(source.ndim)])


def _scatter_axis(x, a, out):
    code, axis = a
    if code == 0:
        raise InputError("ScatterAxis that adds has no rule.")
    return mx.put_along_axis(x[0], x[1], x[2], axis=axis)


def _pad(x, a, out):
    axes, low, high = a
    widths = [(0, 0)] * x[0].ndim
    for axis, *width in zip(axes, low, high, strict=True):
        widths[axis] = tuple(width)
    return mx.pad(x[0], widths, constant_values=x[1])


def _convolution(x, a, out):
    stride, low, high, kernel_dilation, input_dilation, groups, flip = a
    return mx.conv_general(
        x[0],
        x[1],
        stride=stride,
        padding=(low, high),
        kernel_dilation=kernel_dilation,
        input_dilation=input_dilation,
        groups=groups,
        flip=flip,
    )


def _routes(left, right, left_sorted, right_sorted) -> dict:
    """MLX takes one side as sorted only where it counts off the indices of the other by itself."""
    return {
        "lhs_indices": None if right_sorted else left,
        "rhs_indices": None if left_sorted else right,
        "sorted_indices": left_sorted or right_sorted,
    }


def _gather_mm(x, a, out):
    return mx.gather_mm(*x[:2], **_routes(*x[2:], *a))


QUANTISATION_MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")


def _quantized_matmul(x, a, out):
    group_size, bits, mode, transposed = a
    return mx.quantized_matmul(
        x[0],
        x[1],
        scales=x[2],
        biases=x[3] if len(x) > 3 else None,
        transpose=transposed,
        group_size=group_size,
        bits=bits,
        mode=QUANTISATION_MODES[mode],
    )


def _gather_qmm(x, a, out):
    group_size, bits, mode, transposed, *are_sorted = a
    biases = x[3] if len(x) > 5 else None
    return mx.gather_qmm(
        *x[:3],
        biases,
        **_routes(*x[-2:], *are_sorted),
        transpose=transposed,
        group_size=group_size,
        bits=bits,
        mode=QUANTISATION_MODES[mode],
    )


def _equal(x, a, out):
    equal = mx.equal(*x)
    return equal | ((x[0] != x[0]) & (x[1] != x[1])) if a[0] else equal


def _arange(x, a, out):
    start, stop, step = a
    return mx.arange(start, stop, step, dtype=out[0].dtype)


# ---- composites (patterns.py)


def _rope(x, a, out):
    array, cos, sin = x
    dims, traditional = a
    turned, rest = array[..., :dims], array[..., dims:]
    cos, sin = cos.astype(array.dtype), sin.astype(array.dtype)
    halves = mx.split(turned, 2, axis=-1)
    first, second = (turned[..., 0::2], turned[..., 1::2]) if traditional else halves
    parts = [first * cos - second * sin, first * sin + second * cos]
    if traditional:
        turned = mx.flatten(mx.stack(parts, axis=-1), -2)
    else:
        turned = mx.concatenate(parts, axis=-1)
    return mx.concatenate([turned, rest], axis=-1)


def _attention(x, a, out):
    scale, causal = a
    mask = "causal" if causal else x[3] if len(x) > 3 else None
    return mx.fast.scaled_dot_product_attention(*x[:3], scale=scale, mask=mask)


def _linear(x, a, out):
    return x[0] @ x[1].T if len(x) == 2 else mx.addmm(x[2], x[0], x[1].T)


GELU = {"none": nn.gelu, "tanh": nn.gelu_approx}

ELEMENTWISE = {
    "Abs": mx.abs, "Add": mx.add, "ArcCos": mx.arccos, "ArcCosh": mx.arccosh,
    "ArcSin": mx.arcsin, "ArcSinh": mx.arcsinh, "ArcTan": mx.arctan, "ArcTan2": mx.arctan2,
    "ArcTanh": mx.arctanh, "Ceil": mx.ceil, "Cos": mx.cos, "Cosh": mx.cosh,
    "Copy": mx.array, "Contiguous": mx.array, "Divide": mx.divide,
    "Erf": mx.erf, "ErfInv": mx.erfinv, "Exp": mx.exp, "Expm1": mx.expm1, "Floor": mx.floor,
    "FloorDivide": mx.floor_divide, "Greater": mx.greater, "GreaterEqual": mx.greater_equal,
    "Less": mx.less, "LessEqual": mx.less_equal, "Log1p": mx.log1p, "LogAddExp": mx.logaddexp,
    "LogicalAnd": mx.logical_and, "LogicalNot": mx.logical_not, "LogicalOr": mx.logical_or,
    "Maximum": mx.maximum, "Minimum": mx.minimum, "Multiply": mx.multiply,
    "Negative": mx.negative, "NotEqual": mx.not_equal, "Power": mx.power,
    "Remainder": mx.remainder, "Select": mx.where, "Sigmoid": mx.sigmoid, "Sign": mx.sign,
    "Sin": mx.sin, "Sinh": mx.sinh, "Square": mx.square, "StopGradient": mx.stop_gradient,
    "Subtract": mx.subtract, "Tan": mx.tan, "Tanh": mx.tanh, "Round": mx.round,
}  # fmt: skip

OPS = {
    **{name: _elementwise(function) for name, function in ELEMENTWISE.items()},
    **dict.fromkeys(("Reshape", "Flatten", "Unflatten", "ExpandDims", "Squeeze"), _to_shape),
    "AddMM": lambda x, a, out: mx.addmm(x[2], x[0], x[1], alpha=a[0], beta=a[1]),
    "Arange": _arange,
    "ArgPartition": lambda x, a, out: mx.argpartition(x[0], kth=a[0], axis=a[1]),
    "ArgReduce": _arg_reduce,
    "ArgSort": lambda x, a, out: mx.argsort(x[0], axis=a[0]),
    "AsStrided": lambda x, a, out: mx.as_strided(x[0], *a),
    "AsType": lambda x, a, out: x[0].astype(a[0]),
    "BitwiseBinary": _bitwise,
    "Broadcast": lambda x, a, out: mx.broadcast_to(x[0], out[0].shape),
    "Concatenate": lambda x, a, out: mx.concatenate(x, axis=a[0]),
    "Convolution": _convolution,
    "Depends": lambda x, a, out: list(x[: len(out)]),
    "DivMod": lambda x, a, out: list(mx.divmod(*x)),
    "Equal": _equal,
    "Full": lambda x, a, out: mx.broadcast_to(x[0], out[0].shape),
    "Gather": _gather,
    "GatherAxis": _gather_axis,
    "GatherMM": _gather_mm,
    "GatherQMM": _gather_qmm,
    "Hadamard": lambda x, a, out: mx.hadamard_transform(x[0], scale=a[0]),
    "Log": lambda x, a, out: (mx.log2, mx.log10, mx.log)[a[0]](x[0]),
    "LogSumExp": lambda x, a, out: mx.logsumexp(x[0], axis=-1, keepdims=True),
    "Matmul": lambda x, a, out: mx.matmul(*x),
    "Pad": _pad,
    "Partition": lambda x, a, out: mx.partition(x[0], kth=a[0], axis=a[1]),
    "QuantizedMatmul": _quantized_matmul,
    "Reduce": _reduce,
    "Scan": _scan,
    "Scatter": _scatter,
    "ScatterAxis": _scatter_axis,
    "Size": lambda x, a, out: mx.array(a[0], out[0].dtype),
    "Slice": _slice,
    "SliceUpdate": _slice_update,
    "Softmax": lambda x, a, out: mx.softmax(x[0], axis=-1, precise=a[0]),
    "Sort": lambda x, a, out: mx.sort(x[0], axis=a[0]),
    "Split": lambda x, a, out: mx.split(x[0], list(a[0]), axis=a[1]),
    "Sqrt": lambda x, a, out: mx.rsqrt(x[0]) if a[0] else mx.sqrt(x[0]),
    "Transpose": lambda x, a, out: mx.transpose(x[0], a[0]),
    "View": lambda x, a, out: x[0].view(a[0]),
    "Attention": _attention,
    "GELU": lambda x, a, out: GELU[a[0]](x[0]),
    "LayerNorm": lambda x, a, out: mx.fast.layer_norm(*x, *[None] * (3 - len(x)), a[0]),
    "Linear": _linear,
    "RMSNorm": lambda x, a, out: mx.fast.rms_norm(*x, *[None] * (2 - len(x)), a[0]),
    "RoPE": _rope,
    "SiLU": lambda x, a, out: nn.silu(x[0]),
}
