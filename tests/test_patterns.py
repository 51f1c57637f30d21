"""Composite nodes stand where people's spellings of an operation stand, and nowhere else."""

import math
from collections import Counter

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_compress.bridges.decoder import module_program

import tiny
from mlx_compress.execute import run
from mlx_compress.graph import trace
from mlx_compress.patterns import PATTERNS, recognise

COMPOSITES = {pattern.name for pattern in PATTERNS}
X, W = (2, 5, 12), (12,)
Q, K, V = (2, 6, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4)


def random(shapes):
    keys = mx.random.split(mx.random.key(0), len(shapes))
    return [mx.random.normal(shape, key=key) for shape, key in zip(shapes, keys, strict=True)]


def found(fn, *shapes):
    """Composites of the function, after checking that the rewritten graph computes the same."""
    arrays = random(shapes)
    graph = recognise(trace(fn, *arrays))
    got, _ = run(graph, arrays, {})
    want = fn(*arrays)
    np.testing.assert_allclose(np.array(got[0]), np.array(want), rtol=2e-5, atol=2e-6)
    return [(n.op, n.attributes) for n in graph.nodes if n.op in COMPOSITES]


def sdpa(q, k, v, mask=None, scale=0.3):
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)


def rope(x, **changes):
    options = {"traditional": False, "base": 100.0, "scale": 0.5, "offset": 4} | changes
    return mx.fast.rope(x, options.pop("dims", 8), **options)


NEAR = pytest.approx
SPELLINGS = {
    "rms norm": (lambda x, w: mx.fast.rms_norm(x, w, 1e-3), (X, W), ("RMSNorm", (NEAR(1e-3),))),
    "rms norm of a matrix": (
        lambda x, w: mx.fast.rms_norm(x, w, 1e-3), ((5, 12), W), ("RMSNorm", (NEAR(1e-3),)),
    ),
    "rms norm without a weight": (
        lambda x: mx.fast.rms_norm(x, None, 1e-3), (X,), ("RMSNorm", (NEAR(1e-3),)),
    ),
    "rms norm by hand": (
        lambda x, w: w * (x * mx.rsqrt((x**2).mean(-1, keepdims=True) + 1e-3)),
        (X, W), ("RMSNorm", (NEAR(1e-3),)),
    ),
    "layer norm": (
        lambda x, w, b: mx.fast.layer_norm(x, w, b, 1e-5), (X, W, W), ("LayerNorm", (NEAR(1e-5),)),
    ),
    "layer norm without a bias": (
        lambda x, w: mx.fast.layer_norm(x, w, None, 1e-5), (X, W), ("LayerNorm", (NEAR(1e-5),)),
    ),
    "layer norm of nothing but x": (
        lambda x: mx.fast.layer_norm(x, None, None, 1e-5), (X,), ("LayerNorm", (NEAR(1e-5),)),
    ),
    "rope": (rope, (Q,), ("RoPE", (8, False))),
    "traditional rope": (lambda x: rope(x, traditional=True), (Q,), ("RoPE", (8, True))),
    "rope of some": (lambda x: rope(x, dims=2), (Q,), ("RoPE", (2, False))),
    "traditional rope of some": (
        lambda x: rope(x, dims=6, traditional=True), (Q,), ("RoPE", (6, True)),
    ),
    "rope by frequencies": (
        lambda x, f: rope(x, base=None, freqs=mx.exp(f)), (Q, (4,)), ("RoPE", (8, False)),
    ),
    "attention": (sdpa, ((2, 3, 5, 8), K, V), ("Attention", (NEAR(0.3), False))),
    "grouped attention": (sdpa, (Q, K, V), ("Attention", (NEAR(0.3), False))),
    "attention, causal": (
        lambda q, k, v: sdpa(q, k, v, "causal"), (Q, K, V), ("Attention", (NEAR(0.3), True)),
    ),
    "attention, causal by a mask": (
        lambda q, k, v: sdpa(q, k, v, mx.arange(2, 7)[:, None] >= mx.arange(7)),
        (Q, K, V), ("Attention", (NEAR(0.3), True)),
    ),
    "attention, causal by an additive mask": (
        lambda q, k, v: sdpa(q, k, v, mx.where(mx.arange(2, 7)[:, None] < mx.arange(7), -1e9, 0)),
        (Q, K, V), ("Attention", (NEAR(0.3), True)),
    ),
    "attention with a mask that is given": (
        sdpa, (Q, K, V, (2, 1, 5, 7)), ("Attention", (NEAR(0.3), False)),
    ),
    "attention with a bias for each head": (
        sdpa, (Q, K, V, (2, 6, 5, 7)), ("Attention", (NEAR(0.3), False)),
    ),
    "gelu": (nn.gelu, (X,), ("GELU", ("none",))),
    "gelu, halved first": (
        lambda x: 0.5 * x * (1 + mx.erf(x / math.sqrt(2))), (X,), ("GELU", ("none",)),
    ),
    "gelu by tanh": (nn.gelu_approx, (X,), ("GELU", ("tanh",))),
    "silu": (nn.silu, (X,), ("SiLU", ())),
    "silu the other way round": (lambda x: mx.sigmoid(x) * x, (X,), ("SiLU", ())),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_spelling_is_found_with_its_attributes(name):
    fn, shapes, want = SPELLINGS[name]
    assert found(fn, *shapes) == [want]


NOT_QUITE = {
    "mean of another power": lambda x: x * mx.rsqrt((x**4).mean(-1, keepdims=True) + 1e-3),
    "a mean over rows": lambda x: x * mx.rsqrt((x**2).mean(1, keepdims=True) + 1e-3),
    "a sum in place of the mean": lambda x: x * mx.rsqrt((x**2).sum(-1, keepdims=True) + 1e-3),
    "silu of another": lambda x: x * mx.sigmoid(2 * x),
    "gelu with another constant": lambda x: x * (1 + mx.erf(x / 1.5)) / 2,
    "halves turned the other way": lambda x: mx.concatenate(
        [x[..., :6] * mx.cos(x[..., 6:]) + x[..., 6:], x[..., 6:] - x[..., :6]], axis=-1
    ),
}


@pytest.mark.parametrize("name", NOT_QUITE)
def test_what_only_looks_like_it_is_left_alone(name):
    assert found(NOT_QUITE[name], X) == []


def test_a_mask_with_a_window_is_not_causal_however_wide():
    def windowed(q, k, v):
        rows, columns = mx.arange(2, 7)[:, None], mx.arange(7)
        return sdpa(q, k, v, (rows >= columns) & (rows < columns + 4096))

    assert found(windowed, Q, K, V) == [("Attention", (NEAR(0.3), False))]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 12), X, (2, 3, 5, 12)])
