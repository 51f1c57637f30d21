import copy
import dataclasses
import math

import hypothesis.strategies as st
import mlx.core as mx
import mlx.nn as nn
import pytest
from hypothesis import given, settings
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import _get_classes

from mlx_compress.errors import InputError
from mlx_compress.fields import Inexpressible, expressible, fit_config, nearest_expressible
from mlx_compress.probes import Path, Shapes, effects, memoised, put
from mlx_compress.renumber import without_layers


def model_of(config: dict) -> nn.Module:
    model, args = _get_classes(config)
    return model(args.from_dict(copy.deepcopy(config)))


def shapes_of(config: dict) -> Shapes:
    return {path: w.shape for path, w in tree_flatten(model_of(config).parameters())}


def optional_fields(config: dict) -> list[Path]:
    """The fields that a model's dataclasses declare and that `config` leaves out or sets to None.

    A dataclass that the model keeps belongs to the nested dict that it agrees with.
    """
    kept = [v for m in model_of(config).modules() for v in vars(m).values()]
    found = {}
    for path, node in dicts(config):
        for args in filter(dataclasses.is_dataclass, kept):
            names = [field.name for field in dataclasses.fields(args)]
            shared = [name for name in names if isinstance(node.get(name), int | float | str)]
            if shared and all(getattr(args, name) == node[name] for name in shared):
                found |= {(*path, name): None for name in names if node.get(name) is None}
    return list(found)


def dicts(node: dict, path: Path = ()):
    yield path, node
    for key, value in node.items():
        if isinstance(value, dict):
            yield from dicts(value, (*path, key))


# No two roles have the same number: vocab 101, hidden 64, MLP 88, heads 4, kv heads 2, layers 3.
BASE = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
}
LLAMA = BASE | {"model_type": "llama"}
LLAMA_24 = LLAMA | {"head_dim": 24}
QWEN2 = BASE | {"model_type": "qwen2"}
QWEN3 = BASE | {"model_type": "qwen3", "head_dim": 24}
GEMMA = BASE | {"model_type": "gemma", "head_dim": 24}
PHI3 = BASE | {"model_type": "phi3"}
MIXTRAL = BASE | {"model_type": "mixtral", "num_local_experts": 6, "num_experts_per_tok": 2}
DEEPSEEK_V3 = BASE | {
    "model_type": "deepseek_v3",
    "num_key_value_heads": 4,
    "moe_intermediate_size": 40,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 36,
    "q_lora_rank": 52,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 20,
    "v_head_dim": 12,
    "n_group": 2,
    "topk_group": 1,
}
OPENELM = {
    "model_type": "openelm",
    "head_dim": 24,
    "num_transformer_layers": 3,
    "model_dim": 64,
    "vocab_size": 101,
    "ffn_dim_divisor": 1,
    "num_query_heads": [4, 4, 6],
    "num_kv_heads": [2, 2, 3],
    "ffn_multipliers": [1.5, 2.0, 2.546875],  # widths 96, 128, 163
}
NEMOTRON_NAS = BASE | {
    "model_type": "nemotron-nas",
    "block_configs": [
        {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 12.0}},  # width 512
        {"attention": {"no_op": True}, "ffn": {"ffn_mult": 24.0}},  # width 1024
        {"attention": {"n_heads_in_group": 2}, "ffn": {"no_op": True}},
    ],
}
NEMOTRON_H = BASE | {
    "model_type": "nemotron_h",
    "attention_bias": False,
    "mamba_num_heads": 6,
    "mamba_head_dim": 10,
    "mamba_proj_bias": False,
    "ssm_state_size": 12,
    "conv_kernel": 3,
    "n_groups": 2,
    "mlp_bias": False,
    "layer_norm_epsilon": 1e-5,
    "use_bias": False,
    "use_conv_bias": True,
    "hybrid_override_pattern": "M*-M-",
    "num_hidden_layers": 5,
}
LFM2 = BASE | {
    "model_type": "lfm2",
    "norm_eps": 1e-5,
    "conv_bias": False,
    "conv_L_cache": 3,
    "block_dim": 64,
    "block_ff_dim": 88,
    "block_multiple_of": 8,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
    "num_hidden_layers": 5,
    "full_attn_idxs": [2, 4],
}
LFM2_TYPES = {k: v for k, v in LFM2.items() if k != "full_attn_idxs"} | {
    "layer_types": ["conv", "conv", "full_attention", "conv", "full_attention"]
}
GEMMA3 = {
    "model_type": "gemma3",
    "vocab_size": 101,
    "text_config": {k: v for k, v in BASE.items() if k != "vocab_size"}
    | {"model_type": "gemma3_text", "head_dim": 24, "sliding_window_pattern": 2},
}
GEMMA3N = {
    "model_type": "gemma3n",
    "text_config": BASE
    | {
        "model_type": "gemma3n_text",
        "num_hidden_layers": 4,
        "head_dim": 16,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": 101,
        "sliding_window": 8,
        "rope_local_base_freq": 10000.0,
        "rope_theta": 10000.0,
        "final_logit_softcapping": 30.0,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        "hidden_size_per_layer_input": 20,
        "altup_num_inputs": 3,
        "altup_coef_clip": 120.0,
        "altup_correct_scale": True,
        "altup_active_idx": 0,
        "laurel_rank": 12,
    },
}
GPT2 = {
    "model_type": "gpt2",
    "n_ctx": 32,
    "n_embd": 64,
    "n_head": 4,
    "n_layer": 3,
    "n_positions": 32,
    "layer_norm_epsilon": 1e-5,
    "vocab_size": 101,
}
MAMBA = {
    "model_type": "mamba",
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 88,
    "state_size": 12,
    "num_hidden_layers": 3,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "time_step_rank": 5,
}


