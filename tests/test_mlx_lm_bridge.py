import json
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_compress.bridges.mlx_lm import LanguageModel, open_model

import tiny
from mlx_compress import recipe
from mlx_compress.errors import InputError
from mlx_compress.execute import run
from mlx_compress.options import Options
from mlx_compress.prune import prune_parameters

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


def configured(folder, **changes):
    """The same folder with other config fields; None takes a field away."""
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {k: v for k, v in config.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def refused(folder, **options):
    """The text with which a folder is refused: one line, that ends with a remedy."""
    with pytest.raises(InputError) as caught:
        open_model(folder, **options)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400 and text.endswith(".")
    assert caught.value.exit_code == 2
    return text


# ---- a good folder


def test_a_folder_opens_as_the_model_that_mlx_lm_loads(folder):
    from mlx_lm.utils import load_model

    model = open_model(folder)
    assert model.config == tiny.LLAMA and model.notes == []
    assert mx.array_equal(model.module()(TOKENS), load_model(folder)[0](TOKENS))


def test_the_graph_of_a_model_computes_what_it_computes(folder):
    model = open_model(folder)
    graph = model.trace(TOKENS)
    (logits,), _ = run(graph, [TOKENS], model.fetch(graph.parameters))
    wanted = model.module()(TOKENS)
    assert float(mx.abs(logits - wanted).max()) < 1e-4 * float(mx.abs(wanted).max())


def test_opening_reads_no_weights(folder):
    mx.clear_cache()
    before = mx.get_active_memory()
    model = open_model(folder)
    model.trace(TOKENS)
    model.fetch(["lm_head.weight"])
    assert mx.get_active_memory() - before < 4096


def test_every_parameter_can_be_fetched_again_and_again(folder):
    model, weights = open_model(folder), tiny.parameters(tiny.build(tiny.LLAMA))
    for _ in range(3):
        for path in ("lm_head.weight", "model.norm.weight"):
            assert mx.array_equal(model.fetch([path])[path], weights[path])
    assert model.fetch(weights).keys() == weights.keys()


def test_a_parameter_that_is_handed_out_is_not_held(folder):
    model = open_model(folder)
    mx.eval(model.fetch(["model.embed_tokens.weight"]))
    held = {id(a) for a in model._weights.values()}
    again = model.fetch(["model.embed_tokens.weight"])["model.embed_tokens.weight"]
    assert id(again) not in held and "model.embed_tokens.weight" not in model._weights


def test_a_config_builds_a_model_of_its_shapes(folder):
    model = open_model(folder)
    shapes = {path: array.shape for path, array in tiny.parameters(model.module()).items()}
    assert model.shapes_of(model.config) == shapes
    other = model.shapes_of({**model.config, "intermediate_size": 9})
    changed = {path for path in shapes if shapes[path] != other[path]}
    assert {path.split(".")[3] for path in changed} == {"mlp"} and len(changed) == 6


def test_fields_that_are_left_out_are_optional(folder):
    assert ("head_dim",) not in open_model(folder).optional_fields()
    config = {k: v for k, v in tiny.LLAMA.items() if k != "head_dim"}
    for given in (config, {**config, "head_dim": None}):
        optional = LanguageModel(folder, given).optional_fields()
        assert ("head_dim",) in optional and ("hidden_size",) not in optional


def test_a_trace_can_be_in_another_dtype_than_the_weights(tmp_path):
    tiny.save(tiny.LLAMA, tmp_path / "half", dtype=mx.float16)
    model = open_model(tmp_path / "half")
    for dtype, wanted in ((None, mx.float16), (mx.float32, mx.float32)):
        graph = model.trace(TOKENS, dtype=dtype)
        assert graph.values[graph.parameters["lm_head.weight"]].dtype == wanted


def test_a_folder_without_a_tokenizer_says_so_when_one_is_needed(folder):
    with pytest.raises(InputError, match=f"^{folder}: .*check its tokenizer files"):
        open_model(folder).tokenizer()


# ---- quantised


def quantised(folder):
    """A folder with a Llama in 4 bits, as mlx-lm makes it; returns what it computes."""
    from mlx_lm.utils import quantize_model, save_config

    config = {**tiny.LLAMA, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    module = tiny.build(config)
    module, config = quantize_model(module, dict(config), group_size=32, bits=4)
    folder.mkdir()
    weights = dict(tree_flatten(module.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    save_config(config, folder / "config.json")
    return module(TOKENS)


def test_a_quantised_model_is_dequantised_and_that_is_said(tmp_path):
    logits = quantised(tmp_path / "q4")
    model = open_model(tmp_path / "q4")
    assert model.notes == [f"{tmp_path / 'q4'} is quantised to 4 bits: dequantised first"]
    assert "quantization" not in model.config and "quantization_config" not in model.config
    weights = tiny.parameters(model.module())
    assert all(mx.issubdtype(a.dtype, mx.floating) for a in weights.values())
    assert {path: a.shape for path, a in weights.items()} == model.shapes_of(model.config)
    got = model.module()(TOKENS)
    assert float(mx.abs(got - logits).max()) < 1e-3 * float(mx.abs(logits).max())


def test_a_pruned_quantised_model_loads_without_its_quantisation(tmp_path, monkeypatch):
    from mlx_lm.utils import load_model

    monkeypatch.setattr(recipe, "prove", lambda *_: 0.0)
    quantised(tmp_path / "q4")
    model = open_model(tmp_path / "q4")
    planned = recipe.make_plan(model, Options(pruning_ratio=0.5, importance="magnitude"))
    record = recipe.save_pruned(model, planned, tmp_path / "out")
    assert any("dequantised first" in note for note in record["notes"])
    assert "quantization" not in json.loads((tmp_path / "out" / "config.json").read_text())
    named = recipe.named_axes(model.trace(TOKENS))
    pruned = prune_parameters(named, planned.plan, tiny.parameters(model.module()))
    (wanted,), _ = run(recipe.edit_graph(named, planned.plan), [TOKENS], pruned)
    got = load_model(tmp_path / "out")[0](TOKENS)
    assert float(mx.abs(got - wanted).max()) < 1e-4 * float(mx.abs(wanted).max())


# ---- bad folders


@pytest.mark.parametrize("name", ["nowhere", "./no/where", "/no/where", "a/b/c"])
def test_a_missing_folder_is_named(name):
    assert refused(name) == f"--model {name}: no such folder."


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "file").touch()
    assert refused(tmp_path / "file") == f"--model {tmp_path / 'file'}: no such folder."


def test_a_repository_that_cannot_be_fetched_is_named(monkeypatch):
    import mlx_lm.utils

    def unreachable(name):
        raise ConnectionError("one\ntwo")

    monkeypatch.setattr(mlx_lm.utils, "_download", unreachable)
    text = refused("someone/something")
    assert text.startswith("--model someone/something: no such folder, and it could not be fetched")
    assert "ConnectionError" in text


def test_a_folder_without_a_config_is_no_model(tmp_path):
    assert refused(tmp_path) == f"{tmp_path}: has no config.json; it is not a model folder."


@pytest.mark.parametrize(
    "content, reason",
    [
        (b'{"model_type": ', "not valid JSON .*line 1.*fetch it anew"),
        (b"", "not valid JSON .*fetch it anew"),
        (b"\xff\xfe\x00", "not valid JSON .*fetch it anew"),
        (b"[1, 2]", "names no model_type; it is not the config of a model"),
        (b'{"hidden_size": 4}', "names no model_type; it is not the config of a model"),
        (b'{"model_type": 5}', "names no model_type"),
    ],
)
def test_a_config_that_is_not_one_is_named(folder, content, reason):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=f"^{folder / 'config.json'}: {reason}"):
        open_model(folder)
    refused(folder)


def test_a_config_that_cannot_be_read_is_named(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    assert refused(folder).startswith(f"{folder / 'config.json'}: cannot be read (")


def test_a_folder_without_weights_is_named(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    text = f"{folder}: has no model*.safetensors; other formats are not read."
    assert refused(folder) == text


@pytest.mark.parametrize("size", [0, 5, 2000, -1])
def test_truncated_weights_are_named(folder, size):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert refused(folder).startswith(f"{file}: damaged or truncated (")


def test_a_truncated_shard_among_whole_ones_is_named(folder):
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes((folder / "model.safetensors").read_bytes()[:-1])
    assert refused(folder).startswith(f"{shard}: damaged")


def reweighted(folder, edit):
    weights = mx.load(str(folder / "model.safetensors"))
    mx.eval(weights)
    edit(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})


def test_a_missing_tensor_is_named(folder):
    reweighted(folder, lambda weights: weights.pop("model.layers.1.mlp.down_proj.weight"))
    assert refused(folder) == (
        f"{folder}: mlx-lm cannot open it: Missing 1 parameters: "
        "model.layers.1.mlp.down_proj.weight; the weights are incomplete, fetch the folder anew."
    )


def test_many_missing_tensors_are_told_in_one_line(folder):
    reweighted(folder, lambda weights: [weights.pop(p) for p in list(weights) if "layers" in p])
    assert "Missing 18 parameters: model.layers.0" in refused(folder)


def test_a_tensor_that_no_model_of_this_config_has_is_named(folder):
    reweighted(folder, lambda weights: weights.update(extra=mx.zeros(3)))
    assert "not in model: extra; the weights are not of the model" in refused(folder)


def test_a_tensor_of_another_shape_is_named(folder):
    text = refused(configured(folder, intermediate_size=21))
    assert "Expected shape (21, 16)" in text and "_proj.weight; the weights are not of" in text


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"model_type": "nonesuch"}, "Model type nonesuch not supported; choose another model"),
        ({"model_type": "cache"}, "has no attribute 'Model'; check its config.json"),
        ({"model_type": "../../evil"}, "not supported; choose another model"),
        ({"hidden_size": None}, "'hidden_size'; check its config.json"),
        ({"num_attention_heads": 0, "head_dim": None}, "by zero; check its config.json"),
        ({"hidden_size": "wide"}, "check its config.json"),
        ({"rope_scaling": {"type": "nonesuch"}}, "nonesuch; check its config.json"),
        ({"quantization": {"bits": 4}}, "'group_size' is missing; check its config.json"),
        ({"quantization": 4}, "check its config.json"),
    ],
)
def test_a_config_that_builds_no_model_is_told_with_the_reason(folder, changes, reason):
    text = refused(configured(folder, **changes))
    assert text.startswith(f"{folder}: ") and reason in text


