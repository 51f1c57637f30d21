"""Distillation of programs: class scores and embeddings, in memory and by the command."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_unflatten

import judging
from commands import refused
from mlx_compress.archive import load_program, save_program
from mlx_compress.distill_samples import Answers, asked
from mlx_compress.errors import InputError
from mlx_compress.options import DistillOptions
from mlx_compress.program import program_of, with_weights
from mlx_compress.samples import read_samples
from mlx_compress.training import train
from mlx_compress.training_state import TrainingFolder

QUICK = {"iters": 12, "batch_size": 4, "warmup": 0, "learning_rate": 3e-2, "steps_per_eval": 6}


def other(program, seed=0):
    """The same program with other weights."""
    keys = iter(mx.random.split(mx.random.key(seed), 99))
    held = program.fetch(list(program.graph.parameters))
    return with_weights(program, {p: a + 0.3 * mx.random.normal(a.shape, key=next(keys))
                                  for p, a in held.items()})  # fmt: skip


def images(tmp_path):
    place = judging.folder_of(tmp_path, lambda seed: judging.images(24, seed), ".npz")
    net = judging.convolutions()
    return net, judging.read(net, place, "calibration").split(4)


def sentences(tmp_path, **kind):
    place = judging.folder_of(tmp_path, lambda seed: judging.pairs(24, seed), ".jsonl")
    net = judging.encoder(**kind)
    return net, judging.read(net, place, "calibration").split(4)


def objective(net, samples, **changed):
    return Answers(other(net), net, *samples, DistillOptions(**QUICK | changed))


CASES = [
    (images, {}, "forward-kl"), (images, {}, "reverse-kl"), (images, {}, "taid"),
    (sentences, {}, "cosine"), (sentences, {"pools": True}, "mse"),
]  # fmt: skip


@pytest.mark.parametrize("read, kind, loss", CASES)
def test_the_student_comes_nearer_to_the_teacher(read, kind, loss, tmp_path):
    net, samples = read(tmp_path, **kind)
    curve = train(objective(net, samples, loss=loss), DistillOptions(**QUICK),
                  TrainingFolder(tmp_path / "state", {})).curve  # fmt: skip
    assert curve[-1]["divergence"] < 0.7 * curve[0]["divergence"]


@pytest.mark.parametrize("hard", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("read, kind, loss", CASES[:1] + CASES[3:])
def test_gradients_are_finite_differences(read, kind, loss, hard, tmp_path):
    net, samples = read(tmp_path, **kind)
    found = objective(net, samples, loss=loss, hard_labels=hard)
    weights = found.start()
    path = sorted(weights)[0]
    step = mx.random.normal(weights[path].shape, key=mx.random.key(1))
    ends = [found.gradients(weights | {path: weights[path] + side * 1e-2 * step}, 0, 1.0)[0].item()
            for side in (-1, 1)]  # fmt: skip
    _, grads = found.gradients(weights, 0, 1.0)
    along = (grads[path] * step).sum().item()
    assert abs((ends[1] - ends[0]) / 2e-2 - along) < 2e-2 * max(0.05, abs(along))


def test_two_batches_of_two_give_the_gradient_of_one_of_four(tmp_path):
    place = judging.folder_of(tmp_path, lambda seed: judging.pairs(24, seed), ".jsonl")
    net, results = judging.encoder(), []
    for size, steps in ((4, 1), (2, 2)):
        samples = judging.read(net, place, "calibration", batch_size=size).split(16 // size)
        found = objective(net, samples, batch_size=size, grad_accumulation_steps=steps)
        results.append(found.gradients(found.start(), 0, 1.0))
    assert abs(results[0][0].item() - results[1][0].item()) < 1e-5
    for path, grad in results[0][1].items():
        np.testing.assert_allclose(grad, results[1][1][path], atol=1e-5)


def test_a_batch_that_is_picked_is_that_of_the_file(tmp_path):
    net, (samples, _) = sentences(tmp_path)
    for b, batch in enumerate(samples.batches):
        picked = samples.pick(np.arange(b * 4, b * 4 + 4))
        assert all(map(mx.array_equal, picked.batches[0], batch))
        assert (picked.targets == samples.targets[b * 4 : b * 4 + 4]).all()
    mixed, all_answers = samples.pick([9, 2]), asked(net, samples)
    np.testing.assert_allclose(asked(net, mixed), all_answers[mx.array([9, 2])], atol=1e-6)


def test_statistics_of_batch_norms_are_not_trained(tmp_path):
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm(4)).eval()
    head = nn.Linear(4, judging.CLASSES)

    def fn(parameters, image):
        module.update(tree_unflatten([(p[2:], a) for p, a in parameters.items() if p[0] == "m"]))
        head.update(tree_unflatten([(p[2:], a) for p, a in parameters.items() if p[0] == "h"]))
        return head(module(image).mean((1, 2)))

    from mlx.utils import tree_flatten

    held = {f"m.{p}": a for p, a in tree_flatten(module.parameters())}
    held |= {f"h.{p}": a for p, a in tree_flatten(head.parameters())}
    net = program_of(fn, {"image": mx.zeros((2, 6, 6, 3))}, outputs=["scores"], parameters=held,
                     dynamic={"image": {0: "batch"}})  # fmt: skip
    place = judging.folder_of(tmp_path, lambda seed: judging.images(24, seed), ".npz")
    samples = judging.read(net, place, "calibration").split(4)
    trained = set(Answers(net, net, *samples, DistillOptions(**QUICK)).start())
    assert trained == set(held) - {"m.layers.1.running_mean", "m.layers.1.running_var"}


def test_a_loss_that_does_not_suit_is_refused(tmp_path):
    for read, loss, others in ((images, "cosine", "reverse-kl"), (sentences, "js", "cosine, mse")):
        place = tmp_path / loss
        place.mkdir()
        with pytest.raises(InputError, match=f"--loss {loss}: unknown; choose from {others}"):
            objective(*read(place), loss=loss)


def test_answers_of_another_shape_are_refused(tmp_path):
    net, samples = images(tmp_path)

    def doubled(parameters, image):
        return mx.concatenate([image.mean((1, 2))] * 2, axis=-1)

    wide = program_of(doubled, {"image": mx.zeros((2, 6, 6, 3))}, outputs=["scores"],
                      parameters={}, dynamic={"image": {0: "batch"}})  # fmt: skip
    with pytest.raises(InputError, match=r"--teacher: answers in the shape \(6,\), the student in"):
        Answers(net, wide, *samples, DistillOptions(**QUICK))


# ---- by the command

FEW = ("--iters", 6, "--batch-size", 4, "--eval-samples", 20, "--warmup", 0, "--steps-per-eval", 3)


@pytest.fixture
def folders(tmp_path):
    """A teacher, a student, and images."""
    (tmp_path / "data").mkdir()
    judging.folder_of(tmp_path / "data", lambda seed: judging.images(40, seed), ".npz")
    net = judging.convolutions()
    for name, program in (("teacher", net), ("student", other(net))):
        (tmp_path / name).mkdir()
        save_program(program, tmp_path / name)
    return tmp_path


def arguments(folders, out="out"):
    given = {"teacher": "teacher", "model": "student", "data": "data", "mlx-path": out}
    named = sum(((f"--{flag}", folders / name) for flag, name in given.items()), ())
    return "distill", *named, *FEW, "--learning-rate", 3e-2


def test_a_distilled_program_is_measured_and_opens(call, folders):
    code, out, err = call(*arguments(folders))
    assert code == 0, err
    report = json.loads((folders / "out" / "report.json").read_text())
    curve = report["distillation"]["held_out"]
    assert curve[-1]["divergence"] < curve[0]["divergence"] and "top-1" in out
    assert "from the teacher" in err and "Saved to" in err
    student, trained = (load_program(folders / name) for name in ("student", "out"))
    samples = read_samples(trained, folders / "data", "evaluation", count=20, batch_size=4)
    assert not mx.allclose(asked(student, samples), asked(trained, samples))
    assert json.loads((folders / "out" / "compression.json").read_text())["teacher"]


def test_pruning_and_distilling_a_program_goes_by_one_command(call, folders):
    given = ("--model", folders / "teacher", "--data", folders / "data", "--mlx-path")
    code, _, err = call(
        *given, folders / "out", "--pruning-ratio", 0.5, "--importance", "magnitude",
        "--iters", 6, "--batch-size", 4, "--eval-samples", 20, "--methods", "prune,distill",
    )  # fmt: skip
    assert code == 0, err
    record = json.loads((folders / "out" / "compression.json").read_text())
    assert record["kept_block_parameters"] < 1 and record["distillation"]["judged_by"]


def test_what_only_language_models_have_is_refused(call, folders):
    refused(call(*arguments(folders), "--lora-rank", 2), "--lora-rank: is for language models")
    result = call(*arguments(folders), "--target-dir", folders / "t")
    refused(result, "--target-dir: is for language models")
    result = call(*arguments(folders), "--attribution", "weights")
    refused(result, "--attribution weights: weighs a saved program's blocks; give --hidden-weight")


def test_what_was_learnt_beside_a_program_is_not_saved_with_it(call, tmp_path):
    """The student is an image transformer of half the width and of one block."""
    (tmp_path / "data").mkdir()
    judging.folder_of(tmp_path / "data", lambda seed: judging.images(40, seed), ".npz")
    for name, (width, blocks) in {"teacher": (8, 2), "student": (4, 1)}.items():
        (tmp_path / name).mkdir()
        save_program(judging.patches(width, blocks), tmp_path / name)
    code, _, err = call(
        *arguments(tmp_path), "--hidden-weight", 1, "--attention-weight", 1,
        "--attribution", "weights",
    )  # fmt: skip
    assert code == 0, err
    told = json.loads((tmp_path / "out" / "report.json").read_text())["distillation"]
    assert told["losses"][-1] < told["losses"][0]
    before, after = (load_program(tmp_path / name).graph for name in ("student", "out"))
    assert before.parameters.keys() == after.parameters.keys()


def test_few_samples_are_refused(call, folders):
    result = call(*arguments(folders), "--batch-size", 40)
    refused(result, "40 samples make one batch of 40", "lower --batch-size")
