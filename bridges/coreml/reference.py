"""A slow evaluator of Core ML packages in NumPy: reads what was written, and computes what it says.

    model = Package(path)
    model(feeds)               {output: array}
    model(feeds, state)        the same with states, changed in place; `model.state()` makes them

It takes the saved spec and weights, and shares no code with the exporter. It checks a program's
meaning and its declared shapes and types, not Core ML's runtime. A result is computed in float32
and rounded to the declared type.
"""

import itertools
import math
from pathlib import Path

import numpy as np
from coremltools.converters.mil.frontend.milproto.load import load as load_program
from coremltools.converters.mil.mil import types
from coremltools.converters.mil.mil.types.symbolic import is_symbolic

from .quiet import ct

DTYPES = {"fp16": np.float16, "fp32": np.float32, "int32": np.int32, "bool": np.bool_}


class Function:
    """The main function of a MIL program."""

    def __init__(self, program):
        self.main = program.functions["main"]

    def ops(self) -> list[str]:
        return [op.op_type for op in self.main.operations]

    def __call__(self, feeds, state=None) -> dict[str, np.ndarray]:
        held = {}
        for name, var in self.main.inputs.items():
            if not types.is_state(var.sym_type):
                held[var.name] = _checked(var, _rounded(var, np.asarray(feeds[name])))
        for op in self.main.operations:
            self._run(op, held, state)
        return {var.name: held[var.name] for var in self.main.outputs}

    def _run(self, op, held, state) -> None:
        if op.op_type == "const":
            held[op.outputs[0].name] = op.outputs[0].val
            return
        if op.op_type in ("read_state", "coreml_update_state"):
            name = (op.input if op.op_type == "read_state" else op.state).name
            if op.op_type == "coreml_update_state":
                state[name][...] = held[op.value.name]
            held[op.outputs[0].name] = state[name].copy()
            return
        args = {key: _given(var, held) for key, var in op.inputs.items() if var is not None}
        results = RULES[op.op_type](**args)
        if not isinstance(results, list):
            results = [results]
        for var, result in zip(op.outputs, results, strict=True):
            held[var.name] = _checked(var, _rounded(var, result))


class Package(Function):
    """A saved .mlpackage."""

    def __init__(self, path):
        weights = Path(path) / "Data/com.apple.CoreML/weights"
        self.spec = ct.utils.load_spec(str(path))
        super().__init__(load_program(self.spec, self.spec.specificationVersion, str(weights)))

    def state(self) -> dict[str, np.ndarray]:
        """Empty states, by name."""
        return {
            s.name: np.zeros(tuple(s.type.stateType.arrayType.shape), np.float16)
            for s in self.spec.description.state
        }


def _given(var, held):
    if isinstance(var, list | tuple):
        return [_given(v, held) for v in var]
    array = held[var.name] if var.name in held else var.val
    return array.astype(np.float32) if getattr(array, "dtype", None) == np.float16 else array


def _rounded(var, array):
    with np.errstate(over="ignore"):
        return np.asarray(array).astype(DTYPES[types.builtin_to_string(var.dtype)])


def _checked(var, array):
    declared = var.shape
    assert len(declared) == array.ndim, f"{var.name}: {array.shape}, but declared {declared}"
    for said, n in zip(declared, array.shape, strict=True):
        assert is_symbolic(said) or said == n, f"{var.name}: {array.shape}, declared {declared}"
    return array


# ---- activations and norms


def _sigmoid(x):
    return np.where(x >= 0, 1 / (1 + np.exp(-np.abs(x))), 1 - 1 / (1 + np.exp(-np.abs(x))))


def _erf(x):
    return np.vectorize(math.erf, otypes=[np.float64])(x)


def _gelu(x, mode="EXACT"):
    if mode == "EXACT":
        return 0.5 * x * (1 + _erf(x / 2**0.5))
    assert mode == "TANH_APPROXIMATION"
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def _softmax(x, axis=-1):
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def _layer_norm(x, axes, epsilon, gamma=1.0, beta=0.0):
    axes = tuple(axes)
    off = x - x.mean(axis=axes, keepdims=True)
    return off / np.sqrt((off**2).mean(axis=axes, keepdims=True) + epsilon) * gamma + beta


