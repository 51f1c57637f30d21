"""Rules of the Core ML table against MLX, through the evaluator of `reference.py`."""

import re

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_compress.bridges.coreml.build import Plan, build, features
from mlx_compress.bridges.coreml.ops import OPS
from mlx_compress.bridges.coreml.prepare import prepare
from mlx_compress.bridges.coreml.quiet import ct
from mlx_compress.bridges.coreml.reference import Function

from mlx_compress import execute
from mlx_compress.errors import InputError
from mlx_compress.graph import trace
from test_execute import CASES, IMAGES, X, convolution, normal

# Packed weights are merged where they are parameters (test_coreml_export.py).
PACKED = {"QuantizedMatmul", "GatherQMM"}
NOT_SAID = {
    "ArcTan2": "MIL has no such operation",
    "AsStrided": "MIL has no strides",
    "ErfInv": "MIL has no such operation",
    "View": "MIL has no bit casts",
}
ORDER_IS_FREE = {"ArgPartition", "Partition"}
# Rules that are not complete say so.
PARTLY = {
    "BitwiseBinary": "of integers has no rule",
    "Convolution": "dynamic weights|a computed, turned kernel",
    "Scan": "only the sum",
    "Scatter": "Scatter of windows",
    "Slice": "has no entries",
}


def mil(fn, inputs, *, target=ct.target.iOS18, floats="fp32", dtype=None):
    """The MIL program of `fn`, and the arrays it takes by name."""
    graph, packed = prepare(trace(fn, *inputs, dtype=dtype), {})
    names = [f"in_{k}" for k in range(len(inputs))]
    outputs = [f"out_{k}" for k in range(len(graph.outputs))]
    plan = Plan(graph, features(graph, names, floats), outputs, packed)
    program, _ = build(plan, fetch_none, symbols={}, floats=floats, target=target)
    feeds = {name: np.array(x) for name, x in zip(names, inputs, strict=True)}
    return Function(program), feeds


def fetch_none(paths):
    raise AssertionError("these functions have no parameters")


def positive(case):
    """Core ML counts no index from the end; a pass of coremltools minds what a model makes."""
    op, fn, *inputs = case
    integers = [mx.issubdtype(x.dtype, mx.integer) for x in inputs]
    if "Gather" in op or "Scatter" in op:
        inputs = [abs(x) if k else x for x, k in zip(inputs, integers, strict=True)]
    return op, fn, inputs


@pytest.mark.parametrize(
    "case", [c for c in CASES if c[0] not in PACKED | NOT_SAID.keys()], ids=lambda case: case[0]
)
def test_a_rule_computes_what_mlx_computes(case):
    op, fn, inputs = positive(case)
    wanted = fn(*inputs)
    wanted = [wanted] if isinstance(wanted, mx.array) else wanted
    if op in PARTLY:
        try:
            mil(fn, inputs)
        except InputError as refused:
            assert re.search(PARTLY[op], str(refused))
            return
    function, feeds = mil(fn, inputs)
    for got, want in zip(function(feeds).values(), wanted, strict=True):
        tolerance = 1e-3 if want.dtype == mx.float16 else 3e-6
        got, want = (np.sort(a, axis=None) if op in ORDER_IS_FREE else a
                     for a in (got, np.array(want)))  # fmt: skip
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def test_every_primitive_has_a_rule_or_a_reason():
    assert execute.OPS.keys() - OPS.keys() == NOT_SAID.keys() | PACKED


def test_what_has_no_rule_is_named_all_at_once():
    with pytest.raises(InputError, match="no rule for primitive ErfInv, View of the traced graph"):
        mil(lambda x: [mx.erfinv(x), x.view(mx.int32)], [X])


def test_turned_and_grouped_kernels_are_written_as_core_ml_reads_them():
    square, wide = normal(8, 3, 3, 6), normal(6, 3, 2, 3)
    kernels = {
        "flipped": convolution(normal(8, 3, 3, 3), groups=2, flip=True),
        "spread": convolution(normal(8, 2, 2, 6), input_dilation=(2, 3)),
        "transposed": lambda x: mx.conv_transpose2d(x, square, 2, 1, 1, 1),
        "grouped": lambda x: mx.conv_transpose2d(x, wide, (2, 3), 0, groups=2),
    }
    for fn in kernels.values():
        function, feeds = mil(fn, [IMAGES])
        np.testing.assert_allclose(*function(feeds).values(), np.array(fn(IMAGES)), atol=2e-5)


class Block(nn.Module):
    """Grouped-query attention with rotary positions; `mask` and `traditional` are MLX's own."""

    def __init__(self, mask=None, traditional=False, norm=nn.RMSNorm):
        super().__init__()
        self.norm, self.mask = norm(16), mask
        self.q, self.kv, self.o = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.rope = nn.RoPE(4, traditional=traditional)
        mx.eval(self.parameters())

    def __call__(self, x):
        h = self.norm(x)
        heads = lambda y, n: mx.unflatten(y, -1, (n, 4)).transpose(0, 2, 1, 3)  # noqa: E731
        q, (k, v) = heads(self.q(h), 4), mx.split(heads(self.kv(h), 4), 2, axis=1)
        y = mx.fast.scaled_dot_product_attention(
            self.rope(q), self.rope(k), v, scale=0.3, mask=self.mask
        )
        return x + nn.gelu(self.o(y.transpose(0, 2, 1, 3).flatten(2)))


WINDOW = mx.array(np.tri(5, dtype=bool) & ~np.tri(5, k=-3, dtype=bool))
SLOPES = mx.random.normal((1, 4, 5, 5), key=mx.random.key(4))
BLOCKS = {
    "causal": ("causal", False), "open": (None, True), "window": (WINDOW, False),
    "by head": (SLOPES, True),
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("target", ["iOS16", "iOS18"])
def test_a_block_is_said_in_operations_of_core_ml(name, target):
    block = Block(*BLOCKS[name], norm=nn.LayerNorm if name == "open" else nn.RMSNorm)
    x = normal(2, 5, 16)
    # Parameters of a function that is no module are constants of its graph.
    function, feeds = mil(block.__call__, [x], target=ct.target[target])
    np.testing.assert_allclose(*function(feeds).values(), np.array(block(x)), atol=3e-6)
    wanted = {"linear", "gelu", "layer_norm" if name == "open" else "rsqrt"}
    assert wanted <= set(function.ops())
    assert ("scaled_dot_product_attention" in function.ops()) == (target == "iOS18")


def test_half_precision_keeps_norms_and_positions_in_float32():
    """Squares of 300 overflow float16, and it cannot count to 4097."""
    norm = nn.RMSNorm(16)
    mx.eval(norm.parameters())
    x = 300 * normal(2, 5, 16)
    function, feeds = mil(lambda x: norm(x), [x], floats="fp16")
    np.testing.assert_allclose(*function(feeds).values(), np.array(norm(x)), rtol=2e-3)

    def turned(x):
        return x + mx.cos(mx.arange(4096, 4101).astype(mx.float32) + x.shape[0])[:, None]

    function, feeds = mil(turned, [x[0]], floats="fp16")
    np.testing.assert_allclose(*function(feeds).values(), np.array(turned(x[0])), rtol=2e-3)


def test_what_only_constants_make_is_computed_when_it_is_written():
    function, _ = mil(lambda x: x * mx.exp(mx.arange(6) / 3), [X])
    assert [op for op in function.ops() if op != "const"] == ["mul"]
