"""The choice is the best by evidence, and a cheap one of those that cannot be told apart."""

import json
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import tiny
from mlx_compress import recipe
from mlx_compress.allocate import Request
from mlx_compress.calibration import UNMENDED, Calibration
from mlx_compress.choice import LAYERS, UNITS, Candidate, decide
from mlx_compress.data import Windows
from mlx_compress.errors import InputError
from mlx_compress.importance import CRITERIA
from mlx_compress.influence import LAYER_CRITERIA
from mlx_compress.layers import layer_dimensions, without
from mlx_compress.options import Options
from mlx_compress.plan import PrunePlan
from mlx_compress.planning import one_kind_whole


def candidates(**means):
    """Losses that share the noise of their sequences, as paired ones do."""
    text = np.random.default_rng(0).normal(3.0, 0.5, 40)
    own = np.random.default_rng(1)
    return [
        Candidate(name, PrunePlan({}), text + mean + own.normal(0, 0.01, 40), 0.1, name == "dear")
        for name, mean in means.items()
    ]


def test_a_difference_smaller_than_the_spread_of_the_text_is_told():
    verdict = decide(candidates(cheap=0.02, dear=0.0))
    assert verdict.winner.name == "dear"
    estimate, low, high = verdict.behind["cheap"].values()
    assert low < estimate < high and estimate == pytest.approx(0.02, abs=0.006) and low > 0


def test_what_cannot_be_told_apart_goes_to_the_cheaper():
    assert decide(candidates(cheap=0.0005, dear=0.0)).winner.name == "cheap"
    assert decide(candidates(worse=0.5, cheap=0.0, dear=0.0)).winner.name == "cheap"


def test_of_those_that_cost_alike_the_best_wins_however_close():
    assert decide(candidates(first=0.002, best=0.0)).winner.name == "best"
    assert decide(candidates(best=0.0, last=0.002)).winner.name == "best"


def test_noise_saves_no_candidate_that_is_worse_than_one_told_apart():
    clear, best = candidates(clear=0.02, best=0.0)
    swing = np.where(np.arange(40) % 2, 0.5, -0.5)
    noisy = Candidate("noisy", PrunePlan({}), best.losses + 0.04 + swing, 0.1)
    verdict = decide([noisy, clear, best])
    assert verdict.behind["noisy"]["low"] < 0 < verdict.behind["clear"]["low"]
    assert verdict.winner.name == "best"


def test_random_is_compared_with_and_never_wins():
    verdict = decide(candidates(random=-0.5, cheap=0.1, dear=0.0))
    assert verdict.winner.name == "dear" and verdict.behind["random"]["high"] < 0


def test_the_verdict_can_be_read_in_the_report():
    document = decide(candidates(cheap=0.02, dear=0.0)).document()
    assert [(d["criterion"], d["chosen"]) for d in document] == [("cheap", False), ("dear", True)]
    assert document[1]["behind_best"]["estimate"] == 0


def windows(count=16, length=12):
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, tiny.VOCABULARY, (count, length)).astype(np.int32)
    return Windows(tokens, np.full(count, length - 1), None)


OPTIONS = Options(pruning_ratio=0.4, dims=("channels",), batch_size=2)


def test_a_model_is_planned_by_the_criterion_that_loses_least(tmp_path):
    tiny.save(tiny.LLAMA, tmp_path)
    planned = recipe.make_plan(recipe.open_model(tmp_path), OPTIONS, windows())
    verdict = planned.verdicts[UNITS]
    names = [candidate.name for candidate in verdict.candidates]
    assert names == list(CRITERIA) and verdict.winner.name != "random"
    assert all(len(c.losses) == 4 for c in verdict.candidates)  # a quarter of 16
    assert planned.plan.recipe["chosen"] == verdict.winner.name
    assert planned.plan.cuts == verdict.winner.plan.cuts
    assert verdict.behind[verdict.winner.name]["low"] <= 0


LAYERS_ONLY = Options(pruning_ratio=0.3, dims=("layers",), batch_size=2)


def held_out_losses(planned, folder):
    """Of each held-out window, by stock code."""
    module, out = recipe.open_model(folder).module(), []
    for [tokens] in planned.calibration.held_out.batches:
        losses = nn.losses.cross_entropy(module(tokens)[:, :-1], tokens[:, 1:])
        out.append(losses.mean(axis=1))
    return np.concatenate(out)


