"""Losses of distillation equal slow float64 loops; both gradients equal central differences."""

import math
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reference_distillation as reference
from mlx_compress.errors import InputError
from mlx_compress.losses import (
    LOSSES,
    TaidSchedule,
    bucketed,
    cross_entropy,
    forward_kl,
    js,
    log_probs,
    masked_mean,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    taid,
)

V = 7
# Name, and options other than the defaults.
CASES = [
    ("forward-kl", {}),
    ("reverse-kl", {}),
    ("js", {}),
    ("js", {"beta": 0.2}),
    ("js", {"beta": 0}),
    ("js", {"beta": 1}),
    ("skew-kl", {}),
    ("skew-kl", {"alpha": 0}),
    ("skew-reverse-kl", {}),
    ("skew-reverse-kl", {"alpha": 0.6}),
    ("adaptive-kl", {}),
    ("adaptive-kl", {"head": 0.9}),
    ("taid", {"t": 0.0}),
    ("taid", {"t": 0.4}),
    ("taid", {"t": 1.0}),
]
every_case = pytest.mark.parametrize(("name", "options"), CASES)
DEFAULTS = {name: {"t": 0.4} if name == "taid" else {} for name in LOSSES}
every_loss = pytest.mark.parametrize("name", list(LOSSES))


def pair(seed=0, shape=(2, V), scale=2.0):
    rng = np.random.default_rng(seed)
    return [(scale * rng.standard_normal(shape)).astype(np.float32) for _ in range(2)]


def loss_of(name, **options):
    return partial(LOSSES[name], **{**DEFAULTS[name], **options})


def slow(name, student, teacher, fixed=None, **options):
    options = {**DEFAULTS[name], **options}
    fixed = fixed or (student, teacher)
    return [
        reference.distillation_loss(name, s, t, fixed=(fs, ft), **options)
        for s, t, fs, ft in zip(student, teacher, *fixed, strict=True)
    ]


def gradients(loss, *arrays):
    arrays = [mx.array(a) for a in arrays]
    _, found = mx.vjp(lambda *a: [loss(*a).sum()], arrays, [mx.array(1.0)])
    return [np.array(g.astype(mx.float32)) for g in found]


def slow_gradients(name, student, teacher, **options):
    fixed = student, teacher
    return [
        reference.slopes(lambda s: sum(slow(name, s, teacher, fixed, **options)), student),
        reference.slopes(lambda t: sum(slow(name, student, t, fixed, **options)), teacher),
    ]


@every_case
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_a_loss_equals_the_slow_loop(name, options, temperature):
    student, teacher = pair()
    found = loss_of(name, temperature=temperature, **options)(mx.array(student), mx.array(teacher))
    assert found.dtype == mx.float32 and found.shape == (2,)
    wanted = slow(name, student, teacher, temperature=temperature, **options)
    np.testing.assert_allclose(np.array(found), wanted, rtol=1e-5, atol=1e-6)


@every_case
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_both_gradients_equal_central_differences(name, options, temperature):
    student, teacher = pair(seed=1)
    options = {"temperature": temperature, **options}
    found = gradients(loss_of(name, **options), student, teacher)
    for fast, wanted in zip(found, slow_gradients(name, student, teacher, **options), strict=True):
        np.testing.assert_allclose(fast, wanted, rtol=1e-4, atol=2e-6)


@every_loss
def test_both_arguments_get_a_gradient_as_they_do_not_from_fused_kernels(name):
    for gradient in gradients(loss_of(name), *pair(seed=2)):
        assert np.abs(gradient).max() > 1e-3


@every_loss
def test_a_temperature_keeps_the_size_of_gradients(name):
    student, teacher = pair(seed=3, scale=0.01)
    sizes = [
        np.linalg.norm(gradients(loss_of(name, temperature=t), student, teacher)[0])
        for t in (1.0, 4.0)
    ]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.1)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.1, 3.0, 30.0]), st.sampled_from(sorted(LOSSES)))
