"""A decoder program computes what mlx-lm computes with its own cache."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_compress.bridges.decoder import caches, module_program
from mlx_compress.bridges.programs import open_program

import tiny
import zoo
from mlx_compress.errors import InputError

# Plain, windows, latent keys, two caches in one layer, experts, soft caps, absolute positions.
NAMES = ["llama", "gemma3_text", "deepseek_v3", "deepseek_v32", "mixtral", "gemma2", "gpt2",
         "gpt_bigcode", "phi3", "nemotron-nas"]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def without_compiler():
    mx.disable_compile()
    yield
    mx.enable_compile()


def logits(out):
    return out[0] if isinstance(out, tuple | list) else out


def step(program, ids, state):
    """One call of the program: logits, and the state of the next."""
    out = program.run({"input_ids": ids, **state})
    named = dict(zip(program.outputs, out, strict=True))
    return named["logits"], {past: named[present] for past, present in caches(program)}


@pytest.mark.parametrize("name", NAMES)
def test_steps_with_the_past_as_inputs_equal_those_of_the_models_own_cache(name):
    from mlx_lm.models.cache import make_prompt_cache

    module = zoo.build(name)
    program = module_program(lambda: module)
    ids = mx.array(np.random.default_rng(7).integers(1, 97, (2, 9)), mx.int32)
    cache = make_prompt_cache(module)
    empty = program.feeds({"batch": 2, "length": 4, "past": 0})
    state = {past: empty[past] for past, _ in caches(program)}
    for start, end in ((0, 4), (4, 8), (8, 9)):  # all new, several at once, one
        got, state = step(program, ids[:, start:end], state)
        want = logits(module(ids[:, start:end], cache=cache))
        assert mx.allclose(got, want, rtol=1e-4, atol=1e-4).item()
        assert next(iter(state.values())).shape[2] == end


def test_names_are_those_of_the_field():
    module = tiny.build(tiny.LLAMA)
    program = module_program(lambda: module)
    assert program.inputs[:3] == ("input_ids", "past_key_values.0.key", "past_key_values.0.value")
    assert program.outputs[:3] == ("logits", "present.0.key", "present.0.value")
    assert [str(n) for n in program.graph.values[program.graph.inputs[1]].shape] == [
        "batch", "2", "past", "6"
    ]  # fmt: skip


def test_quantised_weights_stay_quantised(tmp_path):
    import mlx.nn as nn
    from mlx_lm.utils import save_config, save_model

    config = {**tiny.LLAMA, "hidden_size": 32, "intermediate_size": 64}
    module = tiny.build(config)
    nn.quantize(module, group_size=32, bits=4, class_predicate=lambda p, m: "mlp" in p)
    save_model(tmp_path, module)
    quantisation = {"group_size": 32, "bits": 4}
    save_config({**config, "quantization": quantisation}, tmp_path / "config.json")
    program = open_program(tmp_path)
    assert sum(n.op == "QuantizedMatmul" for n in program.graph.nodes) == 6
    feeds = program.feeds({"batch": 1, "length": 5, "past": 0})
    got, want = program.run(feeds)[0], module(mx.array(feeds["input_ids"]))
    np.testing.assert_allclose(np.array(got), np.array(want), rtol=1e-4, atol=1e-4)


def test_a_model_in_half_precision_is_exported_in_float32_or_as_it_is(tmp_path):
    tiny.save(tiny.LLAMA, tmp_path, dtype=mx.bfloat16)
    for dtype, want in ((mx.float32, mx.float32), (None, mx.bfloat16)):
        program = open_program(tmp_path, dtype=dtype)
        assert program.fetch(["model.norm.weight"])["model.norm.weight"].dtype == want
        assert program.graph.values[program.graph.inputs[1]].dtype == want


@pytest.mark.parametrize("name", ["mamba", "qwen3_next"])
def test_a_cache_of_another_kind_is_refused_by_its_name(name):
    with pytest.raises(InputError, match="its cache holds ArraysCache, not keys and values"):
        module_program(lambda: zoo.build(name))


def test_a_cache_that_does_more_is_refused_with_the_remedy():
    with pytest.raises(InputError, match="asks more of a cache .*maybe_trim_front.*--no-cache"):
        module_program(lambda: zoo.build("llama4"))


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_any_architecture_has_a_program_without_a_cache(name, tmp_path):
    from zoo_checks import write_stock

    module = zoo.build(name)
    program = open_program(write_stock(tmp_path / name, name, module), cached=False)
    feeds = program.feeds()
    want = logits(module(mx.array(feeds["input_ids"])))
    got = program.run(feeds)[0]
    np.testing.assert_allclose(np.array(got), np.array(want), rtol=1e-4, atol=1e-4)
