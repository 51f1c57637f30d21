"""What is added to a weight is the least squares solution, at the lambda that new data prefer."""

import mlx.core as mx
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from mlx_compress.least_squares import LAMBDAS, MIXTURES, Sums, judged_errors


def summed(fitted, judged, *, keep, outputs, biased):
    """Sums of batches of (x [rows, n], error [rows, m]), to fit on and to judge on."""
    sums = Sums(None, np.array(keep), np.array(outputs), biased=biased)
    for batches, only in ((fitted, False), (judged, True)):
        for x, error in batches:
            sums.add(mx.array(x, mx.float32), mx.array(error, mx.float32), judged=only)
    return sums


def joined(batches, keep, outputs):
    """x and error of all batches, of what is kept."""
    xs, errors = zip(*batches, strict=True)
    return np.concatenate(xs)[:, keep], np.concatenate(errors)[:, outputs]


def solved(x, error, lam, *, biased):
    """The slow way: the change of the weights, and of the biases as a last row."""
    shape = (x.shape[1], error.shape[1])

    def output(changes):
        weights, bias = np.split(changes, [shape[0] * shape[1]])
        return x @ weights.reshape(shape) + (bias if biased else 0)

    free = error.shape[1] * biased
    weights, bias = reference.fitted_change(output, error, shape, free, lam)
    return np.vstack([weights, bias]) if biased else weights


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.integers(4, 30), st.booleans(), st.sampled_from([0, 0.3, 3]))
def test_the_change_is_the_least_squares_solution_at_the_best_lambda(seed, rows, biased, noise):
    rng = np.random.default_rng(seed)
    keep, outputs, true = [0, 2, 3], [1, 2], rng.standard_normal((5, 4))
    batches = []
    for _ in range(3):
        x = rng.standard_normal((rows, 5)) * [1, 1, 3, 0.5, 1] + [0, 0, 1, 0, 0]
        batches.append((x, x @ true + noise * rng.standard_normal((rows, 4)) + 0.5))
    fitted, judged = batches[:2], batches[2:]
    change, lam = summed(fitted, judged, keep=keep, outputs=outputs, biased=biased).change()
    first, second = (joined(each, keep, outputs) for each in (fitted, judged))

    def held_out(lam):
        if lam == np.inf:
            return np.sum(second[1] ** 2)
        found, (x, error) = solved(*first, lam, biased=biased), second
        return np.sum((np.hstack([x, np.ones((len(x), int(biased)))]) @ found - error) ** 2)

    assert held_out(lam) <= min(map(held_out, (*LAMBDAS, np.inf))) * (1 + 1e-4) + 1e-6
    if lam == np.inf:
        assert change is None
    else:
        want = solved(*first, lam, biased=biased)
        np.testing.assert_allclose(change, want, rtol=1e-3, atol=1e-3)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.integers(2, 12), st.booleans())
def test_no_change_makes_the_error_larger_where_it_was_judged(seed, rows, biased):
    rng = np.random.default_rng(seed)
    draw = [(rng.standard_normal((rows, 6)), rng.standard_normal((rows, 3))) for _ in range(2)]
    sums = summed(draw[:1], draw[1:], keep=range(6), outputs=range(3), biased=biased)
    change, _ = sums.change()
    if change is not None:
        x, error = draw[1]
        after = error - np.hstack([x, np.ones((rows, int(biased)))]) @ change
        assert np.sum(after**2) <= np.sum(error**2) * (1 + 1e-5)


def test_an_error_that_no_weight_explains_changes_nothing():
    rng = np.random.default_rng(0)
    x, true = rng.standard_normal((40, 6)), rng.standard_normal((6, 3))
    one, other = (x, x @ true), (x, -x @ true)  # one half wants what the other does not
    shape = {"keep": range(6), "outputs": range(3)}
    assert summed([one], [other], **shape, biased=False).change() == (None, np.inf)
    none = [(x, 0 * x @ true)]
    assert summed(none, none, **shape, biased=True).change() == (None, np.inf)
    assert summed([one], [], **shape, biased=False).change() == (None, np.inf)


def test_dead_slots_and_dead_inputs_keep_their_weights():
    rng = np.random.default_rng(0)
    x, true = rng.standard_normal((40, 4)), rng.standard_normal((4, 3))
    x[:, 2] = 0
    data, shape = [(x, x @ true)], {"keep": range(4), "outputs": range(3)}
    change, _ = summed(data, data, **shape, biased=True).change()
    assert np.all(np.abs(change[2]) == 0) and np.isfinite(change).all()
    np.testing.assert_allclose(change[[0, 1, 3]], true[[0, 1, 3]], rtol=1e-2, atol=1e-2)
    dead = [(0 * x, x @ true)]
    assert summed(dead, dead, **shape, biased=False).change() == (None, np.inf)


def test_half_precision_is_summed_up_in_single():
    x = mx.full((1000, 1), 9.0, mx.float16)  # the sum of squares is beyond float16
    sums = Sums(None, np.arange(1), np.arange(1), biased=False)
    sums.add(x, x, judged=False)
    assert sums.fitted[0].sum() == sums.fitted[1].sum() == 81_000


def test_mixtures_of_many_outputs_prefer_the_lambda_that_all_of_them_do():
    rng = np.random.default_rng(0)
    true, noise = rng.standard_normal((6, 2 * MIXTURES)), 3
    x = rng.standard_normal((2, 12, 6))
    error = x @ true + noise * rng.standard_normal((2, 12, 2 * MIXTURES))
    fitted, judged = ((a.T @ a, a.T @ e) for a, e in zip(x, error, strict=True))
    lambdas = (1e-3, 1.0, 10.0, 1e3)
    got = judged_errors(fitted, judged, lambda lam: np.full(6, lam), lambdas)
    changes = [np.linalg.solve(fitted[0] + lam * np.eye(6), fitted[1]) for lam in lambdas]
    want = [np.sum((x[1] @ d - error[1]) ** 2) - np.sum(error[1] ** 2) for d in changes]
    np.testing.assert_allclose(got, want, atol=0.3 * np.abs(want).max())
    assert np.argmin(got) == np.argmin(want)
