"""The gate finds what would pass, and a model that loses too much is set aside."""

import json

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from mlx_compress import gate, recipe
from mlx_compress.data import Windows
from mlx_compress.errors import GateFailed, InputError
from mlx_compress.options import Options


@given(st.floats(0.01, 0.9), st.floats(0.05, 0.95))
def test_bisection_comes_near_to_the_largest_amount_that_passes(limit, asked):
    found = gate.most_that_passes(lambda removed: removed, asked, limit)
    best = min(limit, asked)
    if best > asked / 2**5:
        step = max(asked / 2**gate.STEPS, gate.NEAR * asked)
        assert found <= best and best - found <= 1.01 * step


def test_when_nothing_passes_it_says_so():
    assert gate.most_that_passes(lambda removed: 1.0, 0.5, 0.1) is None
    assert "no amount is known" in gate.words(Options(params=0.5), None)


def test_what_to_ask_for_is_said_in_the_words_that_were_used():
    assert gate.words(Options(params=0.5), 0.2) == "--target params=0.8 would pass"
    assert gate.words(Options(disk_mb=12), 0.2, 22.123) == "--target disk_mb=17.7 would pass"
    assert gate.words(Options(pruning_ratio=0.5), 0.2) == "--pruning-ratio 0.20 would pass"
    for options in (Options(params=0.5), Options(macs=0.5), Options(pruning_ratio=0.5)):
        assert gate.amount(gate.with_amount(options, 0.3)) == pytest.approx(0.3)


@given(st.sampled_from(["disk_mb", "latency_ms"]), st.floats(1e-3, 1e5), st.floats(0.01, 0.99))
def test_amounts_are_fractions_of_what_the_dense_model_spends(name, whole, removed):
    options = gate.with_amount(Options(**{name: whole / 2}), removed, whole)
    assert options.budget[0] == name
    assert gate.amount(options, whole) == pytest.approx(removed)
    asked = float(gate.words(options, removed, whole).split("=")[1].split()[0])
    least = whole * (1 - removed)  # what is said is rounded to the side that passes
    assert asked >= least * (1 - 1e-6) and asked <= whole * (1.0101 - int(100 * removed) / 100)


def test_a_drop_is_what_is_lost_or_a_fraction_of_the_dense_figure():
    assert gate.LOSS.drop(2.0, 2.5, "absolute") == 0.5
    assert gate.LOSS.drop(2.0, 2.5, "relative") == 0.25
    assert gate.LOSS.drop(2.0, 1.5, "relative") < 0
    top_1 = gate.Figure("score", "top-1", higher_is_better=True)
    assert top_1.drop(0.8, 0.6, "absolute") == pytest.approx(0.2)
    assert top_1.drop(0.8, 0.6, "relative") == pytest.approx(0.25)


def test_options_of_the_gate_are_checked():
    with pytest.raises(InputError, match="--max-drop -1: must be 0 or more"):
        Options(max_drop=-1)
    with pytest.raises(InputError, match="--drop-type both: unknown"):
        Options(drop_type="both")


def written_by(model):
    """Tokens [16, 12] that the model finds likely, each row from another first token."""
    tokens = mx.arange(16, dtype=mx.int32)[:, None]
    for _ in range(11):
        tokens = mx.concatenate([tokens, model(tokens)[:, -1:].argmax(-1).astype(mx.int32)], axis=1)
    return np.array(tokens)


@pytest.fixture
def compress(tmp_path, monkeypatch):
    """The whole job on a tiny model and text of its own, without what needs a tokenizer."""
    tiny.save(tiny.LLAMA, tmp_path / "model")
    windows = Windows(written_by(tiny.build(tiny.LLAMA)), np.full(16, 11), tmp_path / "words.txt")
    monkeypatch.setattr("mlx_compress.bridges.measure.sample", lambda *a: {})

    def run(**changes):
        model = recipe.open_model(tmp_path / "model")
        amount = {} if "disk_mb" in changes else {"pruning_ratio": 0.8}
        options = Options(**amount, dims=("channels",), batch_size=2, importance="magnitude",
                          **changes)  # fmt: skip
        return recipe.compress(model, options, windows, tmp_path / "out")

    return run


@pytest.mark.parametrize(
    "target, flag", [({}, "--pruning-ratio 0."), ({"disk_mb": 0.016}, "--target disk_mb=0.01")]
)
def test_a_model_that_loses_too_much_is_kept_aside_with_what_would_pass(
    compress, tmp_path, target, flag
):
    with pytest.raises(GateFailed, match=rf"loss rises by .*{flag}\d* would pass") as failed:
        compress(max_drop=1e-3, **target)
    assert failed.value.exit_code == 3 and not (tmp_path / "out").exists()
    report = json.loads((tmp_path / "out.rejected" / "report.json").read_text())
    assert report["compressed"]["nats_per_token"] > report["dense"]["nats_per_token"]


def test_an_earlier_rejected_model_is_not_overwritten(compress, tmp_path):
    (tmp_path / "out.rejected").mkdir()
    with pytest.raises(InputError, match="out.rejected: exists already"):
        compress(max_drop=1e-3)
    assert not (tmp_path / "out").exists()


def test_a_model_within_the_gate_is_kept(compress, tmp_path):
    compress(max_drop=10.0, drop_type="absolute")
    assert (tmp_path / "out" / "config.json").exists()
    assert not (tmp_path / "out.rejected").exists()
