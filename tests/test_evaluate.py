import json
import math
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from mlx_compress import evaluate
from mlx_compress.data import Windows
from mlx_compress.errors import InputError
from mlx_compress.evaluate import (
    EvaluateConfig,
    Runner,
    bootstrap_interval,
    cached_runner,
    compare_scores,
    disk_bytes,
    evaluate_pair,
    parameter_count,
    peak_bytes,
    perplexity,
    prefill_decode_speed,
    score_tokens,
    subject,
    token_losses,
)

BOOKS = Path(__file__).parents[2] / "shared" / "data" / "lm-books5m"
VOCABULARY = 11


class Total:
    """The cache of `SumModel`: the sum of all embeddings so far."""

    state = None


class SumModel(nn.Module):
    """Logits from the sum of all embeddings so far: a tiny model with a cache as mlx-lm's have."""

    def __init__(self, seed=0):
        super().__init__()
        mx.random.seed(seed)
        self.embedding = nn.Embedding(VOCABULARY, 32)
        self.head = nn.Linear(32, VOCABULARY)
        self.update({"head": {"weight": mx.random.normal((VOCABULARY, 32))}})
        mx.eval(self.parameters())

    def __call__(self, tokens, cache=None):
        sums = mx.cumsum(self.embedding(tokens), axis=1)
        if cache is not None:
            sums = sums if cache[0].state is None else sums + cache[0].state
            cache[0].state = sums[:, -1:]
        return self.head(sums)


def make_cache(model):
    return [Total()]


def some_windows(count=5, length=6, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, VOCABULARY, (count, length)).astype(np.int32)


def as_windows(tokens):
    return Windows(tokens, np.full(len(tokens), 3 * tokens.shape[1] - 3), Path("test.txt"))


def table_of(logits_NTV):
    """A `logits_fn` that hands out the rows of `logits_NTV` in order, over and over."""
    place = -1

    def logits_fn(tokens):
        nonlocal place
        if place < 0:  # the first call only looks at the shape
            place = 0
            return logits_NTV[: tokens.shape[0]]
        rows = [(place + i) % len(logits_NTV) for i in range(tokens.shape[0])]
        place += tokens.shape[0]
        return logits_NTV[mx.array(rows)]

    return logits_fn


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_losses_equal_the_slow_loop(dtype, batch_size):
    windows = some_windows(4, 5)
    logits = (20 * mx.random.normal((4, 5, VOCABULARY), key=mx.random.key(1))).astype(dtype)
    slow = np.array(logits.astype(mx.float32)).tolist()
    losses, tops = score_tokens(table_of(logits), windows, batch_size)
    assert losses.dtype == np.float32 and losses.shape == (4, 4)
    np.testing.assert_allclose(losses, reference.token_losses(slow, windows), rtol=1e-5, atol=1e-5)
    assert tops.tolist() == reference.top_tokens(slow)


@settings(deadline=None)
@given(st.integers(1, 7), st.integers(1, 9))
def test_every_batch_has_all_its_rows_and_every_window_one_loss(count, batch_size):
    shapes, model, windows = set(), SumModel(), some_windows(count)

    def traced(tokens):
        shapes.add(tuple(tokens.shape))
        return model(tokens)

    losses = token_losses(traced, windows, batch_size)
    assert shapes == {(batch_size, 6)}
    np.testing.assert_allclose(losses, token_losses(model, windows, 1), rtol=1e-4, atol=1e-4)


def test_batches_shrink_where_logits_would_not_fit(monkeypatch):
    rows, windows = [], some_windows(5)
    model = SumModel()
    monkeypatch.setattr(evaluate, "LOGITS_BYTES", 2 * 4 * 6 * VOCABULARY)
    losses = token_losses(lambda t: rows.append(len(t)) or model(t), windows, 8)
    assert rows == [8, 2, 2, 2]  # the first only looks at the shape
    np.testing.assert_allclose(losses, token_losses(model, windows, 1), rtol=1e-4, atol=1e-4)


def test_a_model_that_knows_nothing_loses_log_vocabulary():
    losses = token_losses(lambda tokens: mx.zeros((*tokens.shape, 7)), some_windows() % 7)
    np.testing.assert_allclose(losses, math.log(7), rtol=1e-6)
    sizes = np.full(5, 10)
    assert perplexity(losses, sizes).perplexity == pytest.approx(7)
    assert perplexity(losses, sizes).nats_per_byte == pytest.approx(math.log(7) / 2)
    assert perplexity(losses).nats_per_byte is None
    assert perplexity(losses).tokens == 25


