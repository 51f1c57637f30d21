"""Symbolic sizes: the graph that differencing finds is the graph that tracing gives."""

from fractions import Fraction

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_compress.errors import InputError
from mlx_compress.execute import run
from mlx_compress.graph import trace
from mlx_compress.sizes import (
    Size,
    instantiate,
    is_symbolic,
    resolve,
    size_named,
    sizes_of,
    solve,
)

GRID = {"batch": (2, 3), "length": (4, 7)}


def symbolic(fn, grid=GRID):
    def at(batch, length):
        return trace(fn, mx.zeros((batch, length, 6)))

    return solve(at, [grid])


def attend(x):
    """Reshapes, positions, slices from behind, and a scalar that depends on the length."""
    y = x.reshape(-1, 2, 3) * mx.array(x.shape[1] + 2)
    y = y.reshape(x.shape[0], x.shape[1], 6)
    rows, columns = mx.arange(x.shape[1])[:, None], mx.arange(x.shape[1])
    scores = mx.where(rows >= columns, y @ y.swapaxes(1, 2), -1e9)
    return (mx.softmax(scores) @ y)[:, -1], mx.concatenate([x, y], axis=1)


@pytest.mark.parametrize("sizes", [(1, 1), (1, 9), (5, 2), (13, 4)])
def test_the_instance_of_a_symbolic_graph_computes_what_the_function_does(sizes):
    graph = instantiate(symbolic(attend), dict(zip(GRID, sizes, strict=True)))
    x = mx.random.normal((*sizes, 6), key=mx.random.key(1))
    got, _ = run(graph, [x], {})
    for a, b in zip(got, attend(x), strict=True):
        np.testing.assert_allclose(np.array(a), np.array(b), rtol=1e-6)


def test_an_instance_has_the_shapes_and_attributes_of_a_trace():
    graph = instantiate(symbolic(attend), {"batch": 5, "length": 8})
    traced = trace(attend, mx.zeros((5, 8, 6)))
    made = {node.outputs[0] for node in graph.nodes if node.op == "Size"}
    assert [n.op for n in graph.nodes if n.op != "Size"] == [n.op for n in traced.nodes]
    assert {i: v.shape for i, v in graph.values.items()} == {
        i: v.shape for i, v in traced.values.items()
    }
    assert made and made <= traced.constants.keys()


def test_sizes_in_a_symbolic_graph_are_forms_of_their_names():
    graph = symbolic(lambda x: mx.concatenate([x, x[:, :2]], axis=1).reshape(-1, 6))
    rows, width = graph.values[graph.outputs[0]].shape
    assert rows.terms == {("batch",): 2, ("batch", "length"): 1} and width == 6
    assert str(rows) == "2*batch+batch*length"
    assert is_symbolic(graph) and not is_symbolic(instantiate(graph, {"batch": 1, "length": 1}))


def test_constant_positions_that_follow_a_size_become_a_range():
    def numbered(x):
        return x + mx.array(np.arange(2, 2 + x.shape[1], dtype=np.float32))[:, None]

    graph = symbolic(numbered)
    assert [n.op for n in graph.nodes][0] == "Arange" and not graph.constants
    x = mx.zeros((3, 11, 6))
    got, _ = run(instantiate(graph, {"batch": 3, "length": 11}), [x], {})
    assert mx.array_equal(got[0], numbered(x))


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (lambda x: x * 2 if x.shape[1] > 5 else x + 1, "takes another way"),
        (lambda x: x.sum(axis=1) / x.shape[1] ** 2, "no sums of products"),
        (lambda x: x * mx.array(np.eye(x.shape[1])).sum(), "a constant array of shape"),
        (lambda x: mx.split(x, x.shape[1], axis=1)[0], "takes another way"),
    ],
)
def test_what_does_not_leave_a_size_open_is_refused_with_the_reason(fn, reason):
    with pytest.raises(InputError, match=reason):
        symbolic(fn)


def test_another_grid_is_tried_where_the_code_branches():
    def few_or_many(x):
        return x * 2 if x.shape[1] > 5 else x + 1

    def at(batch, length):
        return trace(few_or_many, mx.zeros((batch, length, 6)))

    graph = solve(at, [GRID, {"batch": (2, 3), "length": (8, 9)}])
    assert [n.op for n in graph.nodes][-1] == "Multiply"


NAMES = st.sampled_from([(), ("a",), ("b",), ("a", "b")])
TERMS = st.dictionaries(NAMES, st.integers(-5, 5).filter(bool), max_size=4)


@given(TERMS, st.integers(0, 9), st.integers(0, 9))
def test_a_form_is_the_sum_of_its_terms(terms, a, b):
    size = Size(tuple(sorted((names, Fraction(c)) for names, c in terms.items())))
    want = sum(c * (a if "a" in n else 1) * (b if "b" in n else 1) for n, c in terms.items())
    assert size.at({"a": a, "b": b}) == want
    assert eval(str(size), {"a": a, "b": b}) == want
    assert resolve([(size, "x"), 3], {"a": a, "b": b}) == [(want, "x"), 3]


def test_half_a_size_is_a_whole_number():
    half = Size(((("a",), Fraction(1, 2)),))
    assert half.at({"a": 6}) == 3 and str(half) == "1/2*a"


def test_sizes_are_read_from_the_shapes_of_inputs():
    graph = symbolic(lambda x: x * 2)
    assert sizes_of(graph, [(5, 8, 6)]) == {"batch": 5, "length": 8}
    with pytest.raises(InputError, match=r"input 0: shape \(5, 8, 7\), but \(batch, length, 6\)"):
        sizes_of(graph, [(5, 8, 7)])
    with pytest.raises(InputError, match=r"input 0: shape \(5, 8\)"):
        sizes_of(graph, [(5, 8)])
    assert size_named("batch").at({"batch": 4}) == 4


def test_two_inputs_that_share_a_size_must_agree():
    def at(batch, length):
        return trace(lambda x, y: x + y, mx.zeros((batch, length)), mx.zeros((batch, length)))

    with pytest.raises(InputError, match=r"input 1: shape \(5, 9\)"):
        sizes_of(solve(at, [GRID]), [(5, 8), (5, 9)])
