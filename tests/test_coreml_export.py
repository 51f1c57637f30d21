"""Core ML packages: written, read back, and evaluated by `bridges/coreml/reference.py`."""

import shutil
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_compress.bridges.coreml.export import export_coreml
from mlx_compress.bridges.coreml.package import SPEC, WEIGHTS
from mlx_compress.bridges.coreml.prepare import prepare
from mlx_compress.bridges.coreml.reference import Package
from mlx_compress.bridges.coreml.run import (
    Model,
    checked_feeds,
    comparer,
    in_order,
    load,
    read_package,
)
from mlx_compress.bridges.decoder import module_program

import tiny
from mlx_compress.errors import InputError
from mlx_compress.parity import Case, compare
from mlx_compress.program import program_of
from zoo_coreml import PROMPT, decode
from zoo_exports import stock_decode, worst

FIXED = {"batch": 1, "length": 4, "past": 3}
LLAMA = {
    **tiny.LLAMA, "hidden_size": 32, "head_dim": 8, "intermediate_size": 64, "vocab_size": 64,
    "num_hidden_layers": 1,
}  # fmt: skip
MIXTURE = {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2}


@pytest.fixture(scope="module")
def program():
    module = tiny.build(LLAMA)
    return module_program(lambda: module, metadata={"model": "tiny"})


def error(program, package, sizes=None):
    """The largest relative error of any output, at random inputs."""
    feeds = program.feeds(sizes, seed=1)
    named = {name.replace(".", "_"): array for name, array in feeds.items() if array.size}
    return worst(list(package(named).values()), program.run(feeds))


def test_a_package_of_fixed_sizes_computes_what_mlx_computes(program, tmp_path):
    for past in (0, 3):
        path = tmp_path / f"past{past}.mlpackage"
        sizes = {"length": 4, "past": past}
        written = export_coreml(program, path, dtype="float32", shapes=sizes)
        package = Package(path)
        assert error(program, package, sizes) < 1e-5
        assert written.bytes == sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
        assert package.ops().count("scaled_dot_product_attention") == 1
        assert ("past_key_values_0_key" in package.main.inputs) == (past > 0)
    assert not list(tmp_path.glob(".*"))


def test_open_sizes_hold_at_every_size_of_their_range(program, tmp_path):
    path = tmp_path / "open.mlpackage"
    spans = {"batch": (1, 3), "length": (1, 16), "past": (1, 20)}
    export_coreml(program, path, dtype="float32", shapes=spans)
    package = Package(path)
    for sizes in ((1, 1, 1), (3, 16, 20), (2, 5, 7)):
        assert error(program, package, dict(zip(spans, sizes, strict=True))) < 1e-5
    tokens = next(f for f in package.spec.description.input if f.name == "input_ids")
    ranges = tokens.type.multiArrayType.shapeRange.sizeRanges
    assert [(r.lowerBound, r.upperBound) for r in ranges] == [(1, 3), (1, 16)]


def test_sizes_to_choose_from_go_together(program, tmp_path):
    path = tmp_path / "chosen.mlpackage"
    export_coreml(program, path, dtype="float32", shapes={"length": [1, 4], "past": [9, 12]})
    package = Package(path)
    assert error(program, package, {"length": 4, "past": 12}) < 1e-5
    feeds = {n.replace(".", "_"): a for n, a in program.feeds({"length": 1, "past": 12}).items()}
    assert feeds["past_key_values_0_key"].shape == (1, 2, 12, 8)
    feeds["input_ids"] = np.zeros((1, 3), np.int32)
    with pytest.raises(InputError, match=r"input_ids: shape \(1, 3\), but \(1, 1\) or \(1, 4\)"):
        checked_feeds(package.spec, feeds)


def test_a_cache_in_states_has_room_for_what_is_asked(program, tmp_path):
    for shapes, context in (({}, 2048), ({"past": (1, 40)}, 40), ({"past": 30, "length": 1}, 30)):
        path = tmp_path / f"{context}.mlpackage"
        export_coreml(program, path, shapes=shapes, stateful=True)
        assert Package(path).state()["key_cache"].shape == (1, 1, 2, context, 8)
        tokens = read_package(path).description.input[0].type.multiArrayType
        upper = [r.upperBound for r in tokens.shapeRange.sizeRanges] or list(tokens.shape)
        assert upper == [1, 1 if "length" in shapes else min(512, context)]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_cache_in_states_decodes_the_tokens_of_stock_mlx_lm(tmp_path, dtype):
    module = tiny.build({**LLAMA, "num_hidden_layers": 2}, seed=1)
    program = module_program(lambda: module)
    path = tmp_path / "states.mlpackage"
    shapes = {"length": (1, 8)}
    export_coreml(program, path, dtype=dtype, shapes=shapes, stateful=True, context=24)
    package = Package(path)
    assert {n: a.shape for n, a in package.state().items()} == {
        "key_cache": (2, 1, 2, 24, 8), "value_cache": (2, 1, 2, 24, 8),
    }  # fmt: skip
    assert list(package.main.inputs) == ["input_ids", "causal_mask", "key_cache", "value_cache"]
    assert decode(package, PROMPT) == stock_decode(module, PROMPT)


