"""Losses on projected hidden states, and the kernels of KL divergences."""

import json
import shutil
import warnings

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_compress.benchmarks import fused as benchmark
from mlx_compress.kernels import kl, projected
from mlx_compress.kernels.projected import projected_grads, projected_loss

import metal_on_cpu
import reference

N, D, V, TEACHER_D = 23, 6, 37, 5
DIRECTIONS = pytest.mark.parametrize("forward", [True, False], ids=["forward", "reverse"])
DIVERGENCE = {True: kl.forward_kl, False: kl.reverse_kl}


def plain_kl(student, teacher):
    log_q, log_p = nn.log_softmax(student, axis=-1), nn.log_softmax(teacher, axis=-1)
    return (mx.exp(log_p) * (log_p - log_q)).sum(axis=-1)


def truncated_kl(student, logprobs, indices):
    """Of a teacher's first classes, all others together as one more."""
    log_q = mx.take_along_axis(nn.log_softmax(student, axis=-1), indices, axis=-1)
    kept = (mx.exp(logprobs) * (logprobs - log_q)).sum(axis=-1)
    p_tail, q_tail = (1 - mx.exp(log).sum(axis=-1) for log in (logprobs, log_q))
    return kept + p_tail * mx.log(p_tail / q_tail)


def cross_entropy(student, targets):
    return nn.losses.cross_entropy(student, targets, reduction="none")


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    shapes = {
        "hidden": (N, D), "head": (V, D), "bias": (V,),
        "teacher_hidden": (N, TEACHER_D), "teacher_head": (V, TEACHER_D),
    }  # fmt: skip
    arrays = {name: mx.array(rng.normal(size=shape), mx.float32) for name, shape in shapes.items()}
    mask = (rng.random(N) < 0.7).astype(np.float32) * rng.uniform(0.5, 2, N).astype(np.float32)
    return arrays | {"mask": mx.array(mask)}


def fused(case, hidden, head, bias, *, chunk, **choices):
    """The sum by chunks, forward KL against the teacher's own hidden states and head."""
    return projected_loss(
        hidden, head, case["mask"], bias_V=bias, chunk=chunk,
        loss=lambda logits, states: plain_kl(logits, states @ case["teacher_head"].T),
        per_token=[case["teacher_hidden"]], **choices,
    )  # fmt: skip


def naive(case, hidden, head, bias):
    teacher = case["teacher_hidden"] @ case["teacher_head"].T
    return (plain_kl(hidden @ head.T + bias, teacher) * case["mask"]).sum()


def trained(case):
    return [case["hidden"], case["head"], case["bias"]]


def assert_close(found, wanted, rtol=1e-5, atol=1e-5):
    for got, want in zip(found, wanted, strict=True):
        got, want = (np.asarray(mx.array(each).astype(mx.float32)) for each in (got, want))
        np.testing.assert_allclose(got, want, rtol=rtol, atol=atol)


@pytest.mark.parametrize("chunk", [1, 4, 7, 23, 100])
def test_value_and_gradients_are_those_of_whole_logits_and_of_a_float64_loop(case, chunk):
    arrays = trained(case)
    value, grads = mx.value_and_grad(lambda *a: fused(case, *a, chunk=chunk), (0, 1, 2))(*arrays)
    wanted, by_autograd = mx.value_and_grad(lambda *a: naive(case, *a), (0, 1, 2))(*arrays)
    assert_close([value, *grads], [wanted, *by_autograd])

    loops = [np.asarray(a).astype(np.float64) for a in (*arrays, case["mask"])]
    teacher = np.asarray(case["teacher_hidden"] @ case["teacher_head"].T).astype(np.float64)
    assert_close([value, *grads], reference.projected_kl(*loops[:3], teacher, loops[3]))


def test_a_scaled_loss_scales_every_gradient(case):
    def mean(*arrays):
        return 3 * fused(case, *arrays, chunk=5) / case["mask"].sum()

    found = mx.grad(mean, (0, 1, 2))(*trained(case))
    plain = mx.grad(lambda *a: naive(case, *a), (0, 1, 2))(*trained(case))
    assert_close(found, [3 * grad / case["mask"].sum() for grad in plain])


