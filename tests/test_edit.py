"""The edited graph: the same primitives with the sizes that are left."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import plain
from mlx_compress.axes import named_axes
from mlx_compress.edit import edit_graph
from mlx_compress.errors import InputError
from mlx_compress.execute import run
from mlx_compress.graph import signature, trace
from mlx_compress.plan import Cut, PrunePlan
from mlx_compress.prune import prune_parameters, pruned_shapes, zero_parameters


def traced(function, *inputs, **shapes):
    """The named axes of `function(x, **parameters)`, and random inputs and parameters for it."""
    mx.random.seed(0)
    inputs = [mx.random.normal(shape) for shape in inputs]
    parameters = {name: mx.random.normal(shape) for name, shape in shapes.items()}
    graph = trace(lambda p, *x: function(*x, **p), *inputs, parameters=parameters)
    return named_axes(graph), inputs, parameters


def keeping(named, keep):
    """A plan from {dimension: kept units}."""
    dims = {name: named.dimensions[name] for name in keep}
    return PrunePlan({n: Cut(n, d.kind, d.size, keep[n], d.within) for n, d in dims.items()})


def edited(named, plan, inputs, parameters):
    """The outputs of the edited graph on pruned parameters."""
    return run(edit_graph(named, plan), inputs, prune_parameters(named, plan, parameters))[0]


def same(left, right):
    assert [a.shape for a in left] == [b.shape for b in right]
    for a, b in zip(left, right, strict=True):
        np.testing.assert_allclose(np.array(a), np.array(b), rtol=1e-5, atol=1e-5)


def pruning_equals_zeroing(traced, keep):
    named, inputs, parameters = traced
    plan = keeping(named, keep)
    zeroed = zero_parameters(named, plan, parameters)
    same(edited(named, plan, inputs, parameters), run(named.graph, inputs, zeroed)[0])


def pruning_equals(function, traced, keep):
    """`function` itself, called with the pruned parameters, gives the same."""
    named, inputs, parameters = traced
    plan = keeping(named, keep)
    expected = function(*inputs, **prune_parameters(named, plan, parameters))
    same(edited(named, plan, inputs, parameters), [expected])


# ---- whole models


def everything(named):
    """Each free dimension, whole: a plan that removes nothing."""
    keep = {}
    for d in named.free():
        rows = named.dimensions[d.within].size if d.within else None
        keep[d.name] = [list(range(d.size))] * rows if rows else list(range(d.size))
    return keeping(named, keep)


@pytest.mark.parametrize("name", plain.MODELS)
def test_a_plan_that_removes_nothing_gives_the_same_graph(name):
    named, inputs, parameters = plain.traced(name)
    for plan in (PrunePlan({}), everything(named)):
        graph = edit_graph(named, plan)
        assert signature(graph) == signature(named.graph)
        same(run(graph, inputs, parameters)[0], run(named.graph, inputs, parameters)[0])


@pytest.mark.parametrize("name", plain.MODELS)
def test_every_value_has_the_shape_and_dtype_that_the_edited_graph_says(name):
    named, inputs, parameters = plain.traced(name)
    dimensions = [d for d in named.free() if d.kind != "experts"]
    plan = plain.random_plan(named, dimensions, seed=3)
    graph = edit_graph(named, plan)
    assert graph.shapes() == pruned_shapes(named, plan)
    taps = [i for node in graph.nodes for i in node.outputs]
    _, seen = run(graph, inputs, prune_parameters(named, plan, parameters), taps=taps)
    for i, array in seen.items():
        assert (array.shape, array.dtype) == (graph.values[i].shape, graph.values[i].dtype)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(plain.MODELS)), st.integers(0, 2**32))
def test_two_edits_in_a_row_equal_one(name, seed):
    named, inputs, parameters = plain.traced(name)
    dimensions = [d for d in named.free() if d.exact and d.size > 2]
    plan = plain.random_plan(named, dimensions, seed, least=2)  # an axis of size 1 has no name
    names = sorted(plan.cuts)
    first = PrunePlan({name: plan.cuts[name] for name in names[::2]})
    again = named_axes(edit_graph(named, first))
    second = PrunePlan({name: plan.cuts[name] for name in names[1::2]})
    smaller = prune_parameters(named, first, parameters)
    same(edited(again, second, inputs, smaller), edited(named, plan, inputs, parameters))


# ---- what follows from a size


def test_a_slice_with_bounds_from_the_end_follows_the_sizes():
    def gates(x, gate, up, down):
        y = mx.concatenate([x @ gate, x @ up], axis=-1)
        return (y[:, :-6] * y[:, -6:]) @ down

    case = traced(gates, (5, 4), gate=(4, 6), up=(4, 6), down=(6, 3))
    pruning_equals_zeroing(case, {"channels": [1, 2, 5]})


def test_slices_of_an_array_that_is_constant_follow_what_reads_them():
    def started(x, a, b):
        start = mx.full((5, 14), 0.5)
        return (x @ a * start[:, :7] * start[:, 13:6:-1]) @ b

    pruning_equals_zeroing(traced(started, (5, 4), a=(4, 7), b=(7, 3)), {"channels": [0, 6]})


def test_an_array_filled_part_by_part_shrinks_in_each_part():
    def filled(x, a, b, c):
        y = mx.zeros((5, 11))
        y[:, :7] = x @ a
        y[:, 7:] = x @ b
        return y @ c

    case = traced(filled, (5, 4), a=(4, 7), b=(4, 4), c=(11, 3))
    pruning_equals_zeroing(case, {"channels": [1, 6], "channels_2": [3]})


def test_one_mask_serves_layers_that_keep_different_numbers_of_heads():
    mask = mx.triu(mx.full((6, 6), -1e9), k=1)

    def layers(x, **p):
        for n in "12":
            q = (x @ p["q" + n]).reshape(1, 6, 4, 3).transpose(0, 2, 1, 3)
            weights = mx.softmax(q @ q.swapaxes(2, 3) + mx.broadcast_to(mask, (1, 4, 6, 6)), -1)
            x = (weights @ q).transpose(0, 2, 1, 3).reshape(1, 6, 12) @ p["o" + n]
        return x

    case = traced(layers, (1, 6, 8), q1=(8, 12), o1=(12, 8), q2=(8, 12), o2=(12, 8))
    pruning_equals_zeroing(case, {"heads": [0, 2, 3], "heads_2": [1]})


def test_a_pad_of_a_segment_keeps_its_width():
    def padded(x, a, b, c):
        return (mx.pad(x @ a, [(0, 0), (1, 2)]) * (x @ b)) @ c

    case = traced(padded, (5, 4), a=(4, 5), b=(4, 8), c=(8, 3))
    pruning_equals_zeroing(case, {"channels": [0, 4], "channels_2": [1]})


def test_a_cut_inside_the_rows_of_a_frozen_axis_stays_where_it_is():
    def halves(x, a, gain, b):
        left, right = mx.split(((x @ a).reshape(5, 3, 2) * gain).reshape(5, 6), 2, axis=-1)
        return (left * right) @ b

    case = traced(halves, (5, 4), a=(4, 6), gain=(2,), b=(3, 7))
    pruning_equals_zeroing(case, {})


REPEATED = {
    "padded": lambda y: mx.pad(y, [(0, 0), (1, 2)]),
    "tiled": lambda y: mx.concatenate([y, y], axis=-1),
    "joined": lambda y: mx.concatenate([y, mx.zeros((5, 3)), y[:, ::2]], axis=-1),
    "strided": lambda y: mx.repeat(y, 2, axis=-1)[:, 1::2],
    "twice": lambda y: mx.repeat(y, 2, axis=-1),
}


@pytest.mark.parametrize("name", REPEATED)
def test_repeated_units_follow_what_each_reader_needs(name):
    def repeated(x, a, gain, b):
        return (REPEATED[name](mx.repeat(x @ a, 4, axis=-1)) * gain) @ b

    size = REPEATED[name](mx.zeros((5, 24))).shape[1]
    named, inputs, parameters = traced(repeated, (5, 4), a=(4, 6), gain=(size,), b=(size, 3))
    dimensions = [d for d in named.free() if d.size > 1]
    assert len(dimensions) > 1
    for some in (*([d] for d in dimensions), dimensions):
        plan = plain.random_plan(named, some, seed=4)
        pruning_equals_zeroing((named, inputs, parameters), {c.name: c.keep for c in plan})


def normalised(x, a, b):
    y = x @ a
    return (y - y.mean(-1, keepdims=True)) / mx.sqrt(y.var(-1, keepdims=True) + 0.1) @ b


MEANS = {
    "mean and variance": normalised,
    "variance of a sample": lambda x, a, b: (x @ a) / (x @ a).std(-1, keepdims=True, ddof=1) @ b,
    "sum over size": lambda x, a, b: (x @ a) * ((x @ a).sum(-1, keepdims=True) / a.shape[1]) @ b,
    "softmax": lambda x, a, b: mx.softmax(x @ a, axis=-1) @ b,
    "largest": lambda x, a, b: (x @ a) / mx.abs(x @ a).max(-1, keepdims=True) @ b,
    "norm": lambda x, a, b: (x @ a) / mx.linalg.norm(x @ a, axis=-1, keepdims=True) @ b,
}


@pytest.mark.parametrize("name", MEANS)
def test_a_mean_counts_the_units_that_are_left(name):
    case = traced(MEANS[name], (5, 4), a=(4, 8), b=(8, 3))
    pruning_equals(MEANS[name], case, {"channels": [0, 2, 3, 7]})


@pytest.mark.parametrize("name", MEANS)
def test_a_mean_counts_right_after_a_second_edit(name):
    named, inputs, parameters = traced(MEANS[name], (5, 4), a=(4, 8), b=(8, 3))
    first = keeping(named, {"channels": [0, 1, 2, 3, 7]})
    smaller = prune_parameters(named, first, parameters)
    again = named_axes(edit_graph(named, first))
    pruning_equals(MEANS[name], (again, inputs, smaller), {"channels": [0, 2, 3, 4]})


def test_a_mean_over_what_is_not_pruned_keeps_its_count():
    def pooled(x, a, b):
        return (x @ a).mean(axis=1) @ b

    case = traced(pooled, (2, 8, 4), a=(4, 8), b=(8, 3))
    pruning_equals(pooled, case, {"channels": [0, 2, 3]})


# ---- what an edit refuses, and what it drops


def test_a_ranking_over_a_pruned_dimension_is_refused_by_name():
    def largest(x, a, b, c):
        y = x @ a + c
        return mx.take_along_axis(y, mx.argpartition(y, kth=2, axis=-1)[:, :3], axis=-1) @ b

    named, _, _ = traced(largest, (5, 4), a=(4, 8), b=(3, 2), c=(8,))
    (dimension,) = named.free()
    with pytest.raises(InputError, match="ArgPartition ranks a pruned dimension"):
        edit_graph(named, keeping(named, {dimension.name: [0, 1, 2, 3, 4]}))


def test_a_bypassed_value_gives_way_and_takes_its_parameters_along():
    def residual(x, a, up, down, b):
        y = x @ a
        return (y + mx.tanh(y @ up) @ down) @ b

    shapes = {"a": (4, 6), "up": (6, 9), "down": (9, 6), "b": (6, 3)}
    named, inputs, parameters = traced(residual, (5, 4), **shapes)
    graph = named.graph
    (total,) = (n for n in graph.nodes if n.op == "Add")
    short = edit_graph(named, PrunePlan({}), bypass={total.outputs[0]: total.inputs[0]})
    assert set(short.parameters) == {"a", "b"}
    left = {path: parameters[path] for path in short.parameters}
    same(run(short, inputs, left)[0], [inputs[0] @ left["a"] @ left["b"]])


def test_the_traced_graph_is_left_as_it_was():
    named, inputs, parameters = plain.traced("fused_encoder")
    before = (named.graph.nodes, dict(named.graph.values), dict(named.graph.constants))
    edit_graph(named, plain.random_plan(named, named.free(), seed=0))
    assert (named.graph.nodes, dict(named.graph.values)) == before[:2]
    assert set(named.graph.constants) == set(before[2])
