"""Saved programs by the commands: planned, refitted, proven, measured, gated, exported."""

import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import judging
from commands import refused
from mlx_compress import program_recipe
from mlx_compress.archive import load_program, save_program
from mlx_compress.axes import named_axes
from mlx_compress.layers import layer_dimensions, without
from mlx_compress.options import Options
from mlx_compress.plan import PrunePlan
from mlx_compress.program import program_of, with_weights

CALIBRATED = ("--calibration-samples", 32, "--batch-size", 4)
FEW = (*CALIBRATED, "--eval-samples", 20)
HALF = ("--pruning-ratio", 0.5)


def saved(folder, program):
    folder.mkdir()
    save_program(program, folder)
    return folder


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("models") / "net", judging.convolutions())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return judging.folder_of(
        tmp_path_factory.mktemp("data"), lambda seed: judging.images(40, seed), ".npz"
    )


@pytest.fixture(scope="module")
def small(net, data, tmp_path_factory):
    """The net at half its channels, refitted."""
    out = tmp_path_factory.mktemp("small") / "small"
    options = Options(pruning_ratio=0.5, importance="wanda", batch_size=4, calibration_samples=32)
    model = program_recipe.open_model(net)
    program_recipe.save_pruned(model, program_recipe.make_plan(model, options, data), out)
    return out


def record(folder):
    return json.loads((folder / "compression.json").read_text())


def test_one_command_plans_refits_measures_and_exports(call, net, data, tmp_path):
    out = tmp_path / "out"
    command = ("--model", net, "--data", data, "--mlx-path", out, *HALF, *FEW)
    code, text, err = call(*command, "--export", "onnx")
    assert code == 0, err
    assert "Loss, nats" in text and "top-1" in text and "test.npz" in text
    assert "criterion" in err and "nats/token" not in err and f"--model {out}" in err
    report = json.loads((out / "report.json").read_text())
    assert report["compressed"]["parameters"] < report["dense"]["parameters"]
    assert {c["unit"] for c in report["criteria"]} == {"nats"}
    assert report["task"]["measure"] == "top-1" and report["data"]["samples"] == 20
    held = record(out)
    assert held["verified"]["error_against_zeroing"] < 1e-5
    fitted, judged = held["refit"], held["refit"]["held_out"]
    assert judged.keys() == {"as it is", "closed form", "sequential"}
    assert fitted["method"] in (min(("closed form", "sequential"), key=judged.get), "as it is")
    assert bool(fitted["lambda"]) == (fitted["method"] != "as it is")
    assert held["metrics"]["paired"]["loss"] == report["paired"]["loss"]
    assert len(held["parent"]["sha256"]["model.safetensors"]) == 64
    assert (out / "onnx" / "model.onnx").is_file()


def test_a_refitted_program_equals_zeroing_with_the_fitted_weights(net, small):
    dense, pruned = load_program(net), load_program(small)
    keep = next(iter(PrunePlan.from_json(record(small)["plan"]))).keep
    weights = {p: np.array(a) for p, a in dense.fetch(list(dense.graph.parameters)).items()}
    fitted = {p: np.array(a) for p, a in pruned.fetch(list(pruned.graph.parameters)).items()}
    for c in range(6):
        if c not in keep:
            weights["conv.weight"][c] = weights["conv.bias"][c] = 0
            weights["head.weight"][:, c] = 0
    for k, c in enumerate(keep):
        assert (weights["conv.weight"][c] == fitted["conv.weight"][k]).all()
        assert (weights["head.weight"][:, c] != fitted["head.weight"][:, k]).any()
        weights["head.weight"][:, c] = fitted["head.weight"][:, k]
    weights["head.bias"] = fitted["head.bias"]
    zeroed = with_weights(dense, {path: mx.array(array) for path, array in weights.items()})
    feeds = dense.feeds({"batch": 5})
    assert len(keep) == 3
    assert np.allclose(pruned.run(feeds)[0], zeroed.run(feeds)[0], atol=1e-5)