def _batch_norm(x, mean, variance, gamma=1.0, beta=0.0, epsilon=1e-5):
    shape = (1, -1, *[1] * (x.ndim - 2))
    mean, scale = np.reshape(mean, shape), np.reshape(gamma / np.sqrt(variance + epsilon), shape)
    return (x - mean) * scale + np.reshape(beta, np.shape(beta) and shape)


def _attention(query, key, value, attn_mask=None):
    scores = query @ key.swapaxes(-1, -2) / math.sqrt(query.shape[-1])
    if attn_mask is not None and attn_mask.dtype == bool:
        scores = np.where(attn_mask, scores, -np.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return _softmax(scores) @ value


# ---- linear algebra


def _linear(x, weight, bias=0.0):
    return x @ weight.T + bias


def _matmul(x, y, transpose_x=False, transpose_y=False):
    x = x.swapaxes(-1, -2) if transpose_x else x
    return x @ (y.swapaxes(-1, -2) if transpose_y else y)


def _conv(x, weight, strides, pad_type, pad, dilations, groups, bias=0.0):
    assert pad_type == "custom"
    x = np.pad(x, [(0, 0), (0, 0), *zip(pad[::2], pad[1::2], strict=True)])
    kernel = weight.shape[2:]
    out = [
        (n - d * (k - 1) - 1) // s + 1
        for n, k, s, d in zip(x.shape[2:], kernel, strides, dilations, strict=True)
    ]
    result = np.zeros((x.shape[0], weight.shape[0], *out), np.float64)
    per_out, per_in = weight.shape[0] // groups, weight.shape[1]
    for place in np.ndindex(*kernel):
        window = tuple(
            slice(p * d, p * d + s * (n - 1) + 1, s)
            for p, d, s, n in zip(place, dilations, strides, out, strict=True)
        )
        seen = x[(slice(None), slice(None), *window)]
        for g in range(groups):
            w = weight[(slice(g * per_out, (g + 1) * per_out), slice(None), *place)]
            part = seen[:, g * per_in : (g + 1) * per_in]
            result[:, g * per_out : (g + 1) * per_out] += np.einsum("oi,bi...->bo...", w, part)
    return result + np.reshape(bias, (1, -1, *[1] * (x.ndim - 2)))


def _conv_transpose(x, weight, strides, pad_type, pad, dilations, groups):
    assert pad_type == "custom"
    kernel, spatial = weight.shape[2:], x.shape[2:]
    sizes = [
        (n - 1) * s + d * (k - 1) + 1
        for n, s, d, k in zip(spatial, strides, dilations, kernel, strict=True)
    ]
    per_in, per_out = weight.shape[0] // groups, weight.shape[1]
    whole = np.zeros((x.shape[0], per_out * groups, *sizes))
    for place, at in itertools.product(np.ndindex(*kernel), np.ndindex(*spatial)):
        where = tuple(
            i * s + p * d for i, s, p, d in zip(at, strides, place, dilations, strict=True)
        )
        for g in range(groups):
            ins, outs = (slice(g * n, (g + 1) * n) for n in (per_in, per_out))
            seen = x[(slice(None), ins, *at)] @ weight[(ins, slice(None), *place)]
            whole[(slice(None), outs, *where)] += seen
    cut = tuple(
        slice(first, n - last) for n, first, last in zip(sizes, pad[::2], pad[1::2], strict=True)
    )
    return whole[(slice(None), slice(None), *cut)]


# ---- shapes and indices


def _reshape(x, shape):
    shape = [int(n) for n in shape]
    assert 0 not in shape
    return np.reshape(x, shape)


def _window(x, begin, end, stride=None, begin_mask=None, end_mask=None, squeeze_mask=None):
    where = []
    for k in range(x.ndim):
        if squeeze_mask is not None and squeeze_mask[k]:
            where.append(int(begin[k]))
            continue
        step = 1 if stride is None else int(stride[k])
        first = None if begin_mask is not None and begin_mask[k] else int(begin[k])
        last = None if end_mask is not None and end_mask[k] else int(end[k])
        where.append(slice(first, last, step))
    return tuple(where)


def _slice(x, **bounds):
    return x[_window(x, **bounds)]


def _slice_update(x, update, **bounds):
    x = x.copy()
    place = x[_window(x, **bounds)]
    assert place.shape == update.shape, (place.shape, update.shape)
    x[_window(x, **bounds)] = update
    return x


def _split(x, axis, split_sizes=None, num_splits=None):
    sizes = split_sizes if split_sizes is not None else [x.shape[axis] // num_splits] * num_splits
    return list(np.split(x, np.cumsum(sizes)[:-1], axis=axis))


def _gather(x, indices, axis=0, batch_dims=0, validate_indices=False):
    assert batch_dims == 0 and np.all(indices >= 0) and np.all(indices < x.shape[axis])
    return np.take(x, indices, axis=axis)


def _gather_nd(x, indices, batch_dims=0, validate_indices=False):
    assert batch_dims == 0
    return x[tuple(np.moveaxis(indices, -1, 0))]


def _along(indices, axis: int):
    where = list(np.meshgrid(*map(np.arange, indices.shape), indexing="ij"))
    where[axis] = indices
    return tuple(where)


def _gather_along_axis(x, indices, axis=0, validate_indices=False):
    return x[_along(indices, axis)]


COMBINE = {"add": np.add.at, "max": np.maximum.at, "min": np.minimum.at, "mul": np.multiply.at}


def _put(data, where, updates, mode):
    data = data.copy()
    if mode == "update":
        data[where] = updates
    else:
        COMBINE[mode](data, where, updates)
    return data


def _scatter_along_axis(data, indices, updates, axis=0, mode="add", validate_indices=False):
    return _put(data, _along(indices, axis), updates, mode)


def _scatter_nd(data, indices, updates, mode="add", validate_indices=False):
    return _put(data, tuple(np.moveaxis(indices, -1, 0)), updates, mode)


def _pad(x, pad, mode="constant", constant_val=0.0):
    assert mode == "constant"
    widths = np.reshape(pad, (-1, 2))
    lead = [(0, 0)] * (x.ndim - len(widths))
    return np.pad(x, [*lead, *map(tuple, widths)], constant_values=constant_val)


def _cumsum(x, axis=0, exclusive=False, reverse=False):
    x = np.flip(x, axis) if reverse else x
    total = np.cumsum(x, axis=axis) - (x if exclusive else 0)
    return np.flip(total, axis) if reverse else total


def _argsort(x, axis=-1, ascending=False):
    return np.argsort(x if ascending else -x, axis=axis, kind="stable")


def _cast(x, dtype):
    if dtype in ("int32", "int16", "uint16", "int8", "uint8"):
        return np.trunc(x).astype(dtype)
    return np.asarray(x).astype(DTYPES.get(dtype, dtype))


# ---- compressed weights


def _blocks(x, shape):
    for axis, (n, blocks) in enumerate(zip(shape, x.shape, strict=False)):
        x = np.repeat(x, n // blocks, axis=axis)
    return x


def _shift_scale(data, scale, offset=None):
    data = np.asarray(data).astype(np.float32)
    offset = 0 if offset is None else _blocks(np.asarray(offset).astype(np.float32), data.shape)
    return _blocks(scale, data.shape) * (data - offset)


def _lut(indices, lut, vector_axis=None):
    indices = np.asarray(indices).astype(np.int64)
    assert lut.shape[-1] == 1
    table = _blocks(lut, indices.shape)[..., 0]
    return np.take_along_axis(table, indices[..., None], axis=-1)[..., 0]


def _reduce(function):
    def rule(x, axes=None, keep_dims=False):
        return function(x, axis=None if axes is None else tuple(axes), keepdims=bool(keep_dims))

    return rule


def _arg(function):
    def rule(x, axis=-1, keep_dims=True, output_dtype="int32"):
        return function(x, axis=axis, keepdims=bool(keep_dims))

    return rule


UNARY = {
    "abs": np.abs, "acos": np.arccos, "asin": np.arcsin, "atan": np.arctan, "atanh": np.arctanh,
    "ceil": np.ceil, "cos": np.cos, "cosh": np.cosh, "erf": _erf, "exp": np.exp,
    "floor": np.floor, "identity": lambda x: x, "logical_not": np.logical_not,
    "relu": lambda x: np.maximum(x, 0), "round": np.round, "sigmoid": _sigmoid,
    "sign": np.sign, "silu": lambda x: x * _sigmoid(x),
    "sin": np.sin, "sinh": np.sinh, "softplus": lambda x: np.logaddexp(x, 0), "sqrt": np.sqrt,
    "square": np.square, "tan": np.tan, "tanh": np.tanh,
    "shape": lambda x: np.array(x.shape, np.int32),
}  # fmt: skip
BINARY = {
    "add": np.add, "equal": np.equal, "floor_div": np.floor_divide, "greater": np.greater,
    "greater_equal": np.greater_equal, "less": np.less, "less_equal": np.less_equal,
    "logical_and": np.logical_and, "logical_or": np.logical_or, "logical_xor": np.logical_xor,
    "maximum": np.maximum, "minimum": np.minimum, "mod": np.mod, "mul": np.multiply,
    "not_equal": np.not_equal, "pow": np.power, "real_div": np.true_divide, "sub": np.subtract,
}  # fmt: skip
REDUCE = {
    "reduce_max": np.max, "reduce_mean": np.mean, "reduce_min": np.min, "reduce_prod": np.prod,
    "reduce_sum": np.sum, "reduce_log_sum_exp": np.logaddexp.reduce,
}  # fmt: skip
RULES = {
    **{name: lambda x, f=f: f(x) for name, f in UNARY.items()},
    **{name: lambda x, y, f=f: f(x, y) for name, f in BINARY.items()},
    **{name: _reduce(f) for name, f in REDUCE.items()},
    "reduce_argmax": _arg(np.argmax),
    "reduce_argmin": _arg(np.argmin),
    "argsort": _argsort,
    "batch_norm": _batch_norm,
    "cast": _cast,
    "concat": lambda values, axis, interleave=False: np.concatenate(values, axis=axis),
    "constexpr_blockwise_shift_scale": _shift_scale,
    "constexpr_lut_to_dense": _lut,
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "cumsum": _cumsum,
    "expand_dims": lambda x, axes: np.expand_dims(x, tuple(axes)),
    "gather": _gather,
    "gather_along_axis": _gather_along_axis,
    "gather_nd": _gather_nd,
    "gelu": _gelu,
    "layer_norm": _layer_norm,
    "linear": _linear,
    "log": lambda x, epsilon=0: np.log(x + epsilon),
    "matmul": _matmul,
    "pad": _pad,
    "range_1d": lambda start, end, step: np.arange(start, end, step),
    "reshape": _reshape,
    "rsqrt": lambda x, epsilon=0: 1 / np.sqrt(x + epsilon),
    "scaled_dot_product_attention": _attention,
    "scatter_along_axis": _scatter_along_axis,
    "scatter_nd": _scatter_nd,
    "select": lambda cond, a, b: np.where(cond, a, b),
    "slice_by_index": _slice,
    "slice_update": _slice_update,
    "softmax": _softmax,
    "split": _split,
    "squeeze": lambda x, axes=None: np.squeeze(x, None if axes is None else tuple(axes)),
    "stack": lambda values, axis: np.stack(values, axis=axis),
    "tile": lambda x, reps: np.tile(x, [int(n) for n in reps]),
    "transpose": lambda x, perm: np.transpose(x, perm),
}
