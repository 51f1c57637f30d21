"""Swaps leave a plan with the counts it had and no pair of units that would better be exchanged."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import plain
import reference
import tiny
from mlx_compress import swaps
from mlx_compress.axes import named_axes
from mlx_compress.calibrate import calibrate
from mlx_compress.graph import trace
from mlx_compress.importance import Sources
from mlx_compress.layers import layer_dimensions, without
from mlx_compress.osscar import DAMPING
from mlx_compress.plan import Cut, PrunePlan
from mlx_compress.swaps import refine
from test_calibrate import axes_of, fetcher

MLP, ATTENTION = "model.layers.1.mlp", "model.layers.1.self_attn"
MOE = "model.layers.1.block_sparse_moe.switch_mlp"


def sources_of(named, batches, fetch):
    dims = [d.name for d in named.free()]
    statistics = calibrate(named, batches, fetch, dims=dims, second={})
    return Sources(named, tuple(named.free()), fetch, statistics)


@pytest.fixture(scope="module")
def models():
    """(sources, model) of a Llama and a Mixtral."""
    mx.disable_compile()
    out = {}
    for name, config in (("llama", tiny.LLAMA), ("mixtral", tiny.MIXTRAL)):
        model, batches = tiny.build(config), tiny.batches(count=4)
        out[name] = sources_of(axes_of(model, batches), batches, fetcher(model)), model
    mx.enable_compile()
    return out


def cut_of(named, name, keep):
    d = named.dimensions[name]
    return Cut(name, d.kind, d.size, keep, d.within, d.slots)


def plan_of(named, **keep):
    return PrunePlan({name: cut_of(named, name, which) for name, which in keep.items()})


def moments_at(sources, path):
    """X^T X of what the weights of a parameter are multiplied with, [n, n] or [experts, n, n]."""
    from mlx_compress.contractions import contractions

    place = next(p for p in contractions(sources.named) if p.weight and p.weight[0] == path)
    return sources.statistics.second[place.second_key].sum(axis=0)


def loss_of(weight_ON, moments, slots, every):
    """keep -> the loss of a layer whose inputs are the units' `slots`."""

    def loss(keep):
        gone = [s for u in every if u not in set(keep) for s in slots(u)]
        return reference.loss_without(weight_ON.T.astype(np.float64), moments, gone, DAMPING)

    return loss


def assert_no_swap_helps(loss, before, after, every):
    assert len(after) == len(before) and loss(after) < loss(before)
    others = [{*after, p} - {u} for u in after for p in set(every) - set(after)]
    assert all(loss(other) >= loss(after) * (1 - 1e-6) for other in others)


def test_the_channels_of_a_layer_are_swapped_until_no_pair_is_left(models):
    sources, model = models["llama"]
    plan = plan_of(sources.named, **{f"{MLP}.channels": list(range(10))})
    keep = refine(sources, plan).cuts[f"{MLP}.channels"].keep
    weight = np.array(model.model.layers[1].mlp.down_proj.weight)
    moments = moments_at(sources, f"{MLP}.down_proj.weight")
    loss = loss_of(weight, moments, lambda u: [u], range(20))
    assert_no_swap_helps(loss, range(10), keep, range(20))


def test_each_expert_swaps_its_own_channels(models):
    sources, model = models["mixtral"]
    start = [[0, 1, 2, 3], [6, 7, 8, 9], [0, 3, 6, 9]]
    plan = plan_of(sources.named, **{f"{MOE}.channels": start})
    rows = refine(sources, plan).cuts[f"{MOE}.channels"].keep
    weight = np.array(model.model.layers[1].block_sparse_moe.switch_mlp.down_proj.weight)
    moments = moments_at(sources, f"{MOE}.down_proj.weight")
    for e, (before, after) in enumerate(zip(start, rows, strict=True)):
        loss = loss_of(weight[e], moments[e], lambda u: [u], range(10))
        assert_no_swap_helps(loss, before, after, range(10))


def attention_loss(sources, model, slots, every):
    weight = np.array(model.model.layers[1].self_attn.o_proj.weight)
    moments = moments_at(sources, f"{ATTENTION}.o_proj.weight")
    return loss_of(weight, moments, slots, every)


def test_heads_are_swapped_with_all_their_slots(models):
    sources, model = models["llama"]
    loss = attention_loss(sources, model, lambda u: range(12 * u, 12 * u + 12), range(2))
    best = min([0], [1], key=loss)
    for start in ([0], [1]):
        plan = plan_of(sources.named, **{f"{ATTENTION}.heads": start})
        assert refine(sources, plan).cuts[f"{ATTENTION}.heads"].keep == best


