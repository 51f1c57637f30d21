"""Losses on projected hidden states: equal to those on whole logits, in bounded memory."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_compress.benchmarks import fused as benchmark
from mlx_compress.kernels import kl, projected
from mlx_compress.kernels.projected import projected_grads, projected_loss

import reference_distillation as reference

N, D, V, TEACHER_D = 23, 6, 37, 5


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


def test_the_benchmark_compares_three_ways_that_agree(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark, "in_fresh_process", benchmark.step)
    out = tmp_path / "fused.json"
    benchmark.main(["--sizes", "500:64", "--width", "8", "--out", str(out)])
    assert "<= 1/8" in capsys.readouterr().out
    (case,) = json.loads(out.read_text())["cases"]
    assert list(case["rows"]) == ["whole", "fused", "stepwise"]
    assert all(row["differs"] < 1e-4 for row in case["rows"].values())
    assert case["rows"]["fused"]["output_bytes"] == 4 * 8 * (64 + 500)
    assert case["met"] == (case["rows"]["fused"]["of_whole"] <= 1 / 8)
