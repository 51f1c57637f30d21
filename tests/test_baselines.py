"""Published methods do what their papers and code say: each is held against slow loops."""

from itertools import combinations
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_unflatten
from mlx_compress.benchmarks import baselines, criteria
from mlx_compress.bridges.mlx_lm import open_model

import tiny
from mlx_compress.budget import block_parameters
from mlx_compress.data import Windows
from mlx_compress.errors import InputError
from mlx_compress.layers import dropped_parameters
from mlx_compress.scoring import inspect

REMOVED = 0.4
READERS = [f"model.layers.{k}.{name}" for k in range(2)
           for name in ("self_attn.o_proj", "mlp.down_proj")]  # fmt: skip
TOKENS = np.concatenate([np.array(batch) for (batch,) in tiny.batches(4, rows=4, length=9)])


class Spy(nn.Module):
    """A layer that keeps what goes in, and may put something else in its place."""

    def __init__(self, inner, instead=lambda x: x):
        super().__init__()
        self.inner, self.instead, self.seen = inner, instead, []

    def __call__(self, x):
        self.seen.append(np.array(x, dtype=np.float64).reshape(-1, x.shape[-1]))
        return self.inner(self.instead(x))


def run(module, instead=None):
    """Logits on all tokens, and the inputs [rows, slots] of the layers that read units, by path."""
    layers = dict(module.named_modules())
    spies = {path: Spy(layers[path], *([instead[path]] if instead else [])) for path in READERS}
    module.update_modules(tree_unflatten(list(spies.items())))
    logits = np.array(module(mx.array(TOKENS)))
    return logits, {path: np.concatenate(spy.seen) for path, spy in spies.items()}


