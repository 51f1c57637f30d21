"""The command line: what goes wrong is one line and an exit code, and nothing is half-written."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from commands import refused
from mlx_compress import recipe
from mlx_compress.options import IMPORTANCES
from mlx_compress.plan import PrunePlan
from mlx_compress.store import default_folder

EXAMPLE = Path(recipe.__file__).parent / "assets"
BOOKS, MODEL = EXAMPLE / "books", EXAMPLE / "books5m"


@pytest.fixture
def folder(tmp_path):
    """A copy of the embedded model that a test may damage."""
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


PRUNE = ("--pruning-ratio", "0.25", "--importance", "magnitude")


def test_a_missing_folder_is_named(call, tmp_path):
    result = call("prune", "--model", tmp_path / "no", "--mlx-path", tmp_path / "out", *PRUNE)
    refused(result, "--model", str(tmp_path / "no"), "no such folder")


@pytest.mark.parametrize("command", [(), ("prune",), ("distill", "--teacher", "no"), ("eval",)])
def test_data_that_is_not_there_is_refused_before_a_model_is_opened(call, tmp_path, command):
    result = call(*command, "--model", "no", "--data", tmp_path / "none")
    refused(result, f"{tmp_path / 'none'}: no such file or folder; --data takes")


def test_a_folder_without_config_is_no_model(call, tmp_path):
    refused(call("inspect", "--model", tmp_path), "config.json", str(tmp_path))


def test_a_damaged_config_is_said(call, folder):
    (folder / "config.json").write_text("{")
    refused(call("inspect", "--model", folder), "config.json", "not valid JSON")


def test_truncated_weights_are_found_before_they_are_used(call, folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100_000])
    refused(call("inspect", "--model", folder), "model.safetensors", "truncated")


def test_an_unknown_architecture_is_named(call, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "nonesuch"}))
    refused(call("inspect", "--model", folder), "nonesuch")


def test_code_in_the_folder_does_not_run(call, folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_file": "mine.py"}))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    refused(call("inspect", "--model", folder), "model_file", "--trust-remote-code")
    assert not (tmp_path / "ran").exists()


def test_an_unknown_importance_lists_the_known(call, tmp_path):
    result = call(
        "prune", "--model", MODEL, "--mlx-path", tmp_path / "out", "--pruning-ratio", "0.25",
        "--importance", "magic",
    )  # fmt: skip
    refused(result, "--importance magic", *IMPORTANCES)


@pytest.mark.parametrize("ratio", ["0", "1", "1.5", "-0.1"])
def test_a_ratio_outside_0_to_1_is_refused(call, tmp_path, ratio):
    result = call("prune", "--model", MODEL, "--mlx-path", tmp_path / "o", "--pruning-ratio", ratio)
    refused(result, "--pruning-ratio", "between 0 and 1")


def test_a_ratio_that_would_empty_a_dimension_is_refused(call, tmp_path):
    result = call(
        "prune", "--model", MODEL, "--mlx-path", tmp_path / "o", "--pruning-ratio", "0.9",
        "--importance", "magnitude",
    )  # fmt: skip
    refused(result, "would empty", "heads", "2 units")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["empty"]),
        (b"\x00\xff\xfe\x80" * 500, ["UTF-8"]),
        (b"Too short.", ["--max-seq-length"]),
    ],
)
def test_bad_text_is_named(call, tmp_path, content, words):
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    result = call(
        "prune", "--model", MODEL, "--mlx-path", tmp_path / "out", "--data", text,
        "--pruning-ratio", "0.25",
    )  # fmt: skip
    refused(result, str(text), *words)
    assert not (tmp_path / "out").exists()


def test_a_criterion_that_reads_text_asks_for_it(call, tmp_path):
    result = call("prune", "--model", MODEL, "--mlx-path", tmp_path / "o", "--pruning-ratio", "0.2",
                  "--importance", "taylor")  # fmt: skip
    refused(result, "taylor", "--data")


def test_an_existing_output_folder_is_left_alone(call, tmp_path):
    (tmp_path / "kept.txt").write_text("mine")
    result = call("prune", "--model", MODEL, "--mlx-path", tmp_path, *PRUNE)
    refused(result, str(tmp_path), "exists already")
    assert [p.name for p in tmp_path.iterdir()] == ["kept.txt"]


def test_a_full_disk_leaves_nothing_and_exits_4(call, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    result = call("prune", "--model", MODEL, "--mlx-path", tmp_path / "out", *PRUNE)
    refused(result, "MB", code=4)
    assert not list(tmp_path.iterdir())


def test_it_must_be_said_how_much_to_remove(call, tmp_path):
    result = call("prune", "--model", MODEL, "--mlx-path", tmp_path / "out")
    refused(result, "--pruning-ratio", "--target")
    result = call("--model", MODEL, "--mlx-path", tmp_path / "out", "--data", BOOKS)
    refused(result, "--pruning-ratio", "--target")


def test_a_damaged_target_says_how_to_write_one(call, tmp_path):
    result = call("prune", "--model", MODEL, "--mlx-path", tmp_path / "o", "--target", "half")
    refused(result, "--target half", "params=0.75")


def test_an_unknown_yaml_key_is_refused_and_a_known_one_is_overridden(call, tmp_path):
    settings = tmp_path / "run.yaml"
    settings.write_text("pruning-rate: 0.5\n")
    out = tmp_path / "out"
    refused(call("prune", "-c", settings, "--model", MODEL, "--mlx-path", out), "pruning-rate")
    settings.write_text("pruning-ratio: 0.5\nimportance: magnitude\n")
    code, text, err = call(
        "prune", "-c", settings, "--model", MODEL, "--dry-run", "--json", "--dims", "channels",
        "--importance", "random",
    )  # fmt: skip
    recipe_used = json.loads(text)["recipe"]
    assert code == 0, err
    assert (recipe_used["pruning_ratio"], recipe_used["importance"]) == (0.5, "random")


def test_a_dry_run_prints_a_plan_that_can_be_saved_diffed_and_applied(call, tmp_path):
    one, two, out = tmp_path / "one.json", tmp_path / "two.json", tmp_path / "out"
    common = ("prune", "--model", MODEL, "--dims", "channels", *PRUNE)
    assert call(*common, "--dry-run", "--save-plan", one)[0] == 0
    code, text, _ = call(*common, "--dry-run", "--json", "--seed", "1", "--importance", "random")
    two.write_text(text)
    assert code == 0 and PrunePlan.load(two).cuts.keys() == PrunePlan.load(one).cuts.keys()
    code, text, _ = call("diff", one, two, "--json")
    sides = json.loads(text)["model.layers.0.mlp.channels"]
    assert code == 0 and len(sides["left"]) == len(sides["right"]) > 0
    code, _, err = call("prune", "--model", MODEL, "--plan", one, "--mlx-path", out)
    assert code == 0, err
    weights = mx.load(str(out / "model.safetensors"))
    assert weights["model.layers.0.mlp.down_proj.weight"].shape == (256, 528)
    assert weights["model.layers.0.mlp.down_proj.weight"].dtype == mx.float16
    assert recipe.read_plan(out).cuts == PrunePlan.load(one).cuts


def test_inspect_prints_every_dimension_as_json(call):
    code, text, _ = call("inspect", "--model", MODEL, "--json")
    document = json.loads(text)
    names = {d["name"] for d in document["dimensions"]}
    assert code == 0 and "model.layers.3.mlp.channels" in names
    axes = document["parameters"]["model.layers.0.mlp.down_proj.weight"]
    assert axes == ["model.width", "model.layers.0.mlp.channels"]


def test_the_whole_job_reports_dense_beside_compressed(call, tmp_path):
    out = tmp_path / "out"
    code, text, err = call(
        "--model", MODEL, "--data", BOOKS, "--mlx-path", out, "--target", "params=0.8",
        "--importance", "wanda", "--calibration-samples", 4, "--eval-samples", 4,
        "--max-seq-length", 64,
    )  # fmt: skip
    assert code == 0, err
    report = json.loads((out / "report.json").read_text())
    assert report["compressed"]["parameters"] < report["dense"]["parameters"]
    assert abs(report["kept_block_parameters"] - 0.8) < 0.02
    assert report["compressed"]["sample"]["continuation"]
    for words in ("Perplexity", "Decode, tokens/s", "Same top token", "dense:", "compressed:"):
        assert words in text
    assert f"statistics made and kept in {default_folder()}" in err
    assert "tokens for 704 inputs of model.layers" in err  # of 4 windows of 64
    record = json.loads((out / "compression.json").read_text())
    assert record["verified"]["logit_error"] < 2e-2
    assert record["metrics"]["paired"]["nats_per_token"]["low"] > 0
    assert len(record["parent"]["sha256"]["model.safetensors"]) == 64


def test_the_tests_leave_the_cache_of_the_user_alone(tmp_path_factory):
    assert default_folder().is_relative_to(tmp_path_factory.getbasetemp())


def test_help_needs_no_heavy_package():
    script = (
        "import sys; sys.argv = ['x', '--help']\n"
        "from mlx_compress import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "print([m for m in ('mlx.core', 'numpy', 'rich', 'mlx_lm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_widths_that_differ_by_layer_name_the_carrier_that_holds_them(call, tmp_path):
    out = tmp_path / "out"
    common = ("prune", "--model", MODEL, "--mlx-path", out, "--dims", "channels",
              "--global-pruning", *PRUNE)  # fmt: skip
    refused(call(*common), "'llama'", "mlp.channels", "--carrier openelm")
    assert not out.exists()
    code, _, err = call(*common, "--carrier", "openelm")
    assert code == 0, err
    assert json.loads((out / "config.json").read_text())["model_type"] == "openelm"


def test_dropping_attention_alone_is_refused_with_what_would_do(call, tmp_path):
    result = call("prune", "--model", MODEL, "--mlx-path", tmp_path / "out", "--dims", "attention",
                  *PRUNE)  # fmt: skip
    refused(result, "model.layers.attention", "carrier nemotron-nas cannot", "--round-to 256")


def test_whole_layers_are_dropped_and_renumbered(call, tmp_path):
    out = tmp_path / "out"
    code, _, err = call("prune", "--model", MODEL, "--mlx-path", out, "--dims", "layers",
                        "--pruning-ratio", "0.34", "--importance", "magnitude")  # fmt: skip
    assert code == 0, err
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 4
    weights = mx.load(str(out / "model.safetensors"))
    assert {p.split(".")[2] for p in weights if "layers" in p} == set("0123")


def test_too_little_memory_is_said_before_the_long_part(call, tmp_path, monkeypatch):
    from mlx_compress.bridges import measure

    monkeypatch.setattr(measure, "machine", lambda: {"memory_bytes": 10_000_000})
    result = call("--model", MODEL, "--mlx-path", tmp_path / "out", "--data", BOOKS, *PRUNE)
    refused(result, "GB", "compress prune", code=4)
    assert not list(tmp_path.iterdir())
