"""Hidden states and attention maps are matched as slow loops do it, with every gradient."""

import math

import mlx.core as mx
import numpy as np
import pytest

import reference_distillation as reference
from mlx_compress.errors import InputError
from mlx_compress.matching import attention_loss, hidden_loss

B, T, D, E = 2, 3, 4, 5
MASK = np.array([[1, 1, 0], [0, 1, 1]])
every_measure = pytest.mark.parametrize("measure", ["mse", "cosine"])
every_map_measure = pytest.mark.parametrize("measure", ["kl", "mse"])


def hidden(seed=0):
    rng = np.random.default_rng(seed)
    shapes = (B, T, D), (B, T, E), (D, E)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def maps(heads, seed=0):
    """Causal attention maps [B, heads, T, T]."""
    logits = 2 * np.random.default_rng(seed).standard_normal((B, heads, T, T))
    weights = np.exp(logits) * np.tril(np.ones((T, T)))
    return (weights / weights.sum(axis=-1, keepdims=True)).astype(np.float32)


def assert_gradients(fast, slow, arrays):
    """`fast` and `slow` are one function, of MLX and of NumPy arrays."""
    found = mx.grad(fast, argnums=list(range(len(arrays))))(*map(mx.array, arrays))
    for place, gradient in enumerate(found):

        def of_one(array, place=place):
            return slow(*arrays[:place], array, *arrays[place + 1 :])

        wanted = reference.slopes(of_one, arrays[place])
        np.testing.assert_allclose(np.array(gradient), wanted, rtol=1e-3, atol=1e-5)


@every_measure
def test_hidden_states_are_matched_through_a_projection(measure):
    arrays = hidden()

    def fast(student, teacher, projection):
        return hidden_loss(
            student, teacher, mx.array(MASK), measure=measure, projection_DE=projection
        )

    def slow(student, teacher, projection):
        return reference.hidden_distance(student, teacher, MASK, projection, measure)

    assert fast(*map(mx.array, arrays)).item() == pytest.approx(slow(*arrays), rel=1e-5)
    assert_gradients(fast, slow, arrays)


@every_measure
def test_equal_widths_need_no_projection(measure):
    _, teacher, _ = hidden()
    student = hidden(seed=1)[1]
    found = hidden_loss(mx.array(student), mx.array(teacher), mx.array(MASK), measure=measure)
    wanted = reference.hidden_distance(student, teacher, MASK, np.eye(E), measure)
    assert found.item() == pytest.approx(wanted, rel=1e-5)


def test_cosine_is_blind_to_scale_and_safe_at_zero():
    _, teacher, _ = map(mx.array, hidden())
    mask = mx.array(MASK)
    assert hidden_loss(3 * teacher, teacher, mask, measure="cosine").item() == pytest.approx(
        0, abs=1e-6
    )
    zeros = mx.zeros_like(teacher)
    assert hidden_loss(zeros, teacher, mask, measure="cosine").item() == 1
    slope = mx.grad(lambda s: hidden_loss(s, teacher, mask, measure="cosine"))(zeros)
    assert mx.isfinite(slope).all().item()


def test_widths_that_differ_are_refused_without_a_projection():
    student, teacher, _ = map(mx.array, hidden())
    with pytest.raises(InputError, match=r"give a projection \[4, 5\]"):
        hidden_loss(student, teacher, mx.array(MASK))


@every_map_measure
@pytest.mark.parametrize("heads", [(2, 2), (1, 3)])
def test_attention_maps_are_matched_by_head_or_by_their_mean(measure, heads):
    arrays = [maps(heads[0]), maps(heads[1], seed=1)]

    def fast(student, teacher):
        return attention_loss(student, teacher, mx.array(MASK), measure=measure)

    def slow(student, teacher):
        return reference.map_distance(student, teacher, MASK, measure)

    assert fast(*map(mx.array, arrays)).item() == pytest.approx(slow(*arrays), rel=1e-5)


@every_map_measure
@pytest.mark.parametrize("heads", [(2, 2), (1, 3)])
def test_gradients_of_attention_maps_equal_central_differences(measure, heads):
    # No zeros: at the smallest probability that counts the KL has a corner.
    arrays = [0.5 * maps(h, seed=h) + 0.5 / T for h in heads]
    arrays = [a.astype(np.float32) for a in arrays]
    assert_gradients(
        lambda s, t: attention_loss(s, t, mx.array(MASK), measure=measure),
        lambda s, t: reference.map_distance(s, t, MASK, measure),
        arrays,
    )


@every_map_measure
def test_equal_maps_cost_nothing_and_zeros_are_safe(measure):
    student, teacher = mx.array(maps(2)), mx.array(maps(2, seed=1))
    mask = mx.array(MASK)
    assert attention_loss(teacher, teacher, mask, measure=measure).item() == 0

    def through_softmax(logits):
        causal = mx.where(mx.tril(mx.ones((T, T))) > 0, logits, -mx.inf)
        return attention_loss(mx.softmax(causal, axis=-1), teacher, mask, measure=measure)

    logits = mx.where(student > 0, mx.log(mx.maximum(student, 1e-9)), 50.0)
    value, slope = mx.value_and_grad(through_softmax)(1e3 * logits)
    assert math.isfinite(value.item()) and mx.isfinite(slope).all().item()


@every_map_measure
def test_padding_changes_no_loss(measure):
    student, teacher = maps(2), maps(2, seed=1)
    short = attention_loss(*map(mx.array, (student, teacher, MASK)), measure=measure)
    wide = [np.pad(a, ((0, 0), (0, 0), (0, 2), (0, 2))) for a in (student, teacher)]
    mask = mx.array(np.pad(MASK, ((0, 0), (0, 2))))
    padded = attention_loss(*map(mx.array, wide), mask, measure=measure)
    assert padded.item() == pytest.approx(short.item(), rel=1e-6)


def test_maps_over_other_keys_are_refused():
    with pytest.raises(InputError, match="only the number of heads may differ"):
        attention_loss(mx.ones((1, 2, 3, 3)), mx.ones((1, 2, 3, 4)), mx.ones((1, 3)))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    student, teacher, projection = (mx.array(a).astype(dtype) for a in hidden())
    mask = mx.array(MASK)
    found = hidden_loss(student, teacher, mask, projection_DE=projection)
    exact = [np.array(a.astype(mx.float32)) for a in (student, teacher, projection)]
    wanted = reference.hidden_distance(*exact[:2], MASK, exact[2], "mse")
    assert found.dtype == mx.float32 and found.item() == pytest.approx(wanted, rel=1e-5)
    pair = [mx.array(maps(2, seed)).astype(dtype) for seed in (0, 1)]
    exact = [np.array(a.astype(mx.float32)) for a in pair]
    wanted = reference.map_distance(*exact, MASK, "kl")
    assert attention_loss(*pair, mask).item() == pytest.approx(wanted, rel=1e-4)


def test_without_tokens_the_loss_is_0():
    student, teacher, projection = map(mx.array, hidden())
    mask = mx.zeros((B, T))
    assert hidden_loss(student, teacher, mask, projection_DE=projection).item() == 0
    assert attention_loss(mx.array(maps(2)), mx.array(maps(2, seed=1)), mask).item() == 0
