"""KL divergences of logits: against loops and autograd, and when the Metal kernel is used."""

import shutil
import warnings

import mlx.core as mx
import numpy as np
import pytest
from mlx_compress.kernels import kl

import metal_on_cpu
import reference_distillation as reference
from mlx_compress import losses
from test_kernels import assert_close, plain_kl

DIRECTIONS = pytest.mark.parametrize("forward", [True, False], ids=["forward", "reverse"])
DIVERGENCE = {True: kl.forward_kl, False: kl.reverse_kl}


def logits(shape, seed=0):
    rng = np.random.default_rng(seed)
    return [mx.array(3 * rng.normal(size=shape), mx.float32) for _ in range(2)]


@DIRECTIONS
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_and_slope_equal_a_loop(forward, temperature):
    student, teacher = logits((2, 3, 11))
    weights = mx.arange(6, dtype=mx.float32).reshape(2, 3)

    def weighted(student):
        nats = DIVERGENCE[forward](student, teacher, temperature=temperature)
        return (nats * weights).sum(), nats

    (_, nats), slope = mx.value_and_grad(weighted)(student)
    for place in np.ndindex(2, 3):
        rows = [np.asarray(each)[place].astype(float) for each in (student, teacher)]
        wanted, by_logit = reference.kl_row(*rows, temperature=temperature, forward=forward)
        assert_close([nats[place]], [temperature**2 * wanted])
        scale = temperature**2 * weights[place].item()
        assert_close([slope[place]], [scale * np.array(by_logit)])


@DIRECTIONS
def test_the_kernels_loss_is_the_one_of_that_name_in_losses(forward):
    student, teacher = logits((4, 9))
    name = "forward_kl" if forward else "reverse_kl"

    def at(module):
        loss = getattr(module, name)
        return mx.value_and_grad(lambda s: loss(s, teacher, temperature=2.5).sum())(student)

    found = at(kl), at(losses)
    assert_close(found[0], found[1])


@DIRECTIONS
def test_both_gradients_are_those_of_autograd(forward):
    def plain(student, teacher):
        return plain_kl(student, teacher) if forward else plain_kl(teacher, student)

    pair = logits((4, 9))
    found = mx.grad(lambda s, t: DIVERGENCE[forward](s, t).sum(), (0, 1))(*pair)
    wanted = mx.grad(lambda s, t: plain(s, t).sum(), (0, 1))(*pair)
    assert_close(found, wanted)
    assert all(mx.abs(grad).max().item() > 0.01 for grad in found)


@DIRECTIONS
def test_classes_masked_on_both_sides_count_nothing(forward):
    pair = logits((2, 8))
    masked = [mx.concatenate([each, mx.full((2, 3), -mx.inf)], axis=-1) for each in pair]
    (nats, slope), (wanted, by_logit) = (
        mx.value_and_grad(lambda s, t=given[1]: DIVERGENCE[forward](s, t).sum())(given[0])
        for given in (masked, pair)
    )
    assert_close([nats, slope[:, :8], slope[:, 8:]], [wanted, by_logit, mx.zeros((2, 3))])


@DIRECTIONS
def test_a_class_that_one_side_rules_out_keeps_all_finite(forward):
    pair = logits((2, 8))
    side = 0 if forward else 1  # the one whose logarithm is weighed
    pair[side] = mx.where(mx.arange(8) == 3, -mx.inf, pair[side])
    name = "forward_kl" if forward else "reverse_kl"

    def at(module):
        loss = getattr(module, name)
        return mx.value_and_grad(lambda s: loss(s, pair[1]).sum())(pair[0])

    found = at(kl), at(losses)
    assert np.isfinite(np.array(found[0][1])).all() and found[0][0].item() > 1
    compared = slice(1) if forward else slice(2)  # q - p goes on saying what the student lacks
    assert_close(found[0][compared], found[1][compared])


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="differ in shape"):
        kl.forward_kl(mx.zeros((2, 3)), mx.zeros((2, 4)))
    with pytest.raises(ValueError, match="temperature is 0"):
        kl.reverse_kl(mx.zeros((2, 3)), mx.zeros((2, 3)), temperature=0)


