"""`export`, `import` and what follows: real files, opened by who will open them, or one line."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_compress.bridges import exports
from mlx_compress.bridges.programs import open_program

import tiny
from commands import refused
from mlx_compress import cli
from mlx_compress.archive import load_program, read_record
from mlx_compress.errors import GateFailed
from mlx_compress.options import EXPORTS, ExportOptions
from mlx_compress.parity import random_cases

torch = pytest.importorskip("torch")


@pytest.fixture
def folder(tmp_path):
    tiny.save({**tiny.LLAMA, "hidden_size": 32, "intermediate_size": 64}, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
        torch.nn.Conv2d(8, 12, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(), torch.nn.Linear(12, 5),
    ).eval()  # fmt: skip


@pytest.fixture
def pt2(network, tmp_path):
    open_batch = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(network, (torch.zeros(2, 3, 9, 9),), dynamic_shapes=open_batch)
    torch.export.save(program, tmp_path / "net.pt2")
    return tmp_path / "net.pt2"


@pytest.mark.parametrize("target", exports.TARGETS)
def test_every_target_writes_a_file_that_equals_the_model(call, folder, tmp_path, target):
    out = tmp_path / "out"
    code, printed, err = call(
        "export", "--model", folder, "--to", target, "-o", out, "--sizes", "length=6,past=3"
    )
    assert code == 0, err
    record = json.loads((out / "export.json").read_text())
    assert record["target"] == target
    assert all(p["max_error"] < 1e-4 for p in record["parity"])
    assert str(out / exports.TARGETS[target].file) in printed
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_cache_in_buffers_is_compared_and_told_of(call, tmp_path):
    config = {**tiny.LLAMA, "hidden_size": 32, "head_dim": 16}
    tiny.save(config, tmp_path / "model")
    out = tmp_path / "out"
    code, _, err = call(
        "export", "--model", tmp_path / "model", "--to", "onnx", "-o", out, "--kv-cache", "buffer",
        "--sizes", "length=3,past=4",
    )  # fmt: skip
    assert code == 0, err
    parity = json.loads((out / "export.json").read_text())["parity"]
    assert [p["case"] for p in parity] == [
        "random batch 1, length 3, past 4", "random batch 1, length 1, past 0"
    ]  # fmt: skip
    assert all(p["max_error"] < 1e-4 for p in parity)
    page = (out / "README.md").read_text()
    assert "| past_key_values.0.key | batch, 2, capacity, 16 |" in page and "past_length" in page


def test_several_targets_go_into_a_folder_of_their_own(call, folder, tmp_path):
    code, _, err = call("export", "--model", folder, "--to", "onnx,mlxfn", "-o", tmp_path / "out")
    assert code == 0, err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["mlxfn", "onnx"]


def test_compress_exports_what_it_has_pruned(call, tmp_path):
    example = Path(cli.__file__).parent / "assets"
    code, printed, err = call(
        "--model", example / "books5m", "--data", example / "books", "--mlx-path", tmp_path / "out",
        "--pruning-ratio", "0.5", "--importance", "magnitude", "--eval-samples", "2",
        "--max-seq-length", "32", "--export", "mlxfn",
    )  # fmt: skip
    assert code == 0 and "mx.import_function" in printed, err
    small = (tmp_path / "out" / "mlxfn" / "model.mlxfn").stat().st_size
    assert small < 0.9 * 4 * 5_475_584


def test_metadata_and_how_it_was_pruned_are_in_the_file(call, folder, tmp_path):
    import onnx

    record = {"kept_block_parameters": 0.7, "plan": {"recipe": {"importance": "taylor"}}}
    (folder / "compression.json").write_text(json.dumps(record))
    code, _, err = call("export", "--model", folder, "--to", "onnx", "-o", tmp_path / "out",
                        "--metadata", "author=Me", "--metadata", "license=MIT")  # fmt: skip
    assert code == 0, err
    model = onnx.load(str(tmp_path / "out" / "model.onnx"))
    held = {entry.key: entry.value for entry in model.metadata_props}
    assert (held["author"], held["license"]) == ("Me", "MIT")
    assert json.loads(held["compression"])["recipe"] == {"importance": "taylor"}
    result = call("export", "--model", folder, "--to", "onnx", "-o", tmp_path / "b",
                  "--metadata", "author")  # fmt: skip
    refused(result, "--metadata author", "author=Me")


def test_an_export_that_is_unknown_is_refused_before_the_work(call, tmp_path):
    result = call("--model", "no", "--mlx-path", tmp_path / "out", "--data", tmp_path,
                  "--pruning-ratio", "0.5", "--export", "tflite")  # fmt: skip
    refused(result, "--export tflite", "onnx")


def test_quantised_weights_make_the_file_smaller_and_are_exact(call, folder, tmp_path):
    sizes = {}
    for how in (None, "int4"):
        out = tmp_path / str(how)
        extra = ("--quantize", how, "--q-group-size", "32") if how else ()
        code, _, err = call("export", "--model", folder, "--to", "torch", "-o", out, *extra)
        assert code == 0, err
        record = json.loads((out / "export.json").read_text())
        assert all(p["max_error"] < 1e-4 for p in record["parity"])
        sizes[how] = sum(t.nbytes for t in torch.export.load(out / "model.pt2").state_dict.values())
    assert sizes["int4"] < 0.5 * sizes[None]


def test_a_torch_program_comes_in_is_pruned_and_goes_out_again(call, pt2, network, tmp_path):
    assert call("import", "--torch", pt2, "--mlx-path", tmp_path / "net")[0] == 0
    (tmp_path / "net" / "special_tokens_map.json").write_text("{}")
    opened = load_program(tmp_path / "net")
    image = np.random.default_rng(0).standard_normal((4, 3, 9, 9)).astype(np.float32)
    want = network(torch.from_numpy(image)).detach().numpy()
    (got,) = opened.run({opened.inputs[0]: image})
    np.testing.assert_allclose(np.array(got), want, rtol=1e-4, atol=1e-5)
    code, printed, err = call(
        "prune", "--model", tmp_path / "net", "--mlx-path", tmp_path / "small",
        "--pruning-ratio", "0.5", "--importance", "magnitude",
    )  # fmt: skip
    assert code == 0, err
    small = load_program(tmp_path / "small")
    assert (tmp_path / "small" / "special_tokens_map.json").read_text() == "{}"
    assert small.graph.shapes()["0.weight"] == (4, 3, 3, 3)
    assert read_record(tmp_path / "small")["verified"]["error_against_zeroing"] < 1e-5
    assert call("inspect", "--model", tmp_path / "small")[0] == 0
    code, _, err = call("export", "--model", tmp_path / "small", "--to", "torch",
                        "-o", tmp_path / "o")  # fmt: skip
    assert code == 0, err
    module = torch.export.load(tmp_path / "o" / "model.pt2").module()
    (want,) = small.run({small.inputs[0]: image})
    got = module(torch.from_numpy(image)).detach().numpy()
    np.testing.assert_allclose(got, np.array(want), rtol=1e-4, atol=1e-5)


def test_text_for_a_model_that_takes_more_than_tokens_is_refused(call, tmp_path):
    from test_torch_in import bert

    bert(tmp_path / "bert")
    (tmp_path / "words.txt").write_text("some words")
    result = call("export", "--model", tmp_path / "bert", "--to", "mlxfn", "-o", tmp_path / "o",
                  "--data", tmp_path / "words.txt")  # fmt: skip
    refused(result, "this model reads input_ids, attention_mask", "give an .npz")


def test_an_export_that_differs_is_not_written(folder, tmp_path, monkeypatch):
    program = open_program(folder)
    off = exports.Target("model", lambda *a: [], lambda path, options: wrong, "{path}")

    def wrong(feeds):
        return [np.array(a) * 1.01 for a in program.run(feeds)]

    monkeypatch.setitem(exports.TARGETS, "off", off)
    with pytest.raises(GateFailed, match="model: differs from the MLX model by 1.0e-02"):
        exports.export(
            program, "off", tmp_path / "out", ExportOptions(), random_cases(program)
        )
    assert GateFailed.exit_code == 3 and not (tmp_path / "out").exists()


def test_real_inputs_come_from_an_npz(call, pt2, tmp_path):
    np.savez(tmp_path / "images.npz", input=np.zeros((2, 3, 9, 9)))
    code, printed, err = call(
        "export", "--model", pt2, "--to", "mlxfn", "-o", tmp_path / "a", "--sizes", "batch=2",
        "--data", tmp_path / "images.npz",
    )  # fmt: skip
    assert code == 0 and "images.npz" in printed, err
    np.savez(tmp_path / "wrong.npz", other=np.zeros(3))
    result = call(
        "export", "--model", pt2, "--to", "mlxfn", "-o", tmp_path / "b",
        "--data", tmp_path / "wrong.npz",
    )  # fmt: skip
    refused(result, "wrong.npz: has no array 'input'", "other")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--to", "tflite"), ("--to tflite", "choose from", *EXPORTS)),
        (("--to", ""), ("--to", "choose from")),
        (("--to", "torch", "--quantize", "dynamic"), ("--quantize dynamic", "not for torch")),
        (("--to", "torch", "--quantize", "int3"), ("--quantize int3", "choose from int4, int8")),
        (("--to", "torch", "--dtype", "bf16"), ("--dtype bf16", "float32, float16")),
        (("--to", "mlxfn", "--sizes", "length"), ("--sizes length", "batch=1,length=1..512")),
        (("--to", "mlxfn", "--sizes", "width=3"), ("--sizes width", "batch, length, past")),
    ],
)
def test_bad_options_are_refused_in_one_line(call, folder, tmp_path, arguments, words):
    refused(call("export", "--model", folder, "-o", tmp_path / "out", *arguments), *words)
    assert not (tmp_path / "out").exists()


def test_what_is_no_model_is_refused_in_one_line(call, tmp_path):
    out = tmp_path / "out"
    result = call("export", "--model", tmp_path / "no", "--to", "mlxfn", "-o", out)
    refused(result, "--model", "no such folder")
    (tmp_path / "bad.pt2").write_bytes(b"not a zip")
    refused(call("import", "--torch", tmp_path / "bad.pt2", "--mlx-path", out), "bad.pt2")
    refused(call("import", "--torch", tmp_path / "no.pt2", "--mlx-path", out), "no such file")
    refused(call("import", "--torch", tmp_path / "no", "--mlx-path", out), "--torch", "neither")
    assert not out.exists()


def test_a_place_that_is_taken_is_refused_before_the_work(call, folder, tmp_path):
    Path(tmp_path / "out").mkdir()
    result = call("export", "--model", folder, "--to", "mlxfn", "-o", tmp_path / "out")
    refused(result, f"-o {tmp_path / 'out'}", "exists already")


def test_a_cache_that_is_not_keys_and_values_says_what_to_do(call, tmp_path):
    import zoo
    from zoo_checks import write_stock

    mx.disable_compile()
    write_stock(tmp_path / "mamba", "mamba", zoo.build("mamba"))
    out = ("export", "--model", tmp_path / "mamba", "--to", "mlxfn")
    refused(call(*out, "-o", tmp_path / "a"), "ArraysCache", "--no-cache")
    code, _, err = call(*out, "-o", tmp_path / "b", "--no-cache", "--sizes", "length=5")
    mx.enable_compile()
    assert code == 0, err