def resized(shapes: Shapes, sizes: dict[tuple[str, int], int]) -> Shapes:
    """`shapes` with axes set: {(end of the path, axis): size}."""
    target = {path: list(shape) for path, shape in shapes.items()}
    for (end, axis), size in sizes.items():
        paths = [path for path in target if path.endswith(end)]
        assert paths, end
        for path in paths:
            target[path][axis] = size
    return {path: tuple(shape) for path, shape in target.items()}


def replaced(shapes: Shapes, sizes: dict[int, int]) -> Shapes:
    return {path: tuple(sizes.get(n, n) for n in shape) for path, shape in shapes.items()}


def fit(config: dict, target: Shapes, **choices) -> dict:
    """`fit_config` on an mlx-lm model: the config found has the exact shapes, its model runs."""
    before = copy.deepcopy(config)
    found = fit_config(config, shapes_of, target, optional=optional_fields(config), **choices)
    assert config == before
    assert shapes_of(found) == target
    logits = model_of(found)(mx.array([[1, 2, 3]]))
    assert logits.shape == (1, 3, 101)
    return found


def edited(config: dict, **fields) -> dict:
    return put(config, {tuple(name.split("__")): value for name, value in fields.items()})


ATTENTION_24 = {  # one of two kv groups, with heads of 24
    ("q_proj.weight", 0): 48,
    ("o_proj.weight", 1): 48,
    ("k_proj.weight", 0): 24,
    ("v_proj.weight", 0): 24,
}
ATTENTION_16 = {  # one of two kv groups, with heads of 16
    ("q_proj.weight", 0): 32,
    ("o_proj.weight", 1): 32,
    ("k_proj.weight", 0): 16,
    ("v_proj.weight", 0): 16,
}
BIASES_16 = {("q_proj.bias", 0): 32, ("k_proj.bias", 0): 16, ("v_proj.bias", 0): 16}
EXPERTS = {
    ("block_sparse_moe.gate.weight", 0): 4,
    ("switch_mlp.gate_proj.weight", 0): 4,
    ("switch_mlp.up_proj.weight", 0): 4,
    ("switch_mlp.down_proj.weight", 0): 4,
}