def test_progress_counts_windows():
    seen = []
    score_tokens(SumModel(), some_windows(5), 2, "dense", progress=lambda *step: seen.append(step))
    assert seen == [("dense", 2, 5), ("dense", 4, 5), ("dense", 5, 5)]


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(0, 99), st.sampled_from([1, 2**22]))
def test_the_bootstrap_equals_the_slow_loop(count, seed, draws):
    rng = np.random.default_rng(seed + 100)
    numerator, denominator = rng.normal(size=count), rng.integers(1, 9, count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "DRAWS", draws)
        found = bootstrap_interval(numerator, denominator, seed=seed, resamples=50)
    slow = reference.bootstrap_ratios(numerator, denominator, seed=seed, resamples=50)
    assert found["low"] == pytest.approx(reference.percentile(slow, 2.5))
    assert found["high"] == pytest.approx(reference.percentile(slow, 97.5))
    assert found["estimate"] == pytest.approx(sum(numerator) / sum(denominator))


def test_the_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(300):
        found = bootstrap_interval(rng.normal(1, 1, 50), np.ones(50), seed=seed, resamples=400)
        hits += found["low"] <= 1 <= found["high"]
    assert 0.90 <= hits / 300 <= 0.98


@settings(deadline=None)
@given(st.floats(-1, 1))
def test_an_even_loss_has_no_width_and_its_own_size(shift):
    losses = np.random.default_rng(0).normal(4, 2, (9, 5))
    tops = np.zeros((9, 5), np.int32)
    sizes = np.arange(1, 10)
    paired = compare_scores((losses, tops), (losses + shift, tops), sizes)
    assert paired["nats_per_token"]["low"] == pytest.approx(shift)
    assert paired["nats_per_token"]["high"] == pytest.approx(shift)
    assert paired["nats_per_byte"]["estimate"] == pytest.approx(shift * 45 / sizes.sum())
    assert paired["top_token_agreement"] == {"estimate": 1, "low": 1, "high": 1}


def test_agreement_is_the_fraction_of_positions():
    dense, other = np.zeros((4, 10), np.int32), np.zeros((4, 10), np.int32)
    other[:2, 0] = 1
    paired = compare_scores((np.ones((4, 10)), dense), (np.ones((4, 10)), other))
    agreement = paired["top_token_agreement"]
    assert agreement["estimate"] == pytest.approx(0.95)
    assert 0.9 == pytest.approx(agreement["low"]) and agreement["high"] == pytest.approx(1)
    assert paired["nats_per_byte"] is None


def test_pairing_makes_the_interval_narrow():
    rng = np.random.default_rng(0)
    dense = rng.normal(4, 1, (100, 1)) + rng.normal(0, 0.1, (100, 20))
    worse = dense + 0.1 + rng.normal(0, 0.1, (100, 20))
    tops = np.zeros((100, 20))
    paired = compare_scores((dense, tops), (worse, tops))["nats_per_token"]
    alone = bootstrap_interval(worse.sum(1), np.full(100, 20))
    assert 0 < paired["low"] < 0.1 < paired["high"]
    assert 10 * (paired["high"] - paired["low"]) < alone["high"] - alone["low"]


@pytest.mark.parametrize("length", [1, 2, 6])
def test_prefill_and_steps_give_the_logits_of_the_whole(length):
    model = SumModel()
    tokens = mx.array(some_windows(1, 9))
    runner = cached_runner(model, make_cache)
    logits, state = runner.prefill(tokens[:, :length])
    steps = [logits]
    for t in range(length, 9):
        logits, state = runner.step(tokens[:, t : t + 1], state)
        steps.append(logits)
    expected = model(tokens)[:, length - 1 :]
    np.testing.assert_allclose(mx.concatenate(steps, axis=1), expected, rtol=1e-4, atol=1e-4)


def test_speeds_are_interleaved_and_the_warm_up_is_not_counted(monkeypatch):
    calls, clock = [], 0.0

    def runner(name, prefill_s, step_s):
        def work(kind, seconds):
            nonlocal clock
            clock += seconds
            calls.append((kind, name))
            return mx.zeros((1, 1, VOCABULARY)), None

        return Runner(lambda tokens: work("prefill", prefill_s), lambda t, s: work("step", step_s))

    monkeypatch.setattr(evaluate.time, "perf_counter", lambda: clock)
    runners = {"dense": runner("dense", 2.0, 0.5), "compressed": runner("compressed", 1.0, 0.25)}
    prompt = mx.zeros((1, 10), mx.int32)
    rates = prefill_decode_speed(runners, prompt, decode_tokens=4, repeats=3)
    assert rates["dense"] == {"prefill": [5.0] * 3, "decode": [2.0] * 3}
    assert rates["compressed"] == {"prefill": [10.0] * 3, "decode": [4.0] * 3}
    turns = [name for kind, name in calls if kind == "prefill"]
    d, c = "dense", "compressed"
    assert turns == [d, c, c, d, d, c, c, d]
    assert calls.count(("step", "dense")) == 16