def wrong_values(*arguments):
    nats, slope = kl.reference_rows(*arguments)
    return nats * 1.01, slope


def wrong_gradients(*arguments):
    nats, slope = kl.reference_rows(*arguments)
    return nats, mx.zeros_like(slope)


def does_not_compile(*arguments):
    raise RuntimeError("[metal::Device] Unable to build metal library\nprogram_source:12:3: error")


@pytest.fixture
def metal(monkeypatch):
    """As on a Mac, with the kernel that is given."""

    def use(rows):
        monkeypatch.setattr(kl, "metal_rows", rows)
        monkeypatch.setattr(kl, "on_metal", lambda: True)
        kl._proven.cache_clear()

    yield use
    kl._proven.cache_clear()


@DIRECTIONS
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_a_kernel_that_agrees_is_used(metal, forward, dtype):
    """It is proven the first time, for its dtype."""
    used = []

    def right(*arguments):
        used.append(arguments[0].shape)
        return kl.reference_rows(*arguments)

    metal(right)
    pair = [each.astype(dtype) for each in logits((2, 2, 5))]
    found = [DIVERGENCE[forward](*pair) for _ in range(2)]
    assert used == [(3, 1031), (4, 5), (4, 5)]
    assert_close(found, 2 * [kl.reference_rows(*pair, 1.0, forward)[0]])


def test_a_kernel_is_proven_at_first_use_inside_a_compiled_gradient_too(metal):
    metal(kl.reference_rows)
    pair = logits((2, 5))
    found = mx.compile(mx.grad(lambda s, t: kl.forward_kl(s, t).sum()))(*pair)
    assert kl._proven.cache_info().currsize == 1
    assert_close([found], [kl.reference_rows(*pair, 1.0, True)[1]])


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (wrong_values, "gives other values"),
        (wrong_gradients, "gives other gradients"),
        (does_not_compile, "failed: .*Unable to build metal library; plain MLX"),
    ],
)
def test_a_kernel_that_does_not_steps_aside_and_says_so_once(metal, rows, reason):
    metal(rows)
    pair = logits((2, 5))
    with pytest.warns(UserWarning, match=reason):
        first = kl.forward_kl(*pair)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = kl.forward_kl(*pair)
    wanted = kl.reference_rows(*pair, 1.0, True)[0]
    assert_close([first, second], [wanted, wanted])


@pytest.mark.parametrize(
    ("available", "device"), [(False, mx.gpu), (True, mx.cpu), (False, mx.cpu)]
)
def test_the_kernel_is_tried_only_where_metal_computes(monkeypatch, available, device):
    monkeypatch.setattr(kl.mx.metal, "is_available", lambda: available)
    monkeypatch.setattr(kl.mx, "default_device", lambda: mx.Device(device))
    assert kl._pick(mx.float32, True) is kl.reference_rows


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
@DIRECTIONS
def test_the_metal_source_run_thread_by_thread_gives_the_reference(monkeypatch, tmp_path, forward):
    monkeypatch.setattr(kl.mx.fast, "metal_kernel", metal_on_cpu.emulated(tmp_path))
    kl._kernel.cache_clear()
    try:
        monkeypatch.setattr(kl, "THREADS", 96)
        assert kl.agrees(kl.metal_rows, mx.float32, forward)
        for size in (1, 31, 97, 300):
            pair = logits((2, size), seed=size)
            if size == 300:  # a thread meets nothing first, and all logits are far below 0
                pair = [mx.where(mx.arange(300) < 96, -mx.inf, each - 200) for each in pair]
            found = kl.metal_rows(*pair, 1.5, forward)
            assert_close(found, kl.reference_rows(*pair, 1.5, forward))
    finally:
        kl._kernel.cache_clear()


@pytest.mark.skipif(not mx.metal.is_available(), reason="needs Metal")
@DIRECTIONS
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_the_kernel_gives_the_reference_on_metal(forward, dtype):
    assert kl.agrees(kl.metal_rows, dtype, forward)
    pair = [each.astype(dtype) for each in logits((5, 32003))]
    found, wanted = (f(*pair, 1.5, forward) for f in (kl.metal_rows, kl.reference_rows))
    assert_close(found, wanted, rtol=kl.TOLERANCE[dtype], atol=1e-5)
