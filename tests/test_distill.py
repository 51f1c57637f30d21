import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_compress.distill import DistillOptions, batch_rows, distil, gradients
from mlx_compress.errors import GateFailed, InputError
from mlx_compress.losses import LOSSES
from tiny import LLAMA, VOCABULARY, build, parameters

TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (6, 9)).astype(np.int32)
QUICK = {"iters": 12, "warmup": 2, "learning_rate": 1e-2, "steps_per_eval": 4, "batch_size": 2}


def flat(grads):
    return {path: np.array(array) for path, array in tree_flatten(grads)}


@pytest.mark.parametrize("loss", LOSSES)
def test_the_student_comes_nearer_to_the_teacher(loss):
    student, teacher = build(LLAMA, 1), build(LLAMA, 0)
    curve = distil(student, teacher, TOKENS, TOKENS, DistillOptions(loss=loss, **QUICK))
    assert [point["step"] for point in curve] == [0, 4, 8, 12]
    assert min(p["divergence"] for p in curve) < 0.9 * curve[0]["divergence"]


def test_two_batches_of_two_give_the_gradient_of_one_of_four():
    student, teacher = build(LLAMA, 1), build(LLAMA, 0)
    mask = np.ones(TOKENS.shape, bool)
    mask[0, :7] = False  # the two batches count unlike numbers of tokens
    options = DistillOptions(hard_labels=0.3)
    whole, one = gradients(student, teacher, [(TOKENS[:4], mask[:4])], options)
    parts = [(TOKENS[:2], mask[:2]), (TOKENS[2:4], mask[2:4])]
    split, two = gradients(student, teacher, parts, options)
    assert abs(whole.item() - split.item()) < 1e-5
    two = flat(two)
    for path, grad in flat(one).items():
        np.testing.assert_allclose(grad, two[path], atol=1e-5)


def test_tokens_that_do_not_count_give_no_gradient():
    student, teacher = build(LLAMA, 1), build(LLAMA, 0)
    nothing = [(TOKENS, np.zeros(TOKENS.shape, bool))]
    loss, grads = gradients(student, teacher, nothing, DistillOptions(hard_labels=0.5))
    assert loss.item() == 0
    assert all(not grad.any() for grad in flat(grads).values())


def test_padding_behind_a_text_changes_no_gradient():
    student, teacher, options = build(LLAMA, 1), build(LLAMA, 0), DistillOptions(hard_labels=0.5)
    mask = np.arange(TOKENS.shape[1])[None] < np.full((6, 1), 5)
    padded = np.where(mask, TOKENS, 0)
    _, long = gradients(student, teacher, [(padded, mask)], options)
    _, short = gradients(student, teacher, [(TOKENS[:, :5], mask[:, :5])], options)
    short = flat(short)
    for path, grad in flat(long).items():
        np.testing.assert_allclose(grad, short[path], atol=1e-5)


def test_a_loss_that_is_not_finite_stops_with_its_step_and_the_best_weights():
    student, teacher, calls = build(LLAMA, 1), build(LLAMA, 0), []
    before = parameters(student)

    def breaks(tokens):
        calls.append(tokens)
        return teacher(tokens) * (mx.nan if len(calls) == 6 else 1)

    options = DistillOptions(**{**QUICK, "steps_per_eval": 9})
    with pytest.raises(GateFailed, match="step 3: the loss is not finite; lower --learning-rate"):
        distil(student, breaks, TOKENS, TOKENS, options)  # three calls are of the evaluation
    for path, array in parameters(student).items():
        assert mx.array_equal(array, before[path])


def test_a_run_without_gain_ends_by_its_patience():
    student = build(LLAMA, 0)
    options = DistillOptions(**QUICK, patience=1)
    curve = distil(student, build(LLAMA, 0), TOKENS, TOKENS, options)
    assert curve[-1]["step"] < 12


def test_batches_take_every_window_once_a_round():
    options = DistillOptions(batch_size=2, grad_accumulation_steps=1)
    rows = np.concatenate([batch_rows(options, step, 6)[0] for step in range(3)])
    assert sorted(rows) == list(range(6))


def test_no_windows_are_refused():
    with pytest.raises(InputError, match="no windows of text"):
        distil(build(LLAMA), build(LLAMA), TOKENS[:0], TOKENS, DistillOptions())


@pytest.mark.parametrize(
    "wrong, text",
    [
        ({"loss": "mse"}, "--loss mse: unknown"),
        ({"iters": 0}, "--iters 0: must be at least 1"),
        ({"learning_rate": float("nan")}, "--learning-rate nan: must be more than 0"),
        ({"hard_labels": 2}, "--hard-labels 2: must lie between 0 and 1"),
    ],
)
def test_options_out_of_range_are_refused(wrong, text):
    with pytest.raises(InputError, match=text):
        DistillOptions(**wrong)