def test_a_layer_of_a_module_is_linear(bias, shape):
    layer = nn.Linear(12, 9, bias=bias)
    graph = recognise(trace(layer, mx.zeros(shape)))
    assert [(n.op, len(n.inputs)) for n in graph.nodes] == [("Linear", 2 + bias)]
    x = mx.random.normal(shape, key=mx.random.key(2))
    (got,), _ = run(graph, [x], {"weight": layer.weight, **({"bias": layer.bias} if bias else {})})
    np.testing.assert_allclose(np.array(got), np.array(layer(x)), rtol=1e-5, atol=1e-6)


def test_a_product_of_two_activations_is_no_layer():
    assert found(lambda x, y: x @ y.T, (5, 12), (9, 12)) == []


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_is_found_as_well(dtype):
    x, w = (a.astype(dtype) for a in random([X, W]))
    graph = recognise(trace(lambda x, w: nn.silu(mx.fast.rms_norm(x, w, 1e-3)), x, w))
    assert [n.op for n in graph.nodes] == ["RMSNorm", "SiLU"]


def test_a_decoder_comes_down_to_its_layers():
    module = tiny.build(tiny.LLAMA)
    program = module_program(lambda: module)
    ops = Counter(node.op for node in recognise(program.graph).nodes)
    want = {"Attention": 2, "RoPE": 4, "RMSNorm": 5, "SiLU": 2, "Linear": 15, "Cos": 1, "Sin": 1}
    assert {op: ops[op] for op in want} == want
    assert not ops.keys() & {"Softmax", "Matmul", "Flatten", "GreaterEqual"}
