"""Biases that a config can put on are found by trying, and the refit fills them."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_compress.bridges.biases import with_biases

import tiny
from mlx_compress import recipe
from mlx_compress.data import Windows
from mlx_compress.errors import InputError
from mlx_compress.options import Options

TOKENS = mx.array([[3, 7, 1, 9, 22, 5, 4, 8]])


@pytest.fixture(autouse=True)
def no_compile():
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture
def folder(tmp_path):
    tiny.save(tiny.LLAMA, tmp_path / "model")
    return tmp_path / "model"


def windows(count=32, length=12):
    """What the model goes on with behind two words, so that the nearer to it the better."""
    model = tiny.build(tiny.LLAMA)
    tokens = mx.array(np.random.default_rng(2).integers(0, tiny.VOCABULARY, (count, 2)), mx.int32)
    while tokens.shape[1] < length:
        following = model(tokens)[:, -1:].argmax(-1).astype(mx.int32)
        tokens = mx.concatenate([tokens, following], axis=1)
    return Windows(np.array(tokens), np.full(count, length - 1), None)


def test_every_bias_of_a_llama_is_put_on_and_changes_nothing(folder):
    model = recipe.open_model(folder)
    more = with_biases(model)
    assert more.config["mlp_bias"] and more.config["attention_bias"]
    before, after = (dict(tree_flatten(m.module().parameters())) for m in (model, more))
    layers = {path.removesuffix(".weight") for path in before if "_proj" in path}
    assert after.keys() - before.keys() == more.zeros == {f"{path}.bias" for path in layers}
    assert all(not after[path].any().item() for path in more.zeros)
    assert "attention_bias, mlp_bias" in more.notes[-1]
    assert mx.array_equal(more.module()(TOKENS), model.module()(TOKENS))


def test_what_the_weights_hold_stays_where_a_field_is_on_already(folder, tmp_path):
    held = tiny.save(tiny.LLAMA | {"attention_bias": True}, tmp_path / "half")
    own = {path for path in held if path.endswith(".bias")}
    more = with_biases(recipe.open_model(tmp_path / "half"))
    assert own and not own & more.zeros and all("mlp" in path for path in more.zeros)
    found = dict(tree_flatten(more.module().parameters()))
    assert all(mx.array_equal(found[path], held[path]) for path in own)


def test_a_model_that_can_hold_no_more_is_refused(tmp_path):
    tiny.save(tiny.LLAMA | {"attention_bias": True, "mlp_bias": True}, tmp_path / "full")
    with pytest.raises(InputError, match="--biases: .*'llama'.*has them all.*leave it out"):
        with_biases(recipe.open_model(tmp_path / "full"))


def test_the_refit_fills_them_and_stock_mlx_lm_opens_the_result(folder, tmp_path):
    model = with_biases(recipe.open_model(folder))
    options = Options(pruning_ratio=0.5, dims=("channels",), importance="wanda", batch_size=4)
    planned = recipe.make_plan(model, options, windows(128))
    recipe.save_pruned(model, planned, tmp_path / "out")  # proven by stock mlx-lm
    assert json.loads((tmp_path / "out/config.json").read_text())["mlp_bias"] is True
    saved = mx.load(str(tmp_path / "out/model.safetensors"))
    assert planned.refit["method"] == "sequential"
    assert saved["model.layers.0.mlp.down_proj.bias"].any().item()


def test_statistics_without_the_biases_are_not_taken_for_those_with(folder, tmp_path):
    options = Options(pruning_ratio=0.5, dims=("channels",), importance="wanda", batch_size=4)
    model = recipe.open_model(folder)
    for each in (model, with_biases(model)):
        recipe.make_plan(each, options, windows(), kept=tmp_path / "kept")
    folders = [path for path in (tmp_path / "kept").iterdir() if path.is_dir()]
    assert len(folders) == 2
