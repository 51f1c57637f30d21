"""Samples: what is read, in which batches, and that losses and measures are the slow ones."""

import math

import mlx.core as mx
import numpy as np
import pytest

import judging
from judging import folder_of, read, run, slope
from mlx_compress.data import SPLITS
from mlx_compress.errors import InputError


@pytest.fixture(scope="module")
def net():
    return judging.convolutions()


@pytest.fixture(scope="module")
def encoder():
    return judging.encoder()


def slow_cross_entropy(logits, label):
    top = max(logits)
    return top + math.log(sum(math.exp(x - top) for x in logits)) - logits[label]


# ---- labelled arrays


def test_the_loss_of_labelled_arrays_is_the_slow_cross_entropy(net, tmp_path):
    samples = read(net, folder_of(tmp_path, lambda s: judging.images(6, s), ".npz"), batch_size=3)
    for b in range(2):
        (logits,) = run(net, samples, b)
        labels = samples.targets[3 * b : 3 * b + 3]
        want = [slow_cross_entropy(z, n) for z, n in zip(logits.tolist(), labels, strict=True)]
        np.testing.assert_allclose(np.array(samples.loss(b, [logits])), want, rtol=1e-5)
        assert samples.loss(b, [logits]).dtype == mx.float32
        assert samples.answers(b, [logits]).tolist() == [z.index(max(z)) for z in logits.tolist()]
    assert (samples.measure, samples.higher_is_better, samples.task.unit) == ("top-1", True, "nats")


def test_the_gradient_of_the_cross_entropy_is_that_of_finite_differences(net, tmp_path):
    samples = read(net, folder_of(tmp_path, lambda s: judging.images(3, s), ".npz"))
    logits = np.array(run(net, samples, 0)[0], np.float64)
    got = mx.grad(lambda z: samples.loss(0, [z]).sum())(mx.array(logits.astype(np.float32)))

    def loss(z):
        pairs = zip(z.tolist(), samples.targets, strict=True)
        return sum(slow_cross_entropy(row, label) for row, label in pairs)

    np.testing.assert_allclose(np.array(got), slope(loss, logits), atol=1e-6)


def test_a_sample_keeps_its_label_and_its_pixels(net, tmp_path):
    data = judging.images(9)
    data["labels"] = np.arange(9) % judging.CLASSES
    data["image"][:, 0, 0, 0] = np.arange(9)
    folder_of(tmp_path, lambda seed: data, ".npz")
    for split in SPLITS:
        samples = read(net, tmp_path, split, count=6, batch_size=2, seed=4)
        drawn = [int(n) for (image,) in samples.batches for n in np.array(image)[:, 0, 0, 0]]
        assert [n % judging.CLASSES for n in drawn] == samples.targets.tolist()
        assert len(set(drawn)) == 6
    assert drawn == sorted(drawn) != [0, 1, 2, 3, 4, 5]


def test_calibration_is_drawn_by_the_seed_and_evaluation_is_always_the_same(net, tmp_path):
    folder_of(tmp_path, lambda s: judging.images(40, s), ".npz")

    def drawn(split, seed):
        return np.array(read(net, tmp_path, split, count=8, seed=seed).batches[0][0]).tobytes()

    assert drawn("calibration", 1) == drawn("calibration", 1) != drawn("calibration", 2)
    assert drawn("evaluation", 1) == drawn("evaluation", 2) != drawn("calibration", 1)


def test_calibration_has_whole_batches_and_evaluation_every_sample(net, tmp_path):
    folder_of(tmp_path, lambda s: judging.images(10, s), ".npz")
    whole, every = (read(net, tmp_path, split, count=10, batch_size=4) for split in SPLITS)
    assert [(len(s), len(s.batches)) for s in (whole, every)] == [(8, 2), (10, 3)]
    assert {b[0].shape for s in (whole, every) for b in s.batches} == {(4, 6, 6, 3)}
    assert whole.sizes(net) == {"batch": 4}
    assert [len(every.loss(b, run(net, every, b)).tolist()) for b in range(3)] == [4, 4, 2]


