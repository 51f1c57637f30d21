"""Programs on samples: what is reported is what slow loops find, and differences are paired."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import judging
import plain
from mlx_compress import stream
from mlx_compress.archive import save_program
from mlx_compress.axes import named_axes
from mlx_compress.cost import cost
from mlx_compress.errors import InputError
from mlx_compress.evaluate import EvaluateConfig
from mlx_compress.evaluate_samples import (
    batch_seconds,
    compare_samples,
    evaluate_programs,
    score_samples,
)
from mlx_compress.program import prune_program, with_weights
from mlx_compress.report import machine
from mlx_compress.samples import read_samples

DATA = Path(__file__).parents[2] / "shared" / "data"
QUICK = EvaluateConfig(seed=3, resamples=200, repeats=2)


@pytest.fixture(scope="module")
def net():
    return judging.convolutions()


@pytest.fixture(scope="module")
def pruned(net):
    named = named_axes(net.at())
    return prune_program(net, plain.random_plan(named, named.free(), seed=1))


@pytest.fixture(scope="module")
def samples(net, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, seed in (("train", 1), ("test", 2)):
        judging.write(folder / f"{name}.npz", judging.images(50, seed))
    return read_samples(net, folder, "evaluation", count=50, batch_size=8)


@pytest.fixture(scope="module")
def alike(tmp_path_factory):
    """An encoder and its samples."""
    folder = tmp_path_factory.mktemp("pairs")
    for name, seed in (("train", 1), ("test", 2)):
        judging.write(folder / f"{name}.jsonl", judging.pairs(30, seed))
    program = judging.encoder()
    opened = {"folder": folder, "open_tokenizer": lambda folder: judging.Words()}
    held = read_samples(program, folder, "evaluation", count=30, batch_size=8, **opened)
    return program, held


def one_by_one(program, samples):
    """Losses and answers by running the program on each batch whole."""
    losses, answers = [], []
    for b, batch in enumerate(samples.batches):
        outputs = program.run(dict(zip(program.inputs, batch, strict=True)))
        losses += samples.loss(b, outputs).tolist()
        answers += samples.answers(b, outputs).tolist()
    return losses, answers


@pytest.mark.parametrize("room", [2**28, 0])
def test_streamed_losses_and_answers_are_those_of_whole_runs(net, samples, monkeypatch, room):
    monkeypatch.setattr(stream, "KEPT_BYTES", room)
    monkeypatch.setattr(stream, "KEPT", room)
    told = []
    got = score_samples(net, samples, "dense", progress=lambda *step: told.append(step))
    for mine, want in zip(got, one_by_one(net, samples), strict=True):
        np.testing.assert_allclose(mine, want, rtol=1e-5)
    assert told[-1][0] == "dense" and told[-1][1] == told[-1][2] == len(told)


def test_the_report_of_one_program_has_its_figures(net, samples, tmp_path):
    save_program(net, tmp_path)
    report = evaluate_programs(net, None, samples, QUICK, folders={"dense": tmp_path})
    losses, answers = one_by_one(net, samples)
    dense = report["dense"]
    assert dense["loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    right = sum(a == b for a, b in zip(answers, samples.targets, strict=True))
    assert dense["score"] == right / 50
    assert dense["parameters"] == 6 * 27 + 6 + 6 * judging.CLASSES + judging.CLASSES
    assert dense["parameter_bytes"] == 4 * dense["parameters"]
    files = tmp_path.glob("*.safetensors")
    assert dense["disk_bytes"] == sum(file.stat().st_size for file in files)
    assert dense["macs_per_sample"] == 36 * 6 * 27 + 6 * judging.CLASSES
    assert dense["ms_per_sample"] > 0
    assert report["task"] == {"measure": "top-1", "higher_is_better": True, "loss": "nats"}
    assert report["data"] == {
        "path": str(samples.path), "samples": 50, "samples_per_batch": 8,
        "inputs": {"image": [8, 6, 6, 3]},
    }  # fmt: skip
    assert (report["seed"], report["dtype"]) == (3, "float32")
    assert machine().items() <= report.items()
    assert "paired" not in report and json.dumps(report, allow_nan=False)


def test_a_pruned_program_is_compared_sample_by_sample(net, pruned, samples):
    report = evaluate_programs(net, pruned, samples, QUICK)
    dense, small, paired = (report[name] for name in ("dense", "compressed", "paired"))
    assert small["parameters"] < dense["parameters"]
    assert small["macs_per_sample"] == cost(pruned.at({"batch": 1})).macs < dense["macs_per_sample"]
    assert small["disk_bytes"] is None
    for key in ("loss", "score"):
        assert paired[key]["estimate"] == pytest.approx(small[key] - dense[key], abs=1e-6)
        assert paired[key]["low"] <= paired[key]["estimate"] <= paired[key]["high"]
    assert paired["speedup"]["low"] <= paired["speedup"]["estimate"] <= paired["speedup"]["high"]
    assert json.dumps(report, allow_nan=False)


def test_a_program_does_not_differ_from_itself(alike):
    program, samples = alike
    report = evaluate_programs(program, program, samples, QUICK)
    for key in ("loss", "score"):
        assert set(report["paired"][key].values()) == {0.0}
    assert report["task"]["measure"] == "Spearman"
    assert report["data"]["inputs"]["input_ids"] == [16, 7]


def test_the_interval_of_the_score_is_that_of_slow_resamples(alike):
    _, samples = alike
    rng = np.random.default_rng(5)
    dense, small = (samples.targets + noise * rng.standard_normal(30) for noise in (0.1, 0.8))
    losses = [np.zeros(30, np.float32), np.arange(30, dtype=np.float32)]
    got = compare_samples(samples, (losses[0], dense), (losses[1], small), QUICK)
    from scipy.stats import spearmanr

    draws, found = np.random.default_rng(QUICK.seed), []
    for _ in range(QUICK.resamples):
        chosen = [int(k) for k in draws.integers(30, size=30)]
        truth = [float(samples.targets[k]) for k in chosen]
        each = [spearmanr([a[k] for k in chosen], truth)[0] for a in (small, dense)]
        found.append(each[0] - each[1])
    low, high = np.percentile(found, [2.5, 97.5])
    assert (got["score"]["low"], got["score"]["high"]) == pytest.approx((low, high), abs=1e-9)
    assert got["score"]["high"] < 0 and got["loss"]["estimate"] == np.arange(30).mean()
    assert got["loss"]["low"] > 0


def test_programs_take_turns_and_the_warm_up_is_not_counted(net, pruned, samples, monkeypatch):
    order = []
    programs = {"dense": net, "compressed": pruned}
    from mlx_compress import evaluate_samples

    run = evaluate_samples.run

    def seen(graph, *rest):
        order.append(len(graph.parameters) and graph.shapes()["head.weight"][1])
        return run(graph, *rest)

    monkeypatch.setattr(evaluate_samples, "run", seen)
    taken = batch_seconds(programs, samples, repeats=2)
    assert {name: len(each) for name, each in taken.items()} == {"dense": 2, "compressed": 2}
    small = pruned.graph.shapes()["head.weight"][1]
    assert order == [6, small, small, 6, 6, small]


def test_a_loss_that_is_not_finite_is_named(net, samples):
    weights = dict(net.fetch(list(net.graph.parameters)))
    broken = with_weights(net, weights | {"head.bias": mx.array([0.0, mx.inf, 0, 0])})
    with pytest.raises(InputError, match="compressed: the loss on sample 0 is not finite; its wei"):
        evaluate_programs(net, broken, samples, QUICK)


def test_one_sample_gives_no_interval(net, samples, tmp_path):
    for name in ("train", "test"):
        judging.write(tmp_path / f"{name}.npz", judging.images(1))
    alone = read_samples(net, tmp_path, "evaluation", count=1, batch_size=8)
    with pytest.raises(InputError, match="test.npz: 1 sample gives no interval; give more"):
        evaluate_programs(net, None, alone)


def test_samples_of_another_program_are_refused(alike, samples):
    with pytest.raises(InputError, match=r"input 0: shape \(8, 6, 6, 3\), but \(batch, len"):
        score_samples(alike[0], samples)


def test_a_trained_resnet_is_right_about_cifar10(tmp_path):
    torch = pytest.importorskip("torch")
    from mlx_compress.benchmarks.networks import cifar10_test, trained_resnet
    from mlx_compress.bridges.programs import imported_program
    from mlx_compress.bridges.torch import from_torch

    module = trained_resnet(DATA, 20)
    if module is None:
        pytest.skip("needs ../shared/data/cnn-resnet-cifar10 and cifar10-lossless")
    images, labels = cifar10_test(DATA, 100)
    program = imported_program(from_torch(module, [torch.zeros(2, 3, 32, 32)]))
    for name in ("train", "test"):
        judging.write(tmp_path / f"{name}.npz", {"pixels": images, "labels": labels})
    samples = read_samples(program, tmp_path, "evaluation", count=100, batch_size=32)
    with torch.no_grad():
        want = module(torch.from_numpy(images)).argmax(-1).numpy()
    _, answers = score_samples(program, samples)
    assert (answers == want).all() and samples.score(answers) == (want == labels).mean() > 0.88
