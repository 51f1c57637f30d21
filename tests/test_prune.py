"""The oracle: a pruned model computes what the dense one does with those units zeroed."""

import itertools
import random

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_unflatten

import plain
import reference
from mlx_compress.axes import named_axes
from mlx_compress.edit import edit_graph
from mlx_compress.errors import InputError
from mlx_compress.execute import run
from mlx_compress.graph import trace
from mlx_compress.options import KINDS
from mlx_compress.plan import Cut, PrunePlan
from mlx_compress.prune import (
    picks,
    prune_array,
    prune_parameters,
    pruned_shapes,
    zero_array,
    zero_parameters,
)

seeds = st.integers(0, 2**32)
TOLERANCE = 1e-5


def outputs(graph, inputs, parameters):
    return np.concatenate([np.array(a).ravel() for a in run(graph, inputs, parameters)[0]])


def difference(left, right):
    """The largest difference, relative to the largest value."""
    assert np.isfinite(left).all()
    return np.abs(left - right).max() / (np.abs(right).max() + 1e-6)


def pruned_and_zeroed(name, plan):
    named, inputs, parameters = plain.traced(name)
    pruned = outputs(edit_graph(named, plan), inputs, prune_parameters(named, plan, parameters))
    return pruned, outputs(named.graph, inputs, zero_parameters(named, plan, parameters))


def cut(named, name, keep):
    d = named.dimensions[name]
    return PrunePlan({name: Cut(name, d.kind, d.size, keep, d.within, d.slots)})


# ---- pruned equals zeroed


@pytest.mark.parametrize("name", plain.MODELS)
def test_pruning_units_of_any_kind_equals_zeroing_them(name):
    named, inputs, parameters = plain.traced(name)
    dense = outputs(named.graph, inputs, parameters)
    for kind in KINDS:
        dimensions = [d for d in named.free([kind]) if d.exact]
        if dimensions:
            pruned, zeroed = pruned_and_zeroed(name, plain.random_plan(named, dimensions, seed=1))
            assert difference(pruned, zeroed) < TOLERANCE, kind
            assert difference(dense, zeroed) > 1e-3, f"{kind} does not matter"


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(plain.MODELS)), st.data(), seeds)
def test_any_plan_of_exact_dimensions_equals_zeroing(name, data, seed):
    named, _, _ = plain.traced(name)
    dimensions = [d for d in named.free() if d.exact]
    some = data.draw(st.lists(st.sampled_from(dimensions), min_size=1, unique=True))
    pruned, zeroed = pruned_and_zeroed(name, plain.random_plan(named, some, seed))
    assert difference(pruned, zeroed) < TOLERANCE


def network(seed):
    """A random network on x [2, 6, 5] as a function of (parameters, x), and its parameters."""

    def function(parameters, x):
        rng, numbers = random.Random(seed), itertools.count()

        def weight(*shape):
            name = f"w{next(numbers)}"
            return parameters.setdefault(name, mx.random.normal(shape) * shape[0] ** -0.5)

        pool = [x @ weight(5, rng.choice((4, 6, 8)))]
        for _ in range(rng.randint(3, 10)):
            y = layer(rng, rng.choice(pool), pool, weight)
            pool += [y] if y is not None and y.shape[-1] < 40 else []
        return sum(y.mean(axis=1) @ weight(y.shape[-1], 3) for y in pool[-3:])

    parameters = {}
    function(parameters, mx.zeros((2, 6, 5)))
    return function, parameters


