from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_compress.bridges.students import continued

from mlx_compress import training, training_state
from mlx_compress.distill_text import Live, NextToken
from mlx_compress.errors import GateFailed, InputError
from mlx_compress.explained import Traced
from mlx_compress.losses import LOSSES
from mlx_compress.options import DIVERGENCES, DistillOptions
from mlx_compress.token_loss import Batch, gradients
from mlx_compress.training import batch_rows, train
from mlx_compress.training_state import TrainingFolder
from mlx_compress.training_text import Text
from tiny import LLAMA, VOCABULARY, build, parameters

TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (6, 9)).astype(np.int32)
QUICK = {"iters": 12, "warmup": 2, "learning_rate": 1e-2, "steps_per_eval": 4, "batch_size": 2}


TEXT = Text("train", TOKENS, np.ones(TOKENS.shape, bool))
HELD = Text("held out", TOKENS, TEXT.mask)


@pytest.fixture
def folder(tmp_path):
    return TrainingFolder(tmp_path / "training", {"--model": "tiny"})


def distil(student, teacher, text, held_out, options, folder, **more):
    return train(NextToken(student, teacher, text, held_out, options), options, folder, **more)


def as_batch(tokens, mask, teacher):
    tokens = mx.array(tokens)
    return Batch(tokens, mx.array(mask) * 1.0, (mx.stop_gradient(teacher(tokens[:, :-1])),))


def same(left, right):
    assert left.keys() == right.keys()
    assert all(mx.array_equal(left[path], right[path]) for path in left)


def test_the_losses_that_can_be_chosen_are_those_there_are():
    assert set(DIVERGENCES) == set(LOSSES)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_student_comes_nearer_to_the_teacher(loss, folder):
    student, teacher = build(LLAMA, 1), build(LLAMA, 0)
    options = DistillOptions(loss=loss, **QUICK)
    curve = distil(student, Live(teacher), TEXT, HELD, options, folder).curve
    assert [point["step"] for point in curve] == [0, 4, 8, 12]
    assert min(p["divergence"] for p in curve) < 0.9 * curve[0]["divergence"]


def test_text_alone_trains_a_student_that_asks_no_teacher(folder):
    student = build(LLAMA, 1)
    options = DistillOptions(hard_labels=1, **QUICK)
    curve = distil(student, None, TEXT, HELD, options, folder).curve
    assert curve[-1]["cross_entropy"] < 0.9 * curve[0]["cross_entropy"]


def test_weights_are_held_in_float32_where_arithmetic_is_bfloat16(folder):
    student, teacher = build(LLAMA, 1), build(LLAMA, 0)
    options = DistillOptions(dtype="bfloat16", **{**QUICK, "learning_rate": 1e-3})
    done = distil(student, Live(teacher), TEXT, HELD, options, folder)
    assert done.curve[-1]["divergence"] < done.curve[0]["divergence"]
    halves = [mx.array_equal(a, a.astype(mx.bfloat16)) for a in done.weights.values()]
    assert not any(half.item() for half in halves)


def test_two_batches_of_two_give_the_gradient_of_one_of_four():
    student, teacher = build(LLAMA, 1), build(LLAMA, 0)
    mask = np.ones(TOKENS.shape, bool)
    mask[0, :7] = False  # the two batches count unlike numbers of tokens
    options = DistillOptions(hard_labels=0.3)
    whole, one = gradients(Traced(student), [as_batch(TOKENS[:4], mask[:4], teacher)], options)
    parts = [as_batch(TOKENS[k : k + 2], mask[k : k + 2], teacher) for k in (0, 2)]
    split, two = gradients(Traced(student), parts, options)
    assert abs(whole.item() - split.item()) < 1e-5
    for path, grad in one.items():
        np.testing.assert_allclose(grad, two[path], atol=1e-5)


def test_tokens_that_do_not_count_give_no_gradient():
    student, teacher = build(LLAMA, 1), build(LLAMA, 0)
    nothing = as_batch(TOKENS, np.zeros(TOKENS.shape, bool), teacher)
    loss, grads = gradients(Traced(student), [nothing], DistillOptions(hard_labels=0.5))
    assert loss.item() == 0
    assert not any(mx.any(grad).item() for grad in grads.values())


def test_padding_behind_a_text_changes_no_gradient():
    student, teacher, options = build(LLAMA, 1), build(LLAMA, 0), DistillOptions(hard_labels=0.5)
    mask = np.arange(TOKENS.shape[1])[None] < np.full((6, 1), 5)
    padded = as_batch(np.where(mask, TOKENS, 0), mask, teacher)
    _, long = gradients(Traced(student), [padded], options)
    _, short = gradients(Traced(student), [as_batch(TOKENS[:, :5], mask[:, :5], teacher)], options)
    for path, grad in long.items():
        np.testing.assert_allclose(grad, short[path], atol=1e-5)