def test_half_precision_keeps_its_dtype_and_is_as_near_as_its_rounding(case):
    arrays = [array.astype(mx.bfloat16) for array in trained(case)]
    value, grads = mx.value_and_grad(lambda *a: fused(case, *a, chunk=7), (0, 1, 2))(*arrays)
    assert value.dtype == mx.float32 and {grad.dtype for grad in grads} == {mx.bfloat16}
    exact = [array.astype(mx.float32) for array in arrays]
    wanted, by_autograd = mx.value_and_grad(lambda *a: naive(case, *a), (0, 1, 2))(*exact)
    assert_close([value, *grads], [wanted, *by_autograd], rtol=0.03, atol=0.1)


def test_the_head_gradient_is_summed_in_float32():
    """In bfloat16 the sum of 400 equal terms stops growing at 256 of them."""
    ones = mx.ones((400, 1), mx.bfloat16)
    _, grads = projected_grads(
        ones, mx.zeros((2, 1), mx.bfloat16), mx.ones(400), loss=lambda logits: logits[:, 0], chunk=1
    )
    assert grads["head"].tolist() == [[400.0], [0.0]]


GRADIENTS = {
    "compiled": lambda run: mx.compile(mx.value_and_grad(run, (0, 1))),
    "checkpointed": lambda run: mx.value_and_grad(mx.checkpoint(run), (0, 1)),
}


@pytest.mark.parametrize("wrap", GRADIENTS)
def test_it_composes_with_layers_below_and_a_tied_embedding(case, wrap):
    tokens = mx.array(np.random.default_rng(1).integers(0, V, N))

    def through(loss):
        def run(table, body):
            hidden = mx.tanh(table[tokens] @ body)
            return loss(hidden, table, case["bias"]) / case["mask"].sum()

        return run

    start = case["head"], mx.eye(D) + 0.1
    lean = through(lambda *a: fused(case, *a, chunk=12))
    whole = through(lambda *a: naive(case, *a))
    value, grads = GRADIENTS[wrap](lean)(*start)
    wanted, by_autograd = mx.value_and_grad(whole, (0, 1))(*start)
    assert_close([value, *grads], [wanted, *by_autograd])


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_the_same(case):
    frozen = mx.grad(lambda *a: fused(case, *a, chunk=4, train_head=False), (0, 1))(*trained(case))
    by_hidden = mx.grad(lambda *a: naive(case, *a))(*trained(case))
    assert_close(frozen, [by_hidden, mx.zeros((V, D))])


def test_truncated_teachers_and_hard_labels_come_per_token(case):
    rng = np.random.default_rng(2)
    logits = case["teacher_hidden"] @ case["teacher_head"].T
    top = mx.argsort(logits, axis=-1)[:, -4:]
    logprobs = mx.take_along_axis(nn.log_softmax(logits, axis=-1), top, axis=-1)
    for loss, rows in (
        (truncated_kl, [logprobs, top]),
        (cross_entropy, [mx.array(rng.integers(0, V, N))]),
    ):

        def lean(hidden, head, loss=loss, rows=rows):
            return projected_loss(hidden, head, case["mask"], loss=loss, chunk=5, per_token=rows)

        def whole(hidden, head, loss=loss, rows=rows):
            return (loss(hidden @ head.T, *rows) * case["mask"]).sum()

        found, wanted = (
            mx.value_and_grad(f, (0, 1))(case["hidden"], case["head"]) for f in (lean, whole)
        )
        assert_close([found[0], *found[1]], [wanted[0], *wanted[1]])


def test_a_quantised_teacher_head_is_called_with_a_chunk_at_a_time():
    sizes, head = [], nn.QuantizedLinear(64, V, bias=False, group_size=32, bits=4)
    states, hidden = mx.random.normal((10, 64)), mx.random.normal((10, D))

    def loss(logits, rows):
        sizes.append(len(rows))
        return kl.reverse_kl(logits, 5 * mx.tanh(head(rows) / 5))

    total = projected_loss(
        hidden, mx.ones((V, D)), mx.ones(10), loss=loss, chunk=4, per_token=[states]
    )
    assert sizes == [4, 4, 2]
    whole = kl.reverse_kl(hidden @ mx.ones((D, V)), 5 * mx.tanh(head(states) / 5)).sum()
    assert_close([total], [whole])


def test_evaluating_step_by_step_gives_the_same(case):
    total, grads = projected_grads(
        case["hidden"], case["head"], case["mask"], bias_V=case["bias"], chunk=4,
        loss=lambda logits, states: plain_kl(logits, states @ case["teacher_head"].T),
        per_token=[case["teacher_hidden"]],
    )  # fmt: skip
    wanted = mx.value_and_grad(lambda *a: naive(case, *a), (0, 1, 2))(*trained(case))
    assert_close([total, grads["hidden"], grads["head"], grads["bias"]], [wanted[0], *wanted[1]])


