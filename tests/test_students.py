import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_compress.bridges.mlx_lm import open_model
from mlx_compress.bridges.students import student_of, trained_fetch

from mlx_compress.explained import Traced
from mlx_compress.options import DistillOptions
from mlx_compress.token_loss import Batch, gradients
from tiny import LLAMA, MIXTRAL, VOCABULARY, build, save

TOKENS = mx.array(np.random.default_rng(0).integers(0, VOCABULARY, (2, 9)), mx.int32)
MASK = mx.ones(TOKENS.shape)


@pytest.fixture
def student(tmp_path):
    save(LLAMA, tmp_path / "model")
    return open_model(tmp_path / "model")


@pytest.mark.parametrize("config", [LLAMA, MIXTRAL], ids=lambda config: config["model_type"])
def test_layers_computed_twice_give_the_same_gradients(config, tmp_path):
    save(config, tmp_path / "model")
    model = open_model(tmp_path / "model")
    batch = Batch(TOKENS, MASK, (build(config, 1)(TOKENS[:, :-1]),))
    plain, again = (DistillOptions(grad_checkpoint=on) for on in (False, True))
    _, expected = gradients(Traced(student_of(model, plain)), [batch], plain)
    _, got = gradients(Traced(student_of(model, again)), [batch], again)
    assert got.keys() == expected.keys()
    for path, grad in expected.items():
        np.testing.assert_allclose(got[path], grad, atol=1e-6)


def test_a_checkpointed_student_leaves_other_models_of_its_class_alone(student):
    before = student_of(student, DistillOptions())
    after = student_of(student, DistillOptions(grad_checkpoint=True))
    assert type(before.layers[0]) is not type(after.layers[0])
    assert "__call__" in vars(type(after.layers[0]))
    assert type(before.layers[0]) is type(build(LLAMA).layers[0])


def test_adapters_are_all_that_is_trained_and_begin_as_nothing(student):
    options = DistillOptions(lora_rank=2)
    module = student_of(student, options)
    names = [path.rpartition(".")[2] for path, _ in tree_flatten(module.trainable_parameters())]
    assert names and set(names) == {"lora_a", "lora_b"}
    plain = student_of(student, DistillOptions())
    np.testing.assert_allclose(module(TOKENS), plain(TOKENS), atol=1e-6)


def test_merged_adapters_compute_what_they_computed_apart(student):
    options = DistillOptions(lora_rank=2)
    module = student_of(student, options)
    best = {
        path: mx.random.normal(array.shape, key=mx.random.key(i)) * 0.1
        for i, (path, array) in enumerate(tree_flatten(module.trainable_parameters()))
    }
    module.load_weights(list(best.items()), strict=False)
    plain = student.module()
    paths = [path for path, _ in tree_flatten(plain.parameters())]
    plain.load_weights(list(trained_fetch(student, options, best)(paths).items()))
    assert mx.abs(plain(TOKENS) - student.module()(TOKENS)).max() > 0.1
    np.testing.assert_allclose(plain(TOKENS), module(TOKENS), atol=1e-4)
