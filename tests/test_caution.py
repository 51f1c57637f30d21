"""What is said of calibration text: too little of it, another language, one that nobody knows."""

import math
from pathlib import Path

import numpy as np
import pytest

import judging
import plain
from mlx_compress import caution, recipe
from mlx_compress.axes import named_axes
from mlx_compress.calibrate import calibrate
from mlx_compress.options import Options
from mlx_compress.scoring import on_text

MODEL = Path(recipe.__file__).parent / "assets" / "books5m"
GREEK = "το ποτάμι ήταν ήσυχο τον Αύγουστο και οι βάρκες έμεναν στην άμμο όλο το πρωί".split()
BOOKS = {"nats_per_token": 3.9, "nats_per_byte": 1.13}


def test_alike_texts_are_not_remarked_on():
    assert caution.another_text(BOOKS, BOOKS) == []
    assert caution.another_text({"nats_per_token": 3.6, "nats_per_byte": 1.05}, BOOKS) == []
    assert caution.another_text({**BOOKS, "nats_per_byte": None}, BOOKS) == []


@pytest.mark.parametrize(
    ("token", "byte", "words"),
    [
        (6.7, 1.9, "perplexity 812 (1.90 nats/byte), evaluation text 49.4 (1.13 nats/byte)"),
        (2.0, 0.6, "perplexity 7.39 (0.60 nats/byte)"),
        (4.1, 4.1, "perplexity 60.3 (4.10 nats/byte)"),
        (6.7, None, "perplexity 812, evaluation"),
        (math.inf, None, "evaluation text 49.4"),
    ],
)
def test_texts_that_differ_are_named_with_the_remedy(token, byte, words):
    (note,) = caution.another_text({"nats_per_token": token, "nats_per_byte": byte}, BOOKS)
    assert words in note and "calibrate on text like what the model will read" in note


def test_a_language_that_the_model_does_not_know_is_asked_about():
    foreign = {"nats_per_token": 10.8, "nats_per_byte": 3.9}
    (note,) = caution.another_text(foreign, foreign)
    assert "5.6 bits a byte" in note and "language" in note


def test_foreign_calibration_text_is_remarked_on(tmp_path):
    text = tmp_path / "text.txt"
    drawn = np.random.default_rng(0).choice(GREEK, 2000)
    text.write_text(" ".join(drawn), encoding="utf8")
    options = Options(
        pruning_ratio=0.2, importance="wanda", calibration_samples=8, max_seq_length=64
    )
    calibration = on_text(recipe.open_model(MODEL), text, options, [])
    assert calibration.unlike(BOOKS) == []  # nothing was read: nothing is said
    assert calibration.named
    (note,) = calibration.unlike(BOOKS)
    assert "nats/byte" in note and calibration.bytes_per_token < 2


@pytest.mark.parametrize(("count", "few"), [(1, True), (59, True), (60, False)])
def test_fewer_rows_than_ten_for_each_input_are_remarked_on(tmp_path, count, few):
    net = judging.convolutions()
    file = judging.write(tmp_path / "data.npz", judging.images(2 * count))
    samples = judging.read(net, file, "calibration", count=count, batch_size=1)
    named = named_axes(net.at({"batch": 1}))
    plan = plain.random_plan(named, named.free(), seed=1)
    statistics = calibrate(named, samples.batches, net.fetch, dims=plan.cuts)
    note = caution.too_few(named, plan, statistics, "rows")
    assert (note is not None) == few
    if few:
        assert note == f"{count} rows for 6 inputs of head.weight: give more --calibration-samples"
