"""Tiny random models of every architecture in `mlx_lm.models`, for tests that hold for all.

    CONFIGS["llama"]      a tiny config.json, as `mlx_lm.utils.load_model` would read it
    build("llama")        the model, with random float32 weights
    UNSUPPORTED           the model files that cannot run here, and why

A key is the name of the model file; "falcon_mamba" covers a branch that another model_type takes.
Different roles get different numbers, so that no two axes match by accident:

    vocab 101, hidden 64, MLP 88, heads 4, kv heads 2
    head_dim 16 = hidden / heads, or 24 where the published config sets it
    6 experts of 40, 2 per token; shared experts 80 = 2 x 40, or 56 where they have their own size
    MLA: q rank 52, kv rank 36, nope 20, rope 8, v 12
    linear attention: key 12, value 20; state space: state 12

Windows are 2 tokens wide: with 3 tokens or more, a sliding layer always takes its own mask.
Hybrids have the fewest layers that show every kind. `CONFIGS` is to be read, not changed.
On the CPU, `mx.compile` calls a C++ compiler: after `mx.disable_compile()`, building all and
running each once takes seconds, not a minute.
"""

import copy

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

BASE = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
HEAD = {"head_dim": 24}
TIED = {"tie_word_embeddings": True}
NO_BIAS = {"attention_bias": False, "mlp_bias": False}
SLIDING_FULL = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 2}

MOE = {
    "moe_intermediate_size": 40,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}