def test_layers_are_dropped_by_the_criterion_that_loses_least(tmp_path):
    """A block of large weights that adds next to nothing: magnitude keeps it, evidence does not."""
    weights = tiny.save({**tiny.LLAMA, "num_hidden_layers": 3}, tmp_path)
    block = "model.layers.1."
    for path in (p for p in weights if p.startswith(block) and p.endswith("proj.weight")):
        idle = "o_proj" in path or "down_proj" in path
        weights[path] *= 1e-4 if idle else 10
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights, {"format": "mlx"})
    options = replace(LAYERS_ONLY, refit=False)
    model = recipe.open_model(tmp_path)
    planned = recipe.make_plan(model, options, windows())
    verdict = planned.verdicts[LAYERS]
    found = {c.name: c.plan.cuts["model.layers"].keep for c in verdict.candidates}
    assert list(found) == list(LAYER_CRITERIA) and 1 in found["magnitude"]
    assert planned.plan.cuts["model.layers"].keep == [0, 2]
    assert planned.plan.recipe["chosen_layers"] == verdict.winner.name
    assert not planned.notes and not planned.dims

    recipe.save_pruned(model, planned, tmp_path / "out")
    wanted = held_out_losses(planned, tmp_path / "out")
    np.testing.assert_allclose(verdict.winner.losses, wanted, rtol=1e-5)
    record = json.loads((tmp_path / "out" / "compression.json").read_text())
    assert [c["criterion"] for c in record["layer_criteria"]] == list(LAYER_CRITERIA)


def test_what_is_lost_with_a_layer_is_mended_by_those_behind_it(tmp_path):
    """The last of three repeats the second, which is dropped: what makes up for it is to be had."""
    weights = tiny.save({**tiny.LLAMA, "num_hidden_layers": 3}, tmp_path)
    second, third = "model.layers.1.", "model.layers.2."
    weights |= {p.replace(second, third): a for p, a in weights.items() if p.startswith(second)}
    weights = {p: a * 0.3 if "o_proj" in p or "down" in p else a for p, a in weights.items()}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights, {"format": "mlx"})
    model = recipe.open_model(tmp_path)
    cut = without(layer_dimensions(recipe.inspect(model))[0], [1])
    off = {}
    for refit in (True, False):
        options = replace(LAYERS_ONLY, refit=refit)
        planned = recipe.apply_plan(model, PrunePlan({cut.name: cut}), options, windows(64))
        out = tmp_path / str(refit)
        recipe.save_pruned(model, planned, out)
        batches = planned.calibration.held_out.batches
        pairs = [[recipe.open_model(f).module()(*b) for f in (tmp_path, out)] for b in batches]
        off[refit] = sum(mx.square(want - got).sum().item() for want, got in pairs)
        record = json.loads((out / "compression.json").read_text())
        assert ("refit" in record) is refit
        if refit:
            fitted = record["refit"]
            assert fitted["method"] == "sequential"
            assert fitted["lambda"] and all(p.startswith(third) for p in fitted["lambda"])
            found = held_out_losses(planned, out).mean()
            assert found == pytest.approx(fitted["held_out"]["sequential"], rel=1e-5)
    assert off[True] < 0.8 * off[False]


def own_words(model, count=128, length=12):
    """Windows that a model wrote itself, so that it loses by whatever harms it."""
    module, tokens = model.module(), mx.zeros((count, 1), mx.int32)
    for step in range(length - 1):
        logits = module(tokens)[:, -1]
        drawn = mx.random.categorical(logits, key=mx.random.key(step))
        tokens = mx.concatenate([tokens, drawn[:, None].astype(mx.int32)], axis=1)
    return Windows(np.array(tokens), np.full(count, length - 1), None)


@pytest.mark.parametrize(("idle", "whole"), [("down", True), ("o_proj", False)])
def test_a_kind_of_unit_is_left_whole_where_that_loses_less(tmp_path, idle, whole):
    """Half of the heads or none can go; where the MLPs do nothing, it had better be none."""
    weights = tiny.save({**tiny.LLAMA, "intermediate_size": 80}, tmp_path)
    scale = {"o_proj": 4.0, "down": 4.0, "lm_head": 3.0, idle: 1e-3}
    weights = {
        p: a * next((s for name, s in scale.items() if name in p), 1) for p, a in weights.items()
    }
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights, {"format": "mlx"})
    model = recipe.open_model(tmp_path)
    options = Options(params=0.6, batch_size=4)
    planned = recipe.make_plan(model, options, own_words(model))
    cut = {cut.kind for cut in planned.plan}
    assert cut == ({"channels"} if whole else {"channels", "heads"})
    said = [note for note in planned.notes if note.startswith("heads: all kept")]
    rounded = [note for note in planned.notes if "self_attn.heads: 1 of 2 kept" in note]
    assert (bool(said), bool(rounded)) == (whole, not whole)
    winner = planned.verdicts[UNITS].winner
    assert winner.plan.cuts == planned.plan.cuts
    assert planned.kept_parameters == pytest.approx(0.6, abs=0.01)


@pytest.mark.parametrize("asked", [0.87, 0.9])
def test_what_keeps_more_than_was_asked_is_not_compared(tmp_path, asked):
    """The heads alone come nearest to these targets with all of them, and lose nothing so."""
    tiny.save(tiny.LLAMA, tmp_path)
    model = recipe.open_model(tmp_path)
    planned = recipe.make_plan(model, Options(params=asked, batch_size=8), own_words(model))
    assert planned.plan.cuts and planned.kept_parameters == pytest.approx(asked, abs=0.03)