@pytest.mark.parametrize(
    "config, target, changes",
    [
        (LLAMA, {88: 60}, {"intermediate_size": 60}),
        (LLAMA, ATTENTION_16, {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}),
        (LLAMA_24, ATTENTION_24, {"num_attention_heads": 2, "num_key_value_heads": 1}),
        (LLAMA_24, {64: 48, 88: 60}, {"hidden_size": 48, "intermediate_size": 60}),
        (QWEN2, {88: 60}, {"intermediate_size": 60}),
        (QWEN3, ATTENTION_24, {"num_attention_heads": 2, "num_key_value_heads": 1}),
        (QWEN3, {64: 40}, {"hidden_size": 40}),
        (GEMMA, {64: 40, 88: 60}, {"hidden_size": 40, "intermediate_size": 60}),
        (PHI3, {88: 60, 176: 120}, {"intermediate_size": 60}),
        (MIXTRAL, EXPERTS, {"num_local_experts": 4}),
        (MIXTRAL, {88: 60}, {"intermediate_size": 60}),
        (MAMBA, {88: 60, 176: 120}, {"intermediate_size": 60}),
        (GEMMA3, {88: 60}, {"text_config__intermediate_size": 60}),
        (GEMMA3, {64: 40}, {"text_config__hidden_size": 40}),
    ],
    ids=lambda value: value.get("model_type") if isinstance(value, dict) else None,
)
def test_a_narrower_model_needs_no_other_change(config, target, changes):
    change = replaced if isinstance(next(iter(target)), int) else resized
    assert fit(config, change(shapes_of(config), target)) == edited(config, **changes)


def test_experts_heads_and_widths_of_deepseek_are_found_together():
    sizes = {88: 60, 40: 32, 80: 64, 6: 4, 64: 56, 112: 84, 48: 36}  # 4 heads of 28 and 12 -> 3
    target = replaced(shapes_of(DEEPSEEK_V3), sizes)
    target = resized(target, {("embed_q.weight", 0): 3, ("unembed_out.weight", 0): 3})
    found = fit(DEEPSEEK_V3, target)
    assert found == edited(
        DEEPSEEK_V3,
        intermediate_size=60,
        moe_intermediate_size=32,
        n_routed_experts=4,
        hidden_size=56,
        num_attention_heads=3,
    )


@pytest.mark.parametrize(
    "config, layers, dropped, changes",
    [
        (LLAMA, "model.layers", 1, {"num_hidden_layers": 2}),
        (QWEN2, "model.layers", 0, {"num_hidden_layers": 2}),
        (GPT2, "model.h", 1, {"n_layer": 2}),
        (GPT2 | {"n_layer": 2, "n_head": 2}, "model.h", 1, {"n_layer": 1}),
        (MAMBA, "backbone.layers", 1, {"num_hidden_layers": 2}),
        (DEEPSEEK_V3, "model.layers", 1, {"num_hidden_layers": 2}),
        (DEEPSEEK_V3, "model.layers", 0, {"num_hidden_layers": 2, "first_k_dense_replace": 0}),
        (
            OPENELM,
            "transformer.layers",
            1,
            {
                "num_transformer_layers": 2,
                "num_query_heads": [4, 6],
                "num_kv_heads": [2, 3],
                "ffn_multipliers": [1.5, 2.546875],
            },
        ),
        (
            NEMOTRON_NAS,
            "model.layers",
            1,
            {"num_hidden_layers": 2, "block_configs": NEMOTRON_NAS["block_configs"][::2]},
        ),
        (
            NEMOTRON_H,
            "backbone.layers",
            2,
            {"num_hidden_layers": 4, "hybrid_override_pattern": "M*M-"},
        ),
        (LFM2, "model.layers", 1, {"num_hidden_layers": 4, "full_attn_idxs": [1, 3]}),
        (
            LFM2_TYPES,
            "model.layers",
            2,
            {"num_hidden_layers": 4, "layer_types": ["conv"] * 3 + ["full_attention"]},
        ),
        (
            GEMMA3,
            "language_model.model.layers",
            2,
            {"text_config__num_hidden_layers": 2},
        ),
    ],
    ids=lambda value: value.get("model_type") if isinstance(value, dict) else None,
)
def test_dropping_a_layer_shortens_all_that_is_said_per_layer(config, layers, dropped, changes):
    kept = {layers: [i for i in range(config_layers(config, layers)) if i != dropped]}
    target = without_layers(shapes_of(config), kept)
    assert fit(config, target, layers=kept) == edited(config, **changes)


def config_layers(config: dict, layers: str) -> int:
    return 1 + max(
        int(path[len(layers) + 1 :].split(".")[0])
        for path in shapes_of(config)
        if path.startswith(layers + ".")
    )