def test_what_fills_a_batch_counts_nowhere(net, tmp_path):
    folder_of(tmp_path, lambda s: judging.images(5, s), ".npz")
    alone, filled = (read(net, tmp_path, batch_size=size) for size in (1, 3))
    losses = [
        np.concatenate([np.array(s.loss(b, run(net, s, b))) for b in range(len(s.batches))])
        for s in (alone, filled)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_samples_are_split_by_batches(net, tmp_path):
    folder_of(tmp_path, lambda s: judging.images(10, s), ".npz")
    samples = read(net, tmp_path)
    first, rest = samples.split(1)
    assert (len(first), len(rest)) == (4, 6)
    assert [*first.batches, *rest.batches] == samples.batches
    assert [*first.targets, *rest.targets] == samples.targets.tolist()
    outputs = run(net, samples, 2)
    assert rest.loss(1, outputs).tolist() == samples.loss(2, outputs).tolist()


def test_the_score_counts_the_right_classes_where_it_is_asked(net, tmp_path):
    samples = read(net, folder_of(tmp_path, lambda s: judging.images(8, s), ".npz"))
    answers = samples.targets.copy()
    answers[:2] = (answers[:2] + 1) % judging.CLASSES
    assert samples.score(answers) == 6 / 8
    assert samples.score(answers, np.array([0, 0, 7, 5])) == 2 / 4


def test_an_array_of_any_name_serves_a_single_input(net, tmp_path):
    data = judging.images(4)
    data["x_test"] = data.pop("image")
    samples = read(net, folder_of(tmp_path, lambda seed: data, ".npz"))
    assert np.array_equal(samples.batches[0][0], data["x_test"])


def test_the_batch_of_a_program_that_fixes_it_is_taken(tmp_path):
    program = judging.convolutions(3, is_open=False)
    folder_of(tmp_path, lambda s: judging.images(5, s), ".npz")
    assert [b[0].shape[0] for b in read(program, tmp_path).batches] == [3, 3]
    with pytest.raises(InputError, match=r"2 samples do not fill a batch of 3, which is the prog"):
        read(program, tmp_path, "calibration", count=2)


# ---- files and splits


@pytest.mark.parametrize("suffix", [".npz", ".jsonl"])
def test_a_single_file_is_divided_in_halves(net, encoder, tmp_path, suffix):
    content, program = (judging.images(7), net) if suffix == ".npz" else (judging.pairs(7), encoder)
    path = judging.write(tmp_path / f"all{suffix}", content)
    first, second = (read(program, path, split, batch_size=1) for split in SPLITS)
    assert (len(first), len(second)) == (4, 3)
    notice = f"{path}: calibration reads its first half, evaluation its second."
    assert first.notice.startswith(notice) and first.path == path
    if suffix == ".npz":
        assert second.targets.tolist() == content["labels"][4:].tolist()
        assert sorted(first.targets) == sorted(content["labels"][:4])
    else:
        whole = sorted([*first.targets.tolist(), *second.targets.tolist()])
        np.testing.assert_allclose(whole, [r["score"] / 5 for r in content], atol=1e-6)


def test_each_split_has_its_file_and_what_was_not_asked_for_is_said(net, tmp_path):
    judging.write(tmp_path / "valid.npz", judging.images(4))
    judging.write(tmp_path / "test.npz", judging.images(4))
    calibration, evaluation = (read(net, tmp_path, split, count=4) for split in SPLITS)
    assert calibration.notice == f"{tmp_path}: no train split, so calibration reads valid.npz."
    assert (evaluation.path.name, evaluation.notice) == ("test.npz", "")
    short = f"{evaluation.path}: evaluation has 4 of the 9 samples asked for."
    assert read(net, tmp_path, count=9).notice == short


def test_a_file_that_is_sorted_by_label_is_said_before_it_is_halved(net, tmp_path):
    data = judging.images(8)
    data["labels"].sort()
    notice = read(net, judging.write(tmp_path / "all.npz", data)).notice
    assert "is sorted by label, so that its halves hold other classes; shuffle it" in notice


NOTHING = [
    ("none", r"none: no such file or folder; --data takes .* as .npz or .jsonl, or one such file"),
    (".", r"no data in this folder \(looked for test.jsonl, test.npz, train.jsonl, train.npz"),
    ("a.csv", r"a.csv: .csv is not read; give a .jsonl or .npz file"),
]


@pytest.mark.parametrize(("name", "message"), NOTHING)
def test_missing_data_are_named(net, tmp_path, name, message):
    if name.endswith(".csv"):
        (tmp_path / name).write_text("1")
    with pytest.raises(InputError, match=message):
        read(net, tmp_path / name)


def spoiled(**changes):
    data = judging.images(6) | changes
    return {name: array for name, array in data.items() if array is not None}


def with_entry(value, place):
    image = judging.images(6)["image"]
    image[place] = value
    return spoiled(image=image)


PIXELS = (np.zeros((6, 6, 6, 3)) + 3).astype(np.uint8)
ARRAYS = [
    (spoiled(labels=None), r"has no array 'labels' \(but image\); add the class of each sample"),
    (spoiled(image=None), r"has no array 'image' \(but labels\); give one for each input"),
    (spoiled(image=None, a=PIXELS, b=PIXELS), r"has no array 'image' \(but labels, a, b\)"),
    (spoiled(labels=np.eye(6)), r"labels are float64 \(6, 6\), integers \[N\].*labels.argmax"),
    (spoiled(labels=np.ones(6)), r"labels are float64 \(6,\).*labels.astype\('int32'\)"),
    (spoiled(labels=np.array([0, 1, 4, 0, 0, 0])), r"labels\[2\] is 4, but .* 4 classes, 0 to 3"),
    (spoiled(labels=np.array([0, -1, 0, 0, 0, 0])), r"labels\[1\] is -1, but the program has 4"),
    (spoiled(labels=np.zeros(5, int)), r"6 rows of image, but 5 of labels; both need one for"),
    (spoiled(labels=np.zeros(0, int), image=np.zeros((0, 6, 6, 3))), r"0 samples are too few"),
    (spoiled(image=np.zeros((6, 3, 6, 6))),
     r"array image is \(6, 3, 6, 6\), but the program takes \(batch, 6, 6, 3\); give its axes"),
    (spoiled(image=np.zeros((6, 108))), r"array image is \(6, 108\), but the program takes"),
    (spoiled(image=PIXELS), r"array image is uint8, but the program takes float32; scale it as"),
    (with_entry(np.nan, (4, 1, 2, 0)), r"array image holds nan at \[4, 1, 2, 0\]; only finite"),
    (with_entry(-np.inf, (0, 0, 0, 2)), r"array image holds -inf at \[0, 0, 0, 2\]"),
    (spoiled(image=np.full((6, 6, 6, 3), None)), r"array image cannot be read \(Object arrays"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "message"), ARRAYS)
def test_arrays_that_do_not_fit_are_named_with_a_remedy(net, tmp_path, content, message):
    judging.write(tmp_path / "train.npz", judging.images(6))
    judging.write(tmp_path / "test.npz", content)
    with pytest.raises(InputError, match=f"test.npz: .*{message}") as caught:
        read(net, tmp_path)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_a_strange_number_is_found_where_it_lies_in_the_file(net, tmp_path):
    path = judging.write(tmp_path / "all.npz", with_entry(np.nan, (4, 1, 2, 0)))
    assert len(read(net, path, "calibration")) == 3
    with pytest.raises(InputError, match=r"array image holds nan at \[4, 1, 2, 0\]"):
        read(net, path, "evaluation")


def test_a_lone_sample_is_not_halved(net, tmp_path):
    path = judging.write(tmp_path / "all.npz", judging.images(1))
    with pytest.raises(InputError, match="1 samples are too few to read a half .*train.npz and"):
        read(net, path)


@pytest.mark.parametrize("spoil", [b"", b"not a zip", None], ids=["empty", "text", "cut"])
def test_a_damaged_npz_is_named(net, tmp_path, spoil):
    path = judging.write(tmp_path / "all.npz", judging.images(6))
    path.write_bytes(path.read_bytes()[:-30] if spoil is None else spoil)
    with pytest.raises(InputError, match=r"all.npz: not a readable .npz \(") as caught:
        read(net, path)
    assert "\n" not in str(caught.value)


def test_a_single_array_under_another_name_is_named(net, tmp_path):
    with (tmp_path / "all.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(InputError, match=r"all.npz: holds a single array; save it by name"):
        read(net, tmp_path / "all.npz")


def test_token_ids_with_labels_must_lie_in_the_table(encoder, tmp_path):
    program = judging.encoder(pools=True)
    ids = np.array([[1, 2, 3], [4, 12, 5]])
    data = {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": np.array([0, 4])}
    path = folder_of(tmp_path, lambda seed: data, ".npz")
    with pytest.raises(InputError, match=r"input_ids holds 12 at \[1, 1\], but .* has 12 rows"):
        read(program, path)
    data["input_ids"] = ids % 12
    samples = read(program, folder_of(tmp_path, lambda seed: data, ".npz"))
    assert [a.dtype for a in samples.batches[0]] == [mx.int32, mx.int32]
    data["attention_mask"] = np.ones((2, 4), int)
    with pytest.raises(InputError, match=r"test.npz: input 1: shape \(2, 4\), but \(batch, len"):
        read(program, folder_of(tmp_path, lambda seed: data, ".npz"))
    data["attention_mask"] = np.ones((2, 3))
    with pytest.raises(InputError, match=r"attention_mask is float64, but the program takes int32"):
        read(program, folder_of(tmp_path, lambda seed: data, ".npz"))
    with pytest.raises(InputError, match=r"output states is \(batch, length, 5\)"):
        read(encoder, path)


def test_counts_are_checked(net, tmp_path):
    with pytest.raises(InputError, match="0 samples in batches of 4: both must be at least 1"):
        read(net, tmp_path, count=0)
