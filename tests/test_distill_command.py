"""`compress distill` on the embedded model, and the folder that it leaves."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

import judging
from commands import refused
from mlx_compress import recipe, report, training
from mlx_compress.archive import save_program
from mlx_compress.distill_recipe import training_place

EXAMPLE = Path(recipe.__file__).parent / "assets"
BOOKS, TEACHER = EXAMPLE / "books", EXAMPLE / "books5m"
QUICK = (
    "--iters", 4, "--batch-size", 2, "--max-seq-length", 24, "--val-samples", 4, "--warmup", 0,
    "--eval-samples", 4, "--steps-per-eval", 2, "--learning-rate", 3e-4,
)  # fmt: skip


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """The first layer of the teacher."""
    folder = tmp_path_factory.mktemp("student") / "first"
    shutil.copytree(TEACHER, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    weights = mx.load(str(TEACHER / "model.safetensors"))
    kept = {p: a for p, a in weights.items() if ".layers." not in p or ".layers.0." in p}
    mx.save_safetensors(str(folder / "model.safetensors"), kept, metadata={"format": "mlx"})
    return folder


def arguments(student, out, **changed):
    plain = {"teacher": TEACHER, "model": student, "mlx-path": out, "data": BOOKS} | changed
    return "distill", *sum(((f"--{name}", value) for name, value in plain.items()), ()), *QUICK


@pytest.fixture(scope="module")
def trained(student, tmp_path_factory):
    return tmp_path_factory.mktemp("out") / "student"


def test_a_distilled_folder_is_proven_measured_and_better(call, student, trained):
    code, out, err = call(*arguments(student, trained))
    assert code == 0, err
    told = json.loads((trained / "report.json").read_text())
    curve = told["distillation"]["held_out"]
    assert [point["step"] for point in curve] == [0, 2, 4]
    assert curve[-1]["divergence"] < curve[0]["divergence"] - 0.01
    assert f"step 4: {curve[-1]['cross_entropy']:.4f} nats/token held out" in err
    assert len(told["distillation"]["losses"]) == 4
    record = json.loads((trained / "compression.json").read_text())
    assert record["parent"]["name"] == student.name
    assert record["teacher"]["name"] == TEACHER.name
    assert record["verified"]["logit_error"] < 1e-4
    assert "Saved to" in err and "dense" in out
    assert not training_place(trained).exists()


def test_a_folder_that_was_distilled_is_a_student_again(call, trained, tmp_path):
    assert trained.exists(), "the test above makes it"
    code, _, err = call(*arguments(trained, tmp_path / "again"), "--loss", "forward-kl")
    assert code == 0, err
    record = json.loads((tmp_path / "again" / "compression.json").read_text())
    assert record["student"]["distillation"]["steps"] == 4


def test_what_was_stopped_goes_on_with_the_same_command_and_no_other(
    call, student, tmp_path, monkeypatch
):
    place = tmp_path / "out"
    advanced = training.advanced

    def stop(objective, state, *rest):
        if state.step == 3:
            raise KeyboardInterrupt
        return advanced(objective, state, *rest)

    monkeypatch.setattr(training, "advanced", stop)
    code, _, err = call(*arguments(student, place))
    assert code and "the same command goes on" in err.replace("\n", " ")
    assert not place.exists() and training_place(place).exists()
    monkeypatch.undo()
    other = call(*arguments(student, place), "--learning-rate", 1e-3)
    refused(other, str(training_place(place)), "another --learning-rate (0.0003, now 0.001)")
    refused(call(*arguments(student, place), "--iters", 5), "another --iters (4, now 5)")
    code, _, err = call(*arguments(student, place))
    assert code == 0 and "step 0" not in err and "step 4" in err


@pytest.mark.parametrize("flag", ["teacher", "model"])
def test_weights_that_are_no_numbers_are_named(call, student, tmp_path, flag):
    broken, path = tmp_path / "broken", "model.layers.0.mlp.down_proj.weight"
    shutil.copytree(TEACHER if flag == "teacher" else student, broken)
    weights = mx.load(str(broken / "model.safetensors"))
    weights[path][3, 5] = mx.nan
    mx.save_safetensors(str(broken / "model.safetensors"), weights, metadata={"format": "mlx"})
    result = call(*arguments(student, tmp_path / "out", **{flag: broken}))
    refused(result, f"--{flag} {broken}: {path}: holds NaN", "repair the checkpoint")
    assert not training_place(tmp_path / "out").exists()


def test_another_tokenizer_is_refused(call, student, tmp_path):
    shutil.copytree(student, tmp_path / "student")
    file = tmp_path / "student" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    words = tokenizer["model"]["vocab"]
    last, before = sorted(words, key=words.get)[-2:]
    words[last], words[before] = words[before], words[last]
    file.write_text(json.dumps(tokenizer))
    result = call(*arguments(tmp_path / "student", tmp_path / "out"))
    refused(result, "to the teacher and", "to the student; distil from a teacher that has the")


def test_an_empty_text_is_refused(call, student, tmp_path):
    (tmp_path / "train.txt").touch()
    (tmp_path / "test.txt").touch()
    result = call(*arguments(student, tmp_path / "out", data=tmp_path))
    refused(result, "the file is empty")


def test_a_place_that_is_taken_is_refused(call, student, tmp_path):
    refused(call(*arguments(student, tmp_path)), "exists already")


def test_too_little_memory_is_said_with_what_would_fit(call, student, tmp_path, monkeypatch):
    from mlx_compress import distill_recipe

    small = report.machine() | {"memory_bytes": 100_000_000}
    monkeypatch.setattr(distill_recipe, "machine", lambda: small)
    result = call(*arguments(student, tmp_path / "out"), "--batch-size", 64)
    refused(result, "distilling needs about", "--batch-size", "would fit", code=4)


def test_a_program_and_a_language_model_do_not_teach_each_other(call, tmp_path):
    (tmp_path / "net").mkdir()
    save_program(judging.convolutions(), tmp_path / "net")
    result = call(*arguments(tmp_path / "net", tmp_path / "out"))
    refused(result, "--model", str(tmp_path / "net"), "give two of a kind")


def test_a_teacher_that_was_asked_before_is_not_asked_again(call, student, tmp_path, monkeypatch):
    from mlx_compress import distill_recipe

    place = ("--target-dir", tmp_path / "targets", "--top-k", 32)
    command = arguments(student, tmp_path / "out")
    code, _, err = call(*command, *place, "--targets-only")
    assert code == 0 and "is kept in" in err and not (tmp_path / "out").exists()
    monkeypatch.setattr(distill_recipe, "teacher_of", None)
    code, _, err = call(*command, *place)
    assert code == 0, err
    curve = json.loads((tmp_path / "out" / "report.json").read_text())["distillation"]["held_out"]
    assert curve[-1]["divergence"] < curve[0]["divergence"] - 0.01
    other = arguments(student, tmp_path / "other")
    refused(call(*other, *place, "--seed", 1), "holds targets of another --data")


def test_what_is_inside_is_matched_and_nothing_of_it_is_saved(call, tmp_path):
    """The student is narrower, so projections are learnt."""
    student, place = tmp_path / "narrow", tmp_path / "out"
    code, _, err = call(
        "prune", "--model", TEACHER, "--mlx-path", student, "--dims", "width", "--pruning-ratio",
        0.5, "--importance", "magnitude",
    )  # fmt: skip
    assert code == 0, err
    more = ("--hidden-weight", 1, "--attention-weight", 1, "--attribution", "weights")
    code, _, err = call(*arguments(student, place), *more)
    assert code == 0, err
    told = json.loads((place / "report.json").read_text())["distillation"]
    assert told["options"]["hidden_weight"] == 1
    assert told["losses"][0] > told["held_out"][0]["divergence"]
    assert mx.load(str(place / "model.safetensors")).keys() == mx.load(
        str(student / "model.safetensors")
    ).keys()


def test_adapters_are_held_inside_to_a_packed_teacher(call, student, tmp_path):
    from mlx_lm import convert

    packed, out = tmp_path / "q4", tmp_path / "out"
    convert(str(TEACHER), str(packed), quantize=True, q_group_size=64, q_bits=4)
    more = ("--lora-rank", 2, "--hidden-weight", 1, "--attention-weight", 1)
    code, _, err = call(*arguments(student, out, teacher=packed), *more)
    assert code == 0, err
    told = json.loads((out / "report.json").read_text())["distillation"]
    assert told["losses"][0] > told["held_out"][0]["divergence"]
    before, after = (mx.load(str(folder / "model.safetensors")) for folder in (student, out))
    assert after.keys() == before.keys()
    assert any(not mx.array_equal(after[path], before[path]) for path in before)


def test_targets_need_a_folder_and_training_a_place(call, student, tmp_path):
    refused(call(*arguments(student, tmp_path / "out"), "--targets-only"), "--target-dir")
    command = [str(word) for word in arguments(student, tmp_path / "out")]
    at = command.index("--mlx-path")
    refused(call(*command[:at], *command[at + 2 :]), "--mlx-path: name the folder to write")


@pytest.mark.parametrize(
    "more, words",
    [
        (("--top-k", 3), "--top-k: does nothing without --target-dir"),
        (("--attribution-every", 3), "--attribution-every: does nothing without --attribution"),
        (("--loss", "cosine"), "--loss cosine: unknown"),
        (("--attribution", "align", "--target-dir", "t"), "--attribution: asks the teacher itself"),
        (("--attribution", "align", "--grad-checkpoint"), "leave one out"),
        (("--hidden-weight", 1, "--target-dir", "t"), "--hidden-weight: asks the teacher itself"),
        (("--attention-weight", 1, "--grad-checkpoint"), "leave one out"),
        (("--on-policy", 0.5, "--hard-labels", 1), "--on-policy: the student's own text has no"),
    ],
)
def test_options_that_do_not_go_together_are_refused_at_once(call, student, tmp_path, more, words):
    refused(call(*arguments(student, tmp_path / "out"), *more), words)
