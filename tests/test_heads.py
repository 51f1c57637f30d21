import mlx.core as mx
import numpy as np
import pytest

from mlx_compress import distill_text
from mlx_compress.distill_text import Live, NextToken
from mlx_compress.explained import Traced
from mlx_compress.heads import head_of
from mlx_compress.losses import LOSSES
from mlx_compress.options import DistillOptions
from mlx_compress.teacher_targets import likeliest
from mlx_compress.token_loss import Batch, Split, gradients
from mlx_compress.training import train
from mlx_compress.training_state import TrainingFolder
from mlx_compress.training_text import Text
from tiny import LLAMA, VOCABULARY, build, parameters

TIED = LLAMA | {"tie_word_embeddings": True}
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (6, 9)).astype(np.int32)
TEXT = Text("train", TOKENS, np.ones(TOKENS.shape, bool))


@pytest.mark.parametrize("config", [LLAMA, TIED], ids=["own", "tied"])
def test_a_head_and_what_it_reads_make_the_logits(config):
    module, plain = build(config), build(config)
    head, tokens = head_of(module), mx.array(TOKENS)
    hidden = head.hidden(tokens)
    assert hidden.shape == (6, 9, 16) and head.weight.shape == (VOCABULARY, 16)
    np.testing.assert_allclose(head.logits(hidden), plain(tokens), atol=1e-5)
    np.testing.assert_allclose(module(tokens), plain(tokens), atol=1e-5)  # it is still there
    assert parameters(module).keys() == parameters(plain).keys()
    assert type(plain.model.embed_tokens) is not type(head.layer)
    kind = type(head.layer).__mro__[1]
    head.put_back()
    assert type(head.layer) is kind


def test_a_model_that_does_more_to_its_logits_has_no_head_to_take_off():
    module = build(LLAMA)
    kind = type(module)
    module.__class__ = type("Capped", (kind,), {
        "__call__": lambda self, tokens: 3 * mx.tanh(kind.__call__(self, tokens) / 3)
    })  # fmt: skip
    assert head_of(module) is None


def batch_of(teacher, top_k=None):
    tokens = mx.minimum(mx.array(TOKENS[:3]), 19)  # the largest label of 20 logits
    weights = mx.random.uniform(shape=tokens.shape, key=mx.random.key(1))
    weights = mx.where(mx.arange(9) == 3, 0, weights)
    logits = teacher(tokens[:, :-1])
    targets = (logits,) if top_k is None else tuple(map(mx.array, likeliest(logits, top_k)))
    return Batch(tokens, weights, targets)


def same(got, expected):
    assert abs(got[0].item() - expected[0].item()) < 1e-5
    for path, grad in expected[1].items():
        np.testing.assert_allclose(got[1][path], grad, atol=1e-5)


@pytest.mark.parametrize("config", [LLAMA, TIED], ids=["own", "tied"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_few_tokens_at_a_time_give_the_gradients_of_all(loss, config):
    options, teacher = DistillOptions(loss=loss, hard_labels=0.3), build(LLAMA)
    batch, student = batch_of(teacher), build(config, 1)
    expected = gradients(Traced(student), [batch], options, 0.6, count=20)
    theirs = head_of(teacher)
    split = Split(head_of(student), 5, theirs.logits)
    apart = batch._replace(targets=(theirs.hidden(batch.tokens[:, :-1]),))
    same(gradients(Traced(student), [apart], options, 0.6, count=20, split=split), expected)


@pytest.mark.parametrize("top_k", [4, VOCABULARY])
def test_a_few_tokens_at_a_time_of_a_teacher_on_disk_give_the_gradients_of_all(top_k):
    options, batch, student = DistillOptions(), batch_of(build(LLAMA), top_k), build(LLAMA, 1)
    expected = gradients(Traced(student), [batch], options)
    split = Split(head_of(student), 5)
    same(gradients(Traced(student), [batch], options, split=split), expected)


def test_a_head_that_is_not_trained_has_no_gradient():
    batch, student = batch_of(build(LLAMA)), build(LLAMA, 1)
    student.lm_head.freeze()
    expected = gradients(Traced(student), [batch], DistillOptions())
    theirs, own = head_of(build(LLAMA)), head_of(student)
    assert not own.trained and "lm_head.weight" not in expected[1]
    apart = batch._replace(targets=(theirs.hidden(batch.tokens[:, :-1]),))
    split = Split(own, 5, theirs.logits)
    same(gradients(Traced(student), [apart], DistillOptions(), split=split), expected)


@pytest.mark.parametrize("vocabulary", [32_000, 152_000, 1_000_000])
@pytest.mark.parametrize("tokens", [100, 2048, 65536])
def test_as_many_tokens_at_a_time_as_a_fraction_of_the_logits_allows(vocabulary, tokens):
    chunk = distill_text.chunk_of(tokens, vocabulary)
    assert chunk == distill_text.LEAST_CHUNK or (
        chunk * 32 <= tokens and 4 * chunk * vocabulary <= distill_text.CHUNK_BYTES
    )
    more = chunk + 1
    assert more * 32 > tokens or 4 * more * vocabulary > distill_text.CHUNK_BYTES


def test_a_run_with_large_logits_takes_heads_off_and_goes_the_same_way(tmp_path, monkeypatch):
    options = DistillOptions(iters=6, batch_size=2, warmup=0, learning_rate=3e-3, steps_per_eval=3)
    done = {}
    for name, limit in (("whole", 2**28), ("apart", 1)):
        monkeypatch.setattr(distill_text, "LOGITS_BYTES", limit)
        goal = NextToken(build(TIED, 1), Live(build(LLAMA)), TEXT, TEXT, options)
        assert (goal.apart is not None) == (name == "apart")
        done[name] = train(goal, options, TrainingFolder(tmp_path / name, {}))
    np.testing.assert_allclose(done["apart"].losses, done["whole"].losses, rtol=1e-3)
    assert done["apart"].curve[-1] == pytest.approx(done["whole"].curve[-1], rel=1e-3)
