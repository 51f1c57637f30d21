import copy
import dataclasses
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_compress.bridges.mlx_lm import trace_logits
from mlx_lm.utils import _get_classes

import tiny
import zoo
from mlx_compress import scoring
from mlx_compress.axes import named_axes
from mlx_compress.data import Windows
from mlx_compress.edit import edit_graph
from mlx_compress.errors import InputError
from mlx_compress.execute import run
from mlx_compress.fields import Inexpressible, fit_config
from mlx_compress.graph import trace
from mlx_compress.importance import CRITERIA
from mlx_compress.influence import LAYER_CRITERIA, LayerSources, calibrate_layers
from mlx_compress.layers import (
    bypass,
    kept_layers,
    layer_dimensions,
    renamed_paths,
    settled,
    without,
)
from mlx_compress.options import Options
from mlx_compress.plan import Cut, PrunePlan
from mlx_compress.prune import check_plan, prune_parameters, pruned_shapes, zero_parameters
from reference import layer_scores

TOKENS = mx.array([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
LLAMA = zoo.BASE | {"model_type": "llama", "num_hidden_layers": 3}


@pytest.fixture(autouse=True, scope="module")
def no_compile():
    mx.disable_compile()
    yield
    mx.enable_compile()


def stock(config: dict) -> nn.Module:
    config = copy.deepcopy(config)
    model, args = _get_classes(config)
    return model(args.from_dict(config)).eval()


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    named = tree_flatten(model.parameters())
    keys = mx.random.split(mx.random.key(seed), len(named))
    weights = [
        (p, mx.random.normal(w.shape, key=k) / w.shape[-1] ** 0.5 + (w.ndim == 1))
        for (p, w), k in zip(named, keys, strict=True)
    ]
    model.update(tree_unflatten(weights))
    return model


def opened(model: nn.Module):
    """The named axes and the parameters of a language model."""
    named = named_axes(trace_logits(model, TOKENS))
    return named, dict(tree_flatten(model.parameters()))


def dims_of(named) -> dict:
    return {d.name: d for d in layer_dimensions(named)}


def dropping(named, **indices) -> PrunePlan:
    """A plan that drops entries by kind; of a model with one list of layers."""
    dims = {d.kind: d for d in layer_dimensions(named)}
    cuts = [without(dims[kind], gone) for kind, gone in indices.items()]
    return PrunePlan({cut.name: cut for cut in cuts})


def logits_of(graph, parameters) -> mx.array:
    return run(graph, [TOKENS], {p: parameters[p] for p in graph.parameters})[0][0]


def error(got: mx.array, want: mx.array) -> float:
    return (mx.abs(got - want).max() / mx.abs(want).max()).item()


def shapes_of(config: dict) -> dict:
    return {path: w.shape for path, w in tree_flatten(stock(config).parameters())}


def fitted(config: dict, named, plan, parameters) -> tuple[dict, mx.array]:
    """The config found for a plan of dropped layers, and what the stock model of it computes."""
    names, shapes = renamed_paths(named, plan), pruned_shapes(named, plan)
    pruned = prune_parameters(named, plan, parameters)
    weights = [(new, pruned[old]) for old, new in names.items()]
    want = logits_of(edit_graph(named, plan), pruned)
    got = []

    def accept(found: dict) -> bool:
        model = stock(found)
        model.load_weights(weights, strict=True)
        try:
            got.append(model(TOKENS))
        except (IndexError, AttributeError):  # looks for the first layer of a kind that is gone
            return False
        return error(got[-1], want) <= 1e-4

    target = {names[path]: shapes[path] for path in names}
    found = fit_config(config, shapes_of, target, layers=kept_layers(plan), accept=accept)
    return found, got[-1]


# ---- what is found


def test_a_llama_block_is_an_attention_branch_and_an_mlp_branch():
    named, _ = opened(stock(LLAMA))
    blocks, attention, mlp = layer_dimensions(named)
    assert [d.name for d in (blocks, attention, mlp)] == [
        "model.layers", "model.layers.attention", "model.layers.mlp"
    ]  # fmt: skip
    assert all(d.size == 3 and d.removable == (0, 1, 2) for d in (blocks, attention, mlp))
    layer = "model.layers.1."
    assert set(mlp.parameters[1]) == {
        layer + "post_attention_layernorm.weight",
        *(f"{layer}mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    }
    every = {path for path in named.graph.parameters if path.startswith(layer)}
    assert set(blocks.parameters[1]) == every == {*mlp.parameters[1], *attention.parameters[1]}


def test_parallel_branches_are_told_apart_and_keep_the_norm_that_they_share():
    named, _ = opened(zoo.build("phi"))
    dims = dims_of(named)
    assert dims["model.layers.attention"].removable == dims["model.layers.mlp"].removable == (0, 1)
    norm = "model.layers.0.input_layernorm.weight"
    assert norm in dims["model.layers"].parameters[0]
    assert norm not in dims["model.layers.attention"].parameters[0]
    assert norm in renamed_paths(named, dropping(named, attention=[0]))
    assert norm not in renamed_paths(named, dropping(named, attention=[0], mlp=[0]))


def test_layers_of_one_branch_have_a_block_and_no_other_kind():
    kinds = {d.kind: d for d in layer_dimensions(opened(zoo.build("nemotron_h"))[0])}
    assert kinds["layers"].removable == (0, 1, 2, 3)
    assert kinds["attention"].removable == (0, 1)
    assert kinds["mlp"].removable == (2, 3)
    assert kinds["mlp"].why == dict.fromkeys((0, 1), "it has no mlp branch")


def test_a_state_space_branch_mixes_positions():
    for name in ("mamba", "mamba2"):
        assert {d.kind for d in layer_dimensions(opened(zoo.build(name))[0])} == {
            "layers", "attention"
        }  # fmt: skip


@pytest.mark.parametrize(
    "name, why",
    [
        ("hunyuan", "its values are read by model.layers.1"),
        ("rwkv7", "its values are read by model.layers.1"),
        ("gemma4", "layer_scalar is used outside its residual branches"),
        ("gemma4_text", "its values are read by model.layers.2"),
        ("nanbeige", "its branches are not added to one stream"),
    ],
)
def test_a_block_that_shares_more_than_the_stream_stays(name, why):
    blocks = layer_dimensions(opened(zoo.build(name))[0])[0]
    assert blocks.kind == "layers" and not blocks.free
    assert why in blocks.why[0]


class Scaled(nn.Module):
    """Blocks after each of which the stream itself is changed."""

    def __init__(self, change):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = [nn.Linear(8, 8) for _ in range(3)]
        self.change = change

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = self.change(x + nn.silu(layer(x)))
        return x


def test_a_block_stays_where_the_stream_changes_between_blocks():
    (blocks, mlp) = layer_dimensions(named_axes(trace(Scaled(lambda x: x * 0.5), TOKENS)))
    assert not blocks.free
    assert blocks.why[1] == "the stream is changed between layers.0 and layers.1"
    assert mlp.removable == (0, 1, 2)


def test_a_clip_in_half_precision_is_seen_through():
    def clip(x):
        return mx.clip(x.astype(mx.float32), -100.0, 100.0).astype(mx.float16)

    graph = trace(Scaled(clip), TOKENS, dtype=mx.float16)
    blocks = layer_dimensions(named_axes(graph))[0]
    assert blocks.removable == (0, 1, 2)


@pytest.mark.parametrize("name", ["gemma3_text", "talkie"])  # clips; reads the first stream
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_blocks_do_not_depend_on_precision(name, dtype):
    graph = trace_logits(zoo.build(name), TOKENS, dtype=dtype)
    assert [d.removable for d in layer_dimensions(named_axes(graph))] == [(0, 1)] * 3


def test_blocks_do_not_depend_on_the_length_of_the_text():
    model = zoo.build("mixtral")  # sorts the tokens by expert where there are many
    graphs = (trace_logits(model, mx.zeros((2, n), mx.int32)) for n in (5, 80))
    one, two = (layer_dimensions(named_axes(graph)) for graph in graphs)
    assert [(d.name, d.why, d.parameters) for d in one] == [
        (d.name, d.why, d.parameters) for d in two
    ]


# ---- what an edit does


@pytest.mark.parametrize("name", [n for n in zoo.CONFIGS if n != "dbrx"])
def test_a_bypass_equals_a_branch_that_adds_zero(name):
    named, parameters = opened(zoo.build(name))
    for d in layer_dimensions(named):
        for i in d.removable[-1:]:
            if d.size == 1:
                continue
            plan = PrunePlan({d.name: without(d, [i])})
            pruned = prune_parameters(named, plan, parameters)
            graph = edit_graph(named, plan)
            assert set(graph.parameters) <= set(pruned)
            zeros = {branch.value: mx.zeros_like for branch in d.branches[i]}
            dense = run(named.graph, [TOKENS], parameters, replace=zeros)[0][0]
            assert mx.array_equal(logits_of(graph, pruned), dense).item(), d.name
            assert set(parameters) - set(pruned) == set(d.parameters[i]), d.name


STOCK = [
    "llama", "phi", "gemma2", "gpt2", "mixtral", "deepseek_v3", "mamba2", "olmo2", "qwen3",
]  # fmt: skip


@pytest.mark.parametrize("name", STOCK)
def test_a_dropped_block_is_the_stock_model_with_one_layer_less(name):
    config = copy.deepcopy(zoo.CONFIGS[name])
    named, parameters = opened(zoo.build(name))
    plan = dropping(named, layers=[0])
    found, got = fitted(config, named, plan, parameters)
    zeroed = zero_parameters(named, plan, parameters)
    assert error(got, logits_of(named.graph, zeroed)) <= 1e-4
    assert found != config


def test_layers_of_a_hybrid_are_dropped_from_its_pattern():
    config = copy.deepcopy(zoo.CONFIGS["nemotron_h"])
    named, parameters = opened(zoo.build("nemotron_h"))
    found, _ = fitted(config, named, dropping(named, layers=[2]), parameters)
    pattern = config["hybrid_override_pattern"]
    assert found["hybrid_override_pattern"] == pattern[:2] + pattern[3:]


def test_layers_and_channels_are_cut_by_one_plan():
    named, parameters = opened(randomised(stock(LLAMA)))
    plan = dropping(named, layers=[1])
    for d in named.free(["channels"]):
        plan.cuts[d.name] = Cut(d.name, d.kind, d.size, list(range(10, 70)))
    found, got = fitted(LLAMA, named, plan, parameters)
    assert found == LLAMA | {"num_hidden_layers": 2, "intermediate_size": 60}
    assert error(got, logits_of(named.graph, zero_parameters(named, plan, parameters))) <= 1e-4


def test_a_dropped_branch_alone_has_no_llama_config():
    named, parameters = opened(randomised(stock(LLAMA)))
    with pytest.raises(InputError, match="model.layers.1.*in the model, not in the target"):
        fitted(LLAMA, named, dropping(named, attention=[1]), parameters)
    assert issubclass(Inexpressible, InputError)


# ---- plans


def test_renamed_paths_count_on_from_zero_and_leave_out_what_is_gone():
    named, _ = opened(stock(LLAMA))
    plan = dropping(named, layers=[0], mlp=[2])
    names = renamed_paths(named, plan)
    assert names["model.norm.weight"] == "model.norm.weight"
    assert names["model.layers.2.input_layernorm.weight"] == "model.layers.1.input_layernorm.weight"
    assert "model.layers.2.mlp.up_proj.weight" not in names
    assert not any(path.startswith("model.layers.0") for path in names)
    assert kept_layers(plan) == {"model.layers": [1, 2]}


def test_a_plan_without_layers_bypasses_and_renames_nothing():
    named, _ = opened(stock(LLAMA))
    plan = PrunePlan({})
    assert bypass(named, plan) == {} == kept_layers(plan)
    assert all(old == new for old, new in renamed_paths(named, plan).items())


def test_a_plan_of_layers_survives_json():
    named, _ = opened(stock(LLAMA))
    plan = dropping(named, layers=[0], mlp=[2])
    assert PrunePlan.from_json(plan.to_json()) == plan


def test_an_entry_without_branches_is_settled_as_a_dropped_block():
    named, parameters = opened(randomised(stock(LLAMA)))
    plan = dropping(named, attention=[0, 1], mlp=[1, 2])
    done = settled(named, plan)
    assert {cut.name: cut.keep for cut in done} == {
        "model.layers": [0, 2],
        "model.layers.attention": [1, 2],
        "model.layers.mlp": [0, 1],
    }
    one, two = (logits_of(edit_graph(named, p), parameters) for p in (plan, done))
    assert mx.array_equal(one, two).item()
    assert settled(named, dropping(named, mlp=[0])) == dropping(named, mlp=[0])


@pytest.mark.parametrize(
    "cut, text",
    [
        (Cut("model.blocks", "layers", 3, [0]), "model.blocks: the model has no such layers"),
        (Cut("model.layers", "mlp", 3, [0]), "model.layers: the model has no such mlp"),
        (Cut("model.layers", "layers", 4, [0]), "made for 4 entries, the model has 3"),
    ],
)
def test_a_cut_of_another_models_layers_is_refused(cut, text):
    named, _ = opened(stock(LLAMA))
    with pytest.raises(InputError, match=text):
        check_plan(named, PrunePlan({cut.name: cut}))


def test_a_layer_that_has_to_stay_is_named_with_the_reason():
    named, _ = opened(zoo.build("hunyuan"))
    plan = PrunePlan({"model.layers": Cut("model.layers", "layers", 2, [0])})
    expected = r"model.layers.1 cannot be removed \(it reads model.layers.0.self_attn"
    for refusing in (check_plan, bypass, edit_graph, renamed_paths):
        with pytest.raises(InputError, match=expected):
            refusing(named, plan)


# ---- scores


def loss(b: int, outputs: list[mx.array]) -> mx.array:
    return mx.logsumexp(outputs[0][:, :-1], axis=-1).sum()


def scored(named, parameters, criterion: str, **choices):
    def fetch(paths):
        return {path: parameters[path] for path in paths}

    dims = tuple(layer_dimensions(named))
    batches = [[TOKENS], [TOKENS + 11]]
    statistics = calibrate_layers(named, batches, fetch, dims=dims, loss=loss)
    sources = LayerSources(named, dims, fetch, statistics, **choices)
    return LAYER_CRITERIA[criterion](sources)


@pytest.mark.parametrize("criterion", ["magnitude", "activation", "wanda", "taylor"])
@pytest.mark.parametrize("name", ["llama", "phi"])
def test_scores_equal_the_plain_loop(name, criterion):
    named, parameters = opened(zoo.build(name))
    got = scored(named, parameters, criterion)
    for d in layer_dimensions(named):
        for i in range(d.size):
            wanted = [
                layer_scores(
                    _block_values(named, parameters, d, i, tokens),
                    [np.array(parameters[path]) for path in d.parameters[i]],
                )
                for tokens in (TOKENS, TOKENS + 11)
            ]
            want = np.mean([each[criterion] for each in wanted])
            assert got[d.name][i] == pytest.approx(want, rel=1e-3), (d.name, i)


def _block_values(named, parameters, d, i, tokens):
    """x, what is added to it, and the gradient at each branch, as NumPy arrays."""
    branches = d.branches[i]
    values = [branch.value for branch in branches]

    def total(*moves):
        pairs = zip(values, moves, strict=True)
        edits = {v: (lambda x, move=move: x + move) for v, move in pairs}
        return loss(0, run(named.graph, [tokens], parameters, replace=edits)[0])

    taps = [branches[0].stream, *values]
    x, *outs = (run(named.graph, [tokens], parameters, taps=taps)[1][k] for k in taps)
    zeros = [mx.zeros_like(out) for out in outs]
    _, slopes = mx.vjp(total, zeros, [mx.array(1.0)])
    return np.array(x), [np.array(out) for out in outs], [np.array(slope) for slope in slopes]


def test_scores_are_infinite_for_what_has_to_stay():
    named, parameters = opened(zoo.build("nemotron_h"))
    scores = scored(named, parameters, "activation")
    assert np.isinf(scores["backbone.layers.mlp"]).tolist() == [True, True, False, False]
    assert np.isfinite(scores["backbone.layers"]).all()


def test_a_criterion_without_a_word_on_layers_leaves_them_to_their_influence():
    assert scoring.INFLUENCE in LAYER_CRITERIA and LAYER_CRITERIA.keys() < CRITERIA.keys()
    model, batches = tiny.build(tiny.LLAMA), tiny.batches()
    held = tiny.parameters(model)
    source = SimpleNamespace(
        fetch=lambda paths: {path: held[path] for path in paths},
        trace=lambda tokens, dtype=None: trace_logits(model, tokens, dtype=dtype),
    )

    def scores(name):
        windows = Windows(np.array(batches[0][0]), np.ones(2), None)
        options = Options(importance=name, batch_size=1)
        calibration = scoring.on_text(source, windows, options, [])
        named = calibration.named
        found = scoring.layer_scores(calibration, named, layer_dimensions(named), name)
        return found, calibration.notes

    (found, told), (wanted, nothing) = scores("osscar"), scores(scoring.INFLUENCE)
    assert found and all(np.array_equal(found[name], wanted[name]) for name in wanted)
    assert told == ["whole layers are ranked by activation: osscar is about units"]
    assert not nothing


def test_random_scores_follow_the_seed():
    named, parameters = opened(stock(LLAMA))
    one, same, other = (scored(named, parameters, "random", seed=s) for s in (1, 1, 2))
    assert (one["model.layers"] == same["model.layers"]).all()
    assert (one["model.layers"] != other["model.layers"]).any()


def test_a_block_that_does_nothing_is_dropped_first():
    model = randomised(stock(LLAMA))
    idle = model.model.layers[1]
    idle.self_attn.o_proj.weight = idle.self_attn.o_proj.weight * 1e-3
    idle.mlp.down_proj.weight = idle.mlp.down_proj.weight * 1e-3
    named, parameters = opened(model)
    blocks = layer_dimensions(named)[0]
    for criterion in ("magnitude", "activation", "wanda", "taylor"):
        scores = scored(named, parameters, criterion)[blocks.name]
        assert np.argmin(scores) == 1, criterion


def test_nan_in_the_stream_is_an_error():
    named, parameters = opened(stock(LLAMA))
    path = "model.layers.1.mlp.up_proj.weight"
    parameters[path] = parameters[path] * float("nan")
    with pytest.raises(InputError, match="NaN or infinity in the residual stream"):
        scored(named, parameters, "activation")


def test_dimensions_are_found_once():
    named, _ = opened(stock(LLAMA))
    assert layer_dimensions(named) is layer_dimensions(named)
    assert dataclasses.replace(named) == named