def test_a_count_that_no_shape_tells_is_found_by_accept():
    config = edited(
        GEMMA3N,
        text_config__num_hidden_layers=5,
        text_config__layer_types=["sliding_attention", "full_attention", "sliding_attention"] * 2,
        text_config__activation_sparsity_pattern=[0.95, 0.0, 0.0, 0.5, 0.0],
    )
    config["text_config"]["layer_types"].pop()
    layers = {"model.language_model.layers": [0, 1, 2, 4]}  # 3 and 4 share the keys of others
    target = replaced(without_layers(shapes_of(config), layers), {100: 80})  # 5 x 20 -> 4 x 20
    choices = {"layers": layers, "optional": optional_fields(config)}
    for shared in (2, 1):
        found = fit_config(
            config,
            shapes_of,
            target,
            accept=lambda c, shared=shared: c["text_config"]["num_kv_shared_layers"] == shared,
            **choices,
        )
        assert found["text_config"]["activation_sparsity_pattern"] == [0.95, 0.0, 0.0, 0.0]


def test_layers_and_widths_can_go_together():
    kept = {"model.layers": [0, 2]}
    target = replaced(without_layers(shapes_of(LLAMA_24), kept), {88: 60, 64: 40})
    found = fit(LLAMA_24, target, layers=kept)
    assert found == edited(LLAMA_24, num_hidden_layers=2, intermediate_size=60, hidden_size=40)


def test_every_layer_of_openelm_gets_its_own_width_and_heads():
    target = shapes_of(OPENELM)
    for layer, (ffn, heads, kv_heads) in enumerate([(91, 2, 1), (120, 4, 2), (101, 6, 2)]):
        name = f"transformer.layers.{layer}"
        sizes = {
            ("ffn.proj_1.weight", 0): 2 * ffn,
            ("ffn.proj_2.weight", 1): ffn,
            ("attn.qkv_proj.weight", 0): (heads + 2 * kv_heads) * 24,
            ("attn.out_proj.weight", 1): heads * 24,
        }
        target = resized(target, {(f"{name}.{end}", axis): n for (end, axis), n in sizes.items()})
    found = fit(OPENELM, target)
    assert found["num_query_heads"] == [2, 4, 6]
    assert found["num_kv_heads"] == [1, 2, 2]
    assert [round(m * 64) for m in found["ffn_multipliers"]] == [91, 120, 101]


def test_a_narrower_openelm_keeps_its_widths_by_larger_multipliers():
    target = replaced(shapes_of(OPENELM), {64: 48})
    found = fit(OPENELM, target)
    assert found["model_dim"] == 48
    assert [round(m * 48) for m in found["ffn_multipliers"]] == [96, 128, 163]


def test_a_width_that_the_model_rounds_is_hit_exactly_or_refused():
    shapes = shapes_of(NEMOTRON_NAS)
    found = fit(NEMOTRON_NAS, replaced(shapes, {512: 256, 1024: 768}))
    assert [block["ffn"].get("ffn_mult") for block in found["block_configs"]] == [6.0, 18.0, None]
    with pytest.raises(Inexpressible, match=r"gate_proj.weight is asked to be \(300, 64\)"):
        fit(NEMOTRON_NAS, replaced(shapes, {512: 300}))


def test_a_number_becomes_a_list_where_the_model_takes_one_per_layer():
    layer = "language_model.layers.1.mlp"
    sizes = {
        (f"{layer}.gate_proj.weight", 0): 72,
        (f"{layer}.up_proj.weight", 0): 72,
        (f"{layer}.down_proj.weight", 1): 72,
    }
    found = fit(GEMMA3N, resized(shapes_of(GEMMA3N), sizes))
    assert found == edited(GEMMA3N, text_config__intermediate_size=[88, 72, 88, 88])


def offered(config: dict, target: Shapes) -> list[dict]:
    """All candidates, in the order in which `accept` sees them."""
    seen: list[dict] = []
    with pytest.raises(Inexpressible, match="none computes what was asked for"):
        fit(config, target, accept=lambda candidate: seen.append(candidate))
    return seen


