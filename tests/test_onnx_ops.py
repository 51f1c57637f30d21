"""Every rule of the ONNX table against MLX, each on a small graph at several sizes."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import onnx
import pytest
from mlx_compress.bridges.onnx.export import export_onnx
from mlx_compress.bridges.onnx.ops import OPS
from mlx_compress.bridges.onnx.quantized import with_lookups
from mlx_compress.bridges.onnx.runner import load

from mlx_compress.errors import InputError
from mlx_compress.graph import Graph, Node, Value
from mlx_compress.patterns import recognise
from mlx_compress.program import Program, program_of

SIZES = ({"batch": 2, "length": 3}, {"batch": 1, "length": 1}, {"batch": 5, "length": 4})
WHOLE = mx.int32
INDEX = mx.array([[2, 0], [1, 1], [0, 2]])


@dataclass(frozen=True)
class Case:
    """`fn(parameters, *inputs)`; an input is (shape, dtype), with "b" and "l" for open sizes."""

    fn: object
    inputs: tuple
    parameters: dict
    close: float = 2e-6
    shift: float = 0.0  # added to inputs and made positive, for functions of part of the line


def on(fn, *inputs, close=2e-6, shift=0.0, **parameters):
    whole = [i if isinstance(i[0], tuple) else (i, mx.float32) for i in inputs]
    return Case(lambda p, *x: fn(*x, *p.values()), tuple(whole), parameters, close, shift)


def number(*shape, dtype=mx.float32, seed=1):
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def packed(*shape, group=32, bits=4):
    w, s, b = mx.quantize(number(*shape), group, bits)
    return {"w": w, "s": s, "b": b}


def quantised(bits, mode="affine", group=32):
    def fn(x, w, s, *b):
        return mx.quantized_matmul(x, w, s, *b, group_size=group, bits=bits, mode=mode)

    names = ("w", "s", "b")
    arrays = mx.quantize(number(8, 64), group, bits, mode=mode)
    return on(fn, ("b", "l", 64), close=1e-5, **dict(zip(names, arrays, strict=False)))


def lookup(mode, bits, group):
    def fn(index, w, s, *b):
        return mx.dequantize(w[index], s[index], *(a[index] for a in b), group_size=group,
                             bits=bits, mode=mode)  # fmt: skip

    arrays = mx.quantize(number(3, 64), group, bits, mode=mode)
    names = ("w", "s", "b")
    return on(fn, (("b", "l"), WHOLE), **dict(zip(names, arrays, strict=False)))


def spread(x, index, updates):
    return x.at[index].add(updates)


ROUTE = mx.array([[0, 2], [1, 1], [2, 0]], mx.uint32)
X = ("b", "l", 6)
CASES = {
    **{
        fn.__name__: on(fn, X)
        for fn in (
            mx.abs, mx.arctan, mx.arcsinh, mx.ceil, mx.cos, mx.cosh, mx.erf, mx.exp, mx.expm1,
            mx.floor, mx.negative, mx.round, mx.sigmoid, mx.sign, mx.sin, mx.sinh, mx.square,
            mx.tanh, mx.tan,
        )
    },
    **{
        fn.__name__: on(fn, X, shift=shift)
        for fn, shift in (
            (mx.log, 0.1), (mx.log2, 0.1), (mx.log10, 0.1), (mx.log1p, 0.1), (mx.sqrt, 0.1),
            (mx.rsqrt, 0.1), (mx.arccosh, 1.1),
        )
    },
    **{fn.__name__: on(lambda x, fn=fn: fn(0.9 * mx.sin(x)), X)
       for fn in (mx.arccos, mx.arcsin, mx.arctanh)},
    **{
        fn.__name__: on(fn, X, (6,))
        for fn in (
            mx.add, mx.subtract, mx.multiply, mx.divide, mx.maximum, mx.minimum, mx.logaddexp,
            mx.greater, mx.greater_equal, mx.less, mx.less_equal, mx.equal, mx.not_equal,
        )
    },
    **{
        f"{fn.__name__} of whole numbers": on(fn, (X, WHOLE), ((6,), WHOLE), shift=1)
        for fn in (mx.remainder, mx.floor_divide, mx.add, mx.maximum, mx.equal, mx.bitwise_and,
                   mx.bitwise_or, mx.bitwise_xor, mx.left_shift, mx.right_shift)
    },
    **{
        f"{fn.__name__} of a sign": on(
            lambda x, y, fn=fn: fn(x - 2, y + 1), (X, WHOLE), ((6,), WHOLE)
        )
        for fn in (mx.remainder, mx.floor_divide)
    },
    "remainder": on(mx.remainder, X, (6,), close=1e-4),
    "floor divide": on(mx.floor_divide, X, (6,)),
    "divmod": on(lambda x, y: sum(mx.divmod(x, y)), X, (6,), close=1e-4),
    "power": on(mx.power, X, (6,), shift=0.1, close=1e-5),
    "cube": on(lambda x: x**3, X),
    "nan is nan": on(lambda x: mx.array_equal(mx.log(x), mx.log(x), equal_nan=True), X),
    "shift wraps": on(lambda x: mx.left_shift(x.astype(mx.uint32) + 2**31, 3), (X, WHOLE)),
    "logic": on(lambda x, y: ~((x > 0) & (y > 0)) | (x > 1), X, (6,)),
    "and": on(lambda x, y: mx.logical_and(x > 0, y > 0), X, (6,)),
    "bits of booleans": on(lambda x, y: mx.bitwise_and(x > 0, y > 0), X, (6,)),
    "where": on(lambda x, y: mx.where(x > y, x, 2.0), X, (6,)),
    "where of booleans": on(lambda x, y: mx.where(x > y, x > 1, y > 0), X, (6,)),
    "cast": on(lambda x: (3 * x).astype(mx.int32) + (x > 0).astype(mx.int32), X),
    **{
        f"{name} along {axes}": on(lambda x, name=name, axes=axes: getattr(mx, name)(x, axes), X)
        for name in ("sum", "prod", "min", "max", "logsumexp")
        for axes in (-1, [0, 2])
    },
    "all and any": on(lambda x: mx.all(x > -1, -1) | mx.any(x > 1, -1), X),
    "sum of booleans": on(lambda x: (x > 0).sum(-1), X),
    "argmax": on(lambda x: mx.argmax(x, -1), X),
    "argmin": on(lambda x: mx.argmin(x, 0), X),
    **{
        f"{fn.__name__} {how}": on(lambda x, fn=fn, how=how: fn(x, axis=1, **how), X)
        for fn in (mx.cumsum, mx.cumprod, mx.cummax, mx.cummin)
        for how in ({}, {"reverse": True})
    },
    "cumsum before": on(lambda x: mx.cumsum(x, axis=-1, inclusive=False), X),
    "cumprod before": on(lambda x: mx.cumprod(x, axis=-1, inclusive=False), X),
    "softmax": on(lambda x: mx.softmax(x, -1), X),
    "softmax along another axis": on(lambda x: mx.softmax(x, 1), X),
    "sort": on(lambda x: mx.sort(x, axis=1), X),
    "argsort": on(lambda x: mx.argsort(x, axis=-1), X),
    "partition": on(lambda x: mx.sort(mx.partition(x, 2, axis=-1)[..., :3], -1), X),
    "argpartition": on(
        lambda x: mx.sort(mx.take_along_axis(x, mx.argpartition(x, 2, axis=-1)[..., :3], -1), -1), X
    ),
    "reshape": on(lambda x: x.reshape(-1, 2, 3).transpose(1, 0, 2).flatten(1)[:, None], X),
    "unflatten": on(lambda x: mx.unflatten(x, 2, (3, 2)).squeeze() + 1, ("b", 2, 6)),
    "move twice": on(lambda x: (2 * x.transpose(0, 2, 1)).swapaxes(1, 2), X),
    "concatenate": on(lambda x, y: mx.concatenate([x, y, x], 1), X, X),
    "split": on(lambda x: sum(mx.split(x, [2, 4], -1)), X),
    "slice": on(lambda x: x[:, :, 1:5:2] + x[:, -1:, 2:4], X),
    "slice backwards": on(lambda x: x[:, :, ::-1] + x[:, :, 4:5], X),
    "pad": on(lambda x: mx.pad(x, [(1, 0), (0, 2), (1, 1)], constant_values=2.0), X),
    "broadcast": on(lambda x: mx.concatenate([mx.broadcast_to(x[..., :1], x.shape), x], 0), X),
    "full": on(lambda x: mx.concatenate([mx.full(x.shape, 2.5), x], 0), X),
    "positions": on(lambda x: mx.concatenate([x[0], mx.arange(x.shape[1])[:, None] / 4], -1), X),
    "set a part": on(lambda x: _set(x, (slice(None), slice(0, 1), slice(1, 3)), 7.0), X),
    "add to a part": on(lambda x: x.at[:, :, 1:3].add(x[:, :, 3:5]), X),
    "set every other": on(lambda x: _set(x, (slice(None), slice(0, 6, 2)), 7.0), (4, 6)),
    "take": on(lambda x: mx.take(x, INDEX, axis=2), X),
    "take from the first axis": on(lambda x, w: w[(x > 0).astype(mx.int32)], X, w=number(2, 3)),
    "take by two indices": on(lambda x: x[INDEX, :, INDEX[::-1]], (3, 4, 5)),
    "take along": on(lambda x: mx.take_along_axis(x, mx.argsort(-x, -1), -1), X),
    "put along": on(
        lambda x: mx.put_along_axis(x, mx.argsort(x, -1)[..., :1], mx.array(9.0), -1), X
    ),
    "scatter": on(lambda x: spread(x, INDEX, mx.ones((3, 2, 5))), (4, 5)),
    "scatter by two indices": on(lambda x: x.at[INDEX, INDEX[::-1]].maximum(mx.array(0.5)), (3, 4)),
    "scatter windows": on(lambda x: _set(x, (slice(None), INDEX[0]), 3.0), (3, 4)),
    "bytes": on(lambda x: (x.astype(mx.uint32) * 70000).view(mx.uint8), (X, WHOLE)),
    "signed bytes": on(lambda x: (x.astype(mx.uint32) * 70000).view(mx.int8), (X, WHOLE)),
    "hadamard": on(mx.hadamard_transform, ("b", 12)),
    "matmul": on(lambda x, w: x @ w, X, w=number(6, 5)),
    "matmul of two inputs": on(lambda x: x @ x.swapaxes(1, 2), X),
    "addmm": on(lambda x, w, c: mx.addmm(c, x, w, 0.5, 2.0), ("b", 6), w=number(6, 5), c=number(5)),
    "tied": on(lambda i, w: w[i] @ w.T, (("b", "l"), WHOLE), w=number(3, 4)),
    "linear": on(lambda x, w, b: x @ w.T + b, X, w=number(5, 6), b=number(5)),
    "layer": on(lambda x, w, b: mx.addmm(b, x, w.T), X, w=number(5, 6), b=number(5)),
    "one plus a weight": on(lambda x, w: mx.fast.rms_norm(x, 1 + w, 1e-5), X, w=number(6)),
    "rms norm": on(lambda x, w: mx.fast.rms_norm(x, w, 1e-5), X, w=number(6)),
    "rms norm alone": on(lambda x: mx.fast.rms_norm(x.swapaxes(0, 1), None, 1e-5), X),
    "layer norm": on(
        lambda x, w, b: mx.fast.layer_norm(x, w, b, 1e-5), X, w=number(6), b=number(6)
    ),
    "gelu": on(nn.gelu, X),
    "gelu by tanh": on(nn.gelu_approx, X),
    "silu": on(nn.silu, X),
    "gather mm": on(
        lambda x, w: mx.gather_mm(x[:, :, None], w, rhs_indices=_route(x)), X, w=number(3, 6, 5)
    ),
    "gather qmm": on(
        lambda x, w, s, b: mx.gather_qmm(
            x[:, :, None], w, s, b, rhs_indices=_route(x), transpose=True, group_size=32, bits=4
        ),
        ("b", "l", 64), close=1e-5, **packed(3, 5, 64),
    ),
    **{f"quantised to {bits}": quantised(bits) for bits in (2, 3, 4, 5, 6, 8)},
    "quantised to mxfp4": quantised(4, "mxfp4"),
    "quantised lookup": lookup("affine", 4, 32),
    "quantised lookup in 8": lookup("affine", 8, 64),
    "quantised lookup in mxfp4": lookup("mxfp4", 4, 32),
    "depends": on(lambda x: mx.depends(x, mx.exp(x)) + 1, X),
}  # fmt: skip


def _set(x, where, value):
    y = mx.array(x)
    y[where] = value
    return y


def _route(x):
    return mx.argmax(x[..., :3], -1)


def convolution(spatial, *, groups=1, out=6, kernel=3, **how):
    def fn(x, w):
        return mx.conv_general(x, w, groups=groups, **how)

    rank = len(spatial)
    weight = number(out, *[kernel] * rank, 4 // groups)
    return on(fn, ("b", *spatial, 4), close=1e-5, w=weight)


CASES |= {
    "conv 1d": convolution((9,), stride=2, padding=1),
    "conv 2d": convolution((7, 8), stride=(2, 1), padding=(1, 2)),
    "conv dilated": convolution((9, 8), kernel_dilation=2),
    "conv in groups": convolution((6, 5), groups=2),
    "conv of each channel": convolution((6, 5), groups=4, out=8),
    "conv padded on one side": convolution((6, 5), padding=([1, 0], [0, 2])),
    "conv cropped": convolution((6, 7), padding=([-1, 0], [0, -2])),
    "conv flipped": convolution((6, 5), flip=True),
    "conv 3d": convolution((4, 5, 3), padding=1),
    "conv transposed": on(
        lambda x, w: mx.conv_transpose2d(x, w, stride=2, padding=1), ("b", 5, 4, 4), close=1e-5,
        w=number(6, 3, 3, 4),
    ),
    "conv transposed, padded": on(
        lambda x, w: mx.conv_transpose2d(x, w, stride=2, padding=1, output_padding=1),
        ("b", 5, 4, 4), close=1e-5, w=number(6, 3, 3, 4),
    ),
    "conv transposed in groups": on(
        lambda x, w: mx.conv_transpose1d(x, w, stride=3, groups=2), ("b", 5, 4), close=1e-5,
        w=number(6, 4, 2),
    ),
    "max pooling": on(lambda x: nn.MaxPool2d(2, 2)(x), ("b", 6, 8, 3)),
    "strides": on(lambda x: mx.as_strided(x, (3, 4), (2, 1), 1), (9,)),
    "global pooling": on(lambda x: x.transpose(0, 3, 1, 2).max((2, 3)), ("b", 4, 5, 3)),
    "average pooling": on(lambda x: nn.AvgPool2d(3, 2, 1)(x), ("b", 6, 8, 3)),
}  # fmt: skip


def attention(heads=4, kv=2, width=8, value=8, mask=None, keys="l"):
    def fn(x, k, v):
        shown = mask(x) if callable(mask) else mask
        return mx.fast.scaled_dot_product_attention(x, k, v, scale=0.3, mask=shown)

    return on(fn, ("b", heads, "l", width), ("b", kv, keys, width), ("b", kv, keys, value),
              close=1e-5)  # fmt: skip


CASES |= {
    "attention": attention(),
    "attention over others": attention(keys=5),
    "attention with narrow values": attention(value=4),
    "causal attention": attention(mask="causal"),
    "attention with a mask": attention(mask=lambda x: mx.eye(x.shape[2]) > 0),
    "attention with added numbers": attention(mask=lambda x: mx.eye(x.shape[2])),
    "attention of all heads": attention(heads=3, kv=3),
    **{
        f"rope {'in pairs' if pairs else 'in halves'} of {dims}": on(
            lambda x, pairs=pairs, dims=dims: mx.fast.rope(
                x.swapaxes(1, 2), dims, traditional=pairs, base=100.0, scale=1.0, offset=3
            ),
            ("b", "l", 2, 8),
        )
        for pairs in (False, True)
        for dims in (8, 4)
    },
}


def program(case: Case) -> Program:
    names = {"b": "batch", "l": "length"}
    example, dynamic = {}, {}
    for k, (shape, dtype) in enumerate(case.inputs):
        sizes = [SIZES[0].get(names.get(n), n) for n in shape]
        example[f"x{k}"] = mx.zeros(sizes, dtype)
        dynamic[f"x{k}"] = {axis: names[n] for axis, n in enumerate(shape) if n in names}
    limits = {name: 3 for name in example}
    return program_of(case.fn, example, parameters=case.parameters, outputs=["y"],
                      dynamic={k: v for k, v in dynamic.items() if v}, limits=limits)  # fmt: skip


def feeds(case: Case, made: Program, sizes: dict, seed: int) -> dict:
    drawn = made.feeds(sizes, seed)
    if not case.shift:
        return drawn
    return {name: np.abs(a) + np.array(case.shift).astype(a.dtype) for name, a in drawn.items()}


@pytest.mark.parametrize("name", CASES)
def test_it_computes_what_mlx_computes(name, tmp_path):
    case = CASES[name]
    made = program(case)
    path = export_onnx(made, tmp_path / "x.onnx", accuracy_level=0).path
    onnx.checker.check_model(str(path), full_check=True)
    model = load(path, threads=1)
    for seed, sizes in enumerate(SIZES if made.sizes else SIZES[:1]):
        given = feeds(case, made, {k: sizes[k] for k in made.sizes}, seed)
        (want,), (got,) = made.run(given), model.run(given)
        assert got.shape == want.shape
        want = np.array(want.astype(mx.float32))
        scale = max(1.0, np.abs(want).max(initial=0))
        np.testing.assert_allclose(got, want, rtol=0, atol=case.close * scale)


RUN_ELSEWHERE = {
    "Contiguous", "Copy", "StopGradient",  # simplified away
    "Flatten", "Size",  # by the decoders of test_onnx_export.py
}  # fmt: skip


def test_the_cases_reach_every_rule():
    reached = {"Depends"}
    for case in CASES.values():
        graph = program(case).graph
        found = with_lookups(recognise(graph))
        reached |= {node.op for node in (*graph.nodes, *found.nodes)}
    assert OPS.keys() - reached - RUN_ELSEWHERE == set()


def test_unknown_primitives_are_named_at_once(tmp_path):
    values = {k: Value((2,), mx.float32) for k in range(3)}
    nodes = (Node("Woozle", (0,), (1,)), Node("Heffalump", (1,), (2,)))
    graph = Graph(nodes, values, (0,), (2,), {}, {})
    made = Program(graph, lambda paths: {}, ("x",), ("y",))
    with pytest.raises(InputError, match="Heffalump, Woozle"):
        export_onnx(made, tmp_path / "x.onnx")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("how", ({"stride": 2, "input_dilation": 2}, {"input_dilation": 2,
                                 "padding": 5}), ids=("strided", "padded"))  # fmt: skip
def test_a_convolution_that_onnx_lacks_is_refused(how, tmp_path):
    made = program(convolution((5, 5), **how))
    with pytest.raises(InputError, match="has no rule in ONNX"):
        export_onnx(made, tmp_path / "x.onnx")
