"""A Llama and a Mixtral small enough for slow loops, with random weights, in memory or as folders.

    build(LLAMA)              the model; every parameter is random
    save(LLAMA, folder)       a checkpoint folder as mlx-lm would open it; returns its weights

Configs are to be read, not changed: `{**LLAMA, "tie_word_embeddings": True}`.
"""

import copy
import json

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

VOCABULARY = 23
LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
MIXTRAL = {
    **{k: v for k, v in LLAMA.items() if k != "head_dim"},
    "model_type": "mixtral",
    "intermediate_size": 10,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
}


def build(config, seed=0):
    # mlx_lm takes seconds to import, and only those who build need it.
    from mlx_lm.utils import _get_classes

    config = copy.deepcopy(config)
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config)).eval()
    key = mx.random.key(seed)

    def draw(array):
        nonlocal key
        key, mine = mx.random.split(key)
        noise = mx.random.normal(array.shape, key=mine)
        return 1 + 0.3 * noise if array.ndim == 1 else noise * array.shape[-1] ** -0.5

    model.update(tree_map(draw, model.parameters()))
    mx.eval(model.parameters())
    return model


def parameters(model):
    return dict(tree_flatten(model.parameters()))


def batches(count=3, rows=2, length=7, seed=5):
    """Batches of token ids, as a graph takes them."""
    keys = mx.random.split(mx.random.key(seed), count)
    return [[mx.random.randint(0, VOCABULARY, (rows, length), key=key)] for key in keys]


def save(config, folder, *, dtype=mx.float32, seed=0, weights=None):
    """Write a folder with config and weights; returns the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    if weights is None:
        weights = {p: a.astype(dtype) for p, a in parameters(build(config, seed)).items()}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    return weights