def test_a_model_file_of_mlx_lm_that_exits_does_not_end_the_command(folder, monkeypatch):
    import mlx_lm.utils

    def leave(*_, **__):
        raise SystemExit(1)

    monkeypatch.setattr(mlx_lm.utils, "load_model", leave)
    assert "mlx-lm cannot open it: it stops with exit code 1" in refused(folder)


# ---- code in the folder

EVIL = "from pathlib import Path\nPath({marker!r}).touch()\nfrom mlx_lm.models.llama import *\n"


@pytest.fixture
def marker(folder):
    """What exists once code of the folder has been executed."""
    path = folder.parent / "executed"
    for name in ("evil.py", "modeling.py", "configuration.py", "tokenization.py"):
        (folder / name).write_text(EVIL.format(marker=str(path)))
    return path


def test_a_config_that_asks_for_code_is_refused_and_nothing_is_executed(folder, marker):
    text = refused(configured(folder, model_file="evil.py"))
    assert "asks to run code from the folder (model_file: 'evil.py')" in text
    assert text.endswith("pass --trust-remote-code if you trust it.")
    assert not marker.exists()


def test_code_is_executed_only_with_leave(folder, marker):
    model = open_model(configured(folder, model_file="evil.py"), trust_remote_code=True)
    assert marker.exists()
    assert model.shapes_of(model.config) == {
        path: array.shape for path, array in tiny.parameters(model.module()).items()
    }


def test_an_auto_map_of_an_unknown_architecture_is_refused(folder, marker):
    auto_map = {"AutoModelForCausalLM": "modeling.Evil"}
    text = refused(configured(folder, model_type="evil", auto_map=auto_map))
    assert "asks to run code from the folder (auto_map" in text and not marker.exists()


def test_an_auto_map_of_a_known_architecture_is_not_needed(folder, marker):
    auto_map = {"AutoModelForCausalLM": "modeling.Evil", "AutoTokenizer": ["tokenization.T", None]}
    model = open_model(configured(folder, auto_map=auto_map))
    model.trace(TOKENS)
    model.shapes_of(model.config)
    with pytest.raises(InputError):
        model.tokenizer()
    assert not marker.exists()


def test_code_is_not_copied_into_what_is_saved(folder, marker, tmp_path):
    from mlx_compress.checkpoint import copy_rest

    (tmp_path / "out").mkdir()
    copy_rest(folder, tmp_path / "out")
    assert not list(Path(tmp_path / "out").glob("*.py"))