def test_one_kind_is_left_whole_where_evidence_can_tell():
    def ask(options):
        if options.dims == ("heads",):
            raise InputError("the least that heads can reach is 0.9")
        return Request({"|".join(options.dims): 1})

    def found(**changes):
        options = Options(**{"params": 0.5, "dims": ("channels", "heads", "experts"), **changes})
        return ["".join(request.counts) for request in one_kind_whole(options, ask)]

    assert found() == ["heads|experts", "channels|experts", "channels|heads"]
    assert found(dims=("channels", "heads")) == ["channels"]
    assert found(dims=("channels", "layers", "heads"), max_trials=3) == ["channels"]
    for changes in ({"dims": ("channels",)}, {"params": None, "pruning_ratio": 0.5},
                    {"importance": "taylor"}):  # fmt: skip
        assert not found(**changes)


def test_nothing_is_said_of_a_refit_where_no_weight_stands_behind_what_went(tmp_path):
    tiny.save(tiny.LLAMA, tmp_path)
    model = recipe.open_model(tmp_path)
    blocks = layer_dimensions(recipe.inspect(model))[0]
    for dropped, count, refitted in ((1, 16, False), (0, 16, True), (0, 2, False)):
        plan = PrunePlan({blocks.name: without(blocks, [dropped])})
        planned = recipe.apply_plan(model, plan, LAYERS_ONLY, windows(count))
        out = tmp_path / f"{dropped}-{count}"
        recipe.save_pruned(model, planned, out)
        record = json.loads((out / "compression.json").read_text())
        assert ("refit" in record) is refitted
        assert (UNMENDED in record["notes"]) is (count == 2)


def test_units_and_layers_have_each_their_verdict(tmp_path):
    tiny.save(tiny.LLAMA, tmp_path)
    options = replace(OPTIONS, dims=("channels", "layers"), pruning_ratio=0.5)
    planned = recipe.make_plan(recipe.open_model(tmp_path), options, windows())
    assert list(planned.verdicts) == [UNITS, LAYERS]
    assert {"model.layers", "model.layers.0.mlp.channels"} <= planned.plan.cuts.keys()


def test_the_saved_weights_are_the_refitted_ones_unless_asked_otherwise(tmp_path):
    held = tiny.save(tiny.LLAMA, tmp_path / "dense")
    model = recipe.open_model(tmp_path / "dense")
    down = "model.layers.0.mlp.down_proj.weight"
    for refit in (True, False):
        options = replace(OPTIONS, importance="wanda", refit=refit)
        planned = recipe.make_plan(model, options, windows())
        out = tmp_path / str(refit)
        recipe.save_pruned(model, planned, out)
        keep = planned.plan.cuts["model.layers.0.mlp.channels"].keep
        saved = mx.load(str(out / "model.safetensors"))[down]
        assert mx.array_equal(saved, held[down][:, mx.array(keep)]).item() is not refit
        record = json.loads((out / "compression.json").read_text())
        assert ("refit" in record) is refit
    record = json.loads((tmp_path / "True" / "compression.json").read_text())["refit"]
    assert record["method"] in record["held_out"] and record["lambda"].keys() <= held.keys()
    fitted = [loss for name, loss in record["held_out"].items() if name != "as it is"]
    assert record["held_out"][record["method"]] in (min(fitted), record["held_out"]["as it is"])


@pytest.mark.parametrize(
    ("better", "wanted"),
    [(-0.1, "sequential"), (0.0, "sequential"), (0.02, "sequential"), (0.3, "as it is")],
)
def test_the_plain_cut_is_taken_where_it_is_better_for_certain(better, wanted, monkeypatch):
    """By 0.02 of losses that differ by 0.2 from sample to sample nothing can be told."""
    noise = 0.2 * np.random.default_rng(0).standard_normal(32)
    noise -= noise.mean()
    losses = {"as it is": 1 + noise - better, "closed form": np.full(32, 1.01),
              "sequential": np.full(32, 1.0)}  # fmt: skip
    calibration = Calibration(None, None, None, Options(pruning_ratio=0.5), [])
    calibration.__dict__["held_out"] = None
    monkeypatch.setattr(Calibration, "losses", lambda self, plan, cut, samples: losses[cut])
    best, judged = calibration._best(None, {name: name for name in losses})
    assert best == wanted
    assert judged == pytest.approx({name: each.mean() for name, each in losses.items()})


def test_too_little_text_to_hold_some_out_is_refused(tmp_path):
    tiny.save(tiny.LLAMA, tmp_path)
    with pytest.raises(InputError, match="one batch of them is not enough"):
        recipe.make_plan(recipe.open_model(tmp_path), OPTIONS, windows(count=2))


def test_a_choice_needs_text(tmp_path):
    tiny.save(tiny.LLAMA, tmp_path)
    with pytest.raises(InputError, match="--importance auto reads text: give --data"):
        recipe.make_plan(recipe.open_model(tmp_path), OPTIONS)
