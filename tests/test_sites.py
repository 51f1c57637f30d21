"""Sites of a search, and the plan that a search of a tiny Llama ends with."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from mlx_compress.bridges.mlx_lm import trace_logits

import tiny
from mlx_compress.allocate import prunable, prunable_layers
from mlx_compress.budget import block_parameters
from mlx_compress.data import Windows
from mlx_compress.errors import InputError
from mlx_compress.layers import dropped_parameters
from mlx_compress.options import Options
from mlx_compress.planning import goal_of
from mlx_compress.scoring import layer_scores, on_text, unit_scores
from mlx_compress.sites import counts_of, plan_of, search_plan, sites_of

OPTIONS = Options(params=0.7, importance="taylor", batch_size=1, max_trials=4,
                  dims=("channels", "heads", "layers"))  # fmt: skip


def calibration(seed):
    """Of the tiny Llama on random tokens."""
    model = tiny.build(tiny.LLAMA)
    held = tiny.parameters(model)
    source = SimpleNamespace(
        fetch=lambda paths: {path: held[path] for path in paths},
        trace=lambda tokens, dtype=None: trace_logits(model, tokens, dtype=dtype),
        path=None,
    )
    tokens = np.random.default_rng(seed).integers(0, tiny.VOCABULARY, (4, 12)).astype(np.int32)
    found = on_text(source, Windows(tokens, np.ones(4), None), OPTIONS, [])
    found.identity = lambda: ["tiny"]
    return found


@pytest.fixture(scope="module")
def calibrated():
    return calibration(0)


@pytest.fixture(scope="module")
def parts(calibrated):
    named = calibrated.named
    dims, layers = prunable(named, OPTIONS), prunable_layers(named, OPTIONS)
    of_layers = layer_scores(calibrated, named, layers, OPTIONS.importance)
    scores = unit_scores(calibrated, named, dims) | of_layers
    return named, dims, layers, scores


def spent(named):
    def share(plan):
        gone = dropped_parameters(named, plan)
        return block_parameters(named, plan.counts(), gone) / block_parameters(named)

    return share


def test_what_a_config_sets_by_one_number_is_one_site(parts):
    named, dims, layers, scores = parts
    together = sites_of(dims, layers, scores, together=True)
    apart = sites_of(dims, layers, scores, together=False)
    assert len(together) == 2 + len(layers) and len(apart) == len(dims) + len(layers)
    channels = next(s for s in together if "channels" in s.name)
    kept = {len(cut.keep) for cut in channels.cuts(channels.size - 3).values()}
    assert kept == {channels.size - 3} and len(channels.cuts(1)) == len(dims) // 2


def test_counts_keep_the_units_with_the_highest_scores(parts):
    named, dims, layers, scores = parts
    for site, dim in zip(sites_of(dims, [], scores, together=False), dims, strict=True):
        keep = site.cuts(dim.size - 1)[dim.name].keep
        assert set(range(dim.size)) - set(keep) == {int(np.argmin(scores[dim.name]))}


def test_all_counts_whole_is_the_dense_model(parts):
    named, dims, layers, scores = parts
    sites = sites_of(dims, layers, scores, together=True)
    assert not plan_of(named, sites, {s.name: s.size for s in sites}).cuts
    assert counts_of(sites, {}) == {s.name: s.size for s in sites}


@pytest.mark.parametrize("together", [True, False])
def test_a_search_stays_within_the_budget_and_is_no_worse_than_its_start(
    calibrated, parts, together
):
    named, dims, layers, scores = parts
    sites = sites_of(dims, layers, scores, together=together)
    start = {d.name: max(1, round(d.size * 0.6)) for d in dims}
    plan, record = search_plan(
        calibrated, named, dims, sites, spent(named), 0.7, OPTIONS, starts=[start]
    )
    assert spent(named)(plan) <= 0.7 + 1e-6
    assert record["best"] <= record["start"]
    assert record["best"] <= float(calibrated.lost(plan, dims).mean()) + 1e-6


def test_a_search_may_spend_what_its_start_was_rounded_up_to():
    assert goal_of(0.75, [0.7502, 0.83]) == 0.7502
    assert goal_of(0.75, [0.74]) == goal_of(0.75, [0.77]) == 0.75


def test_a_budget_that_no_counts_meet_is_refused_with_what_is_reachable(calibrated, parts):
    named, dims, layers, scores = parts
    sites = sites_of(dims[:1], [], scores, together=False)
    with pytest.raises(InputError, match=r"the least that can be reached is 0\.\d+, 0.010 was"):
        search_plan(calibrated, named, dims[:1], sites, spent(named), 0.01, OPTIONS)


def test_a_plan_that_cannot_be_held_is_never_chosen(calibrated, parts):
    named, dims, layers, scores = parts
    sites = sites_of(dims, layers, scores, together=True)

    def whole_layers(plan):
        return not any(cut.kind == "layers" for cut in plan)

    plan, _ = search_plan(
        calibrated, named, dims, sites, spent(named), 0.7, OPTIONS, holds=whole_layers
    )
    assert whole_layers(plan)
    with pytest.raises(InputError, match="no config of the model can hold .*; give --carrier"):
        search_plan(calibrated, named, dims, sites, spent(named), 0.7, OPTIONS,
                    holds=lambda plan: not plan.cuts)  # fmt: skip


def test_trials_answer_the_same_question_however_it_is_measured(calibrated, parts, tmp_path):
    """And for no other samples, nor where other units go first."""
    named, dims, layers, scores = parts
    sites, file = sites_of(dims, layers, scores, together=True), tmp_path / "study.log"

    def tried(samples, options, **other):
        """How many lines that adds to the file."""
        before = lines() if file.exists() else 0
        search_plan(samples, named, dims, sites, spent(named), 0.7, options, storage=str(file),
                    **other)  # fmt: skip
        return lines() - before

    def lines():
        return len(file.read_text().splitlines())

    assert tried(calibrated, OPTIONS) > 10
    assert tried(calibrated, replace(OPTIONS, eval_samples=2, max_drop=0.1)) <= 1
    assert tried(calibration(1), OPTIONS) > 10
    assert tried(calibrated, OPTIONS, scored_by=["layers by wanda"]) > 10


def test_the_last_word_has_the_loss_after_the_whole_refit(calibrated, parts, monkeypatch):
    named, dims, layers, scores = parts
    sites = sites_of(dims, layers, scores, together=True)
    uniform = {dim.name: round(0.6 * dim.size) for dim in dims}
    seen = []

    def loss(plan):
        """The more channels a plan keeps the better, whatever the search found."""
        return 1 / (1 + sum(n for name, n in plan.counts().items() if "channels" in name))

    def fitted(plan, dims):
        seen.append(plan)
        losses = {"sequential": loss(plan), "closed form": 2.0}
        return None, {"method": "sequential", "held_out": losses}

    monkeypatch.setattr(calibrated, "_fitted", fitted)
    plan, record = search_plan(
        calibrated, named, dims, sites, spent(named), 0.7, OPTIONS, starts=[uniform]
    )
    assert len(seen) >= 2 and plan.cuts == min(seen, key=loss).cuts
    assert record["counts"] == plan.counts()
    asked = len(seen)
    assert calibrated.fitted(plan, dims)[1]["held_out"] and len(seen) == asked  # not fitted again


def test_a_single_plan_is_not_fitted_before_it_is_saved(calibrated, parts, monkeypatch):
    named, dims, *_ = parts
    monkeypatch.setattr(calibrated, "_fitted", lambda *_: pytest.fail("it was fitted"))
    plan = plan_of(named, [], {})
    assert calibrated.fittest([plan], dims) is plan


def test_whole_layers_are_judged_beside_units(calibrated, parts):
    named, dims, layers, scores = parts
    sites = sites_of(dims, layers, scores, together=True)
    whole = {site.name: site.size for site in sites}
    units = next(site for site in sites if "channels" in site.name)
    depth = next(site for site in sites if site.name in {d.name for d in layers})
    plans = [plan_of(named, sites, whole | {s.name: s.levels()[-1]}) for s in (depth, units)]
    losses = []
    for plan in plans:
        cut, record = calibrated._fitted(plan, dims)
        losses.append(float(calibrated.losses(plan, cut, calibrated.held_out).mean()))
    for order in (plans, plans[::-1]):
        assert calibrated.fittest(order, dims).cuts == plans[int(np.argmin(losses))].cuts