BARE = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
MHA = BARE | {"head_dim": 16}
THREE_HEADS = {("q_proj.weight", 0): 48, ("o_proj.weight", 1): 48} | {
    ("k_proj.weight", 0): 48,
    ("v_proj.weight", 0): 48,
}


@pytest.mark.parametrize("kv_heads", [None, 4])
def test_fewer_heads_are_offered_before_narrower_ones(kv_heads):
    config = edited(MHA, num_key_value_heads=kv_heads)
    seen = offered(config, resized(shapes_of(config), THREE_HEADS))
    assert seen[:2] == [
        edited(config, num_attention_heads=3, num_key_value_heads=kv_heads and 3),
        edited(config, head_dim=12),
    ]


def test_only_the_optional_fields_that_are_needed_become_explicit():
    assert {("head_dim",), ("num_key_value_heads",)} < set(optional_fields(BARE))
    found = fit(BARE, resized(shapes_of(BARE), THREE_HEADS))
    assert found == edited(BARE, num_attention_heads=3, head_dim=16)


def test_accept_can_compare_what_the_candidate_computes():
    mx.random.seed(0)
    model, tokens = model_of(MHA), mx.array([[3, 1, 4, 1, 5]])
    weights = dict(tree_flatten(model.parameters()))
    kept = mx.array([i for i in range(64) if i // 16 != 1])
    pruned, zeroed = dict(weights), dict(weights)
    for path, w in weights.items():
        if "self_attn" in path:
            pruned[path] = mx.take(w, kept, axis=1 if "o_proj" in path else 0)
        if "o_proj" in path:
            zeroed[path] = w * (mx.arange(64) // 16 != 1)
    model.update(tree_unflatten(list(zeroed.items())))

    def computes(config):
        candidate = model_of(config)
        candidate.load_weights(list(pruned.items()))
        return bool(mx.allclose(candidate(tokens), model(tokens), atol=1e-5))

    found = fit(MHA, {path: w.shape for path, w in pruned.items()}, accept=computes)
    assert found["num_attention_heads"] == 3
    assert not computes(edited(MHA, head_dim=12))


@pytest.mark.parametrize(
    "config, truth",
    [
        (GPT2, {"n_embd": 48, "n_head": 3}),
        (
            edited(QWEN2, num_key_value_heads=4),
            {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3},
        ),
        (QWEN2, {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}),
    ],
    ids=["gpt2", "qwen2-mha", "qwen2-gqa"],
)
def test_heads_that_shapes_do_not_tell_are_offered_too(config, truth):
    truth = edited(config, **truth)
    target = shapes_of(truth)
    assert fit(config, target) != truth  # as many heads, each narrower
    assert fit(config, target, accept=lambda candidate: candidate == truth) == truth


def test_removing_heads_needs_a_head_width_in_the_config():
    target = resized(shapes_of(QWEN2), ATTENTION_16 | BIASES_16)
    with pytest.raises(Inexpressible, match="hidden_size would have to be 32, 64 at once") as error:
        fit(QWEN2, target)
    assert error.value.exit_code == 2
    assert error.value.conflicts == {
        f"model.layers.{layer}.self_attn.{name}": pair
        for layer in range(3)
        for name, pair in {
            "q_proj.weight": ((32, 64), (64, 64)),
            "q_proj.bias": ((32,), (64,)),
            "o_proj.weight": ((64, 32), (64, 64)),
        }.items()
    }


def test_layers_that_want_different_widths_are_named_with_the_field_they_share():
    layer = "model.layers.0.mlp"
    target = replaced(shapes_of(LLAMA), {88: 80})
    sizes = {
        (f"{layer}.gate_proj.weight", 0): 72,
        (f"{layer}.up_proj.weight", 0): 72,
        (f"{layer}.down_proj.weight", 1): 72,
    }
    with pytest.raises(
        Inexpressible, match="intermediate_size would have to be 72, 80 at once"
    ) as e:
        fit(LLAMA, resized(target, sizes))
    assert e.value.conflicts == {
        f"{layer}.gate_proj.weight": ((72, 64), (80, 64)),
        f"{layer}.up_proj.weight": ((72, 64), (80, 64)),
        f"{layer}.down_proj.weight": ((64, 72), (64, 80)),
    }
    assert "\n" not in str(e.value)


def test_gpt2_has_no_number_for_its_mlp_alone():
    with pytest.raises(Inexpressible, match="n_embd would have to be 60, 64 at once"):
        fit(GPT2, replaced(shapes_of(GPT2), {256: 240}))


def test_counts_and_indices_of_layers_are_read_in_every_way_at_once():
    def stack(config):
        if len(config["blocks"]) != config["total"] - config["reused"]:
            raise ValueError("not valid")
        kinds = {i: "attention" for i in config["attention_from_1"]}
        return {
            f"layers.{i}.{kinds.get(i + 1, 'conv')}": (block["heads"], 8)
            for i, block in enumerate(config["blocks"])
        }

    blocks = [{"heads": n} for n in (2, 3, 2, 1)]
    config = {"total": 6, "reused": 2, "blocks": blocks, "attention_from_1": [1, 2, 4]}
    layers = {"layers": [1, 2, 3]}
    target = without_layers(stack(config), layers)
    found = fit_config(config, stack, target, layers=layers)
    expected = {"total": 5, "reused": 2, "blocks": blocks[1:], "attention_from_1": [1, 3]}
    assert found == expected


def test_two_counts_of_layers_change_together_one_of_them_absent():
    def stack(config):
        if config.get("depth", 4) != config["also"]:
            raise ValueError("not valid")
        return {
            f"layers.{i}.{'attention' if i in config['attention'] else 'conv'}": (8, 8)
            for i in range(config["also"])
        }

    config, layers = {"also": 4, "attention": [0, 2, 3]}, {"layers": [0, 1, 3]}
    target = without_layers(stack(config), layers)
    found = fit_config(config, stack, target, layers=layers, optional=[("depth",)])
    assert found == {"also": 3, "attention": [0, 2], "depth": 3}


def test_a_layer_that_the_order_of_kinds_needs_can_not_be_dropped():
    def alternating(config):
        kinds = ["conv" if i % config["period"] else "attention" for i in range(config["depth"])]
        return {f"layers.{i}.{kind}": (8, 8) for i, kind in enumerate(kinds)}

    config, layers = {"depth": 6, "period": 3, "width": 8}, {"layers": [0, 1, 3, 4, 5]}
    target = without_layers(alternating(config), layers)
    with pytest.raises(Inexpressible, match="drops just these layers") as error:
        fit_config(config, alternating, target, layers=layers)
    assert all(None in pair for pair in error.value.conflicts.values())
    layers = {"layers": [0, 1, 3, 4]}
    target = without_layers(alternating(config), layers)
    found = fit_config(config, alternating, target, layers=layers)
    assert found == {"depth": 4, "period": 2, "width": 8}


def test_a_target_with_other_parameters_or_ranks_is_refused():
    shapes = shapes_of(LLAMA)
    dropped = without_layers(shapes, {"model.layers": [0, 1]})
    with pytest.raises(InputError, match="name the dropped layers in `layers`"):
        fit(LLAMA, dropped)
    with pytest.raises(InputError, match="another rank"):
        fit(LLAMA, shapes | {"model.norm.weight": (64, 1)})
    with pytest.raises(InputError, match="builds no model"):
        fit_config(LLAMA | {"vocab_size": -1}, shapes_of, shapes)


def test_few_models_are_built():
    built = []

    def counted(config):
        built.append(config)
        return shapes_of(config)

    target = replaced(shapes_of(LLAMA_24), {88: 60, 64: 40})
    config = LLAMA_24 | {"label2id": {f"LABEL_{i}": i for i in range(100)}}
    fit_config(config, counted, target, optional=optional_fields(LLAMA_24))
    assert len(built) < 3 * len(LLAMA_24)
    built.clear()
    openelm = OPENELM | {"num_transformer_layers": 64, "num_kv_heads": [2] * 64}
    openelm |= {"num_query_heads": [4] * 64, "ffn_multipliers": [2.0] * 64}
    truth = openelm | {"ffn_multipliers": [1.0 + i / 64 for i in range(64)]}
    assert fit_config(openelm, counted, shapes_of(truth)) == truth
    assert len(built) < 50  # not one for each of the 192 numbers


def slots(config: dict, sizes: dict[tuple[str, int], int]) -> list[tuple[str, int, int]]:
    """Every axis at the end of a path, with its entries per unit."""
    return [
        (path, axis, entries)
        for path in shapes_of(config)
        for (end, axis), entries in sizes.items()
        if path.endswith(end)
    ]


MLP = {("gate_proj.weight", 0): 1, ("up_proj.weight", 0): 1, ("down_proj.weight", 1): 1}
KV_GROUPS_16 = {(end, axis): 64 - rows for (end, axis), rows in ATTENTION_16.items()}
KV_GROUPS_16 |= {("k_proj.weight", 0): 16, ("v_proj.weight", 0): 16}


@pytest.mark.parametrize(
    "config, units, sizes, keep, nearest",
    [
        (LLAMA, 88, MLP, 61, 61),
        (LLAMA, 2, KV_GROUPS_16, 1, 1),
        (QWEN2, 2, KV_GROUPS_16 | {(end, 0): 64 - n for (end, _), n in BIASES_16.items()}, 1, 2),
        (
            edited(NEMOTRON_NAS, block_configs=[NEMOTRON_NAS["block_configs"][0]] * 3),
            512,
            MLP,
            300,
            256,
        ),
        (edited(LLAMA, num_hidden_layers=1), 88, {("gate_proj.weight", 0): 1}, 60, 88),
    ],
    ids=["any", "kv-groups", "no-head-width", "multiples-of-256", "half-a-dimension"],
)
def test_a_request_snaps_to_what_the_config_can_say(config, units, sizes, keep, nearest):
    choices = {"optional": optional_fields(config)}
    where, build = slots(config, sizes), memoised(shapes_of)
    assert nearest_expressible(config, build, where, units, keep, **choices) == nearest
    assert expressible(config, build, where, units, nearest, **choices)
    assert expressible(config, build, where, units, keep, **choices) == (keep == nearest)


def test_an_absent_list_with_one_number_per_layer_becomes_explicit():
    def shapes(config):
        heads = config.get("heads_per_layer") or [config["heads"]] * 3
        return {f"layers.{i}.q": (heads[i] * 8, 40) for i in range(3)}

    target = {"layers.0.q": (48, 40), "layers.1.q": (32, 40), "layers.2.q": (48, 40)}
    found = fit_config({"heads": 6}, shapes, target, optional=[("heads_per_layer",)])
    assert found == {"heads": 6, "heads_per_layer": [6, 4, 6]}


def test_a_model_may_write_into_its_config():
    def shapes(config):
        return {"w": (config["nested"].pop("width"), 8)}

    found = fit_config({"nested": {"width": 6}}, shapes, {"w": (4, 8)})
    assert found == {"nested": {"width": 4}}


def test_effects_show_which_axes_share_a_field():
    moved = effects(memoised(shapes_of), LLAMA)
    assert {path for path, _ in moved[("intermediate_size",)]} == {
        f"model.layers.{i}.mlp.{name}_proj.weight"
        for i in range(3)
        for name in ("gate", "up", "down")
    }
    assert ("max_position_embeddings",) not in moved


def grouped(config: dict) -> Shapes:
    """Heads that must divide, and experts of which no more are used than there are."""
    heads, kv_heads, experts = config["heads"], config["kv_heads"], config["experts"]
    if heads % kv_heads or config["top_k"] > experts:
        raise ValueError("not valid")
    return {"q": (heads * 8, 32), "k": (kv_heads * 8, 32), "router": (experts, 32)}


GROUPED = {"heads": 12, "kv_heads": 4, "experts": 8, "top_k": 6}


def test_fields_that_are_valid_only_together_are_found():
    truth = GROUPED | {"heads": 9, "kv_heads": 3}
    assert fit_config(GROUPED, grouped, grouped(truth)) == truth


def test_a_count_in_the_way_of_a_goal_is_cut():
    truth = GROUPED | {"experts": 4, "top_k": 4}
    assert fit_config(GROUPED, grouped, grouped(truth)) == truth
    assert fit_config(GROUPED, grouped, {**grouped(GROUPED), "router": (7, 32)})["top_k"] == 6


def test_heads_and_their_width_may_both_change():
    def shapes(config):
        h, n, v = config["heads"], config["nope"], config["v"]
        return {"q": (h * (n + 8), 32), "kv": (h * (n + v), 16), "o": (32, h * v)}

    config, truth = {"heads": 4, "nope": 20, "v": 12}, {"heads": 3, "nope": 20, "v": 8}
    assert fit_config(config, shapes, shapes(truth)) == truth


def attention(config):
    """Heads of an even width, with one number for each head."""
    if config["width"] % 2:
        raise ValueError("not valid")
    heads, kv_heads, width = config["heads"], config["kv_heads"], config["width"]
    return {"q": (heads * width, 64), "k": (kv_heads * width, 64), "sinks": (heads,)}


def test_a_field_is_probed_anew_where_another_has_changed_what_it_moves():
    config = {"heads": 4, "kv_heads": 2, "width": 24}
    truth = {"heads": 3, "kv_heads": 1, "width": 12}
    assert fit_config(config, attention, attention(truth)) == truth


def test_a_count_does_not_grow_to_make_up_for_another_field():
    def shapes(config):
        return {f"{name}_proj": (config[name] * config["width"], 64) for name in ("q", "k")}

    config, truth = {"q": 4, "k": 2, "width": 24}, {"q": 2, "k": 2, "width": 18}
    assert fit_config(config, shapes, shapes(truth)) == truth  # and not 4 times 9, with 4 k


@pytest.mark.parametrize(
    "width, start, wanted, found",
    [
        (lambda v: int(v * 100), 0.5, 29, 0.295),  # int(0.29 * 100) is 28
        (lambda v: math.ceil(v * 100), 0.5, 7, 0.065),  # math.ceil(0.07 * 100) is 8
        (lambda v: v * v, 10, 64, 8),
    ],
    ids=["floor", "ceil", "square"],
)
def test_a_field_that_is_no_straight_line_is_hit_by_other_tries(width, start, wanted, found):
    shapes = lambda config: {"w": (width(config["v"]), 8)}  # noqa: E731
    assert fit_config({"v": start}, shapes, {"w": (wanted, 8)}) == {"v": found}


@st.composite
def models(draw):
    """A config, a smaller one, and shapes that are sums and products of its numbers.

    Each number also sets an axis alone, so that the shapes determine it.
    """
    names = [f"f{i}" for i in range(draw(st.integers(2, 4)))]
    config = {name: draw(st.integers(4, 40)) for name in names} | {"unread": 7, "eps": 1e-5}
    smaller = {name: draw(st.integers(1, config[name])) for name in names}
    layers = draw(st.integers(2, 5))
    config["nest"] = {
        "widths": draw(st.lists(st.integers(4, 40), min_size=layers, max_size=layers))
    }
    widths = [draw(st.integers(1, width)) for width in config["nest"]["widths"]]
    terms = draw(
        st.lists(
            st.tuples(
                st.sampled_from(["sum", "product"]),
                st.sampled_from(names),
                st.sampled_from(names),
                st.integers(1, 3),
            ),
            max_size=5,
        )
    )
    return config, config | smaller | {"nest": {"widths": widths}}, terms


def synthetic(config: dict, terms, alone: bool) -> Shapes:
    shapes = {f"alone.{n}": (v, 3) for n, v in config.items() if n.startswith("f") and alone}
    for i, (kind, a, b, k) in enumerate(terms):
        a, b = config[a], config[b]
        shapes[f"mixed{i}"] = (a * b if kind == "product" else k * a + b + 1, 5)
    for i, width in enumerate(config["nest"]["widths"]):
        shapes[f"layers.{i}.w"] = (2 * width, config["f0"] + width)
    return shapes


@settings(max_examples=60, deadline=None)
@given(models())
def test_numbers_that_the_shapes_determine_are_found(model):
    config, truth, terms = model
    shapes = lambda c: synthetic(c, terms, alone=True)  # noqa: E731
    assert fit_config(config, shapes, shapes(truth)) == truth


@settings(max_examples=60, deadline=None)
@given(models())
def test_what_is_found_always_has_the_shapes(model):
    config, truth, terms = model
    shapes = lambda c: synthetic(c, terms, alone=False)  # noqa: E731
    try:
        found = fit_config(config, shapes, shapes(truth))
    except Inexpressible as error:
        assert error.conflicts
    else:
        assert shapes(found) == shapes(truth)