def test_half_precision_is_as_near_as_its_rounding(program, tmp_path):
    export_coreml(program, tmp_path / "half.mlpackage", shapes=FIXED)
    package = Package(tmp_path / "half.mlpackage")
    assert 1e-5 < error(program, package, FIXED) < 5e-3
    assert {v.dtype.__name__ for v in package.main.outputs} == {"fp16"}


# ---- quantised weights


def layer(weight, **how):
    """A program of one layer [8, 64] with quantised weights."""
    arrays = mx.quantize(weight, **how)
    parameters = dict(zip(("w.weight", "w.scales", "w.biases"), arrays, strict=True))

    def fn(parameters, x):
        return mx.quantized_matmul(x, *parameters.values(), **how)

    return program_of(fn, {"x": mx.zeros((3, 64))}, parameters=parameters, outputs=["y"])


def stored(package):
    """The operations that unpack weights."""
    return [op for op in package.main.operations if op.op_type.startswith("constexpr")]


def codes(program, bits):
    """Unpacked by hand, from the bits of the words."""
    words = np.array(program.fetch(["w.weight"])["w.weight"]).view(np.uint8)
    stream = np.unpackbits(words, axis=-1, bitorder="little").reshape(8, 64, bits)
    return (stream * 2 ** np.arange(bits)).sum(-1)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_codes_and_scales_are_carried_over_bit_for_bit(bits, tmp_path):
    program = layer(mx.random.normal((8, 64), key=mx.random.key(bits)), group_size=32, bits=bits)
    written = export_coreml(program, tmp_path / "w.mlpackage", dtype="float32")
    package = Package(written.path)
    assert error(program, package) < 1e-6 and written.notes == ()
    (op,) = stored(package)
    held = op.indices if bits == 2 else op.data
    assert held.dtype.get_bitwidth() == {2: 2, 3: 4, 4: 4}.get(bits, 8)
    np.testing.assert_array_equal(held.val.astype(int), codes(program, bits))
    if bits > 2:
        scales = np.array(program.fetch(["w.scales"])["w.scales"])
        np.testing.assert_array_equal(op.scale.val, scales)
        assert op.offset.dtype == op.data.dtype  # integers: the groups span zero


def test_a_group_that_does_not_reach_zero_has_an_offset_that_is_no_integer(tmp_path):
    weight = 9 + mx.random.normal((8, 64), key=mx.random.key(0))
    program = layer(weight, group_size=32, bits=4)
    package = Package(export_coreml(program, tmp_path / "w.mlpackage", dtype="float32").path)
    assert error(program, package) < 1e-6
    (op,) = stored(package)
    assert op.data.dtype.get_bitwidth() == 4 and op.offset.val.dtype == np.float32


def test_offsets_that_do_not_fit_are_said_and_the_weight_is_unpacked(tmp_path):
    program = layer(mx.ones((8, 64)) + 1e-6 * mx.arange(64), group_size=32, bits=4)
    written = export_coreml(program, tmp_path / "w.mlpackage")
    assert written.notes == ("w.weight: kept as fp16; its offsets do not fit",)
    package = Package(written.path)
    assert error(program, package) < 2e-3 and not stored(package)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_quantised_embeddings_of_every_width_are_found(bits):
    module = tiny.build({**LLAMA, "tie_word_embeddings": True})
    nn.quantize(module, group_size=32, bits=bits)
    graph, packed = prepare(module_program(lambda: module).graph, FIXED)
    assert [n.op for n in graph.nodes].count("Embedding") == 1
    weights = [p for p, _ in tree_flatten(module.parameters()) if p.endswith("scales")]
    assert len(packed) == len(weights)
    assert not {"BitwiseBinary", "QuantizedMatmul"} & {n.op for n in graph.nodes}


