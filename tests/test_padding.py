"""What sequences are filled up with shows nowhere: not in statistics, not in what is fitted."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import plain
from mlx_compress.axes import named_axes
from mlx_compress.calibrate import calibrate
from mlx_compress.graph import trace
from mlx_compress.padding import row_count, without_padding
from mlx_compress.sequential import refit_in_sequence

LENGTHS = [(5, 2), (3, 6), (6, 6), (1, 4), (6, 3), (2, 5)]  # of the two sequences of each batch
LONGEST, WIDTH = 6, 4


class TokenByToken(nn.Module):
    """Two layers, so that no token sees another; what is not zero at zero shows padding."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 10), nn.Linear(10, WIDTH)

    def __call__(self, x):
        return self.second(nn.gelu(self.first(x) + 0.5))


@pytest.fixture
def model():
    mx.random.seed(0)
    return TokenByToken()


def padded():
    """Batches [2, LONGEST, WIDTH] with loud padding, and their masks."""
    rng = np.random.default_rng(1)
    masks = [(np.arange(LONGEST) < np.array(pair)[:, None]).astype(np.int32) for pair in LENGTHS]
    values = [rng.normal(0, 1, (2, LONGEST, WIDTH)) for _ in masks]
    loud = [np.where(m[..., None] > 0, v, 9.0) for v, m in zip(values, masks, strict=True)]
    return [[mx.array(v.astype(np.float32))] for v in loud], [mx.array(m) for m in masks]


def alone(batches, masks):
    """The tokens that count, as batches of one sequence each, [1, tokens, WIDTH]."""
    return [[mx.array(np.array(batch[0])[np.array(mask) > 0])[None]]
            for batch, mask in zip(batches, masks, strict=True)]  # fmt: skip


def measured(model, batches, masks=None):
    held = dict(tree_flatten(model.parameters()))
    named = named_axes(trace(model, *batches[0]))
    dims = [d.name for d in named.free()]
    statistics = calibrate(
        named, batches, lambda paths: {p: held[p] for p in paths}, dims=dims, second={},
        loss=lambda b, outputs: mx.square(outputs[0] * _weights(masks, b)).sum(), masks=masks,
    )  # fmt: skip
    return named, statistics


def _weights(masks, b):
    return 1.0 if masks is None else masks[b][..., None]


def test_statistics_are_those_of_the_tokens_that_count(model):
    batches, masks = padded()
    _, statistics = measured(model, batches, masks)
    every = np.concatenate([np.array(v)[0] for (v,) in alone(batches, masks)])
    hidden = np.array(nn.gelu(model.first(mx.array(every)) + 0.5), dtype=np.float64)
    (moments,) = statistics.moments.values()
    assert moments.rows == len(every) == sum(map(sum, LENGTHS))
    np.testing.assert_allclose(moments.square, (hidden**2).sum(axis=0), rtol=1e-5)
    np.testing.assert_allclose(moments.total, hidden.sum(axis=0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(moments.peak, np.abs(hidden).max(axis=0), rtol=1e-5)
    (halves,) = statistics.second.values()
    np.testing.assert_allclose(halves.sum(axis=0), hidden.T @ hidden, rtol=1e-5, atol=1e-4)


def test_without_masks_the_padding_would_show(model):
    batches, masks = padded()
    with_masks, without = (measured(model, batches, m)[1] for m in (masks, None))
    squares = [next(iter(s.moments.values())).square for s in (with_masks, without)]
    assert (squares[1] > 2 * squares[0]).any()


def test_a_fit_in_sequence_is_that_of_the_tokens_that_count(model):
    batches, masks = padded()
    tokens = [[mx.concatenate([v[0] for v in alone(batches, masks)], axis=1)]]
    fitted = []
    held = dict(tree_flatten(model.parameters()))
    for fit, judge, given in (
        (batches, batches, masks * 2), (tokens, tokens, None), (batches, batches, None)
    ):  # fmt: skip
        named = named_axes(trace(model, *fit[0]))
        plan = plain.random_plan(named, named.free(("channels",)), seed=3)
        cutter = refit_in_sequence(
            named, plan, fit, lambda paths: {p: held[p] for p in paths}, held_out=judge,
            masks=given,
        )  # fmt: skip
        fitted.append(np.array(cutter("second.weight", held["second.weight"])))
    np.testing.assert_allclose(fitted[0], fitted[1], rtol=1e-3, atol=1e-4)
    assert not np.allclose(fitted[0], fitted[2], rtol=1e-3, atol=1e-4)


def test_rows_are_found_with_their_axes_apart_or_as_one():
    mask = mx.array([[1, 0], [1, 1]])
    value = mx.arange(8).reshape(2, 2, 2) + 1.0
    want = np.array([[[1, 2], [0, 0]], [[5, 6], [7, 8]]])
    assert np.array_equal(without_padding(value, mask), want)
    assert np.array_equal(without_padding(value.reshape(4, 2), mask), want.reshape(4, 2))
    heads = mx.ones((2, 2, 3, 2))
    assert (row_count(value, mask), row_count(heads, mask), row_count(value, None)) == (3, 9, 4)
    other = mx.ones((3, 5, 2))
    assert without_padding(other, mask) is other and row_count(other, mask) == 15