def peak_above(function, *arrays):
    mx.eval(arrays)
    mx.synchronize()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    results = function(*arrays)
    mx.eval(results)
    return mx.get_peak_memory() - before


def test_memory_is_bounded_whatever_the_number_of_tokens():
    """Logits of 256 tokens take 4 MB."""
    width, vocabulary = 8, 4096
    head, teacher_head = mx.random.normal((2, vocabulary, width), key=mx.random.key(0))

    def loss(logits, states):
        return plain_kl(logits, states @ teacher_head.T)

    def whole(hidden, head):
        return loss(hidden @ head.T, hidden).sum()

    def lean(hidden, head):
        return projected_loss(
            hidden, head, mx.ones(len(hidden)), loss=loss, chunk=4, per_token=[hidden]
        )

    def stepwise(hidden, head):
        return projected_grads(
            hidden, head, mx.ones(len(hidden)), loss=loss, chunk=4, per_token=[hidden]
        )

    peaks = {}
    for tokens in (64, 256):
        hidden = mx.random.normal((tokens, width), key=mx.random.key(1))
        for name, run in {
            "whole": mx.value_and_grad(whole, (0, 1)),
            "lean": mx.value_and_grad(lean, (0, 1)),
            "compiled": mx.compile(mx.value_and_grad(lean, (0, 1))),
            "stepwise": stepwise,
        }.items():
            peaks[name, tokens] = peak_above(run, hidden, head)
    for name in ("lean", "compiled", "stepwise"):
        assert peaks[name, 256] < peaks["whole", 256] / 20, (name, peaks)
        assert peaks[name, 256] < 1.5 * peaks[name, 64], (name, peaks)
    assert peaks["stepwise", 256] < peaks["lean", 256]


def test_the_head_gradient_takes_twice_its_size_and_step_by_step_once():
    head, hidden = mx.random.normal((4096, 256)), mx.random.normal((16, 256))
    choices = {"loss": lambda logits: mx.logsumexp(logits, axis=-1), "chunk": 1}
    twice = peak_above(
        mx.grad(lambda *a: projected_loss(*a, mx.ones(16), **choices), (0, 1)), hidden, head
    )
    once = peak_above(lambda *a: projected_grads(*a, mx.ones(16), **choices), hidden, head)
    assert twice < 2.5 * head.nbytes and once < 1.2 * head.nbytes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk": 0}, "chunk is 0"),
        ({"hidden_ND": mx.zeros((0, D))}, "tokens > 0"),
        ({"head_VD": mx.zeros((V, D + 1))}, rf"give \[vocabulary, {D}\]"),
        ({"mask_N": mx.ones(N - 1)}, r"mask has the shape"),
        ({"bias_V": mx.ones(V - 1)}, "bias has the shape"),
        ({"per_token": [mx.ones(N), mx.ones(3)]}, r"per_token\[1\]"),
    ],
)
@pytest.mark.parametrize("function", [projected_loss, projected_grads])
def test_shapes_that_do_not_agree_are_refused(function, change, message):
    given = {"hidden_ND": mx.ones((N, D)), "head_VD": mx.ones((V, D)), "mask_N": mx.ones(N)}
    given |= {"loss": lambda logits, *rest: logits[:, 0], "chunk": 4}
    with pytest.raises(ValueError, match=message):
        function(**given | change)


def test_pieces_cover_a_head_of_any_size():
    for rows in (1, 15, 16, 17, 100):
        pieces = projected._zeros(mx.zeros((rows, 3)), projected.PIECES)
        assert sum(map(len, pieces)) == rows and min(map(len, pieces)) > 0


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
        assert_close([nats[place]], [wanted])
        assert_close([slope[place]], [np.array(by_logit) * weights[place].item()])


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


def test_the_benchmark_compares_three_ways_that_agree(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark, "in_fresh_process", benchmark.step)
    out = tmp_path / "fused.json"
    benchmark.main(["--sizes", "500:64:4", "--width", "8", "--out", str(out)])
    assert "<= 1/8" in capsys.readouterr().out
    (case,) = json.loads(out.read_text())["cases"]
    assert list(case["rows"]) == ["whole", "fused", "stepwise"]
    assert all(row["differs"] < 1e-4 for row in case["rows"].values())
    assert case["rows"]["fused"]["output_bytes"] == 4 * 8 * (64 + 500)
    assert case["met"] == (case["rows"]["fused"]["of_whole"] <= 1 / 8)
