"""Removal costs are those of a slow greedy search, swaps those that a search of all pairs makes."""

import numpy as np
import pytest

import reference
import tiny
from mlx_compress.importance import CRITERIA, Sources
from mlx_compress.osscar import DAMPING, Swept, alike, reading, removal_costs, swapped
from test_calibrate import axes_of, calibrate, fetcher


def problem(seed, slots=8, outputs=3, rows=40):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, slots)) @ (np.eye(slots) + 0.4 * rng.random((slots, slots)))
    return rng.standard_normal((slots, outputs)), x.T @ x


def loss_without(weight, moments, gone):
    return reference.loss_without(weight, moments, gone, DAMPING)


def slow_costs(weight, moments, units):
    return reference.greedy_costs(weight, moments, units, DAMPING)


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


# ---- swaps

SINGLE, PAIRS = list(range(8)), [0, 0, 1, 1, 2, 2, 3, 3]
MIXED = [0, 1, 0, 1, 2, 2, -1, -1]


def kept_loss(weight, moments, units):
    """The loss of keeping some units, and the slots that belong to none."""

    def loss(keep):
        gone = [k for k, unit in enumerate(units) if unit >= 0 and unit not in set(keep)]
        return loss_without(weight, moments, gone)

    return loss


def swaps_of(keep, units):
    """Every set of units that one swap makes."""
    return [{*keep, p} - {u} for u in keep for p in set(units) - set(keep)]


def greedy(weight, moments, units, count):
    return np.sort(np.argsort(-removal_costs(weight, moments, np.array(units)))[:count])


@pytest.mark.parametrize("seed", range(5))
def test_the_damped_error_is_that_of_a_fit_by_least_squares(seed):
    """Against NumPy's solver on rows of data; damping is n more rows, all in one slot each."""
    rng = np.random.default_rng(seed)
    x, weight = rng.standard_normal((30, 6)), rng.standard_normal((6, 3))
    moments, keep = x.T @ x, [0, 2, 5]
    rows = np.vstack([x, np.sqrt(DAMPING * np.trace(moments) / 6) * np.eye(6)])
    fitted = np.linalg.lstsq(rows[:, keep], rows @ weight, rcond=None)[0]
    error = 0.5 * np.sum((rows[:, keep] @ fitted - rows @ weight) ** 2)
    assert loss_without(weight, moments, [1, 3, 4]) == pytest.approx(error, 1e-9)
    gone = removal_costs(weight, moments, np.array([-1, 0, -1, 0, 0, -1]))
    assert gone == pytest.approx([error], 1e-9)


@pytest.mark.parametrize("units", [SINGLE, PAIRS, MIXED])
def test_a_swap_changes_the_error_by_what_was_foretold(units):
    weight, moments = problem(7)
    count, loss = max(units) + 1, kept_loss(weight, moments, units)
    kept = np.arange(count) < count // 2
    state = Swept(reading(weight, moments, np.array(units)), kept)
    for _ in range(3):
        held, gone = np.flatnonzero(kept), np.flatnonzero(~kept)
        for row, u in zip(state.changes(held, gone), held, strict=True):
            wanted = [loss({*held, p} - {u}) - loss(held) for p in gone]
            np.testing.assert_allclose(row, wanted, rtol=1e-7, atol=1e-7 * loss(held))
        pair = [held[0], gone[-1]]
        state.flip(pair)
        kept[pair] = ~kept[pair]


@pytest.mark.parametrize("units, least", [(SINGLE, 0.9), (PAIRS, 0.95), (MIXED, 0.95)])
def test_swaps_are_never_worse_than_greedy_and_nearly_always_the_best_of_all(units, least):
    best, count = 0, (max(units) + 1) // 2
    for seed in range(40):
        weight, moments = problem(seed)
        loss, keep = kept_loss(weight, moments, units), greedy(*problem(seed), units, count)
        got = swapped([reading(weight, moments, np.array(units))], keep)
        assert len(got) == count and loss(got) <= loss(keep) * (1 + 1e-9)
        _, optimum = reference.best_subset(set(units) - {-1}, count, loss)
        best += loss(got) <= optimum * (1 + 1e-9)
    assert best >= least * 40


def test_from_the_worst_start_swaps_find_the_planted_basis():
    """Every slot has a copy, and both copies of half of them are kept: the other half is lost."""
    rng = np.random.default_rng(3)
    x, weight = rng.standard_normal((50, 5)), rng.standard_normal((10, 4))
    twice = np.hstack([x, x])
    got = swapped([reading(weight, twice.T @ twice, np.arange(10))], [0, 5, 1, 6, 2])
    assert sorted(got % 5) == [0, 1, 2, 3, 4]


def test_the_errors_of_all_that_read_the_units_add_up():
    cases = [problem(0), problem(8, outputs=5)]
    each = [kept_loss(*case, SINGLE) for case in cases]
    readings = [reading(*case, np.array(SINGLE)) for case in cases]
    got = swapped(readings, [0, 1, 2, 3]).tolist()
    assert all(sum(loss(other) for loss in each) >= sum(loss(got) for loss in each)
               for other in swaps_of(got, SINGLE))  # fmt: skip
    alone = [loss(swapped([one], got)) for one, loss in zip(readings, each, strict=True)]
    assert all(a < 0.99 * loss(got) for a, loss in zip(alone, each, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_units_are_swapped_within_their_row(seed):
    weight, moments = problem(seed)
    loss = kept_loss(weight, moments, SINGLE)
    got = swapped([reading(weight, moments, np.arange(8))], [0, 1, 4, 5, 6], row=4)
    assert np.bincount(got // 4).tolist() == [2, 3]

    def within(keep):
        return loss(keep) if np.bincount(np.array(keep) // 4, minlength=2)[0] == 2 else np.inf

    assert loss(got) <= 1.05 * reference.best_subset(SINGLE, 5, within)[1]


def test_what_is_gone_for_good_helps_nobody():
    weight, moments = problem(4)
    alive = np.array([True, True, False, True, True, False, True, True])
    loss = kept_loss(weight, moments, SINGLE)
    best, _ = reference.best_subset(np.flatnonzero(alive), 3, loss)
    got = swapped([reading(weight, moments, np.arange(8), alive)], [0, 1, 2, 3])
    assert got.tolist() == sorted([2, *best])  # a unit without slots stays as it was


def test_no_more_swaps_are_made_than_allowed_and_the_best_comes_first():
    weight, moments = problem(5)
    loss = kept_loss(weight, moments, SINGLE)
    start, _ = reference.best_subset(SINGLE, 4, lambda keep: -loss(keep))  # the worst of all
    given = [reading(weight, moments, np.arange(8))]
    assert swapped(given, start, limit=0).tolist() == start
    one = swapped(given, start, limit=1)
    assert set(one) == min(swaps_of(start, SINGLE), key=loss)
    assert loss(swapped(given, start)) < loss(one)
    assert swapped(given, SINGLE).tolist() == SINGLE


def test_units_of_unequal_slots_are_not_alike():
    weight, moments = problem(0)
    even, other = (reading(weight, moments, np.array(u)) for u in (SINGLE, PAIRS))
    assert alike([even]) and alike([even, even]) and not alike([even, other])
    for units in ([0, 0, 0, 1, 1, 2, 2, -1], [-1] * 8):
        assert not alike([reading(weight, moments, np.array(units))])


# ---- models


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