@pytest.fixture(scope="module")
def bench_and_aim(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny.save(tiny.LLAMA, folder)
    model = open_model(folder)
    settings = criteria.Settings("tiny", "noise", (REMOVED,), calibration_samples=len(TOKENS))
    windows = Windows(TOKENS, np.ones(len(TOKENS), np.int64), Path("noise"))
    named = inspect(model)
    aim = criteria.aim_at(model, named, REMOVED, settings)
    return criteria.prepared(model, named, windows, settings, [aim])[0], aim


@pytest.fixture(scope="module")
def dense(bench_and_aim):
    """Weights [outputs, slots] and inputs [rows, slots] of the layers that read units."""
    module = bench_and_aim[0].model.module()
    weights = dict(tiny.parameters(module))
    _, inputs = run(module)
    return {p: np.array(weights[f"{p}.weight"], np.float64) for p in READERS}, inputs


def dim_of(path):
    layer, kind = path.rpartition(".")[0], "heads" if "attn" in path else "channels"
    return f"{layer}.{kind}"


def slots_of(path, unit):
    return range(12 * unit, 12 * unit + 12) if "attn" in path else [unit]


def gone_of(path, plan):
    cut = plan.cuts.get(dim_of(path))
    units = sorted(set(range(cut.size)) - set(cut.keep)) if cut else []
    return [slot for unit in units for slot in slots_of(path, unit)]


@pytest.mark.parametrize("path", READERS)
def test_flap_scores_are_fluctuations_standardised_within_a_layer(bench_and_aim, dense, path):
    bench, aim = bench_and_aim
    weight, inputs = dense[0][path], dense[1][path]
    each = []
    for slot in range(weight.shape[1]):
        mean = sum(inputs[:, slot]) / len(inputs)
        variance = sum((x - mean) ** 2 for x in inputs[:, slot]) / len(inputs)
        squares = sum(w**2 for w in weight[:, slot])
        each.append((variance * squares) ** (2 if "attn" in path else 1))
    mean = sum(each) / len(each)
    deviation = (sum((e - mean) ** 2 for e in each) / (len(each) - 1)) ** 0.5
    standard = [(e - mean) / deviation for e in each]
    got = baselines.flap_scores(bench.sources, aim.dims)[dim_of(path)]
    for unit, score in enumerate(got):
        slots = slots_of(path, unit)
        assert score == pytest.approx(sum(standard[s] for s in slots) / len(slots), rel=1e-3)


def test_ranking_across_layers_keeps_what_scores_highest_for_the_same_parameters(bench_and_aim):
    bench, aim = bench_and_aim
    rng, goal = np.random.default_rng(0), block_parameters(bench.named, aim.wanted.counts)
    scores = {d.name: rng.normal(size=d.size) for d in aim.dims}
    plan = baselines.ranked_across(bench.named, aim.dims, scores, goal)
    kept, gone = [], []
    for d in aim.dims:
        keep = plan.cuts[d.name].keep if d.name in plan.cuts else range(d.size)
        best = int(scores[d.name].argmax())
        assert best in keep
        kept += [scores[d.name][i] for i in keep if i != best]
        gone += [scores[d.name][i] for i in range(d.size) if i not in keep]
    assert min(kept) > max(gone)
    channel, head = 3 * 16, (4 + 2) * 12 // 2 * 16
    assert abs(block_parameters(bench.named, plan.counts()) - goal) <= max(channel, head) / 2
    assert len(set(plan.counts().values())) > 2  # each layer has a width of its own


def test_a_threshold_below_all_keeps_the_best_unit_of_each_layer(bench_and_aim):
    bench, aim = bench_and_aim
    scores = {d.name: np.arange(d.size) for d in aim.dims}
    plan = baselines.ranked_across(bench.named, aim.dims, scores, goal=0)
    assert [cut.keep for cut in plan] == [[cut.size - 1] for cut in plan]
    assert len(plan.cuts) == len(aim.dims)


@pytest.mark.parametrize("name", ["FLAP", "FLAP uniform"])
def test_flap_puts_the_mean_in_the_place_of_what_it_removes(bench_and_aim, dense, name):
    bench, aim = bench_and_aim
    pruned = baselines.method(name)(bench, aim, 0)

    def averaged(path):
        mean, gone = dense[1][path].mean(axis=0), gone_of(path, pruned.plan)
        mask = np.isin(np.arange(len(mean)), gone)
        return lambda x: mx.where(mx.array(mask), mx.array(mean, mx.float32), x)

    want, _ = run(bench.model.module(), {path: averaged(path) for path in READERS})
    got = np.array(pruned.module(mx.array(TOKENS)))
    assert any(gone_of(path, pruned.plan) for path in READERS)
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


def test_osscar_fits_a_block_on_what_the_pruned_ones_before_it_hand_over(bench_and_aim, dense):
    bench, aim = bench_and_aim
    plan, fitted = baselines.osscar_in_sequence(bench, aim)
    module = bench.model.module()
    module.load_weights([(f"{p}.weight", fitted[f"{p}.weight"]) for p in READERS[:2]], strict=False)
    _, inputs = run(module)  # the first block is pruned, the second one is not
    for path in READERS[2:]:
        weight, x, gone = dense[0][path].T, inputs[path], gone_of(path, plan)
        keep = np.setdiff1d(np.arange(len(weight)), gone)
        square = x.T @ x
        square += 0.01 * np.trace(square) / len(square) * np.eye(len(square))
        want = np.zeros_like(weight)
        want[keep] = np.linalg.solve(square[np.ix_(keep, keep)], (square @ weight)[keep])
        got = np.array(fitted[f"{path}.weight"]).T
        assert gone and np.abs(got - want).max() <= 1e-3 * np.abs(want).max()


def test_osscar_swaps_until_no_pair_of_channels_would_help(bench_and_aim, dense, monkeypatch):
    bench, aim = bench_and_aim
    poor = {d.name: np.arange(d.size) for d in aim.dims}  # a choice that swaps have to mend
    monkeypatch.setattr(baselines, "criterion", lambda name: lambda sources: poor)
    path = READERS[1]
    keep = baselines.osscar_in_sequence(bench, aim)[0].cuts[dim_of(path)].keep
    weight, x = dense[0][path].T, dense[1][path]
    square = x.T @ x
    square += 0.01 * np.trace(square) / len(square) * np.eye(len(square))

    def lost(keep):
        gone = np.setdiff1d(np.arange(len(weight)), keep)
        inverse = np.linalg.inv(square)[np.ix_(gone, gone)]
        return np.sum(weight[gone] * np.linalg.solve(inverse, weight[gone]))

    others = set(range(20)) - set(keep)
    assert others and max(others) >= len(others)
    swaps = [{*keep, p} - {u} for u in keep for p in others]
    assert all(lost(sorted(other)) >= lost(keep) * (1 - 1e-3) for other in swaps)


def test_layers_lose_the_block_that_turns_the_stream_least(bench_and_aim):
    bench, aim = bench_and_aim
    (cut,) = baselines.method("layers")(bench, aim, 0).plan
    layers = bench.model.module().model.layers
    x = bench.model.module().model.embed_tokens(mx.array(TOKENS))
    turned = []
    for layer in layers:
        before, x = np.array(x, np.float64), layer(x, mask="causal")
        after = np.array(x, np.float64)
        cosines = [
            a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            for a, b in zip(before.reshape(-1, 16), after.reshape(-1, 16), strict=True)
        ]
        turned.append(1 - np.mean(cosines))
    assert cut.keep == [int(np.argmax(turned))]


def test_every_method_removes_as_much(bench_and_aim):
    """Of the same dimensions, those that take one share of all; ours decide what to take."""
    bench, aim = bench_and_aim
    others = [name for name in baselines.METHODS if name not in ("layers", "FLAP")]
    plans = {name: baselines.method(name)(bench, aim, 0).plan for name in others}
    ours = {name: plans.pop(name) for name in criteria.OURS}
    assert all(a.counts() == b.counts() for a, b in combinations(plans.values(), 2))

    def kept(plan):
        gone = dropped_parameters(bench.named, plan)
        return block_parameters(bench.named, plan.counts(), gone)

    uniform = kept(next(iter(plans.values())))
    assert all(kept(plan) <= 1.01 * uniform for plan in ours.values())


def test_a_method_that_is_not_known_is_refused():
    with pytest.raises(InputError, match="there is no flop; choose from"):
        baselines.method("flop")


def test_units_that_several_layers_read_are_refused(bench_and_aim):
    bench, _ = bench_and_aim
    with pytest.raises(InputError, match="width: FLAP and OSSCAR are written for units that one"):
        baselines.flap_scores(bench.sources, [bench.named.dimensions["width"]])
