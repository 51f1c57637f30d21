from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_compress.errors import ResourceError
from mlx_compress.explained import Traced
from mlx_compress.graph import trace
from mlx_compress.options import DistillOptions
from mlx_compress.token_loss import Batch, gradients
from mlx_compress.training_memory import STATES, require_memory, training_bytes
from tiny import LLAMA, build, parameters

WIDE = LLAMA | {"hidden_size": 64, "intermediate_size": 160, "head_dim": 16}
OPTIONS = DistillOptions(batch_size=4, max_seq_length=129)


def graph():
    return trace(build(WIDE), mx.zeros((1, 128), mx.int32))


def test_what_is_said_to_be_needed_is_somewhat_more_than_what_a_step_takes():
    student, teacher = build(WIDE), build(WIDE, 1)
    tokens = mx.random.randint(0, 23, (4, 129))
    mx.eval(tokens)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    targets = (mx.stop_gradient(teacher(tokens[:, :-1])),)
    gradients(Traced(student), [Batch(tokens, mx.ones(tokens.shape), targets)], OPTIONS)
    took = mx.get_peak_memory() - before
    fixed, window = training_bytes(graph(), OPTIONS)
    weights = sum(array.nbytes for array in parameters(student).values())
    assert fixed == STATES * weights
    assert took <= weights + 4 * window <= 3 * took


@pytest.mark.parametrize(
    "teacher, has, words",
    [
        (0, 2.5, "--batch-size 2 would fit"),
        (9, 1.5, "without the teacher it would fit: cache what it says with --target-dir"),
        (0, 0.6, "try --grad-checkpoint"),
        (0, 0.0, "give a smaller student"),
    ],
)
def test_what_would_fit_is_said(teacher, has, words):
    """In windows beside the weights."""
    fixed, window = training_bytes(graph(), OPTIONS)
    with pytest.raises(ResourceError, match=words):
        require_memory(graph(), teacher * window, OPTIONS, fixed + int(has * window), layers=2)
    require_memory(graph(), 0, OPTIONS, fixed + 4 * window)


@pytest.mark.parametrize("inner", [{"hidden_weight": 1.0}, {"attribution": "align"}])
def test_what_would_be_refused_is_not_said_to_fit(inner):
    fixed, window = training_bytes(graph(), OPTIONS)
    for teacher, has in ((9, 1.5), (0, 0.6)):
        with pytest.raises(ResourceError, match="give a smaller student"):
            require_memory(
                graph(), teacher * window, replace(OPTIONS, **inner), fixed + int(has * window),
                layers=2,
            )  # fmt: skip


def test_adapters_are_little_to_train():
    held = sum(array.nbytes for array in parameters(build(WIDE)).values())
    fixed, _ = training_bytes(graph(), OPTIONS, trained=100)
    assert fixed == held + STATES * 4 * 100


def test_logits_that_are_never_whole_do_not_count(monkeypatch):
    from mlx_compress import training_memory

    _, whole = training_bytes(graph(), OPTIONS)
    monkeypatch.setattr(training_memory, "LOGITS_BYTES", 1)
    assert training_bytes(graph(), OPTIONS)[1] < whole