def test_query_heads_are_swapped_within_their_group(models):
    sources, model = models["llama"]
    name = f"{ATTENTION}.query_heads"
    loss = attention_loss(sources, model, lambda u: range(6 * u, 6 * u + 6), range(4))
    for start in ([[0], [0]], [[1], [0]], [[0], [1]], [[1], [1]]):
        cut = refine(sources, plan_of(sources.named, **{name: start})).cuts[name]
        (first,), (second,) = cut.keep
        for other in ([1 - first, 2 + second], [first, 3 - second]):
            assert loss([first, 2 + second]) <= loss(other)


def test_what_another_cut_removes_counts_as_gone(models):
    """Of the one head that is left, the better query head is kept, given that the other is gone."""
    sources, model = models["llama"]
    names = [f"{ATTENTION}.query_heads", f"{ATTENTION}.heads"]
    loss = attention_loss(sources, model, lambda u: range(6 * u, 6 * u + 6), range(4))
    for start in (0, 1):
        plan = plan_of(sources.named, **{names[0]: [[start], [start]], names[1]: [1]})
        cuts = refine(sources, plan).cuts
        assert cuts[names[0]].keep[0] == [start]  # of the head that goes, left as it was
        (kept,) = cuts[names[0]].keep[1]
        assert loss([2 + kept]) == min(loss([2]), loss([3]))
        heads = [[cuts[names[0]].keep[h][0] + 2 * h] for h in range(2)]
        assert loss(heads[cuts[names[1]].keep[0]]) == min(map(loss, heads))


def test_a_dimension_that_many_layers_read_counts_them_all(models):
    sources, _ = models["llama"]
    start = list(range(8))
    keep = refine(sources, plan_of(sources.named, width=start)).cuts["width"].keep
    weights = dict(sources.fetch(list(sources.named.graph.parameters)))
    readers = [path for path in weights if any(
        key in path for key in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
    )]  # fmt: skip
    losses = [
        loss_of(np.array(weights[path]), moments_at(sources, path), lambda u: [u], range(16))
        for path in readers
    ]
    assert len(losses) == 11
    assert_no_swap_helps(lambda keep: sum(f(keep) for f in losses), start, keep, range(16))


def test_the_channels_of_a_convolution_are_swapped_with_all_positions_of_a_patch():
    held = {"a": plain_noise(6, 1, 1, 3), "b": plain_noise(4, 3, 3, 6, seed=1)}

    def net(p, x):
        return mx.conv2d(nn.relu(mx.conv2d(x, p["a"])), p["b"])

    batches = [[plain_noise(2, 6, 6, 3, seed=k)] for k in range(3)]
    named = named_axes(trace(net, *batches[0], parameters=held))
    sources = sources_of(named, batches, lambda paths: {path: held[path] for path in paths})
    weight = np.array(held["b"]).reshape(4, -1)
    loss = loss_of(weight, moments_at(sources, "b"), lambda u: range(u, 54, 6), range(6))
    every = [(loss(keep), keep) for keep in ([0, 1, 2], [1, 3, 5], [3, 4, 5])]
    start = max(every)[1]
    keep = refine(sources, plan_of(named, channels=start)).cuts["channels"].keep
    assert_no_swap_helps(loss, start, keep, range(6))


def plain_noise(*shape, seed=0):
    return mx.random.normal(shape, key=mx.random.key(seed))


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_any_plan_keeps_its_counts_and_is_left_alone_the_second_time(models, name):
    sources, _ = models[name]
    plan = plain.random_plan(sources.named, sources.named.free(("channels", "heads")), seed=1)
    once = refine(sources, replace(plan, recipe={"importance": "wanda"}))
    assert once.counts() == plan.counts() and once.recipe == {"importance": "wanda"}
    assert once.cuts != plan.cuts
    assert refine(sources, once).cuts == once.cuts


# ---- what stays


def test_experts_layers_and_dimensions_without_moments_stay(models):
    sources, _ = models["mixtral"]
    experts = "model.layers.1.block_sparse_moe.experts"
    (layers, *_) = layer_dimensions(sources.named)
    plan = plan_of(sources.named, **{experts: [0, 1], f"{MOE}.channels": [[0, 1]] * 3})
    plan = replace(plan, cuts={**plan.cuts, layers.name: without(layers, [0])})
    blind = replace(sources, statistics=replace(sources.statistics, second={}))
    assert refine(blind, plan) == plan
    refined = refine(sources, plan).cuts
    assert refined[experts] == plan.cuts[experts]
    assert refined[layers.name] == plan.cuts[layers.name]
    assert refined[f"{MOE}.channels"] != plan.cuts[f"{MOE}.channels"]


def test_what_would_take_too_much_memory_stays(models, monkeypatch):
    sources, _ = models["llama"]
    plan = plan_of(sources.named, **{f"{MLP}.channels": list(range(10))})
    monkeypatch.setattr(swaps, "ROOM", 2 * 8 * 20**2 - 1)
    assert refine(sources, plan) == plan
    monkeypatch.setattr(swaps, "ROOM", 2 * 8 * 20**2)
    assert refine(sources, plan) != plan