@pytest.mark.parametrize("config", [LLAMA, {**LLAMA, **MIXTURE}], ids=["llama", "mixtral"])
def test_a_quantised_model_stays_quantised(config, tmp_path):
    module = tiny.build(config)
    nn.quantize(module, group_size=32, bits=4)
    program = module_program(lambda: module)
    written = export_coreml(program, tmp_path / "q.mlpackage", dtype="float32", shapes=FIXED)
    package = Package(written.path)
    assert error(program, package, FIXED) < 1e-5 and written.notes == ()
    weights = [p for p, _ in tree_flatten(module.parameters()) if p.endswith("scales")]
    assert len(stored(package)) == len(weights)


@pytest.mark.parametrize("how, worst_error", [("int8", 0.02), ("int4", 0.3), ("palette4", 0.3)])
def test_weights_are_packed_on_request(tmp_path, how, worst_error):
    parameters = {"w": mx.random.normal((128, 256), key=mx.random.key(1))}
    program = program_of(
        lambda parameters, x: x @ parameters["w"].T, {"x": mx.zeros((3, 256))},
        parameters=parameters, outputs=["y"],
    )  # fmt: skip
    plain = export_coreml(program, tmp_path / "plain.mlpackage")
    small = export_coreml(program, tmp_path / "small.mlpackage", quantize=how)
    assert small.bytes < 0.7 * plain.bytes
    package = Package(small.path)
    assert error(program, package) < worst_error and len(stored(package)) == 1


# ---- other networks


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = [nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, groups=2)]
        self.norm, self.head = nn.BatchNorm(8), nn.Linear(8, 5)

    def __call__(self, x):
        x = nn.relu(self.norm(self.layers[0](x)))
        return self.head(self.layers[1](x).mean((1, 2)))


def test_a_network_of_images_keeps_an_open_batch(tmp_path):
    net = ConvNet().eval()
    mx.eval(net.parameters())
    parameters = dict(tree_flatten(net.parameters()))

    def fn(parameters, pixels):
        net.load_weights(list(parameters.items()))
        return net(pixels)

    program = program_of(
        fn, {"pixels": mx.zeros((2, 9, 9, 3))}, parameters=parameters, outputs=["scores"],
        dynamic={"pixels": {0: "batch"}},
    )  # fmt: skip
    path = tmp_path / "net.mlpackage"
    export_coreml(program, path, dtype="float32", shapes={"batch": (1, 8)})
    package = Package(path)
    for batch in (1, 5):
        assert error(program, package, {"batch": batch}) < 1e-5
    assert "conv" in package.ops()


# ---- what a package says, and what can be wrong


def test_a_package_says_what_it_is(program, tmp_path):
    path = tmp_path / "m.mlpackage"
    about = {"author": "A. Author", "license": "MIT", "short_description": "Tiny", "version": "2"}
    export_coreml(program, path, shapes=FIXED, metadata={**about, "compression": '{"kept": 3}'})
    said = read_package(path).description
    metadata = said.metadata
    got = (metadata.author, metadata.license, metadata.shortDescription, metadata.versionString)
    assert got == tuple(about.values())
    assert metadata.userDefined["compression"] == '{"kept": 3}'
    assert metadata.userDefined["model"] == "tiny"
    assert all(f.shortDescription for f in (*said.input, *said.output))


BAD = [
    ({"path": "m.onnx"}, r"m.onnx: a Core ML package is named \*.mlpackage"),
    ({"path": "no/m.mlpackage"}, "no: no such folder"),
    ({"dtype": "bfloat16"}, "dtype 'bfloat16' is not known; choose of float16, float32"),
    ({"quantize": "int3"}, "quantize 'int3' is not known; choose of int4, int8, palette2"),
    ({"compute_units": "GPU"}, "compute_units 'GPU' is not known; choose of ALL, CPU_ONLY"),
    ({"minimum_deployment_target": "iOS12"}, "minimum_deployment_target 'iOS12' is not known"),
    ({"minimum_deployment_target": "macOS14", "stateful": True}, "macOS14: states and packed"),
    ({"shapes": {"width": 3}}, "size 'width' is not known; the program's sizes are batch, length"),
    ({"shapes": {"past": (0, 4)}}, r"size past: \(0, 4\); give a number, a range"),
    ({"shapes": {"length": (9, 4)}}, r"size length: \(9, 4\) is no range"),
    ({"shapes": {"length": [1, 4], "past": (1, 4)}}, "give every open size as a list"),
    ({"shapes": {"length": 64}, "stateful": True, "context": 32}, "length 64 is more than the"),
]