def test_a_program_that_loses_too_much_is_kept_aside_with_what_would_pass(call, data, tmp_path):
    net, out = saved(tmp_path / "net", skilled(data)), tmp_path / "out"
    command = ("--model", net, "--data", data, "--mlx-path", out, "--importance", "magnitude")
    result = call(*command, *FEW, "--pruning-ratio", 0.8, "--max-drop", 1e-3, "--no-refit")
    refused(result, "top-1 falls by", "(relative), --max-drop 0.001", "would pass", code=3)
    assert "top-1" in result[1].lower() and "compressed" in result[1]
    report = json.loads((tmp_path / "out.rejected" / "report.json").read_text())
    assert report["compressed"]["score"] < report["dense"]["score"] and not out.exists()
    result = call(*command, *FEW, *HALF, "--max-drop", 1)
    refused(result, "out.rejected", "exists already")


def skilled(data):
    """The net with its last layer fitted to what it is judged on."""
    program = judging.convolutions()
    weights = dict(program.fetch(list(program.graph.parameters)))
    with np.load(data / "test.npz") as held:
        image, labels = held["image"], held["labels"]
    x = nn.relu(mx.conv2d(mx.array(image), weights["conv.weight"], padding=1))
    x = np.array(x.mean((1, 2)))
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    found = np.linalg.lstsq(x, 9 * np.eye(judging.CLASSES)[labels], rcond=None)[0]
    fitted = {"head.weight": found[:-1].T, "head.bias": found[-1]}
    fitted = {path: mx.array(array.astype(np.float32)) for path, array in fitted.items()}
    return with_weights(program, weights | {"conv.bias": mx.zeros(6)} | fitted)


def test_options_that_make_no_sense_for_a_program_are_refused(call, net, data, tmp_path):
    command = ("prune", "--model", net, "--mlx-path", tmp_path / "out", *HALF)
    refused(call(*command, "--importance", "magnitude", "--carrier", "openelm"),
            "--carrier openelm", str(net), "saved program")  # fmt: skip
    refused(call(*command, "--importance", "magnitude", "--dims", "channels,layers"),
            "--dims layers", "nothing can be dropped here")  # fmt: skip
    refused(call(*command), "--importance auto", "--data", ".npz", "magnitude")
    assert not (tmp_path / "out").exists()


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = [nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6)) for _ in range(3)]
        self.head = nn.Linear(6, judging.CLASSES)

    def __call__(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def test_whole_layers_of_a_program_are_dropped_where_there_are_some(call, tmp_path):
    mx.random.seed(4)
    module = Residual()
    mx.eval(module.parameters())
    example = {"x": mx.zeros((2, 6))}
    program = program_of(module, example, outputs=["scores"], dynamic={"x": {0: "batch"}})
    net, out = saved(tmp_path / "net", program), tmp_path / "out"
    named = named_axes(program.at())
    layers = next(d for d in layer_dimensions(named) if d.free)
    plan = tmp_path / "plan.json"
    PrunePlan({layers.name: without(layers, [1])}).save(plan)
    code, _, err = call("prune", "--model", net, "--mlx-path", out, "--plan", plan)
    assert code == 0, err
    x = np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)
    want = mx.array(x)
    for k in (0, 2):
        want = want + module.layers[k](want)
    got = load_program(out).run({"x": x})[0]
    assert np.allclose(got, module.head(want), atol=1e-5)


def test_a_plan_is_saved_and_applied_with_and_without_refit(call, net, data, tmp_path):
    plan = tmp_path / "plan.json"
    common = ("prune", "--model", net, "--data", data, *CALIBRATED)
    dry = call(*common, *HALF, "--importance", "wanda", "--dry-run", "--save-plan", plan)
    assert dry[0] == 0 and not (tmp_path / "fitted").exists(), dry[2]
    assert call(*common, "--plan", plan, "--mlx-path", tmp_path / "fitted")[0] == 0
    code, _, err = call("prune", "--model", net, "--plan", plan, "--mlx-path", tmp_path / "plain")
    assert code == 0 and "note: no --data: the kept weights are not refitted" in err
    assert record(tmp_path / "fitted")["refit"] and "refit" not in record(tmp_path / "plain")
    assert call("diff", tmp_path / "fitted", plan)[1].strip() == "The plans keep the same units."