def test_losses_are_not_negative_and_zero_at_equality(seed, scale, name):
    student, teacher = map(mx.array, pair(seed, (3, 5), scale))
    loss = loss_of(name)
    assert loss(student, teacher).min().item() >= -1e-5
    assert mx.abs(loss(teacher, teacher)).max().item() <= 1e-5
    assert np.abs(gradients(loss, teacher, teacher)[0]).max() <= 1e-5


@every_loss
def test_a_loss_ignores_what_is_added_to_all_logits(name):
    student, teacher = map(mx.array, pair(seed=4))
    moved = loss_of(name)(student + 3, teacher - 5)
    assert mx.allclose(moved, loss_of(name)(student, teacher), atol=1e-5)


def test_js_is_symmetric_at_a_half_and_bounded_by_log_2():
    student, teacher = map(mx.array, pair(seed=5, scale=8.0))
    assert mx.allclose(js(student, teacher), js(teacher, student), atol=1e-6)
    assert js(student, teacher).max().item() <= math.log(2)


@pytest.mark.parametrize(("beta", "limit"), [(1e-3, forward_kl), (1 - 1e-3, reverse_kl)])
def test_js_over_its_weight_tends_to_both_kl(beta, limit):
    student, teacher = map(mx.array, pair(seed=6, scale=0.7))
    found = js(student, teacher, beta=beta) / min(beta, 1 - beta)
    assert mx.allclose(found, limit(student, teacher), rtol=2e-2)


def test_skews_of_0_are_kl_and_others_are_bounded():
    student, teacher = map(mx.array, pair(seed=7))
    assert mx.array_equal(skew_kl(student, teacher, alpha=0), forward_kl(student, teacher))
    assert mx.array_equal(skew_reverse_kl(student, teacher, alpha=0), reverse_kl(student, teacher))
    student, teacher = mx.array([[0.0, 1e4]]), mx.array([[1e4, 0.0]])
    for skewed in (skew_kl, skew_reverse_kl):
        assert skewed(student, teacher).item() == pytest.approx(-math.log(0.1), rel=1e-5)


def test_taid_at_1_is_forward_kl_and_at_0_teaches_nothing():
    student, teacher = pair(seed=8)
    found = taid(mx.array(student), mx.array(teacher), t=1.0)
    assert mx.allclose(found, forward_kl(mx.array(student), mx.array(teacher)), atol=1e-6)
    assert np.abs(gradients(partial(taid, t=0.0), student, teacher)[0]).max() < 1e-6


def test_taid_takes_t_as_an_array():
    student, teacher = map(mx.array, pair(seed=8))
    assert mx.array_equal(taid(student, teacher, t=mx.array(0.3)), taid(student, teacher, t=0.3))


@every_case
def test_extreme_logits_equal_the_slow_loop_with_finite_gradients(name, options):
    values = np.random.default_rng(9).choice([-1e4, -30.0, 0.0, 1.0, 1e4], (2, 6, V))
    student, teacher = values.astype(np.float32)
    found = loss_of(name, **options)(mx.array(student), mx.array(teacher))
    wanted = slow(name, student, teacher, **options)
    # Ties of the teacher's logits leave the order of the head open.
    if name != "adaptive-kl":
        np.testing.assert_allclose(np.array(found), wanted, rtol=1e-5, atol=1e-5)
    assert np.isfinite(np.array(found)).all()
    for gradient in gradients(loss_of(name, **options), student, teacher):
        assert np.isfinite(gradient).all()


@every_case
def test_a_teacher_may_give_no_probability_to_a_token(name, options):
    student, teacher = pair(seed=10)
    teacher[:, 2] = -math.inf
    found = loss_of(name, **options)(mx.array(student), mx.array(teacher))
    wanted = slow(name, student, teacher, **options)
    np.testing.assert_allclose(np.array(found), wanted, rtol=1e-5, atol=1e-6)
    fast = gradients(loss_of(name, **options), student, teacher)
    (wanted, _) = slow_gradients(name, student, teacher, **options)
    np.testing.assert_allclose(fast[0], wanted, rtol=1e-4, atol=1e-5)
    assert np.isfinite(fast[1]).all() and not fast[1][:, 2].any()


