"""Some architectures of the zoo as Core ML packages; `zoo_coreml.main` tries them all."""

import mlx.core as mx
import pytest

from zoo_coreml import check_coreml


@pytest.fixture(autouse=True, scope="module")
def without_a_compiler():
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.mark.parametrize(
    "name, said",
    [
        ("gemma3_text", "ok"),  # windows
        ("gpt2", "ok"),
        ("mamba", "ok without a cache"),
        ("deepseek_v2", "ok"),  # latent attention, experts in groups
        ("qwen3_moe", "ok"),
    ],
)
def test_an_architecture_is_said_in_core_ml(name, said, tmp_path):
    assert check_coreml(name, tmp_path) == said
