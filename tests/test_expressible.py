import copy
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_compress.bridges.mlx_lm import LanguageModel, trace_logits

import tiny
import zoo
from mlx_compress.allocate import prunable, request
from mlx_compress.axes import named_axes
from mlx_compress.budget import block_parameters
from mlx_compress.edit import edit_graph
from mlx_compress.errors import InputError
from mlx_compress.execute import run
from mlx_compress.expressible import computes_alike, fitted_config, snap, stand_in
from mlx_compress.fields import Inexpressible
from mlx_compress.options import Options
from mlx_compress.plan import Cut, PrunePlan
from mlx_compress.prune import prune_parameters

TOKENS = mx.array([[3, 7, 1, 9, 22, 5, 4, 8]])
HEADS = "model.layers.*.self_attn.heads"
OPENED: dict = {}


@pytest.fixture(autouse=True)
def no_compile():
    mx.disable_compile()
    yield
    mx.enable_compile()


def opened(config, key):
    """(what `open_model` gives for a config, its named axes, random parameters); made once."""
    if key not in OPENED:
        model = LanguageModel(Path("nowhere"), copy.deepcopy(config))
        module = tiny.build(config)
        OPENED[key] = model, named_axes(trace_logits(module, TOKENS)), tiny.parameters(module)
    return OPENED[key]


def of_zoo(name):
    return opened(zoo.CONFIGS[name], name)


def snapped(name, **options):
    """What is left of a request after snapping: {name: count}, and the notes."""
    model, named, _ = of_zoo(name)
    options = Options(**{"pruning_ratio": 0.5, **options})
    dims = prunable(named, options)
    dims, wanted = snap(model, named, dims, request(named, dims, options), options)
    assert set(wanted.counts) == {d.name for d in dims}
    return wanted.counts, wanted.notes


def kinds_of(counts):
    return {name.rsplit(".", 1)[-1]: count for name, count in counts.items()}


def difference(model, named, parameters, plan, config):
    """How far the model of `config`, with the pruned weights, is from the edited graph."""
    pruned = prune_parameters(named, plan, parameters)
    (want,), _ = run(edit_graph(named, plan), [TOKENS], pruned)
    module = model.build(config)
    module.load_weights(list(pruned.items()))
    got = module(TOKENS)
    return float(mx.abs(got - want).max() / mx.abs(want).max())


# ---- snapping


def test_a_request_that_fits_is_left_as_it_is():
    counts, notes = snapped("llama")
    assert kinds_of(counts) == {"heads": 1, "channels": 44} and len(counts) == 4
    assert notes == []


@pytest.mark.parametrize("name", ["qwen2", "phi3", "mixtral"])
def test_heads_that_no_config_can_shrink_are_left_whole_and_that_is_said(name):
    counts, notes = snapped(name)
    assert set(kinds_of(counts)) == {"channels"}
    (note,) = notes
    assert note.startswith(f"{HEADS}: no stock config can shrink it, ")
    assert note.endswith("; left whole")


@pytest.mark.parametrize("dims", [("channels",), ("heads",), ("channels", "heads")])
def test_gpt2_can_shrink_nothing_and_is_refused(dims):
    text = "no config of 'gpt2' in stock mlx-lm can express smaller .*--dims"
    with pytest.raises(InputError, match=text):
        snapped("gpt2", dims=dims)


def test_the_refusal_names_each_family_and_what_was_asked_for():
    with pytest.raises(InputError, match=f"{HEADS.replace('*', '.')}.*now heads"):
        snapped("qwen2", dims=("heads",))


def test_a_count_is_moved_to_the_nearest_that_the_config_can_express():
    """openelm rounds the widths of its MLPs to a multiple of a divisor."""
    divisor = zoo.CONFIGS["openelm"].get("ffn_dim_divisor", 256)
    counts, notes = snapped("openelm", dims=("channels",), pruning_ratio=0.5)
    moved = [note for note in notes if "the config cannot express" in note]
    assert moved
    for name, count in counts.items():
        size = of_zoo("openelm")[1].dimensions[name].size
        assert count % divisor == 0 and abs(count - size / 2) < divisor
        assert f"transformer.layers.*.ffn.channels: {count} of {size} kept" in " ".join(moved)


def test_with_a_target_what_can_be_shrunk_makes_up_for_what_cannot():
    counts, notes = snapped("qwen2", pruning_ratio=None, params=0.6)
    _, named, _ = of_zoo("qwen2")
    share = block_parameters(named, counts) / block_parameters(named)
    assert share == pytest.approx(0.6, abs=0.01)
    assert any("left whole" in note for note in notes)
    assert not any("was asked for" in note for note in notes)


# ---- the config that is found