@pytest.mark.parametrize("wrong, message", BAD, ids=[str(w) for w, _ in BAD])
def test_what_cannot_be_written_is_refused_and_leaves_nothing(program, tmp_path, wrong, message):
    wrong = dict(wrong)
    path = tmp_path / wrong.pop("path", "m.mlpackage")
    with pytest.raises(InputError, match=message) as refused:
        export_coreml(program, path, **wrong)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_program_without_a_rule_leaves_nothing(tmp_path):
    program = program_of(
        lambda _, x: mx.erfinv(x), {"x": mx.zeros((3,))}, parameters={}, outputs=["y"]
    )
    with pytest.raises(InputError, match="no rule for primitive ErfInv"):
        export_coreml(program, tmp_path / "m.mlpackage")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def package(program, tmp_path_factory):
    path = tmp_path_factory.mktemp("package") / "m.mlpackage"
    export_coreml(program, path, shapes={"length": (1, 8), "past": 0})
    return path


def test_a_package_is_not_overwritten(program, package):
    with pytest.raises(InputError, match="m.mlpackage: exists already; remove it or choose"):
        export_coreml(program, package)


def test_damaged_packages_are_told_apart(package, tmp_path):
    with pytest.raises(InputError, match="none.mlpackage: no such Core ML package"):
        read_package(tmp_path / "none.mlpackage")
    package = shutil.copytree(package, tmp_path / "m.mlpackage")
    weights = (package / WEIGHTS).read_bytes()
    (package / WEIGHTS).write_bytes(weights[: len(weights) // 2])
    with pytest.raises(InputError, match="weight.bin: the weights are damaged"):
        read_package(package)
    (package / WEIGHTS).unlink()
    with pytest.raises(InputError, match="weight.bin: the weights are missing"):
        read_package(package)
    (package / SPEC).write_bytes(b"\xff\xff not a model")
    with pytest.raises(InputError, match="m.mlpackage: damaged, or no ML program"):
        read_package(package)


def test_inputs_that_do_not_fit_are_named(package):
    spec = read_package(package)
    tokens = np.zeros((1, 8), np.int64)
    assert checked_feeds(spec, {"input_ids": tokens})["input_ids"].dtype == np.int32
    with pytest.raises(InputError, match=r"input_ids: shape \(1, 9\), but \(1, 1 to 8\) is expec"):
        checked_feeds(spec, {"input_ids": np.zeros((1, 9))})
    with pytest.raises(InputError, match="input tokens: is no input; the package takes input_ids"):
        checked_feeds(spec, {"input_ids": tokens, "tokens": tokens})
    with pytest.raises(InputError, match="input input_ids: is missing"):
        checked_feeds(spec, {})


@pytest.mark.skipif(sys.platform == "darwin", reason="says what other systems lack")
def test_running_needs_a_mac(package):
    with pytest.raises(InputError, match="Core ML runs on macOS only; open the package on a Mac"):
        load(package)


@pytest.mark.skipif(sys.platform == "darwin", reason="there, Core ML itself is asked")
def test_elsewhere_a_package_is_compared_by_the_evaluator(package, monkeypatch):
    tokens = np.array([[1, 2, 3]], np.int32)
    (got,) = comparer(package)({"input_ids": tokens})[:1]
    np.testing.assert_array_equal(got, Package(package)({"input_ids": tokens})["logits"])
    monkeypatch.setattr("mlx_compress.bridges.coreml.run.EVALUATED", 0)
    assert comparer(package) is None
    with pytest.raises(InputError, match="compute_units 'NPU' is not known"):
        load(package, compute_units="NPU")


class Evaluated:
    """Stands for Core ML's model: the same call, computed by the evaluator."""

    def __init__(self, path):
        self.package = Package(path)

    def predict(self, feeds):
        return dict(reversed(self.package(feeds).items()))


def test_a_model_runs_in_the_names_and_the_order_of_its_program(program, tmp_path):
    for past in (0, 3):
        path = tmp_path / f"past{past}.mlpackage"
        sizes = {"length": 4, "past": past}
        export_coreml(program, path, dtype="float32", shapes=sizes)
        run = in_order(Model(read_package(path), Evaluated(path)))
        (found,) = compare(program, run, [Case("random", program.feeds(sizes))])
        assert found.max_error < 1e-5


@pytest.mark.skipif(sys.platform != "darwin", reason="Core ML runs on macOS only")
def test_core_ml_computes_what_mlx_computes(program, package):
    feeds = program.feeds({"past": 0})
    got = load(package, compute_units="CPU_ONLY").run({"input_ids": feeds["input_ids"]})
    assert worst([got["logits"]], program.run(feeds)[:1]) < 2e-2


def test_coremltools_is_quiet(program, tmp_path, capfd):
    export_coreml(program, tmp_path / "m.mlpackage", shapes=FIXED)
    assert capfd.readouterr() == ("", "")