# The second layer is sparse. Two expert groups, where the published configs have several.
DEEPSEEK_MOE = {
    "moe_intermediate_size": 40,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 2,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
}
ONE_GROUP = {"n_group": 1, "topk_group": 1}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 52,
    "kv_lora_rank": 36,
    "qk_nope_head_dim": 20,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "attention_bias": False,
}
INDEXER = {"index_head_dim": 16, "index_n_heads": 3, "index_topk": 2}
DELTA_NET = {
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 20,
    "linear_conv_kernel_dim": 3,
}
KDA = {
    "kda_layers": [1],
    "full_attn_layers": [2],
    "num_heads": 3,
    "head_dim": 20,
    "short_conv_kernel_size": 3,
}
LONGCAT = {
    "vocab_size": 101,
    "hidden_size": 64,
    "num_layers": 2,
    "num_attention_heads": 4,
    "ffn_hidden_size": 88,
    "expert_ffn_hidden_size": 40,
    "n_routed_experts": 6,
    "zero_expert_num": 3,
    "zero_expert_type": "identity",
    "moe_topk": 2,
    "routed_scaling_factor": 1.5,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
    **{k: v for k, v in MLA.items() if k != "num_key_value_heads"},
}
GRANITE = {
    "attention_multiplier": 0.25,
    "embedding_multiplier": 4.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
LONG_ROPE = {
    "type": "longrope",
    "short_factor": 1.0,
    "long_factor": 2.0,
    "original_max_position_embeddings": 32,
}
MISTRAL_ROPE = {"rope_theta": 10000.0, "llama_4_scaling_beta": 0.1, **YARN}
PARTIAL_ROPE = {"type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}

LLAMA = {**BASE, "model_type": "llama", "rope_scaling": LLAMA3_ROPE, **NO_BIAS}
DEEPSEEK_V3 = {**BASE, "model_type": "deepseek_v3", **MLA, **DEEPSEEK_MOE, "rope_scaling": YARN}
QWEN2 = {**BASE, "model_type": "qwen2", **TIED}
QWEN3 = {**BASE, "model_type": "qwen3", **HEAD, **TIED}
QWEN3_MOE = {
    **BASE,
    "model_type": "qwen3_moe",
    **HEAD,
    **MOE,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
QWEN3_5 = {
    **BASE,
    "model_type": "qwen3_5_text",
    **HEAD,
    **DELTA_NET,
    "full_attention_interval": 2,
    "rope_parameters": PARTIAL_ROPE,
}
QWEN_SHARED_EXPERT = {"shared_expert_intermediate_size": 56}
GEMMA3 = {
    **BASE,
    "model_type": "gemma3_text",
    **HEAD,
    **TIED,
    "query_pre_attn_scalar": 24,
    "rope_local_base_freq": 10000.0,
    "sliding_window": 2,
    "sliding_window_pattern": 2,
}
GEMMA4 = {
    **BASE,
    "model_type": "gemma4_text",
    **HEAD,
    **TIED,
    "global_head_dim": 32,
    "final_logit_softcapping": 30.0,
}
LFM2 = {
    "model_type": "lfm2",
    "vocab_size": 101,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "conv_bias": False,
    "conv_L_cache": 3,
    "layer_types": ["conv", "full_attention"],
}
LFM2_DENSE = {
    **LFM2,
    "block_dim": 64,
    "block_ff_dim": 88,
    "block_multiple_of": 8,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
}
BAILING = {
    **BASE,
    **MOE,
    "first_k_dense_replace": 1,
    "num_shared_experts": 2,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
    "partial_rotary_factor": 0.5,
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "use_qk_norm": True,
    "use_bias": False,
    "use_qkv_bias": False,
}
LLAMA4 = {
    **BASE,
    "model_type": "llama4_text",
    **HEAD,
    "intermediate_size": 40,
    "intermediate_size_mlp": 88,
    "use_qk_norm": True,
}

CONFIGS = {
    "Klear": {
        **BASE,
        "model_type": "Klear",
        **MOE,
        "attention_bias": False,
        "mlp_only_layers": [0],
        "decoder_sparse_step": 1,
        "n_shared_experts": 2,
    },
    "afm7": {
        "model_type": "afm7",
        "vocab_size": 101,
        "hidden_dim": 64,
        "num_layers": 2,
        "num_kv_reuse_layers": 1,
        "num_heads": 4,
        "num_kv_heads": 2,
        "hidden_dim_scale_factor": 1.375,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
    },
    "afmoe": {
        **BASE,
        "model_type": "afmoe",
        **HEAD,
        **MOE,
        **SLIDING_FULL,
        "num_shared_experts": 2,
        "num_dense_layers": 1,
        "route_scale": 1.5,
        "mup_enabled": True,
    },
    "apertus": {
        **BASE,
        "model_type": "apertus",
        **NO_BIAS,
        "post_norm": False,
        "qk_norm": True,
        "rope_scaling": LLAMA3_ROPE,
    },
    "baichuan_m1": {
        **BASE,
        "model_type": "baichuan_m1",
        "sliding_window": 2,
        "sliding_window_layers": [0],
        "num_swa_attention_heads": 8,
        "num_swa_key_value_heads": 4,
        "conv_window": 2,
    },
    "bailing_hybrid": {
        **BAILING,
        "model_type": "bailing_hybrid",
        **HEAD,
        **MLA,
        "layer_group_size": 2,
        "group_norm_size": 2,
    },
    "bailing_moe": {**BAILING, "model_type": "bailing_moe"},
    "bailing_moe_linear": {
        **BAILING,
        "model_type": "bailing_moe_linear",
        **HEAD,
        "layer_group_size": 2,
        "group_norm_size": 2,
    },
    "bailing_moe_v3": {
        **BAILING,
        "model_type": "bailing_hybrid",
        "architectures": ["BailingMoeV3ForCausalLM"],
        **HEAD,
        **MLA,
        "moe_shared_expert_intermediate_size": 56,
        "num_shared_experts": 1,
        "layer_group_size": 2,
        "short_conv_kernel_size": 3,
    },
    "cohere": {
        **BASE,
        "model_type": "cohere",
        **TIED,
        "layer_norm_eps": 1e-5,
        "logit_scale": 0.5,
        "use_qk_norm": True,
    },
    "cohere2": {
        **BASE,
        "model_type": "cohere2",
        **TIED,
        "head_dim": 16,
        "layer_norm_eps": 1e-5,
        "logit_scale": 0.5,
        "sliding_window": 2,
        "sliding_window_pattern": 2,
    },
    "dbrx": {
        "model_type": "dbrx",
        "vocab_size": 101,
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 40, "moe_num_experts": 6, "moe_top_k": 2},
    },
    "deepseek": {**BASE, "model_type": "deepseek", **DEEPSEEK_MOE},
    "deepseek_v2": {
        **DEEPSEEK_V3,
        "model_type": "deepseek_v2",
        "topk_method": "group_limited_greedy",
        "scoring_func": "softmax",
    },
    "deepseek_v3": DEEPSEEK_V3,
    "deepseek_v32": {**DEEPSEEK_V3, "model_type": "deepseek_v32", **INDEXER},
    # Layers: window only, compressor + indexer, indexer on shared keys, reader of both.
    # Heads of 24 are no multiple of 16 or 32, so no fp8 or fp4 rounding takes place.
    "deepseek_v41": {
        **BASE,
        "model_type": "deepseek_v41",
        **HEAD,
        **INDEXER,
        "num_hidden_layers": 4,
        "index_head_dim": 24,
        "q_lora_rank": 52,
        "qk_rope_head_dim": 8,
        "o_groups": 2,
        "o_lora_rank": 28,
        "moe_intermediate_size": 40,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "sliding_window": 2,
        "compress_ratios": [0, 2, 2, 2],
        "kv_source_layer_ids": [1],
        "index_source_layer_ids": [1, 2],
        "candidate_source_layer_id": 1,
        "candidate_topk_blocks": 2,
        "candidate_block_size": 2,
        "compress_rope_theta": 10000.0,
        "rope_scaling": YARN,
        "hc_mult": 3,
        "hc_sinkhorn_iters": 3,
    },
    "dots1": {**BASE, "model_type": "dots1", **HEAD, **DEEPSEEK_MOE, **ONE_GROUP, **NO_BIAS},
    "ernie4_5": {**BASE, "model_type": "ernie4_5", **HEAD, **TIED, "use_bias": False},
    "ernie4_5_moe": {
        **BASE,
        "model_type": "ernie4_5_moe",
        **TIED,
        "use_bias": False,
        "moe_num_experts": 6,
        "moe_k": 2,
        "moe_intermediate_size": 40,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_interval": 1,
    },
    "exaone": {
        **{k: v for k, v in BASE.items() if k not in ("num_hidden_layers", "rms_norm_eps")},
        "model_type": "exaone",
        **TIED,
        "num_layers": 2,
        "layer_norm_epsilon": 1e-5,
        "rope_scaling": LLAMA3_ROPE,
    },
    "exaone4": {
        **BASE,
        "model_type": "exaone4",
        **HEAD,
        "rope_scaling": LLAMA3_ROPE,
        "sliding_window": 2,
        "sliding_window_pattern": "LG",
    },
    "exaone_moe": {
        **BASE,
        "model_type": "exaone_moe",
        **HEAD,
        **MOE,
        **SLIDING_FULL,
        **ONE_GROUP,
        "num_shared_experts": 2,
        "is_moe_layer": [False, True],
        "routed_scaling_factor": 1.5,
    },
    "falcon_h1": {
        **BASE,
        "model_type": "falcon_h1",
        **HEAD,
        **TIED,
        "mamba_d_ssm": 80,
        "mamba_n_heads": 5,
        "mamba_d_head": 16,
        "mamba_d_state": 12,
        "mamba_d_conv": 3,
        "mamba_n_groups": 1,
        "mamba_rms_norm": True,
        "embedding_multiplier": 2.0,
        "lm_head_multiplier": 1.0,
    },
    "falcon_mamba": {
        "model_type": "falcon_mamba",
        "vocab_size": 101,
        "hidden_size": 64,
        "intermediate_size": 104,
        "num_hidden_layers": 2,
        "state_size": 12,
        "conv_kernel": 3,
        "time_step_rank": 6,
        "use_bias": False,
        "use_conv_bias": True,
        "tie_word_embeddings": False,
    },
    "gear": {
        **BASE,
        "model_type": "gear",
        **HEAD,
        **TIED,
        "num_hidden_layers": 3,
        "layer_types": ["conv_mixer", "sliding_attention", "full_attention"],
        "sliding_window": 2,
        "conv_L_cache": 3,
    },
    "gemma": {**BASE, "model_type": "gemma", **HEAD, **TIED},
    "gemma2": {**BASE, "model_type": "gemma2", **HEAD, **TIED, "query_pre_attn_scalar": 24.0},
    "gemma3": {"model_type": "gemma3", "vocab_size": 101, "text_config": GEMMA3},
    "gemma3_text": GEMMA3,
    # The last two layers would read the keys of the first two through a cache.
    "gemma3n": {
        "model_type": "gemma3n",
        "text_config": {
            **BASE,
            "model_type": "gemma3n_text",
            **HEAD,
            **TIED,
            "num_hidden_layers": 4,
            "intermediate_size": [88, 88, 72, 72],
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 2,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": 97,
            "hidden_size_per_layer_input": 20,
            "rope_local_base_freq": 10000.0,
            "final_logit_softcapping": 30.0,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
            "altup_num_inputs": 3,
            "altup_active_idx": 0,
            "altup_coef_clip": 120.0,
            "altup_correct_scale": True,
            "laurel_rank": 12,
        },
    },
    # gemma4 is as the 26B (experts, keys as values), gemma4_text as the 2B (inputs per layer).
    "gemma4": {
        "model_type": "gemma4",
        "vocab_size": 101,
        "text_config": {
            **GEMMA4,
            **SLIDING_FULL,
            "num_global_key_value_heads": 1,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True,
            "enable_moe_block": True,
            "num_experts": 6,
            "top_k_experts": 2,
            "moe_intermediate_size": 40,
        },
    },
    "gemma4_text": {
        **GEMMA4,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 2,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "vocab_size_per_layer_input": 101,
        "hidden_size_per_layer_input": 20,
    },
    "glm": {**BASE, "model_type": "glm", **HEAD, "attention_bias": True},
    "glm4": {
        **BASE,
        "model_type": "glm4",
        **HEAD,
        "attention_bias": False,
        "partial_rotary_factor": 0.5,
    },
    "glm4_moe": {
        **BASE,
        "model_type": "glm4_moe",
        **HEAD,
        **DEEPSEEK_MOE,
        **ONE_GROUP,
        "attention_bias": True,
        "use_qk_norm": True,
        "partial_rotary_factor": 0.5,
        "rope_scaling": None,
    },
    "glm4_moe_lite": {
        **BASE,
        "model_type": "glm4_moe_lite",
        **MLA,
        **DEEPSEEK_MOE,
        **ONE_GROUP,
    },
    "glm_moe_dsa": {
        **BASE,
        "model_type": "glm_moe_dsa",
        **MLA,
        **DEEPSEEK_MOE,
        **ONE_GROUP,
        **INDEXER,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 101,
        "n_embd": 64,
        "n_head": 4,
        "n_layer": 2,
        "n_ctx": 128,
        "n_positions": 128,
        "layer_norm_epsilon": 1e-5,
    },
    "gpt_bigcode": {
        "model_type": "gpt_bigcode",
        "vocab_size": 101,
        "n_embd": 64,
        "n_inner": 88,
        "n_head": 4,
        "n_layer": 2,
        "n_positions": 128,
        "multi_query": True,
        "layer_norm_epsilon": 1e-5,
    },
    "gpt_neox": {
        "model_type": "gpt_neox",
        "vocab_size": 101,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "max_position_embeddings": 128,
        "layer_norm_eps": 1e-5,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
    },
    "gpt_oss": {
        **BASE,
        "model_type": "gpt_oss",
        **HEAD,
        **SLIDING_FULL,
        "intermediate_size": 40,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "rope_scaling": {k: v for k, v in YARN.items() if not k.startswith("mscale")},
    },
    "gptj": {
        "model_type": "gptj",
        "vocab_size": 101,
        "n_embd": 64,
        "n_head": 4,
        "n_layer": 2,
        "n_positions": 128,
        "rotary_dim": 8,
        "layer_norm_epsilon": 1e-5,
    },
    "granite": {**BASE, "model_type": "granite", **TIED, **NO_BIAS, **GRANITE},
    "granitemoe": {
        **BASE,
        "model_type": "granitemoe",
        **TIED,
        **GRANITE,
        "attention_bias": False,
        "intermediate_size": 40,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
    },
    "granitemoehybrid": {
        **BASE,
        "model_type": "granitemoehybrid",
        **TIED,
        **GRANITE,
        "attention_bias": False,
        "intermediate_size": 40,
        "shared_intermediate_size": 56,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "layer_types": ["mamba", "attention"],
        "position_embedding_type": "nope",
        "mamba_n_heads": 6,
        "mamba_d_head": 20,
        "mamba_d_state": 12,
        "mamba_d_conv": 3,
        "mamba_n_groups": 2,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
    },
    "helium": {**BASE, "model_type": "helium", **NO_BIAS, "head_dim": 16},
    # The second layer reads the keys and values of the first.
    "hunyuan": {
        **BASE,
        "model_type": "hunyuan",
        **TIED,
        "attention_bias": False,
        "num_experts": 6,
        "moe_topk": 2,
        "moe_intermediate_size": 40,
        "num_shared_expert": 1,
        "use_mixed_mlp_moe": True,
        "use_qk_norm": True,
        "use_cla": True,
        "cla_share_factor": 2,
        "rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 10.0},
    },
    "hunyuan_v1_dense": {
        **BASE,
        "model_type": "hunyuan_v1_dense",
        **HEAD,
        **TIED,
        "use_qk_norm": True,
        "rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 10.0},
    },
    "internlm2": {
        **BASE,
        "model_type": "internlm2",
        "bias": False,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    },
    "internlm3": {
        **BASE,
        "model_type": "internlm3",
        "bias": False,
        "qkv_bias": False,
        "rope_scaling": {"rope_type": "dynamic", "factor": 6.0},
    },
    # The stack runs twice with the same weights.
    "iquestloopcoder": {
        **BASE,
        "model_type": "iquestloopcoder",
        **HEAD,
        **NO_BIAS,
        "loop_num": 2,
        "loop_window_size": 2,
    },
    "jamba": {
        **BASE,
        "model_type": "jamba",
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "mamba_d_conv": 3,
        "mamba_d_state": 12,
        "mamba_expand": 2,
        "mamba_dt_rank": 6,
    },
    "kimi_k25": {
        "model_type": "kimi_k25",
        "text_config": {**DEEPSEEK_V3, "model_type": "kimi_k2", **ONE_GROUP},
    },
    "kimi_k3": {
        "model_type": "kimi_k3",
        "text_config": {
            **BASE,
            "model_type": "kimi_linear",
            **MLA,
            "linear_attn_config": {**KDA, "gate_lower_bound": -5.0, "use_full_rank_gate": True},
            "hidden_act": "situ",
            "activation_situ_beta": 2.0,
            "activation_situ_linear_beta": 3.0,
            "attn_res_block_size": 2,
            "mla_use_nope": True,
            "mla_use_output_gate": True,
            "num_experts": 6,
            "num_experts_per_token": 2,
            "num_shared_experts": 2,
            "moe_intermediate_size": 40,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 1.5,
            "routed_expert_hidden_size": 32,
            "latent_moe_use_norm": True,
        },
    },
    "kimi_linear": {
        **BASE,
        "model_type": "kimi_linear",
        **HEAD,
        **{k: v for k, v in MLA.items() if k != "q_lora_rank"},
        "linear_attn_config": KDA,
        "mla_use_nope": True,
        "model_max_length": 128,
        "num_experts": 6,
        "num_experts_per_token": 2,
        "num_shared_experts": 2,
        "moe_intermediate_size": 40,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.5,
    },
    "kimi_vl": {
        "model_type": "kimi_vl",
        "text_config": {**DEEPSEEK_V3, **ONE_GROUP, "q_lora_rank": None, "rope_scaling": None},
    },
    "laguna": {
        **BASE,
        "model_type": "laguna",
        **HEAD,
        **MOE,
        **SLIDING_FULL,
        "num_attention_heads_per_layer": [6, 4],
        "mlp_layer_types": ["dense", "sparse"],
        "shared_expert_intermediate_size": 56,
        "moe_routed_scaling_factor": 1.5,
        "rope_parameters": {
            "full_attention": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5, **YARN},
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
    },
    "lfm2": LFM2_DENSE,
    "lfm2-vl": {"model_type": "lfm2-vl", "text_config": LFM2_DENSE},
    "lfm2_moe": {
        **LFM2,
        "model_type": "lfm2_moe",
        **MOE,
        "intermediate_size": 88,
        "num_dense_layers": 1,
        "use_expert_bias": True,
    },
    # The MLP width is a multiple of 256, whatever the config says.
    "lille-130m": {
        "model_type": "lille-130m",
        "vocab_size": 101,
        "n_embd": 64,
        "n_head": 4,
        "n_kv_heads": 2,
        "n_layer": 2,
        "block_size": 128,
        "layer_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    },
    "llama": LLAMA,
    # Four layers: each fourth one attends to all chunks, without RoPE. One expert per token.
    "llama4": {
        "model_type": "llama4",
        "text_config": {
            **LLAMA4,
            "num_hidden_layers": 4,
            "attention_bias": False,
            "attention_chunk_size": 5,
            "interleave_moe_layer_step": 2,
            "num_local_experts": 6,
            "num_experts_per_tok": 1,
            "rope_scaling": LLAMA3_ROPE,
        },
    },
    "llama4_text": {**LLAMA4, **TIED, "no_rope_layers": [1, 0]},
    "longcat_flash": {**LONGCAT, "model_type": "longcat_flash", "attention_method": "MLA"},
    "longcat_flash_ngram": {
        **LONGCAT,
        "model_type": "longcat_flash_ngram",
        "ngram_vocab_size_ratio": 2,
        "emb_neighbor_num": 3,
        "emb_split_num": 2,
    },
    "mamba": {
        "model_type": "mamba",
        "vocab_size": 101,
        "hidden_size": 64,
        "intermediate_size": 104,
        "num_hidden_layers": 2,
        "state_size": 12,
        "conv_kernel": 3,
        "time_step_rank": 6,
        "use_bias": False,
        "use_conv_bias": True,
        "tie_word_embeddings": True,
    },
    "mamba2": {
        "model_type": "mamba2",
        "vocab_size": 101,
        "hidden_size": 64,
        "intermediate_size": 120,
        "num_hidden_layers": 2,
        "num_heads": 6,
        "head_dim": 20,
        "n_groups": 2,
        "state_size": 12,
        "conv_kernel": 3,
        "time_step_rank": 5,
        "time_step_limit": [0.0, 100.0],
        "layer_norm_epsilon": 1e-5,
        "use_bias": False,
        "use_conv_bias": True,
        "tie_word_embeddings": True,
    },
    "mellum": {
        **BASE,
        "model_type": "mellum",
        **HEAD,
        **MOE,
        **SLIDING_FULL,
        "rope_parameters": {
            "full_attention": {"rope_theta": 10000.0, **YARN},
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
    },
    "mimo": {**BASE, "model_type": "mimo", "num_nextn_predict_layers": 1},
    "mimo_v2_flash": {
        **{k: v for k, v in BASE.items() if k != "rms_norm_eps"},
        "model_type": "mimo_v2_flash",
        **HEAD,
        **DEEPSEEK_MOE,
        **ONE_GROUP,
        "n_shared_experts": None,
        "layernorm_epsilon": 1e-5,
        "v_head_dim": 20,
        "hybrid_layer_pattern": [0, 1],
        "moe_layer_freq": [0, 1],
        "sliding_window_size": 2,
        "swa_num_attention_heads": 6,
        "swa_num_key_value_heads": 3,
        "swa_head_dim": 24,
        "swa_v_head_dim": 20,
        "swa_rope_theta": 10000.0,
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "partial_rotary_factor": 0.5,
        "attention_value_scale": 0.7,
    },
    "minicpm": {
        **BASE,
        "model_type": "minicpm",
        "dim_model_base": 32,
        "scale_depth": 1.4,
        "scale_emb": 4.0,
    },
    "minicpm3": {
        **BASE,
        "model_type": "minicpm3",
        **{k: v for k, v in MLA.items() if k != "v_head_dim"},
        "dim_model_base": 32,
        "scale_depth": 1.4,
        "scale_emb": 4.0,
        "rope_scaling": LONG_ROPE,
    },
    "minimax": {
        **BASE,
        "model_type": "minimax",
        **HEAD,
        "intermediate_size": 40,
        "shared_intermediate_size": 0,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "rotary_dim": 12,
        "use_qk_norm": True,
    },
    "minimax_m3_vl": {
        "model_type": "minimax_m3_vl",
        "text_config": {
            **BASE,
            "model_type": "minimax_m3_vl_text",
            **HEAD,
            "intermediate_size": 40,
            "dense_intermediate_size": 88,
            "shared_intermediate_size": 56,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "rotary_dim": 12,
            "moe_layer_freq": [0, 1],
            "sparse_attention_config": {
                "sparse_num_index_heads": 2,
                "sparse_index_dim": 20,
                "sparse_block_size": 2,
                "sparse_topk_blocks": 1,
                "sparse_local_block": 1,
                "sparse_attention_freq": [0, 1],
            },
        },
    },
    "ministral3": {
        **BASE,
        "model_type": "ministral3",
        **HEAD,
        **SLIDING_FULL,
        "rope_parameters": MISTRAL_ROPE,
    },
    "mistral3": {
        "model_type": "mistral3",
        "text_config": {**BASE, "model_type": "mistral", **HEAD},
    },
    "mistral4": {
        **BASE,
        "model_type": "mistral4",
        **MLA,
        **DEEPSEEK_MOE,
        **ONE_GROUP,
        "rope_interleave": True,
        "rope_parameters": MISTRAL_ROPE,
    },
    "mixtral": {
        **BASE,
        "model_type": "mixtral",
        "intermediate_size": 40,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
    },
    "muse_glimmer": {**BASE, "model_type": "muse_glimmer", **HEAD, **SLIDING_FULL},
    "nanbeige": {**BASE, "model_type": "nanbeige", **NO_BIAS, "num_loops": 2},
    "nanochat": {**BASE, "model_type": "nanochat"},
    "nemotron": {
        **{k: v for k, v in BASE.items() if k != "rms_norm_eps"},
        "model_type": "nemotron",
        **HEAD,
        **NO_BIAS,
        "norm_eps": 1e-5,
        "hidden_act": "relu2",
        "partial_rotary_factor": 0.5,
    },
    # The MLP width is a multiple of 256.
    "nemotron-nas": {
        **{k: v for k, v in BASE.items() if k not in ("num_key_value_heads", "intermediate_size")},
        "model_type": "nemotron-nas",
        **NO_BIAS,
        "num_hidden_layers": 4,
        "hidden_act": "silu",
        "rope_scaling": LLAMA3_ROPE,
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 10.0}},
            {"attention": {"no_op": True}, "ffn": {"replace_with_linear": True}},
            {"attention": {"replace_with_linear": True}, "ffn": {"no_op": True}},
            {"attention": {"n_heads_in_group": 4}, "ffn": {"ffn_mult": 16.0}},
        ],
    },
    "nemotron_h": {
        **{k: v for k, v in BASE.items() if k not in ("rms_norm_eps", "num_hidden_layers")},
        "model_type": "nemotron_h",
        **HEAD,
        **NO_BIAS,
        **ONE_GROUP,
        "hybrid_override_pattern": "M*-E",
        "layer_norm_epsilon": 1e-5,
        "use_bias": False,
        "mamba_num_heads": 6,
        "mamba_head_dim": 20,
        "mamba_proj_bias": False,
        "ssm_state_size": 12,
        "conv_kernel": 3,
        "use_conv_bias": True,
        "n_groups": 2,
        "moe_intermediate_size": 40,
        "moe_shared_expert_intermediate_size": 56,
        "moe_latent_size": 32,
        "n_routed_experts": 6,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
    },
    "olmo2": {**BASE, "model_type": "olmo2", **NO_BIAS},
    "olmo3": {**BASE, "model_type": "olmo3", **SLIDING_FULL, "rope_scaling": YARN},
    "olmo_hybrid": {
        **BASE,
        "model_type": "olmo_hybrid",
        **DELTA_NET,
        "attention_bias": False,
        "linear_allow_neg_eigval": True,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "olmoe": {
        **BASE,
        "model_type": "olmoe",
        "intermediate_size": 40,
        "num_experts": 6,
        "num_experts_per_tok": 2,
    },
    "openelm": {
        "model_type": "openelm",
        "vocab_size": 101,
        "model_dim": 64,
        "head_dim": 24,
        "num_transformer_layers": 2,
        "num_query_heads": [4, 6],
        "num_kv_heads": [2, 3],
        "ffn_multipliers": [1.125, 1.375],
        "ffn_dim_divisor": 8,
        "rope_freq_constant": 10000,
    },
    "phi": {
        **{k: v for k, v in BASE.items() if k != "rms_norm_eps"},
        "model_type": "phi",
        "layer_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
    },
    "phi3": {
        **BASE,
        "model_type": "phi3",
        "original_max_position_embeddings": 32,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
    },
    "phi3small": {
        "model_type": "phi3small",
        "vocab_size": 101,
        "hidden_size": 64,
        "ff_intermediate_size": 88,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "dense_attention_every_n_layers": 2,
        "gegelu_limit": 20.0,
        "layer_norm_epsilon": 1e-5,
        "rope_embedding_base": 10000,
        "blocksparse_block_size": 32,
    },
    "phimoe": {
        **BASE,
        "model_type": "phimoe",
        "intermediate_size": 40,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "original_max_position_embeddings": 32,
        "rope_scaling": {**LONG_ROPE, "short_mscale": 1.1, "long_mscale": 1.2},
    },
    "phixtral": {
        "model_type": "phi-msft",
        "num_vocab": 101,
        "model_dim": 64,
        "num_heads": 4,
        "num_layers": 2,
        "rotary_dim": 8,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
    },
    "pixtral": {"model_type": "pixtral", "text_config": {**BASE, "model_type": "mistral", **HEAD}},
    "plamo": {
        **{k: v for k, v in BASE.items() if k != "num_key_value_heads"},
        "model_type": "plamo",
        "n_shared_head": 2,
    },
    # Hidden 80: the rank of the time step is 64 at least.
    "plamo2": {
        **BASE,
        "model_type": "plamo2",
        **TIED,
        "hidden_size": 80,
        "hidden_size_per_head": 24,
        "mamba_num_heads": 5,
        "mamba_d_state": 12,
        "mamba_d_conv": 3,
        "mamba_step": 2,
    },
    # The window holds one token more than the config says.
    "plamo3": {
        **BASE,
        "model_type": "plamo3",
        **HEAD,
        **TIED,
        "window_size": 1,
        "sliding_window_pattern": 2,
        "rope_local_theta": 10000,
    },
    # Packed inputs are multiples of 128, rotated ones of 512. The packed codes stay zero.
    "prism_hadamard_qwen35": {
        "model_type": "prism_hadamard_qwen35",
        "schema_version": 2,
        "tensor_namespace": "mlx-vlm-qwen3_5",
        "gdn_activation_layout": "grouped",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [
            {
                "path": f"model.layers.{layer}.mlp.down_proj",
                "block": block,
                "embedding": False,
                "dtype": "float16",
            }
            for layer, block in enumerate((0, 512))
        ],
        "text_config": {**QWEN3_5, "intermediate_size": 512},
    },
    "qwen": {
        "model_type": "qwen",
        "vocab_size": 101,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "kv_channels": 16,
        "max_position_embeddings": 128,
        "layer_norm_epsilon": 1e-5,
        "no_bias": True,
    },
    "qwen2": QWEN2,
    "qwen2_moe": {**BASE, "model_type": "qwen2_moe", **MOE, **QWEN_SHARED_EXPERT},
    "qwen2_vl": {"model_type": "qwen2_vl", "text_config": {**QWEN2, "model_type": "qwen2_vl_text"}},
    "qwen3": QWEN3,
    "qwen3_5": {"model_type": "qwen3_5", "text_config": QWEN3_5},
    "qwen3_5_moe": {
        "model_type": "qwen3_5_moe",
        "text_config": {
            **QWEN3_5,
            "model_type": "qwen3_5_moe_text",
            **MOE,
            **QWEN_SHARED_EXPERT,
        },
    },
    "qwen3_moe": QWEN3_MOE,
    "qwen3_next": {
        **QWEN3_MOE,
        "model_type": "qwen3_next",
        **DELTA_NET,
        **QWEN_SHARED_EXPERT,
        "full_attention_interval": 2,
        "partial_rotary_factor": 0.25,
    },
    "qwen3_vl": {"model_type": "qwen3_vl", "text_config": {**QWEN3, "model_type": "qwen3_vl_text"}},
    "qwen3_vl_moe": {
        "model_type": "qwen3_vl_moe",
        "text_config": {**QWEN3_MOE, "model_type": "qwen3_vl_moe_text"},
    },
    "recurrent_gemma": {
        **BASE,
        "model_type": "recurrent_gemma",
        **TIED,
        "attention_bias": False,
        "intermediate_size": 176,
        "num_key_value_heads": 1,
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
        "attention_window_size": 2,
        "block_types": ["recurrent", "attention"],
    },
    "rwkv7": {
        "model_type": "rwkv7",
        "vocab_size": 101,
        "hidden_size": 64,
        "intermediate_size": 88,
        "num_hidden_layers": 2,
        "head_dim": 16,
        "norm_eps": 1e-5,
        "a_low_rank_dim": 12,
        "v_low_rank_dim": 20,
        "gate_low_rank_dim": 28,
        "decay_low_rank_dim": 36,
    },
    "seed_oss": {
        **BASE,
        "model_type": "seed_oss",
        **HEAD,
        "attention_bias": True,
        "attention_out_bias": False,
        "mlp_bias": False,
    },
    "smollm3": {**BASE, "model_type": "smollm3", **TIED, **NO_BIAS, "no_rope_layers": [1, 0]},
    "solar_open": {
        **BASE,
        "model_type": "solar_open",
        **HEAD,
        **DEEPSEEK_MOE,
        **ONE_GROUP,
        "partial_rotary_factor": 1.0,
    },
    "spark2_5": {
        **BASE,
        "model_type": "spark2_5",
        **HEAD,
        **TIED,
        **NO_BIAS,
        **SLIDING_FULL,
        "rope_parameters": {
            "full_attention": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            "sliding_attention": {"rope_theta": 10000.0},
        },
    },
    "stablelm": {
        **{k: v for k, v in BASE.items() if k != "rms_norm_eps"},
        "model_type": "stablelm",
        "layer_norm_eps": 1e-5,
        "partial_rotary_factor": 0.25,
        "use_qkv_bias": True,
        "use_parallel_residual": True,
        "qk_layernorm": True,
    },
    "starcoder2": {
        **{k: v for k, v in BASE.items() if k != "rms_norm_eps"},
        "model_type": "starcoder2",
        **TIED,
        "norm_epsilon": 1e-5,
    },
    "step3p5": {
        **{k: v for k, v in BASE.items() if k != "num_key_value_heads"},
        "model_type": "step3p5",
        **HEAD,
        "num_attention_groups": 2,
        "layer_types": ["full_attention", "sliding_attention"],
        "sliding_window": 2,
        "attention_other_setting": {"num_attention_heads": 6, "num_attention_groups": 3},
        "rope_theta": [10000.0, 10000.0],
        "rope_scaling": LLAMA3_ROPE,
        "yarn_only_types": ["full_attention"],
        "partial_rotary_factors": [0.5, 1.0],
        "moe_num_experts": 6,
        "moe_top_k": 2,
        "moe_intermediate_size": 40,
        "moe_layers_enum": "1",
        "moe_router_scaling_factor": 1.5,
        "share_expert_dim": 56,
        "swiglu_limits": [0.0, 7.0],
        "swiglu_limits_shared": [0.0, 16.0],
    },
    "talkie": {
        **{k: v for k, v in BASE.items() if k != "num_key_value_heads"},
        "model_type": "talkie",
        **HEAD,
    },
    "telechat3": {
        **BASE,
        "model_type": "telechat3",
        **HEAD,
        **NO_BIAS,
        "rope_scaling": {**YARN, "type": "telechat3-yarn"},
    },
    "youtu_llm": {**BASE, "model_type": "youtu_llm", **MLA, **TIED, "mlp_bias": False},
}

UNSUPPORTED = {
    "bitnet": "BitLinear is a Metal kernel without a fallback",
    "muse_spark": "its norms, rotary embedding and routing are Metal kernels without a fallback",
    "olmo": "exits on import without ai2-olmo, and adds the mask 'causal' to an array",
}

# Their checkpoints are tied when they hold no lm_head, which `sanitize` finds out.
TIED_ON_LOAD = ("gemma3", "gemma3_text", "recurrent_gemma")


def build(name: str, seed: int = 0, **changes) -> nn.Module:
    """The model of `CONFIGS[name]`, with some of its fields changed, in eval mode, with evaluated
    random parameters.

    Floating parameters are float32 and depend on `seed` only; integer ones keep their values.
    """
    # mlx_lm takes seconds to import, and only those who build need it.
    from mlx_lm.utils import _get_classes

    # Some ModelArgs write into the config they are given.
    config = copy.deepcopy({**CONFIGS[name], **changes})
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    if name in TIED_ON_LOAD:
        weights = dict(tree_flatten(model.parameters()))
        model.sanitize({p: v for p, v in weights.items() if not p.endswith("lm_head.weight")})
    if name == "phi3small" and "vocab_size" not in changes:
        # These token ids lie past our vocabulary; their logits would become -inf.
        model._dummy_tokenizer_ids = mx.array([], dtype=mx.int32)

    parameters = tree_flatten(model.parameters())
    keys = mx.random.split(mx.random.key(seed), len(parameters))
    randomised = [(p, _random(p, v, k)) for (p, v), k in zip(parameters, keys, strict=True)]
    if name == "baichuan_m1":
        # Every load scales the rows of lm_head to a norm of one.
        randomised = list(model.sanitize(dict(randomised)).items())
    model.update(tree_unflatten(randomised))
    model.eval()
    mx.eval(model.parameters())
    return model


def _random(path: str, value: mx.array, key: mx.array) -> mx.array:
    """A random float32 value for the parameter at `path`, whose initial value is `value`."""
    if not mx.issubdtype(value.dtype, mx.floating):
        return value
    parent, leaf = f".{path}".split(".")[-2:]
    value = value.astype(mx.float32)
    noise = mx.random.normal(value.shape, key=key)
    if leaf == "eps":  # a constant of the xIELU activation
        return value
    if leaf == "signs":  # of a Hadamard rotation
        return mx.where(noise > 0, 1.0, -1.0)
    if leaf == "A_log":  # the log of a decay rate; some draw it from the global generator
        return mx.log(mx.random.uniform(1.0, 8.0, value.shape, key=key))
    if leaf == "dt_bias":
        return value + 0.1 * noise
    if "bias" in leaf:
        return 0.1 * noise
    if "norm" in parent or "norm" in leaf or mx.all(value == 1.0).item():
        return 1.0 + 0.1 * noise
    if value.ndim < 2:
        return value + 0.1 * noise
    # A depthwise convolution is [channels, kernel, 1]; all others end with their inputs.
    depthwise = value.ndim == 3 and value.shape[-1] == 1
    return noise / value.shape[-2 if depthwise else -1] ** 0.5
