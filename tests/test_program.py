"""Programs: run, pruned, quantised, saved and opened again, they compute what they should."""

import json
import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_compress.bridges.decoder import module_program

import plain
import tiny
from mlx_compress.archive import load_program, read_record, save_program
from mlx_compress.axes import named_axes
from mlx_compress.errors import GateFailed, InputError
from mlx_compress.parity import compare, error_of, random_cases, require
from mlx_compress.program import program_of, prune_program, with_weights
from mlx_compress.prune import zero_parameters
from mlx_compress.quantize import quantize_program


class Net(nn.Module):
    """A convolution, a norm, and two layers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 96), nn.Linear(96, 5)

    def __call__(self, x):
        return self.down(nn.gelu(self.up(self.norm(self.conv(x)).mean((1, 2)))))


@pytest.fixture(scope="module")
def net():
    mx.random.seed(3)
    module = Net()
    mx.eval(module.parameters())
    return module


@pytest.fixture
def program(net):
    image = {"image": mx.zeros((1, 6, 6, 3))}
    return program_of(net, image, outputs=["scores"], dynamic={"image": {0: "batch"}})


def weights(program):
    return dict(program.fetch(list(program.graph.parameters)))


@pytest.fixture(scope="module")
def decoder():
    module = tiny.build(tiny.LLAMA)
    return module_program(lambda: module)


@pytest.mark.parametrize("batch", [1, 4])
def test_a_program_computes_what_its_function_does_for_any_batch(program, net, batch):
    feeds = program.feeds({"batch": batch})
    (got,) = program.run(feeds)
    np.testing.assert_allclose(np.array(got), np.array(net(mx.array(feeds["image"]))), rtol=1e-5)
    assert program.sizes == {"batch": 1} and feeds["image"].shape == (batch, 6, 6, 3)


def test_inputs_are_checked_by_name_and_shape(program):
    with pytest.raises(InputError, match="input image: is missing"):
        program.run({})
    with pytest.raises(InputError, match=r"input 0: shape \(1, 6, 7, 3\)"):
        program.run({"image": np.zeros((1, 6, 7, 3), np.float32)})


def test_random_token_ids_lie_in_the_vocabulary(decoder):
    ids = decoder.feeds({"batch": 50, "length": 20})["input_ids"]
    assert ids.min() == 0 and ids.max() == tiny.VOCABULARY - 1


def test_ids_that_pick_rows_of_a_table_are_drawn_from_all_of_them():
    def looked_up(p, ids, flags):
        return p["table"][ids.reshape(-1)] * flags[:, None]

    given = {"ids": mx.zeros((3, 1), mx.int32), "flags": mx.zeros((3,), mx.int32)}
    program = program_of(looked_up, given, parameters={"table": mx.ones((50, 4))}, outputs=["y"])
    assert program.limits == {"ids": 50}


def test_a_pruned_program_equals_the_zeroed_one(program):
    named = named_axes(program.at())
    dims = [d for d in named.free() if d.exact]
    assert {d.size for d in dims} == {96}
    plan = plain.random_plan(named, dims, seed=1)
    pruned = prune_program(program, plan)
    zeroed = with_weights(program, zero_parameters(named, plan, weights(program)))
    assert weights(pruned)["up.weight"].shape[0] < 96
    feeds = program.feeds({"batch": 3})
    np.testing.assert_allclose(
        np.array(pruned.run(feeds)[0]), np.array(zeroed.run(feeds)[0]), rtol=1e-5, atol=1e-6
    )


def test_a_pruned_decoder_keeps_its_sizes_open(decoder):
    named = named_axes(decoder.at())
    dims = [d for d in named.free(("channels",)) if d.exact]
    pruned = prune_program(decoder, plain.random_plan(named, dims, seed=2))
    for sizes in ({"past": 0, "length": 1}, {"batch": 3, "length": 5, "past": 9}):
        logits, *present = pruned.run(pruned.feeds(sizes))
        assert logits.shape[1] == sizes["length"]
        assert present[0].shape[2] == sizes["length"] + sizes["past"]


# ---- quantised


def test_a_quantised_program_computes_with_the_dequantised_weights(program):
    quantised, notes = quantize_program(program, bits=4, group_size=32)
    held = weights(program)
    assert notes == ["up.weight: not quantised, its rows have no groups of 32"]
    packed = mx.quantize(held["down.weight"], group_size=32, bits=4)
    assert mx.array_equal(weights(quantised)["down.packed"], packed[0])
    want = with_weights(
        program, held | {"down.weight": mx.dequantize(*packed, group_size=32, bits=4)}
    )
    feeds = program.feeds({"batch": 3})
    np.testing.assert_allclose(
        np.array(quantised.run(feeds)[0]), np.array(want.run(feeds)[0]), rtol=1e-4, atol=1e-5
    )


def test_a_layer_takes_groups_of_32_where_64_do_not_fit(program):
    quantised, _ = quantize_program(program, bits=8)
    (node,) = [n for n in quantised.graph.nodes if n.op == "QuantizedMatmul"]
    assert node.attributes == (32, 8, 0, True)


def test_a_weight_that_is_also_looked_up_is_kept_whole_beside_its_packed_form():
    def tied(p, ids):
        return p["table"][ids] @ p["table"].T

    held = {"table": mx.random.normal((64, 64))}
    ids = {"ids": mx.zeros((2,), mx.int32)}
    quantised, _ = quantize_program(program_of(tied, ids, parameters=held, outputs=["y"]))
    assert set(weights(quantised)) == {
        "table", "table_packed", "table_scales", "table_biases"
    }  # fmt: skip


def test_a_program_without_layers_to_quantise_is_refused(decoder):
    with pytest.raises(InputError, match="no linear layer can be quantised"):
        quantize_program(decoder)
    with pytest.raises(InputError, match="bits 7"):
        quantize_program(decoder, bits=7)
    with pytest.raises(InputError, match="--q-group-size 48: MLX has 128, 64, 32"):
        quantize_program(decoder, group_size=48)


# ---- saved


@pytest.mark.parametrize("which", ["program", "decoder"])
def test_a_saved_program_is_the_same_when_opened(which, request, tmp_path):
    program = request.getfixturevalue(which)
    save_program(program, tmp_path, {"made": "here"})
    opened = load_program(tmp_path)
    assert (opened.inputs, opened.outputs) == (program.inputs, program.outputs)
    assert dict(opened.sizes) == dict(program.sizes) and read_record(tmp_path) == {"made": "here"}
    for name, size in program.sizes.items():
        feeds = program.feeds({name: size + 2})
        for got, want in zip(opened.run(feeds), program.run(feeds), strict=True):
            assert mx.array_equal(got, want)


def damage(text):
    return lambda folder: (folder / "graph.json").write_text(text)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda folder: (folder / "graph.json").unlink(), "cannot be read"),
        (damage("{"), "not valid JSON"),
        (damage('{"format": 99}'), "format 99, but this version reads format 1"),
        (damage("[]"), "format None"),
        (damage('{"format": 1}'), "damaged"),
        (lambda folder: (folder / "model.safetensors").unlink(), "missing, damaged or truncated"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "damaged or truncated"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(program, tmp_path, spoil, reason):
    save_program(program, tmp_path)
    spoil(tmp_path)
    with pytest.raises(InputError, match=reason) as refused:
        load_program(tmp_path)
    assert "\n" not in str(refused.value)


def test_weights_of_another_model_are_refused(program, tmp_path):
    save_program(program, tmp_path)
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {"up.weight": mx.zeros((2, 2))})
    with pytest.raises(InputError, match="conv.weight is nothing"):
        load_program(tmp_path)


def test_what_is_saved_is_plain_json(decoder, tmp_path):
    save_program(decoder, tmp_path)
    document = json.loads((tmp_path / "graph.json").read_text())
    assert {"op", "Size"} & {n[0] for n in document["graph"]["nodes"]} == {"Size"}


# ---- parity


def runner(program, change=lambda array: array):
    return lambda feeds: [change(np.array(array)) for array in program.run(feeds)]


def test_a_program_equals_itself_at_several_sizes(decoder):
    cases = random_cases(decoder)
    assert [c.feeds["input_ids"].shape for c in cases] == [(1, 8), (1, 1), (5, 19)]
    assert [p.max_error for p in compare(decoder, runner(decoder), cases)] == [0, 0, 0]


def test_an_error_beyond_the_tolerance_is_named_with_its_case(program):
    off = runner(program, lambda a: a + 0.01 * abs(a).max())
    found = compare(program, off, random_cases(program))
    assert all(p.max_error == pytest.approx(0.01, rel=1e-3) for p in found)
    require(found, 0.02, "model.onnx")
    with pytest.raises(GateFailed, match=r"model.onnx: differs .* by 1.0e-02 on random batch"):
        require(found, 1e-4, "model.onnx")


def test_not_a_number_and_another_shape_never_pass(program):
    for spoil in (lambda a: a * math.nan, lambda a: a[:, :-1]):
        found = compare(program, runner(program, spoil), random_cases(program))
        with pytest.raises(GateFailed):
            require(found, 1e9, "model.onnx")


def test_equal_infinities_do_not_differ():
    masked = np.array([-np.inf, 2.0])
    assert error_of(masked, masked) == (0, 0)
    assert error_of(np.array([0.0, 2.0]), masked)[0] == np.inf
