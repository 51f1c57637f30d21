"""Stages: what their file may say, and runs of several of them."""

import json
from pathlib import Path

import pytest

from commands import refused
from mlx_compress import distill_stages, recipe
from mlx_compress.distill_recipe import training_place
from mlx_compress.distill_stages import Stage, read_stages
from mlx_compress.errors import InputError
from mlx_compress.options import DistillOptions, Options
from test_distill_command import BOOKS, TEACHER

PRUNING = ("--importance", "magnitude", "--no-refit", "--no-statistics")


def read(tmp_path, text):
    file = tmp_path / "stages.yaml"
    file.write_text(text)
    return read_stages(file, DistillOptions(iters=7), Options())


def test_a_stage_says_its_student_and_what_differs_from_the_command(tmp_path):
    text = (
        "- {target: params=0.7, learning-rate: 1e-4, loss: js, batch-size: 2}\n"
        "- {model: M, teacher: previous, iters: 9}"
    )
    first, second = read(tmp_path, text)
    changed = DistillOptions(iters=7, learning_rate=1e-4, loss="js", batch_size=2)
    assert first == Stage(changed, pruning=Options(params=0.7, batch_size=2))
    assert second == Stage(DistillOptions(iters=9), model="M", teacher="previous")


def test_a_stage_says_how_its_student_is_pruned(tmp_path):
    text = (
        "- {target: params=0.7, dims: layers, importance: taylor, refit: false}\n"
        "- {target: params=0.8, dims: [channels, mlp], max-trials: 4}"
    )
    first, second = (stage.pruning for stage in read(tmp_path, text))
    assert first == Options(params=0.7, dims=("layers",), importance="taylor", refit=False)
    assert second == Options(params=0.8, dims=("channels", "mlp"), max_trials=4)


@pytest.mark.parametrize(
    "text, words",
    [
        ("[]", "is empty; list the stages"),
        ("target: params=0.7", "must be a list of stages"),
        ("- [", "not readable as YAML"),
        ("- {iters: 3}", "stage 1: give either target"),
        ("- {model: M, target: params=0.7}", "stage 1: give either target"),
        ("- {model: M, teacher: last}", "teacher last: choose from first, previous"),
        ("- {model: M, teacher: previous}", "stage 1: teacher: previous, but there is none"),
        ("- {model: M, steps: 3}", "'steps' is no option here; known: "),
        ("- {model: M, iters: many}", "iters: many: is no int"),
        ("- {model: M, iters: 1.9}", "iters: 1.9: is no int"),
        ("- {model: M, loss: far}", "--loss far: unknown"),
        ("- {model: M, mask-prompt: 1}", "mask_prompt: 1: is no bool"),
        ("- {model: M, dims: layers}", "'dims' is no option here; known: "),
        ("- {target: params=0.7, dims: floors}", "--dims floors: unknown"),
        ("- {target: half}", "--target half: write it as params=0.75"),
    ],
)
def test_a_file_that_says_something_else_is_refused(tmp_path, text, words):
    with pytest.raises(InputError, match=words):
        read(tmp_path, text)


QUICKLY = ("--iters", 2, "--batch-size", 2, "--max-seq-length", 24, "--eval-samples", 4)


def compress(call, out, *more):
    given = ("--model", TEACHER, "--mlx-path", out, "--data", BOOKS, "--target", "params=0.5")
    return call(*given, *PRUNING, *QUICKLY, "--methods", *more)


def test_pruning_and_distilling_twice_leaves_what_was_asked_for(call, tmp_path, monkeypatch):
    out, ran = tmp_path / "out", []
    distilled = distill_stages.distill_recipe.distill

    def once(*args, **named):
        if len(ran) == 1:
            ran.append("stopped")
            raise KeyboardInterrupt
        ran.append(args[4])
        return distilled(*args, **named)

    monkeypatch.setattr(distill_stages.distill_recipe, "distill", once)
    code, _, err = compress(call, out, "prune,distill,prune,distill")
    assert code and "the same command goes on from there" in err.replace("\n", " ")
    assert (training_place(out) / "stage-1").exists() and not out.exists()
    other = compress(call, out, "prune,distill,prune,distill", "--loss", "js")
    refused(other, "another stage 1 --loss (None, now js)", "remove the folder")
    code, text, err = compress(call, out, "prune,distill,prune,distill")
    assert code == 0, err
    assert ran == [training_place(out) / "stage-1", "stopped", out]  # the first one only once
    report = json.loads((out / "report.json").read_text())
    assert [row["stage"] for row in report["stages"]] == [1, 2]
    assert report["dense"]["parameters"] == 5_475_584 > report["stages"][0]["parameters"]
    assert report["compressed"]["parameters"] == report["stages"][1]["parameters"]
    record = json.loads((out / "compression.json").read_text())
    assert record["student"]["parent"]["name"] == "stage-1"
    assert "held out" in text and "divergence" in text and not training_place(out).exists()


def test_a_pruned_and_distilled_model_knows_its_plan(call, tmp_path):
    out = tmp_path / "out"
    code, _, err = compress(call, out, "prune,distill", "--loss", "forward-kl")
    assert code == 0, err
    plan = recipe.read_plan(out)
    assert plan.cuts and recipe.open_model(out)
    record = json.loads((out / "compression.json").read_text())
    assert record["parent"]["name"] == Path(TEACHER).name
    assert 0.45 < record["kept_block_parameters"] < 0.55
    assert record["distillation"]["options"]["loss"] == "forward-kl"


def test_a_model_that_the_gate_rejects_is_kept_aside_with_its_table(call, tmp_path):
    out = tmp_path / "out"
    result = compress(call, out, "prune,distill", "--max-drop", 0.001)
    refused(result, "--max-drop 0.001 is allowed", "train longer (--iters)", code=3)
    assert (tmp_path / "out.rejected" / "report.json").exists() and not out.exists()
    assert not training_place(out).exists()
    refused(compress(call, out, "prune,distill", "--max-drop", 9), "out.rejected: exists already")
    assert "compressed" in result[1]


@pytest.mark.parametrize(
    "methods, words",
    [
        (("distill",), "write it as prune,distill"),
        (("prune,prune",), "write it as prune,distill"),
        (("quantize",), "--methods quantize: unknown"),
        (("prune,distill", "--biases"), "--biases: not together with --methods"),
        (("prune,distill,prune,distill", "--target", "disk_mb=9"), "disk_mb: is no fraction"),
    ],
)
def test_methods_that_make_no_sense_are_refused(call, tmp_path, methods, words):
    refused(compress(call, tmp_path / "out", *methods), words)