def test_padding_of_the_vocabulary_changes_no_gradient():
    student, teacher, options = build(LLAMA, 1), build(LLAMA, 0), DistillOptions(hard_labels=0.5)
    _, plain = gradients(Traced(student), [as_batch(TOKENS, TEXT.mask, teacher)], options)
    batch = as_batch(TOKENS, TEXT.mask, teacher)
    logits = batch.targets[0]
    padded = mx.concatenate([logits, mx.full((*logits.shape[:2], 3), 5.0)], axis=-1)
    batch = batch._replace(targets=(padded,))
    _, wide = gradients(Traced(student), [batch], options, count=VOCABULARY)
    for path, grad in plain.items():
        np.testing.assert_allclose(grad, wide[path], atol=1e-6)


def breaking(teacher, call):
    """A teacher whose logits are not numbers at that call."""
    calls = []

    def logits(tokens):
        calls.append(tokens)
        return teacher(tokens) * (mx.nan if len(calls) == call else 1)

    return Live(logits)


def test_a_loss_that_is_not_finite_stops_with_its_step_and_keeps_the_best_weights(folder):
    student, teacher = build(LLAMA, 1), build(LLAMA, 0)
    before = parameters(student)
    options = DistillOptions(**{**QUICK, "steps_per_eval": 9})
    text = "step 3: the loss is not finite; lower --learning-rate .*, and remove .* of step 0 there"
    with pytest.raises(GateFailed, match=text):
        # Three calls are of the evaluation.
        distil(student, breaking(teacher, 6), TEXT, HELD, options, folder)
    same(folder.best(folder.open()), before)


def test_held_out_text_of_no_finite_loss_stops_the_run_too(folder):
    student, teacher = build(LLAMA, 1), build(LLAMA, 0)
    with pytest.raises(GateFailed, match="before the first step .* is not finite: .*--dtype"):
        distil(student, breaking(teacher, 1), TEXT, HELD, DistillOptions(**QUICK), folder)


