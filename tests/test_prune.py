"""The oracle: a pruned model computes what the dense one does with those units zeroed."""

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
    return np.abs(left - right).max() / np.abs(right).max()


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
