"""Every architecture learns from its logits, whole and a few tokens at a time."""

import mlx.core as mx
import numpy as np
import pytest

import zoo
from mlx_compress.errors import InputError
from mlx_compress.explained import Traced
from mlx_compress.heads import first_array, head_of
from mlx_compress.options import DistillOptions
from mlx_compress.token_loss import Batch, Split, gradients

# What mlx-lm computes there has no gradient.
UNTRAINABLE = {"deepseek_v41", "recurrent_gemma"}
# Their logits are capped or scaled behind the head, which so stays where it is.
CAPPED = {"gemma2", "gemma3n", "gemma4", "gemma4_text", "llama4_text", "nanochat", "talkie"}
TOKENS = mx.array(np.random.default_rng(0).integers(0, 101, (2, 8)), mx.int32)


@pytest.fixture(scope="module", autouse=True)
def no_compiler():
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_an_architecture_can_be_a_student(name):
    student, options = Traced(zoo.build(name)), DistillOptions()
    logits = first_array(student.module(TOKENS[:, :-1]))
    batch = Batch(TOKENS, mx.ones(TOKENS.shape), (mx.stop_gradient(logits[..., ::-1]),))
    if name in UNTRAINABLE:
        with pytest.raises(InputError, match="--model: this architecture cannot be trained"):
            gradients(student, [batch], options)
        return
    loss, grads = gradients(student, [batch], options)
    assert np.isfinite(loss.item()) and any(mx.any(grad).item() for grad in grads.values())
    head = head_of(student.module)
    assert (head is None) == (name in CAPPED)
    if head is not None:
        split, apart = gradients(student, [batch], options, split=Split(head, 5))
        assert abs(split.item() - loss.item()) < 1e-3
        assert all(mx.abs(apart[path] - grad).max() < 1e-3 for path, grad in grads.items())
