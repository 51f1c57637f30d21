import copy
import json

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_compress.bridges.carriers import (
    CARRIERS,
    advice,
    carrier_named,
    carriers,
    write_carrier,
)
from mlx_compress.bridges.mlx_lm import open_model
from mlx_lm.models.openelm import make_divisible
from mlx_lm.utils import _get_classes, load_model

from mlx_compress.axes import named_axes
from mlx_compress.checkpoint import write_config
from mlx_compress.edit import edit_graph
from mlx_compress.errors import InputError
from mlx_compress.execute import run
from mlx_compress.layers import layer_dimensions, without
from mlx_compress.plan import Cut, PrunePlan
from mlx_compress.prune import prune_parameters, pruned_fetch, pruner
from zoo import BASE, CONFIGS, HEAD, LLAMA3_ROPE, TIED

TOKENS = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])
LLAMA = BASE | {"model_type": "llama", "num_hidden_layers": 4, "intermediate_size": 256}


@pytest.fixture(autouse=True, scope="module")
def no_compile():
    mx.disable_compile()
    yield
    mx.enable_compile()


def opened(folder, config: dict, dtype=mx.float32):
    """A checkpoint folder of random weights, opened, with its named axes."""
    model_class, args = _get_classes(copy.deepcopy(config))
    model = model_class(args.from_dict(copy.deepcopy(config)))
    named = tree_flatten(model.parameters())
    keys = mx.random.split(mx.random.key(0), len(named))
    weights = {
        p: (mx.random.normal(w.shape, key=k) / w.shape[-1] ** 0.5 + (w.ndim == 1)).astype(dtype)
        for (p, w), k in zip(named, keys, strict=True)
    }
    folder.mkdir(exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "config.json").write_text(json.dumps(config))
    source = open_model(folder)
    return source, named_axes(source.trace(TOKENS))


def per_layer(named, kind: str, counts) -> dict[str, Cut]:
    """Cuts of one kind that keep `counts` units, layer by layer; the last ones stay."""
    dims = [d for d in named.free([kind])]
    assert len(dims) == len(counts)
    return {
        d.name: Cut(d.name, kind, d.size, list(range(d.size - count, d.size)), slots=d.slots)
        for d, count in zip(dims, counts, strict=True)
        if count < d.size
    }


def dropped(named, **indices) -> dict[str, Cut]:
    dims = {d.kind: d for d in layer_dimensions(named)}
    cuts = [without(dims[kind], gone) for kind, gone in indices.items()]
    return {cut.name: cut for cut in cuts}


def stock_error(folder, source, named, plan, carrier) -> float:
    """How far stock mlx-lm, opening the written folder, is from the edited graph."""
    folder.mkdir()
    written = write_carrier(
        folder, pruned_fetch(source.fetch, pruner(named, plan)), named, carrier
    )
    write_config(folder, carrier.config)
    model, config = load_model(folder)
    assert config["model_type"] == carrier.name
    assert written == sum(w.nbytes for _, w in tree_flatten(model.parameters()))
    got = model(TOKENS)
    parameters = dict(tree_flatten(source.module().parameters()))
    pruned = prune_parameters(named, plan, parameters)
    graph = edit_graph(named, plan)
    want = run(graph, [TOKENS], {p: pruned[p] for p in graph.parameters})[0][0]
    return (mx.abs(got - want).max() / mx.abs(want).max()).item()


# ---- nemotron-nas


@pytest.mark.parametrize(
    "fields",
    [{}, TIED, {"rope_scaling": LLAMA3_ROPE}, {"attention_bias": True, "mlp_bias": True}],
    ids=["plain", "tied", "scaled_rope", "biases"],
)
def test_branches_dropped_from_some_layers_are_carried_by_nemotron_nas(tmp_path, fields):
    source, named = opened(tmp_path / "in", LLAMA | fields)
    plan = PrunePlan(dropped(named, attention=[1], mlp=[2]))
    carrier = carrier_named("nemotron-nas", source, named, plan)
    blocks = carrier.config["block_configs"]
    assert ["no_op" in block["attention"] for block in blocks] == [False, True, False, False]
    assert ["no_op" in block["ffn"] for block in blocks] == [False, False, True, False]
    assert stock_error(tmp_path / "out", source, named, plan, carrier) <= 1e-4


def test_a_dropped_block_is_renumbered_in_the_carrier(tmp_path):
    source, named = opened(tmp_path / "in", LLAMA)
    plan = PrunePlan(dropped(named, attention=[0, 1], mlp=[0, 3]))
    carrier = carrier_named("nemotron-nas", source, named, plan)
    assert carrier.config["num_hidden_layers"] == 3
    assert stock_error(tmp_path / "out", source, named, plan, carrier) <= 1e-4


def test_mlp_widths_per_layer_in_whole_steps_are_carried_by_nemotron_nas(tmp_path):
    source, named = opened(tmp_path / "in", LLAMA | {"intermediate_size": 768})
    plan = PrunePlan(per_layer(named, "channels", [768, 512, 256, 512]))
    carrier = carrier_named("nemotron-nas", source, named, plan)
    assert stock_error(tmp_path / "out", source, named, plan, carrier) <= 1e-4


def test_biases_that_the_source_lacks_are_zero_in_the_carrier(tmp_path):
    source, named = opened(tmp_path / "in", LLAMA | {"model_type": "qwen2"})
    plan = PrunePlan(dropped(named, mlp=[0]))
    carrier = carrier_named("nemotron-nas", source, named, plan)
    assert carrier.sources["model.layers.0.self_attn.o_proj.bias"] == ()
    assert stock_error(tmp_path / "out", source, named, plan, carrier) <= 1e-4


# ---- openelm