@every_loss
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_is_computed_in_float32(name, dtype):
    student, teacher = (mx.array(a).astype(dtype) for a in pair(seed=11))
    found = loss_of(name)(student, teacher)
    assert found.dtype == mx.float32
    exact = [np.array(a.astype(mx.float32)) for a in (student, teacher)]
    np.testing.assert_allclose(np.array(found), slow(name, *exact), rtol=1e-5, atol=1e-6)
    wanted = slow_gradients(name, *exact)
    for fast, slope in zip(gradients(loss_of(name), student, teacher), wanted, strict=True):
        np.testing.assert_allclose(fast, slope, rtol=1e-2, atol=1e-4)


def test_cross_entropy_equals_the_slow_loop_and_softmax_minus_one_hot():
    logits, labels = pair(seed=12)[0], np.array([3, 0])
    found = cross_entropy(mx.array(logits), mx.array(labels))
    rows = [reference.log_softmax(row) for row in logits]
    wanted = [-row[v] for row, v in zip(rows, labels, strict=True)]
    np.testing.assert_allclose(np.array(found), wanted, rtol=1e-6)
    (slope,) = gradients(lambda x: cross_entropy(x, mx.array(labels)), logits)
    np.testing.assert_allclose(slope, np.exp(rows) - np.eye(V)[labels], atol=1e-6)


def truncated(k, seed=13, scale=2.0):
    """Student logits, teacher logits, the teacher's k likeliest tokens, their log-probabilities."""
    student, teacher = pair(seed, scale=scale)
    indices = np.argsort(-teacher, axis=-1)[:, :k]
    logs = np.array([reference.log_softmax(row) for row in teacher])
    return student, teacher, indices, np.take_along_axis(logs, indices, axis=-1).astype(np.float32)


@every_loss
@pytest.mark.parametrize("k", [V - 1, V])
def test_a_bucket_of_one_token_or_none_changes_no_loss(name, k):
    student, teacher, indices, logs = truncated(k)
    classes = bucketed(*map(mx.array, (student, indices, logs)))
    whole = loss_of(name)(mx.array(student), mx.array(teacher))
    # In float32 a rest of 0 may come out as 1e-7, times the 87 nats of an impossible class.
    assert mx.allclose(loss_of(name)(*classes), whole, atol=2e-5)


@every_loss
@pytest.mark.parametrize("k", [1, 3, 5])
def test_a_truncated_teacher_equals_the_slow_loop_over_its_classes(name, k):
    student, _, indices, logs = truncated(k)

    def loss(student, logs):
        return loss_of(name)(*bucketed(student, mx.array(indices), logs))

    def both(student, logs):
        rows = zip(student, indices.tolist(), logs, strict=True)
        return zip(*(reference.bucketed_token(*row) for row in rows), strict=True)

    fixed = [list(rows) for rows in both(student, logs)]
    np.testing.assert_allclose(
        np.array(loss(mx.array(student), mx.array(logs))), slow(name, *fixed), atol=1e-5
    )
    wanted = [
        reference.slopes(lambda x: sum(slow(name, *both(x, logs), fixed)), student),
        reference.slopes(lambda x: sum(slow(name, *both(student, x), fixed)), logs),
    ]
    for fast, slope in zip(gradients(loss, student, logs), wanted, strict=True):
        np.testing.assert_allclose(fast, slope, rtol=1e-3, atol=2e-5)


@every_loss
@pytest.mark.parametrize("k", [2, V])
@pytest.mark.parametrize("scale", [40.0, 5e3])
def test_a_bucket_without_mass_is_safe(name, k, scale):
    student, _, indices, logs = truncated(k, scale=scale)

    def loss(student, logs):
        return loss_of(name)(*bucketed(student, mx.array(indices), logs))

    assert np.isfinite(np.array(loss(mx.array(student), mx.array(logs)))).all()
    for gradient in gradients(loss, student, logs):
        assert np.isfinite(gradient).all()