def layer(rng, x, pool, weight):
    c = x.shape[-1]
    alike = [y for y in pool if y.shape == x.shape]
    divisor = rng.choice([n for n in range(1, c + 1) if c % n == 0])
    match rng.randrange(20):
        case 0:
            return x @ weight(c, 6) + weight(6)
        case 1:
            return rng.choice([nn.gelu, mx.sigmoid, nn.relu, mx.tanh, nn.relu6])(x / 2)
        case 2:
            return x + rng.choice(alike)
        case 3:
            return x * rng.choice(alike)
        case 4 if c % 2 == 0:
            a, b = mx.split(x, 2, axis=-1)
            return a * mx.sigmoid(b)
        case 5:
            return mx.concatenate([x, rng.choice(pool)], axis=-1)
        case 6:
            heads = x.reshape(2, 6, divisor, -1)
            return (heads * weight(*rng.choice([(divisor, 1), heads.shape[3:]]))).reshape(x.shape)
        case 7:
            return x.reshape(2, 6, divisor, -1).swapaxes(2, 3).reshape(x.shape)
        case 8:
            q, k, v = (x @ weight(c, n) for n in (16, 8, 8))
            y = attend(q, k, v, heads=4, turn=rng.choice([nn.RoPE(4), lambda a: a]))
            return y @ weight(16, c)
        case 9:
            return mx.fast.rms_norm(x, weight(c), 1e-5)
        case 10:
            return mx.softmax(x, axis=-1)
        case 11:
            return mx.pad(x, [(0, 0), (0, 0), (rng.randrange(3), rng.randrange(3))])
        case 12:
            start = rng.randrange(c)
            return x[..., start : rng.randint(start + 1, c)]
        case 13 if c % 2 == 0:
            return x[..., rng.randrange(2) :: 2]
        case 14:
            return mx.repeat(x, 2, axis=-1)
        case 15:
            return x * rng.choice([x[..., :1], mx.sigmoid(x @ weight(c, 1))])
        case 16:
            return x @ (weight(c, 3) @ mx.concatenate([weight(3, 2), weight(3, 4)], axis=1))
        case 17:
            return mx.conv1d(x, weight(2 * divisor, 3, c // divisor), padding=1, groups=divisor)
        case 18:
            return x + (x.swapaxes(1, 2) @ weight(6, 5) @ weight(5, 6)).swapaxes(1, 2)
        case 19:
            return (x @ x.swapaxes(1, 2)) @ x / 10
    return None


def attend(q, k, v, *, heads, turn):
    size = q.shape[-1] // heads
    q, k, v = (a.reshape(2, 6, -1, size).swapaxes(1, 2) for a in (q, k, v))
    y = mx.fast.scaled_dot_product_attention(turn(q), turn(k), v, scale=0.5)
    return y.swapaxes(1, 2).reshape(2, 6, -1)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seeds)
def test_random_networks_obey_the_oracle(seed):
    mx.random.seed(seed % 1000)
    function, parameters = network(seed)
    x = mx.random.normal((2, 6, 5))
    named = named_axes(trace(function, x, parameters=parameters))
    exact = [d for d in named.free() if d.exact]
    others = [d for d in named.free() if not d.exact]
    for some in ([], exact[::2], exact[1::2], exact):
        plan = plain.random_plan(named, some, seed)
        zeroed = outputs(named.graph, [x], zero_parameters(named, plan, parameters))
        pruned = prune_parameters(named, plan, parameters)
        assert difference(outputs(edit_graph(named, plan), [x], pruned), zeroed) < 1e-4
    plan = plain.random_plan(named, others, seed)
    pruned = prune_parameters(named, plan, parameters)
    assert outputs(edit_graph(named, plan), [x], pruned).shape == zeroed.shape


def test_all_but_one_unit_of_each_dimension_can_go():
    named, _, _ = plain.traced("fused_encoder")
    cuts = [cut(named, d.name, [d.size - 1]).cuts for d in named.free() if d.exact]
    plan = PrunePlan({name: c for part in cuts for name, c in part.items()})
    pruned, zeroed = pruned_and_zeroed("fused_encoder", plan)
    assert difference(pruned, zeroed) < TOLERANCE


# ---- where a mean or a norm counts the units


@pytest.mark.parametrize("name", ["encoder", "encoder_norm_last", "fused_encoder", "decoder"])
def test_a_narrower_stream_computes_what_the_model_does_with_narrower_arrays(name):
    named, inputs, parameters = plain.traced(name)
    (width,) = named.free(["width"])
    assert not width.exact
    plan = cut(named, width.name, [0, 2, 3, 5, 6, 8, 11])
    smaller = prune_parameters(named, plan, parameters)
    model, _ = plain.build(name)
    model.update(tree_unflatten(list(smaller.items())))
    expected = np.array(model(*inputs)).ravel()
    assert difference(outputs(edit_graph(named, plan), inputs, smaller), expected) < TOLERANCE


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_a_norm_over_a_pruned_width_equals_a_smaller_module(norm):
    def build(hidden):
        return nn.Sequential(nn.Linear(5, hidden), norm(hidden), nn.Linear(hidden, 3))

    dense, small = plain.randomised(build(9)), build(4)
    x = mx.random.normal((6, 5))
    named = named_axes(trace(dense, x))
    plan = cut(named, "layers.channels", [0, 3, 4, 7])
    pruned = prune_parameters(named, plan, dict(tree_flatten(dense.parameters())))
    small.load_weights(list(pruned.items()), strict=True)
    expected = np.array(small(x)).ravel()
    assert difference(outputs(edit_graph(named, plan), [x], pruned), expected) < TOLERANCE


# ---- the arrays


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.sampled_from(["decoder", "fused_encoder", "mobilenet", "gru"]), st.data(), seeds)
def test_exactly_the_slots_of_kept_units_are_left(name, data, seed):
    named, _, parameters = plain.traced(name)
    some = data.draw(st.lists(st.sampled_from(named.free()), min_size=1, unique=True))
    plan = plain.random_plan(named, some, seed)
    path = data.draw(st.sampled_from(sorted({path for d in some for path, _ in d.slots})))
    array = parameters[path]
    alive = reference.survivors(array.shape, named.coordinates(path), plan.cuts)
    shape = pruned_shapes(named, plan)[path]
    pruned = prune_array(array, picks(named, plan, path))
    assert pruned.shape == shape
    assert np.array(pruned).tolist() == np.array(array)[alive].reshape(shape).tolist()
    zeroed = zero_array(named, plan, path, array)
    assert np.array(zeroed).tolist() == np.where(alive, np.array(array), 0).tolist()