@pytest.mark.parametrize(
    "name, dims, ratio",
    [
        ("llama", ("channels", "heads"), 0.5),
        ("llama", ("query_heads", "channels"), 0.5),
        ("llama", ("width",), 0.25),
        ("qwen2", ("channels",), 0.3),
        ("phi3", ("channels",), 0.3),
        ("mixtral", ("channels",), 0.3),
        ("gemma", ("heads",), 0.5),
    ],
)
def test_the_model_of_the_config_computes_what_the_edited_graph_computes(name, dims, ratio):
    model, named, parameters = of_zoo(name)
    counts, _ = snapped(name, dims=dims, pruning_ratio=ratio)
    plan = stand_in(named, counts)
    config = fitted_config(model, named, plan)
    assert difference(model, named, parameters, plan, config) < 1e-4


def test_the_config_keeps_what_it_says_of_everything_else():
    model, named, _ = of_zoo("llama")
    config = fitted_config(model, named, stand_in(named, snapped("llama")[0]))
    changed = {k: v for k, v in config.items() if model.config.get(k) != v}
    assert changed == {
        "intermediate_size": 44,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }


def test_a_plan_that_cuts_nothing_gives_the_config_itself():
    model, named, _ = of_zoo("llama")
    assert fitted_config(model, named, PrunePlan({})) == model.config


def test_the_graph_tells_three_heads_of_16_from_four_of_12():
    """The projections have 48 rows either way."""
    config = {**tiny.LLAMA, "hidden_size": 32, "num_attention_heads": 6, "num_key_value_heads": 6,
              "head_dim": 16}  # fmt: skip
    model, named, parameters = opened(config, "wide heads")
    plan = stand_in(named, {f"model.layers.{k}.self_attn.heads": 3 for k in range(2)})
    config = fitted_config(model, named, plan)
    assert (config["num_attention_heads"], config["head_dim"]) == (3, 16)
    assert difference(model, named, parameters, plan, config) < 1e-4
    other = config | {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 12}
    assert model.shapes_of(other) == model.shapes_of(config)
    graph = edit_graph(named, plan)
    assert computes_alike(model.trace_config(config, TOKENS), graph)
    assert not computes_alike(model.trace_config(other, TOKENS), graph)


def test_a_scale_that_would_change_with_the_width_is_seen():
    """Gemma multiplies its embeddings by the square root of the width."""
    model, named, parameters = of_zoo("gemma")
    plan = stand_in(named, {"model.width": 32})
    with pytest.raises(Inexpressible, match="none computes what was asked for"):
        fitted_config(model, named, plan)


def test_graphs_with_other_constants_do_not_compute_alike():
    model, _, _ = of_zoo("llama")
    graph = model.trace_config(model.config, TOKENS)
    assert computes_alike(graph, graph)
    other = model.trace_config({**model.config, "rms_norm_eps": 1e-3}, TOKENS)
    assert not computes_alike(graph, other)
    shifted = {i: a * 1.01 if a.dtype == mx.float32 else a for i, a in graph.constants.items()}
    assert not computes_alike(graph, replace(graph, constants=shifted))
    near = {i: a * (1 - 1e-6) if a.dtype == mx.float32 else a for i, a in graph.constants.items()}
    assert computes_alike(graph, replace(graph, constants=near))


# ---- plans of another model


def test_a_plan_of_another_model_is_refused():
    model, named, _ = of_zoo("llama")
    cut = Cut("model.layers.9.mlp.channels", "channels", 88, list(range(44)))
    with pytest.raises(InputError, match="model.layers.9.mlp.channels: the model has no such"):
        fitted_config(model, named, PrunePlan({cut.name: cut}))
    cut = Cut("model.layers.0.mlp.channels", "channels", 90, list(range(44)))
    with pytest.raises(InputError, match="made for 90 units, the model has 88"):
        fitted_config(model, named, PrunePlan({cut.name: cut}))


def test_a_stand_in_keeps_the_first_units_and_nests_as_the_dimension_does():
    _, named, _ = of_zoo("mixtral")
    name = "model.layers.0.block_sparse_moe.switch_mlp.channels"
    plan = stand_in(named, {name: 3, "width": 64})
    assert list(plan.cuts) == [name]
    assert plan.cuts[name].keep == [[0, 1, 2]] * 6


def test_snapping_leaves_the_models_config_alone():
    before = copy.deepcopy(zoo.CONFIGS["phi3"])
    snapped("phi3")
    assert of_zoo("phi3")[0].config == before


def test_the_random_parameters_of_these_tests_are_those_of_the_graph():
    _, named, parameters = of_zoo("llama")
    assert {p: a.shape for p, a in parameters.items()} == named.graph.shapes()
    assert len(tree_flatten(parameters)) == len(parameters)