def test_a_small_bucket_of_the_student_keeps_its_digits():
    student, _ = bucketed(mx.array([[30.0, 0.0, 1.0, -2.0]]), mx.array([[0]]), mx.array([[-0.5]]))
    wanted = math.log(1 + math.e + math.exp(-2)) - 30
    assert student[0, 1].item() == pytest.approx(wanted, rel=1e-6)


def test_mass_that_leaves_the_listed_tokens_costs_the_student():
    student, _, indices, logs = truncated(2)
    leaky = student.copy()
    leaky[:, [v for v in range(V) if v not in indices]] += 5
    listed, ids = mx.array(logs), mx.array(indices)
    honest, leaked = (reverse_kl(*bucketed(mx.array(x), ids, listed)) for x in (student, leaky))
    assert (leaked > honest).all().item()


def test_masked_mean_counts_some_tokens_only():
    losses, mask = mx.array([[1.0, math.nan], [4.0, math.inf]]), mx.array([[1, 0], [1, 0]])
    assert masked_mean(losses, mask).item() == 2.5
    assert masked_mean(losses, mask == 1).item() == 2.5
    (slope,) = gradients(lambda x: masked_mean(x, mask), losses)
    np.testing.assert_array_equal(slope, [[0.5, 0], [0.5, 0]])


def test_a_batch_without_tokens_that_count_teaches_nothing():
    losses, mask = mx.ones((2, 3)), mx.zeros((2, 3), dtype=mx.bool_)
    assert masked_mean(losses, mask).item() == 0
    assert not gradients(lambda x: masked_mean(x, mask), losses)[0].any()


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(InputError, match=r"mask of shape \(2, 1\) for losses of shape \(2, 3\)"):
        masked_mean(mx.ones((2, 3)), mx.ones((2, 1)))


@every_loss
def test_two_vocabularies_are_refused(name):
    with pytest.raises(InputError, match=r"\(1, 4\), teacher's \(1, 5\); .* one vocabulary"):
        loss_of(name)(mx.zeros((1, 4)), mx.zeros((1, 5)))


def test_a_temperature_of_0_is_refused():
    with pytest.raises(InputError, match="temperature 0; give a number above 0"):
        forward_kl(mx.zeros((1, 4)), mx.zeros((1, 4)), temperature=0)


def test_log_probs_of_large_logits_keep_their_digits():
    found = log_probs(mx.array([10000.0, 9999.5]))
    assert found[0].item() == pytest.approx(-math.log1p(math.exp(-0.5)), rel=1e-6)


def test_the_schedule_of_taid_equals_the_slow_loop():
    options = {"start": 0.3, "end": 0.9, "alpha": 0.1, "beta": 0.5}
    losses = [3.0, 2.5, 2.6, 1.0, 0.9, 5.0, 0.5]
    schedule, ts = TaidSchedule(**options), [0.3]
    for step, loss in enumerate(losses):
        schedule = schedule.after(loss, progress=step / 20)
        ts.append(schedule.t)
    wanted = reference.taid_steps(losses, steps=20, **options)
    np.testing.assert_allclose(ts, wanted, rtol=1e-12)
    assert ts == sorted(ts) and ts[5] > 0.3 + 0.6 * 4 / 20 and ts[7] == 0.3 + 0.6 * 6 / 20
    assert schedule.after(0.4, progress=1.0).t == 0.9


def test_a_loss_that_is_not_finite_leaves_the_schedule_of_taid():
    schedule = TaidSchedule().after(2.0, 0.0)
    assert schedule.after(math.nan, 0.5) == schedule.after(math.inf, 0.5) == schedule


def test_a_schedule_of_taid_that_runs_backwards_is_refused():
    with pytest.raises(InputError, match="TAID from t = 0.8 to 0.2"):
        TaidSchedule(start=0.8, end=0.2)