def test_peak_bytes_leaves_out_what_was_there_before():
    resident = mx.ones((1024, 1024))
    mx.eval(resident)
    size = 4 * 512 * 512
    peak = peak_bytes(lambda: mx.ones((512, 512)) * 2, own_bytes=100)
    assert size <= peak - 100 < 3 * size
    assert peak_bytes(lambda: None, own_bytes=100) == 100


def test_a_quantised_model_has_the_parameters_of_the_dense():
    model = nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 8, bias=False))
    count = 64 * 32 + 32 + 2 * 32 + 32 * 8
    assert parameter_count(model) == count
    for bits in (3, 4, 8):
        packed = nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 8, bias=False))
        nn.quantize(packed, group_size=32, bits=bits)
        assert parameter_count(packed) == count


def test_disk_bytes_count_every_shard_and_nothing_else(tmp_path):
    for name, size in (("model-1.safetensors", 10), ("model-2.safetensors", 5), ("a.json", 7)):
        (tmp_path / name).write_bytes(b"x" * size)
    assert disk_bytes(tmp_path) == 15
    with pytest.raises(InputError, match="nowhere: no safetensors files; give the folder"):
        disk_bytes(tmp_path / "nowhere")


def test_a_pair_is_reported_with_all_that_was_measured(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x" * 10)
    dense, compressed = SumModel(0), SumModel(1)
    tokens = some_windows(6)
    config = EvaluateConfig(batch_size=4, seed=3, resamples=100, decode_tokens=2, repeats=2)
    report = evaluate_pair(
        subject(dense, folder=tmp_path, make_cache=make_cache),
        subject(compressed, make_cache=make_cache),
        as_windows(tokens),
        config,
    )
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert {"machine", "chip", "versions", "seed", "dtype"} <= set(report)
    assert (report["seed"], report["dtype"], report["dense"]["disk_bytes"]) == (3, "float32", 10)
    assert report["compressed"]["disk_bytes"] is None
    assert all(value for key, value in report["dense"].items())
    difference = report["compressed"]["nats_per_token"] - report["dense"]["nats_per_token"]
    expected = token_losses(compressed, tokens).mean() - token_losses(dense, tokens).mean()
    for value in (difference, report["paired"]["nats_per_token"]["estimate"]):
        assert value == pytest.approx(expected, rel=1e-4)
    assert report["paired"]["decode_speedup"]["low"] > 0


def test_a_single_model_and_one_without_a_cache_are_reported_too():
    report = evaluate_pair(subject(SumModel()), None, as_windows(some_windows()))
    assert "paired" not in report and "compressed" not in report
    assert report["dense"]["decode_tokens_per_s"] is None and report["dense"]["peak_bytes"] is None
    pair = evaluate_pair(subject(SumModel()), subject(SumModel()), as_windows(some_windows()))
    assert pair["paired"]["prefill_speedup"] is None
    assert pair["paired"]["nats_per_token"] == {"estimate": 0, "low": 0, "high": 0}


def test_bad_input_is_named():
    model = SumModel()
    beyond = some_windows() + 1
    beyond[0, 0] = VOCABULARY
    with pytest.raises(InputError, match="token id 11 is beyond the 11 logits of the model; use"):
        token_losses(model, beyond)
    model.head.weight = model.head.weight * float("nan")
    with pytest.raises(InputError, match="dense: the loss on window 0 is not finite; .* float32"):
        score_tokens(model, some_windows(), 2, "dense")
    with pytest.raises(InputError, match="test.txt: 1 window of 6 tokens gives no interval; give"):
        evaluate_pair(subject(model), None, as_windows(some_windows(1)))
    with pytest.raises(InputError, match="repeats is 0; it must be at least 1"):
        EvaluateConfig(repeats=0)


@pytest.mark.skipif(not BOOKS.is_dir(), reason=f"{BOOKS} is not here")
def test_the_books_model_is_as_good_as_its_source_says():
    mlx_lm = pytest.importorskip("mlx_lm")
    from mlx_lm.models.cache import make_prompt_cache

    from mlx_compress.data import load_windows

    model, tokenizer = mlx_lm.load(str(BOOKS))
    windows = load_windows(BOOKS, "evaluation", tokenizer, length=128, count=16)
    config = EvaluateConfig(decode_tokens=2, repeats=1)
    each = subject(model, folder=BOOKS, make_cache=make_prompt_cache)
    report = evaluate_pair(each, None, windows, config)["dense"]
    # SOURCE.txt: 3.825 nats a token on windows of 256; these are shorter, and few.
    assert 3.6 < report["nats_per_token"] < 4.4
    assert 2.9 < report["bytes"] / report["tokens"] < 3.9
    assert report["parameters"] == 5_475_584
    assert report["disk_bytes"] == (BOOKS / "model.safetensors").stat().st_size
    assert report["parameter_bytes"] < report["peak_bytes"] < 3 * report["parameter_bytes"]