@pytest.mark.parametrize(
    "fields",
    [{}, TIED, HEAD, {"model_type": "qwen3", **HEAD}],
    ids=["plain", "tied", "head_dim", "qk_norm"],
)
def test_widths_and_kv_heads_per_layer_are_carried_by_openelm(tmp_path, fields):
    config = LLAMA | {"num_attention_heads": 8, "num_key_value_heads": 4} | fields
    source, named = opened(tmp_path / "in", config)
    cuts = per_layer(named, "channels", [255, 7, 101, 256])
    plan = PrunePlan(cuts | per_layer(named, "heads", [4, 1, 3, 2]))
    carrier = carrier_named("openelm", source, named, plan)
    assert carrier.config["num_query_heads"] == [8, 2, 6, 4]
    assert carrier.config["num_kv_heads"] == [4, 1, 3, 2]
    assert stock_error(tmp_path / "out", source, named, plan, carrier) <= 1e-4


def test_every_width_up_to_the_hidden_one_is_met_exactly():
    widths = range(1, 3000)
    for hidden in (64, 576, 2048):
        assert [make_divisible(w / hidden * hidden, divisor=1) for w in widths] == list(widths)


def test_half_precision_weights_keep_their_dtype(tmp_path):
    source, named = opened(tmp_path / "in", LLAMA, mx.float16)
    plan = PrunePlan(per_layer(named, "channels", [200, 100, 50, 25]))
    carrier = carrier_named("openelm", source, named, plan)
    folder = tmp_path / "out"
    folder.mkdir()
    write_carrier(
        folder, pruned_fetch(source.fetch, pruner(named, plan)), named, carrier
    )
    arrays = mx.load(str(folder / "model.safetensors"))
    assert {array.dtype for array in arrays.values()} == {mx.float16}


def test_weights_are_written_in_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_compress.bridges.carriers.SHARD_BYTES", 100_000)
    source, named = opened(tmp_path / "in", LLAMA)
    plan = PrunePlan(per_layer(named, "channels", [200, 100, 50, 25]))
    carrier = carrier_named("openelm", source, named, plan)
    assert stock_error(tmp_path / "out", source, named, plan, carrier) <= 1e-4
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2


# ---- what does not fit, and why


@pytest.mark.parametrize(
    "name, fields, cuts, why",
    [
        ("openelm", {}, {"attention": [1]}, "it cannot leave out the attention of layer 1"),
        ("openelm", {}, {"mlp": [2]}, "it cannot leave out the MLP of layer 2"),
        ("openelm", {"rope_scaling": LLAMA3_ROPE}, {}, "it has no rope scaling"),
        ("openelm", {"mlp_bias": True}, {}, "it has no place for .*gate_proj.bias"),
        ("openelm", {"rope_traditional": True}, {}, "it has no word for rope_traditional=True"),
        ("nemotron-nas", {"intermediate_size": 88}, {}, "multiples of 256, layer 0 has 88"),
        ("nemotron-nas", HEAD, {}, "its heads are of 64 / 4, .* the model's are of 24"),
        ("nemotron-nas", {"model_type": "qwen3", "head_dim": 16}, {}, "no place for .*q_norm"),
        ("openelm", {"model_type": "mixtral"}, {}, "it has no word for num_experts_per_tok=2"),
        ("openelm", CONFIGS["mamba2"], {}, "it has no word for"),
        (
            "openelm",
            {"layer_types": ["sliding_attention", *["full_attention"] * 3], "sliding_window": 4},
            {},
            "it has no layers of type sliding_attention",
        ),
    ],
)  # fmt: skip
def test_a_carrier_that_does_not_fit_says_why(tmp_path, name, fields, cuts, why):
    source, named = opened(tmp_path / "in", LLAMA | fields)
    plan = PrunePlan(dropped(named, **cuts) if cuts else {})
    found = {carrier.name: carrier for carrier in carriers(source, named, plan)}[name]
    assert not found.fits
    with pytest.raises(InputError, match=f"--carrier {name}: does not fit, .*{why}"):
        carrier_named(name, source, named, plan)


def test_equal_shapes_and_names_are_not_enough(tmp_path):
    # Gemma has Llama's parameters, but scales its embeddings and adds one to its norms.
    source, named = opened(tmp_path / "in", LLAMA | HEAD | TIED | {"model_type": "gemma"})
    (openelm,) = (c for c in carriers(source, named, PrunePlan({})) if c.name == "openelm")
    assert "computes something else: logits differ by" in openelm.why_not


def test_the_advice_names_the_carrier_or_every_obstacle(tmp_path):
    source, named = opened(tmp_path / "in", LLAMA)
    widths = PrunePlan(per_layer(named, "channels", [200, 100, 50, 25]))
    assert advice(carriers(source, named, widths)) == "carrier openelm can: --carrier openelm"
    both = PrunePlan(widths.cuts | dropped(named, attention=[1]))
    text = advice(carriers(source, named, both))
    assert "carrier nemotron-nas cannot" in text and "carrier openelm cannot" in text


def test_an_unknown_carrier_is_refused_with_the_known_ones(tmp_path):
    source, named = opened(tmp_path / "in", LLAMA)
    with pytest.raises(InputError, match=f"--carrier llama: unknown; .* {', '.join(CARRIERS)}"):
        carrier_named("llama", source, named, PrunePlan({}))


def test_a_carrier_keeps_the_special_tokens(tmp_path):
    source, named = opened(tmp_path / "in", LLAMA | {"eos_token_id": [5, 6], "bos_token_id": 1})
    found = carrier_named("openelm", source, named, PrunePlan({}))
    assert found.config["eos_token_id"] == [5, 6] and found.config["bos_token_id"] == 1