def test_programs_are_measured_alone_and_side_by_side(call, net, small, data, tmp_path):
    alone = call("eval", "--model", small, "--data", data, "--json")
    assert alone[0] == 0 and "compressed" not in json.loads(alone[1]), alone[2]
    code, text, err = call("eval", "--model", small, "--dense", net, "--data", data)
    assert code == 0 and "compressed" in text and "top-1" in text, err
    (tmp_path / "other").mkdir()
    result = call("eval", "--model", small, "--dense", tmp_path / "other", "--data", data)
    refused(result, "--dense", "is a language model", "a saved program")


def test_the_tokenizer_and_the_pooling_go_along(net, tmp_path):
    folder = shutil.copytree(net, tmp_path / "net")
    (folder / "1_Pooling").mkdir()
    files = {"tokenizer.json": "{}", "1_Pooling/config.json": '{"pooling_mode_cls_token": true}'}
    for name, text in files.items():
        (folder / name).write_text(text)
    model = program_recipe.open_model(folder)
    planned = program_recipe.make_plan(model, Options(pruning_ratio=0.5, importance="magnitude"))
    program_recipe.save_pruned(model, planned, tmp_path / "out")
    assert {name: (tmp_path / "out" / name).read_text() for name in files} == files


def test_statistics_are_read_again_unless_they_are_not_wanted(call, net, data, tmp_path):
    kept = tmp_path / "kept"

    def prune(name, *more):
        code, _, err = call(
            "prune", "--model", net, "--data", data, *HALF, *CALIBRATED, "--importance", "wanda",
            "--mlx-path", tmp_path / name, *more,
        )  # fmt: skip
        assert code == 0, err
        return [line for line in err.splitlines() if line.startswith("note: statistics")]

    first, again = prune("first", "--statistics", kept), prune("again", "--statistics", kept)
    assert len(first) == 1 and f"made and kept in {kept}: 0.0" in first[0]
    assert len(again) == 1 and f"read from {kept}: 0.0" in again[0]
    one, two = (mx.load(str(tmp_path / n / "model.safetensors")) for n in ("first", "again"))
    assert all((one[path] == two[path]).all() for path in one)
    before = sorted(kept.rglob("*"))
    assert prune("none", "--no-statistics") == [] and sorted(kept.rglob("*")) == before
    result = call("prune", "--model", net, "--dry-run", *HALF, "--statistics", kept,
                  "--no-statistics")  # fmt: skip
    refused(result, "--statistics and --no-statistics", "not both")


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("head.weight", np.nan, ["head.weight", "NaN"]),
        ("conv.weight", 1e38, ["NaN or infinity arises there", "all weights are finite"]),
    ],
)
@pytest.mark.parametrize("importance", ["wanda", "auto"])
def test_what_is_not_finite_is_named(call, data, tmp_path, path, value, words, importance):
    program = judging.convolutions()
    weights = dict(program.fetch(list(program.graph.parameters)))
    weights[path] = weights[path] * 0 + value
    net = saved(tmp_path / "net", with_weights(program, weights))
    result = call("--model", net, "--data", data, *HALF, *FEW, "--importance", importance,
                  "--mlx-path", tmp_path / "out")  # fmt: skip
    refused(result, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("spoil", ["constant", "one batch"])
def test_singular_statistics_still_refit_and_the_lambda_is_reported(net, tmp_path, spoil):
    content = judging.images(24)
    if spoil == "constant":
        content["image"] = np.ones_like(content["image"])
    file = judging.write(tmp_path / "data.npz", content)
    options = Options(
        pruning_ratio=0.5, importance="wanda", batch_size=4,
        calibration_samples=4 if spoil == "one batch" else 12,
    )  # fmt: skip
    model = program_recipe.open_model(net)
    planned = program_recipe.make_plan(model, options, file)
    pruned = program_recipe.save_pruned(model, planned, tmp_path / "out")
    found = record(tmp_path / "out")["refit"]["lambda"]
    assert found and all(lam > 0 for lam in found.values())
    assert np.isfinite(np.array(pruned.run(pruned.feeds())[0])).all()
    assert any("give more --calibration-samples" in note for note in planned.notes)
