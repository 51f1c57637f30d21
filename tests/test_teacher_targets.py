import json
import shutil
from collections import namedtuple
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_compress import teacher_targets
from mlx_compress.distill_text import Live, NextToken
from mlx_compress.errors import InputError, ResourceError
from mlx_compress.explained import Traced
from mlx_compress.losses import LOSSES
from mlx_compress.options import DistillOptions
from mlx_compress.teacher_targets import TargetFolder, likeliest
from mlx_compress.token_loss import Batch, gradients
from mlx_compress.training import train
from mlx_compress.training_state import TrainingFolder
from mlx_compress.training_text import Text
from tiny import LLAMA, VOCABULARY, build

TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (7, 9)).astype(np.int32)
TEXT = Text("train", TOKENS[:5], np.ones((5, 9), bool))
HELD = Text("held out", TOKENS[:2], TEXT.mask[:2])
OTHER, MORE = replace(HELD, tokens=TOKENS[3:5]), Text("held out", TOKENS[:3], TEXT.mask[:3])


def folder(place, *, teacher="t", texts=(TEXT, HELD), top_k=VOCABULARY, count=None):
    return TargetFolder(place, teacher, texts, top_k, count)


@pytest.fixture
def place(tmp_path):
    return tmp_path / "targets"


def batch(teacher, rows):
    tokens = mx.array(TEXT.tokens[rows])
    return Batch(tokens, mx.array(TEXT.mask[rows]) * 1.0, teacher(TEXT, rows, tokens[:, :-1]))


def test_the_likeliest_tokens_come_first_with_their_share_of_the_whole_vocabulary():
    logits = mx.random.normal((2, 3, 11), key=mx.random.key(0)) * 3
    logs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    found, kept, rest = likeliest(logits, 4)
    np.testing.assert_allclose(rest, np.log(np.exp(-np.sort(-logs))[..., 4:].sum(-1)), rtol=2e-3)
    np.testing.assert_array_equal(found, np.argsort(-logs, axis=-1)[..., :4])
    np.testing.assert_allclose(kept, -np.sort(-logs, axis=-1)[..., :4], rtol=2e-3)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_whole_vocabulary_on_disk_gives_the_gradients_of_the_teacher(loss, place):
    teacher, student = build(LLAMA, 0), build(LLAMA, 1)
    targets = folder(place)
    targets.write(teacher, batch_size=2)
    assert targets.complete
    options, rows = DistillOptions(loss=loss), np.array([3, 0])
    nats, expected = gradients(Traced(student), [batch(Live(teacher), rows)], options, t=0.6)
    got, grads = gradients(Traced(student), [batch(targets.teacher(), rows)], options, t=0.6)
    assert abs(nats.item() - got.item()) < 1e-2
    for path, grad in expected.items():
        np.testing.assert_allclose(grads[path], grad, atol=4e-3)


def test_a_student_that_is_its_teacher_is_no_way_off(place):
    """Even where a few tokens take all but a trace of the probability."""
    sharp = build(LLAMA, 0)
    sharp.lm_head.weight = sharp.lm_head.weight * 12
    targets = folder(place, top_k=6)
    targets.write(sharp, batch_size=2)
    batch_of = batch(targets.teacher(), np.arange(5))
    nats, _ = gradients(Traced(sharp), [batch_of], DistillOptions())
    assert abs(nats.item()) < 1e-4


def test_the_more_tokens_the_nearer_to_the_teacher(tmp_path):
    teacher, student = build(LLAMA, 0), build(LLAMA, 1)
    options, rows = DistillOptions(), np.arange(5)
    whole = gradients(Traced(student), [batch(Live(teacher), rows)], options)[1]["lm_head.weight"]
    errors = []
    for top_k in (1, 6, 20):
        targets = folder(tmp_path / str(top_k), top_k=top_k)
        targets.write(teacher, batch_size=2)
        _, some = gradients(Traced(student), [batch(targets.teacher(), rows)], options)
        errors.append(mx.abs(some["lm_head.weight"] - whole).sum().item())
    assert errors == sorted(errors, reverse=True)


