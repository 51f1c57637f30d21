"""A simplified graph says the same with fewer nodes."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_compress.execute import run
from mlx_compress.graph import trace
from mlx_compress.simplify import broadcast_shape, simplify


def ops(fn, *arrays):
    """The primitives that are left; their result must equal the function's."""
    graph = simplify(trace(fn, *arrays))
    got, _ = run(graph, arrays, {})
    want = fn(*arrays)
    for a, b in zip(got, want if isinstance(want, tuple) else (want,), strict=True):
        assert a.shape == b.shape and mx.allclose(a, b)
    return [node.op for node in graph.nodes]


X = mx.arange(12.0).reshape(3, 4)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: (x.reshape(3, 4) + 1).astype(mx.float32),
        lambda x: mx.broadcast_to(x, (3, 4)) + 1,
        lambda x: x.transpose(0, 1) + 1,
        lambda x: mx.stop_gradient(x) + 1,
    ],
)
def test_what_changes_nothing_is_gone(fn):
    assert ops(fn, X) == ["Add"]


def test_what_is_computed_twice_is_computed_once():
    def twice(x):
        return mx.exp(x * 2) + mx.exp(x * 2), mx.exp(x * 3)

    assert ops(twice, X) == ["Multiply", "Exp", "Add", "Multiply", "Exp"]


def test_results_of_different_dtypes_are_not_taken_for_each_other():
    def both(x):
        return x.astype(mx.float16).astype(mx.float32), x.astype(mx.int32).astype(mx.float32)

    assert ops(both, X + 0.3).count("AsType") == 4


def test_a_broadcast_stays_where_the_result_needs_it():
    def needed(x):
        return mx.broadcast_to(x[:1], (3, 4)) * 2

    assert ops(needed, X) == ["Slice", "Broadcast", "Multiply"]
    assert ops(lambda x: x * x[:1], X) == ["Slice", "Multiply"]


def test_every_spelling_of_a_square_is_one():
    assert ops(lambda x: x**2 + x * x + mx.square(x), X) == ["Square", "Add", "Add"]


def test_batch_axes_of_a_product_are_broadcast_by_the_product():
    def product(x, y):
        return x @ mx.broadcast_to(y, (2, 4, 5))

    assert ops(product, mx.stack([X, X]), mx.ones((4, 5))) == ["Matmul"]


def test_every_layer_reads_the_same_rotary_angles():
    def layers(q):
        for _ in range(3):
            q = mx.fast.rope(q, 4, traditional=False, base=10.0, scale=1.0, offset=2)
        return q

    left = ops(layers, mx.ones((1, 2, 3, 4)))
    assert left.count("Cos") == left.count("Sin") == left.count("Exp") == 1


def test_a_network_computes_the_same():
    grouped = nn.Conv2d(6, 6, 3, groups=2)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm(6), nn.ReLU(), grouped).eval()
    x = mx.random.normal((2, 9, 9, 3), key=mx.random.key(0))
    graph = trace(net, x)
    parameters = dict(tree_flatten(net.parameters()))
    simple = simplify(graph)
    assert len(simple.nodes) < len(graph.nodes)
    want, got = (np.array(run(g, [x], parameters)[0][0]) for g in (graph, simple))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("shapes", "want"),
    [
        ([(3, 1), (4,)], (3, 4)),
        ([(), (2, 1)], (2, 1)),
        ([(3,), (4,)], None),
        ([(2, 1, 5), (3, 1), ()], (2, 3, 5)),
    ],
)
def test_shapes_broadcast_as_in_numpy(shapes, want):
    assert broadcast_shape(shapes) == want