def test_channels_chosen_within_experts_differ_from_row_to_row():
    named, _, parameters = plain.traced("decoder")
    keep = [[0, 1], [4, 9], [2, 3]]
    plan = cut(named, "experts.channels", keep)
    pruned = prune_parameters(named, plan, parameters)
    for expert, units in enumerate(keep):
        up, down = parameters["experts.up"][expert], parameters["experts.down"][expert]
        assert mx.array_equal(pruned["experts.up"][expert], up[units])
        assert mx.array_equal(pruned["experts.down"][expert], down[:, units])


def test_an_empty_plan_changes_nothing():
    named, _, parameters = plain.traced("mlp")
    pruned = prune_parameters(named, PrunePlan({}), parameters)
    assert all(mx.array_equal(pruned[path], parameters[path]) for path in parameters)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_pruning_and_zeroing_keep_the_dtype(dtype):
    named, _, parameters = plain.traced("mlp")
    plan = cut(named, "layers.channels", [1, 2])
    halves = {path: array.astype(dtype) for path, array in parameters.items()}
    for apply in (prune_parameters, zero_parameters):
        assert {a.dtype for a in apply(named, plan, halves).values()} == {dtype}


# ---- plans of other models


WRONG = {
    "conv.channels: the model has no such dimension": ("conv.channels", 4, [0]),
    "the plan was made for 12 units, the model has 10": ("layers.channels", 12, [0]),
    r"layers.4.fixed: cannot be pruned \(the model's output\)": ("layers.4.fixed", 4, [0]),
    "cannot be chosen within mlp": ("layers.channels", 10, [[0]] * 9, "mlp"),
}


@pytest.mark.parametrize("text", WRONG)
def test_a_plan_of_another_model_is_refused(text):
    named, _, parameters = plain.traced("mlp")
    name, size, keep, *within = WRONG[text]
    plan = PrunePlan({name: Cut(name, "channels", size, keep, *within)})
    for apply in (prune_parameters, zero_parameters):
        with pytest.raises(InputError, match=text):
            apply(named, plan, parameters)
    with pytest.raises(InputError, match=text):
        edit_graph(named, plan)


def test_a_choice_within_another_number_of_units_is_refused():
    named, _, parameters = plain.traced("decoder")
    with pytest.raises(InputError, match="within 2 units of experts.experts, the model has 3"):
        prune_parameters(named, cut(named, "experts.channels", [[0], [1]]), parameters)


def test_parameters_of_another_model_are_refused():
    named, _, parameters = plain.traced("mlp")
    plan = cut(named, "layers.channels", [1, 2])
    with pytest.raises(InputError, match=r"0.bias: shape \(11,\), but the graph has \(10,\)"):
        prune_parameters(named, plan, {**parameters, "layers.0.bias": mx.zeros(11)})
    with pytest.raises(InputError, match=r"head: shape \(3,\), but the graph has None"):
        zero_parameters(named, plan, {**parameters, "head": mx.zeros(3)})