def test_a_student_of_the_disk_is_that_of_the_teacher(place, tmp_path):
    options = DistillOptions(iters=6, batch_size=2, warmup=0, learning_rate=1e-2, steps_per_eval=3)
    targets = folder(place)
    targets.write(build(LLAMA, 0), batch_size=2)
    curves = []
    for name, teacher in (("disk", targets.teacher()), ("live", Live(build(LLAMA, 0)))):
        kept = TrainingFolder(tmp_path / name, {})
        objective = NextToken(build(LLAMA, 1), teacher, TEXT, HELD, options)
        curves.append(train(objective, options, kept).curve)
    for disk, told in zip(*curves, strict=True):
        assert abs(disk["divergence"] - told["divergence"]) < 5e-3
    assert curves[0][-1]["divergence"] < 0.9 * curves[0][0]["divergence"]


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_what_was_cut_off_is_asked_once_and_ends_the_same(stop, place, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_targets, "STEP", 1)
    teacher, asked = build(LLAMA, 0), []

    def logits(tokens):
        asked.append(len(tokens))
        if len(asked) == stop + 1:
            raise KeyboardInterrupt
        return teacher(tokens)

    with pytest.raises(KeyboardInterrupt):
        folder(place).write(logits, batch_size=2)
    folder(place).write(logits, batch_size=2)
    assert sum(asked) - asked[stop] == 7  # windows, each once, but for the call that was cut off
    folder(tmp_path / "whole").write(teacher, batch_size=2)
    for file in place.glob("*.npy"):
        assert file.read_bytes() == (tmp_path / "whole" / file.name).read_bytes()


@pytest.mark.parametrize(
    "changed, name",
    [({"teacher": "u"}, "--teacher"), ({"top_k": 3}, "--top-k"),
     ({"texts": (TEXT, OTHER)}, "--data, --seed"),
     ({"texts": (TEXT, MORE)}, "numbers of windows .*--iters, --batch-size and --val-samples"),
     ({"count": VOCABULARY - 1}, "vocabulary")],
)  # fmt: skip
def test_targets_of_something_else_are_refused(changed, name, place):
    folder(place).write(build(LLAMA, 0), batch_size=2)
    with pytest.raises(InputError, match=f"holds targets of (another|other) {name}"):
        folder(place, **changed).done()


def test_a_damaged_record_is_named(place):
    folder(place).write(build(LLAMA, 0), batch_size=2)
    (place / "targets.json").write_text(json.dumps({"done": 3}))
    with pytest.raises(InputError, match=r"targets.json: damaged .*; remove"):
        folder(place).done()


def test_a_lost_file_is_named(place):
    folder(place).write(build(LLAMA, 0), batch_size=2)
    (place / "train.indices.npy").unlink()
    with pytest.raises(InputError, match="remove the folder to make it anew"):
        folder(place).teacher()


def test_too_little_room_is_said_before_the_teacher_is_asked(place, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 1500))
    with pytest.raises(ResourceError, match="are free; --top-k 4 would fit; name a folder"):
        folder(place).write(None, batch_size=2)
    assert not place.exists()


def test_a_disk_that_fills_up_is_one_line(place, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(teacher_targets, "likeliest", full)
    with pytest.raises(ResourceError, match="the disk is full; name a folder on a larger disk"):
        folder(place).write(build(LLAMA, 0), batch_size=2)
    assert not place.exists()


def test_padding_of_the_vocabulary_is_never_kept(place):
    def padded(tokens):
        return mx.concatenate([build(LLAMA, 0)(tokens), mx.full((*tokens.shape, 4), 99.0)], axis=-1)

    folder(place, count=VOCABULARY).write(padded, batch_size=2)
    assert np.load(place / "train.indices.npy").max() < VOCABULARY