@pytest.mark.parametrize("place", ["measuring", "best", "state", "tidying", "update"])
@pytest.mark.parametrize("count", [2, 3])
def test_ctrl_c_loses_no_measurement_and_no_best_weights(place, count, tmp_path, monkeypatch):
    teacher, options = Live(build(LLAMA, 0)), DistillOptions(**QUICK)
    whole, cut = (TrainingFolder(tmp_path / name, {}) for name in ("whole", "cut"))
    expected = distil(build(LLAMA, 1), teacher, TEXT, HELD, options, whole)
    where, name = {
        "measuring": (NextToken, "measured"), "best": (training_state, "_write"),
        "state": (training_state, "write_report"), "tidying": (Path, "unlink"),
        "update": (training.optim.AdamW, "apply_gradients"),
    }[place]  # fmt: skip
    original, calls = getattr(where, name), []

    def interrupted(*arguments, **named):
        calls.append(1)
        done = original(*arguments, **named) if place == "update" else None
        if len(calls) == count:
            raise KeyboardInterrupt
        return done if place == "update" else original(*arguments, **named)

    monkeypatch.setattr(where, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        distil(build(LLAMA, 1), teacher, TEXT, HELD, options, cut)
    monkeypatch.undo()
    got = distil(build(LLAMA, 1), teacher, TEXT, HELD, options, cut)
    assert got.losses == expected.losses and got.curve == expected.curve
    same(cut.best(got), whole.best(expected))


def test_a_student_in_half_precision_begins_at_what_is_on_disk(folder):
    student, teacher = build(LLAMA, 1), build(LLAMA, 0)
    before = parameters(build(LLAMA, 1))
    options = DistillOptions(dtype="bfloat16", **QUICK)
    same(NextToken(student, Live(teacher), TEXT, HELD, options).start(), before)


def test_text_without_an_answer_is_refused():
    nothing = Text("held out", TOKENS, np.zeros(TOKENS.shape, bool))
    with pytest.raises(InputError, match="no window of the held out text has a token of an answer"):
        NextToken(build(LLAMA), Live(build(LLAMA)), TEXT, nothing, DistillOptions())


@pytest.mark.parametrize("step", range(1, 12, 3))
@pytest.mark.parametrize("loss", ["reverse-kl", "taid"])
def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(step, loss, tmp_path):
    teacher = Live(build(LLAMA, 0))
    options = DistillOptions(loss=loss, **QUICK)
    whole, cut = (TrainingFolder(tmp_path / name, {}) for name in ("whole", "cut"))
    expected = distil(build(LLAMA, 1), teacher, TEXT, HELD, options, whole)

    def stop(stage, done, total):
        if done == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distil(build(LLAMA, 1), teacher, TEXT, HELD, options, cut, progress=stop)
    got = distil(build(LLAMA, 1), teacher, TEXT, HELD, options, cut)
    assert got.losses == expected.losses and got.curve == expected.curve
    same(got.weights, expected.weights)
    same(cut.best(got), whole.best(expected))


def test_a_student_learns_on_what_it_writes_itself(folder):
    options = DistillOptions(**QUICK, on_policy=1.0, hard_labels=0.5)
    teacher, written = build(LLAMA, 0), []

    def write(*arguments):
        written.append(continued(*arguments))
        return written[-1]

    def objective():
        return NextToken(build(LLAMA, 1), Live(teacher), TEXT, HELD, options, write=write)

    curve = train(objective(), options, folder).curve
    assert min(p["divergence"] for p in curve) < 0.95 * curve[0]["divergence"]
    assert len(written) == 12 and all(tokens.shape == (2, 9) for tokens in written)
    rows = batch_rows(options, 0, 6)[0]
    assert (np.array(written[0])[:, :2] == TOKENS[rows, :2]).all()  # the first quarter is given
    assert not mx.array_equal(written[0][:, 2:], written[3][:, 2:])
    again = objective()
    loss, _ = again.gradients(again.start(), 0, 1.0)
    assert mx.array_equal(written[-1], written[0])  # by seed and step alone
    # The text itself is no label there: the loss is the teacher's alone.
    targets = (teacher(written[0][:, :-1]),)
    weights = mx.broadcast_to(mx.arange(9) >= 2, (2, 9)) * 1.0
    plain = DistillOptions(**QUICK)
    expected, _ = gradients(Traced(build(LLAMA, 1)), [Batch(written[0], weights, targets)], plain)
    assert abs(loss.item() - expected.item()) < 1e-5


def test_what_is_written_is_what_the_model_makes_likely():
    model, prompts = build(LLAMA, 0), mx.array(TOKENS[:1, :3])
    rows = [continued(model, mx.repeat(prompts, 500, axis=0), 1, mx.random.key(k)) for k in (0, 1)]
    drawn = np.array(mx.concatenate(rows))[:, 3]
    found = np.bincount(drawn, minlength=VOCABULARY) / len(drawn)
    assert np.abs(found - np.array(mx.softmax(model(prompts)[0, -1]))).max() < 0.05
    cached = np.array(continued(model, prompts, 6, mx.random.key(2)))[0]
    without = prompts
    for key in mx.random.split(mx.random.key(2), 6):
        drawn = mx.random.categorical(model(without)[:, -1], key=key)[:, None]
        without = mx.concatenate([without, drawn.astype(without.dtype)], axis=1)
    assert (cached == np.array(without)[0]).all()


def test_a_run_without_gain_ends_by_its_patience(folder):
    options = DistillOptions(**QUICK, patience=1)
    done = distil(build(LLAMA, 0), Live(build(LLAMA, 0)), TEXT, HELD, options, folder)
    assert done.step == 4


def test_batches_take_every_window_once_a_round():
    options = DistillOptions(batch_size=2, grad_accumulation_steps=1)
    rows = np.concatenate([batch_rows(options, step, 6)[0] for step in range(3)])
    assert sorted(rows) == list(range(6))


def test_no_windows_are_refused(folder):
    nothing = Text("train", TOKENS[:0], TEXT.mask[:0])
    with pytest.raises(InputError, match="no windows of text"):
        distil(build(LLAMA), Live(build(LLAMA)), nothing, HELD, DistillOptions(), folder)


@pytest.mark.parametrize(
    "wrong, text",
    [
        ({"loss": "l2"}, "--loss l2: unknown"),
        ({"iters": 0}, "--iters 0: must be at least 1"),
        ({"learning_rate": float("nan")}, "--learning-rate nan: must be more than 0"),
        ({"on_policy": -1}, "--on-policy -1: must lie between 0 and 1"),
        ({"hard_labels": 2}, "--hard-labels 2: must lie between 0 and 1"),
    ],
)
def test_options_out_of_range_are_refused(wrong, text):
    with pytest.raises(InputError, match=text):
        DistillOptions(**wrong)
