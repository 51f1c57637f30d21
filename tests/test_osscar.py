"""Removal costs are those of a slow greedy search that refits from scratch at every step."""

import numpy as np
import pytest

import tiny
from mlx_compress.importance import CRITERIA, Sources
from mlx_compress.osscar import DAMPING, removal_costs
from test_calibrate import axes_of, calibrate, fetcher


def problem(seed, slots=8, outputs=3, rows=40):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, slots)) @ (np.eye(slots) + 0.4 * rng.random((slots, slots)))
    return rng.standard_normal((slots, outputs)), x.T @ x


def loss_without(weight, moments, gone):
    """Half the damped squared error of the best weights that are zero on `gone`, by solving."""
    damped = moments + DAMPING * np.trace(moments) / len(moments) * np.eye(len(moments))
    keep = [k for k in range(len(weight)) if k not in gone]
    best = np.zeros_like(weight)
    if keep:
        best[keep] = np.linalg.solve(damped[np.ix_(keep, keep)], damped[keep] @ weight)
    error = weight - best
    return 0.5 * float(np.sum(error * (damped @ error)))


def slow_costs(weight, moments, units):
    gone, costs, left = [], {}, set(units) - {-1}
    while left:
        without = {u: gone + [k for k, owner in enumerate(units) if owner == u] for u in left}
        prices = {u: loss_without(weight, moments, slots) for u, slots in without.items()}
        cheapest = min(sorted(left), key=prices.get)
        costs[cheapest], gone = prices[cheapest], without[cheapest]
        left.remove(cheapest)
    return [costs[u] for u in sorted(costs)]


@pytest.mark.parametrize("units", [
    [0, 1, 2, 3, 4, 5, 6, 7],
    [0, 0, 1, 1, 2, 2, 3, 3],
    [0, 1, 0, 1, 2, 2, -1, -1],
])  # fmt: skip
@pytest.mark.parametrize("seed", range(3))
def test_costs_equal_those_of_a_search_that_solves_anew_each_time(units, seed):
    weight, moments = problem(seed)
    got = removal_costs(weight, moments, np.array(units))
    np.testing.assert_allclose(got, slow_costs(weight, moments, units), rtol=1e-6)


def test_a_copy_costs_nothing_until_its_original_goes():
    weight, moments = problem(0, slots=5)
    mix = np.eye(5)[:, [0, 1, 2, 3, 4, 2]]  # the last slot carries what slot 2 carries
    twice = mix.T @ moments @ mix
    costs = removal_costs(np.vstack([weight, weight[2]]), twice, np.arange(6))
    first = min(costs[2], costs[5])
    assert first == costs.min() and first < 0.1 * np.sort(costs)[1]
    assert max(costs[2], costs[5]) > 10 * first


def test_many_units_go_several_at_a_time_in_nearly_the_same_order(monkeypatch):
    weight, moments = problem(1, slots=60, rows=300)
    exact = removal_costs(weight, moments, np.arange(60))
    monkeypatch.setattr("mlx_compress.osscar.STEPS", 20)
    coarse = removal_costs(weight, moments, np.arange(60))
    kept = [set(np.argsort(-c)[:30]) for c in (exact, coarse)]
    assert len(kept[0] & kept[1]) >= 26


@pytest.mark.parametrize("config, names, shape", [
    (tiny.LLAMA, "model.layers.1.mlp.channels", (20,)),
    (tiny.LLAMA, "model.layers.1.self_attn.heads", (2,)),
    (tiny.LLAMA, "model.layers.1.self_attn.query_heads", (2, 2)),
    (tiny.MIXTRAL, "model.layers.1.block_sparse_moe.switch_mlp.channels", (3, 10)),
    (tiny.LLAMA, "width", (16,)),
])  # fmt: skip
def test_every_kind_of_dimension_has_a_cost_for_each_unit(config, names, shape):
    model, batches = tiny.build(config), tiny.batches()
    named = axes_of(model, batches)
    statistics = calibrate(named, batches, fetcher(model), dims=[names], second={})
    dims = (named.dimensions[names],)
    scores = CRITERIA["osscar"](Sources(named, dims, fetcher(model), statistics))[names]
    assert scores.shape == shape and (scores > 0).all()


def test_the_channels_of_a_layer_cost_what_its_weights_and_inputs_say():
    model, batches = tiny.build(tiny.LLAMA), tiny.batches()
    named, name = axes_of(model, batches), "model.layers.1.mlp.channels"
    statistics = calibrate(named, batches, fetcher(model), dims=[name], second={})
    dims = (named.dimensions[name],)
    scores = CRITERIA["osscar"](Sources(named, dims, fetcher(model), statistics))[name]
    (moments,) = (m.sum(axis=0) for m in statistics.second.values())
    weight = np.array(model.model.layers[1].mlp.down_proj.weight, dtype=np.float64).T
    np.testing.assert_allclose(scores, slow_costs(weight, moments, range(20)), rtol=1e-4)
