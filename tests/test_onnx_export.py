"""Language models and networks exported to ONNX: what stands in the file, and what it computes."""

import json
from dataclasses import replace
from functools import lru_cache

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import onnx
import pytest
from mlx.utils import tree_unflatten
from mlx_compress.bridges.decoder import module_program
from mlx_compress.bridges.onnx.export import OnnxOptions, export_onnx
from mlx_compress.bridges.onnx.runner import Decoder, load
from mlx_compress.bridges.onnx.scripts import add_scripts

import tiny
import zoo
from mlx_compress.errors import InputError
from mlx_compress.program import program_of
from zoo_exports import OK, SHAPES, check_onnx, decode, stock_decode, worst

# A dense model, experts with shared ones and latent attention, windows and soft caps, biases and
# partial rotary positions.
ARCHITECTURES = ("llama", "mixtral", "deepseek_v3", "gemma3_text", "phi")
WIDE = {**tiny.LLAMA, "hidden_size": 64, "head_dim": 16, "intermediate_size": 96}


@pytest.fixture(autouse=True)
def uncompiled():
    mx.disable_compile()
    yield
    mx.enable_compile()


@lru_cache
def plain():
    module = tiny.build(tiny.LLAMA)
    return module, module_program(lambda: module)


def decoder(config=None, *, dtype=mx.float32, bits=None, group=32, mode="affine"):
    """A module, to be left as it is, and its program."""
    if config is None:
        return plain()
    module = tiny.build(config)
    module.set_dtype(dtype)
    if bits:
        nn.quantize(module, group, bits, mode=mode)
    return module, module_program(lambda: module)


def error(program, model, **extra) -> float:
    """The largest relative one over three shapes."""
    found = []
    for seed, sizes in enumerate(SHAPES):
        feeds = program.feeds(sizes, seed)
        got = model.run({**feeds, **{k: v(sizes) for k, v in extra.items()}})
        found.append(worst([g.astype(np.float32) for g in got], program.run(feeds)))
    return max(found)


def graph_of(path):
    onnx.checker.check_model(str(path), full_check=True)
    return onnx.load(str(path), load_external_data=False).graph


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_equals_mlx_and_decodes_as_stock_mlx_lm_does(name, tmp_path):
    assert check_onnx(name, tmp_path) == OK


def test_weights_lie_as_matmul_reads_them(tmp_path):
    _, program = decoder()
    graph = graph_of(export_onnx(program, tmp_path / "x.onnx").path)
    held = {tensor.name for tensor in graph.initializer}
    turned = [node for node in graph.node if node.op_type == "Transpose" and node.input[0] in held]
    assert turned == []
    counts = {kind: sum(n.op_type == kind for n in graph.node) for kind in ("Attention", "MatMul")}
    assert counts == {"Attention": 2, "MatMul": 15}


def test_a_tied_embedding_is_written_once(tmp_path):
    _, program = decoder({**tiny.LLAMA, "tie_word_embeddings": True})
    written = export_onnx(program, tmp_path / "x.onnx")
    weights = sum(a.nbytes for a in program.fetch(list(program.graph.parameters)).values())
    assert weights <= written.weight_bytes < weights + 512
    assert error(program, load(written.path)) < 1e-5


def test_open_axes_and_the_cache_are_named_in_the_file(tmp_path):
    _, program = decoder()
    path = export_onnx(program, tmp_path / "x.onnx").path
    graph = graph_of(path)
    shapes = {
        one.name: [d.dim_param or d.dim_value for d in one.type.tensor_type.shape.dim]
        for one in (*graph.input, *graph.output)
    }
    assert shapes["input_ids"] == ["batch", "length"]
    assert shapes["past_key_values.0.key"] == ["batch", 2, "past", 6]
    assert shapes["present.1.value"] == ["batch", 2, "length+past", 6]
    metadata = load(path).metadata
    pairs = json.loads(metadata["mlx_compress.cache"])
    assert pairs["past_key_values.1.key"] == "present.1.key"
    assert json.loads(metadata["mlx_compress.limits"]) == {"input_ids": tiny.VOCABULARY}


def test_a_cache_in_buffers_decodes_the_same(tmp_path):
    module, program = decoder({**tiny.LLAMA, "head_dim": 16})
    path = export_onnx(program, tmp_path / "x.onnx", cache="buffer", positions=64).path
    kinds = [node.op_type for node in graph_of(path).node]
    assert kinds.count("GroupQueryAttention") == 2 and kinds.count("MatMul") == 2 * 5 + 1
    model = load(path)
    feeds = program.feeds({"batch": 1, "length": 3, "past": 4})
    got = model.run({**feeds, "past_length": np.array([4])})
    assert worst(got, program.run(feeds)) < 1e-5
    for prompt in ([5, 17, 3], [7]):
        assert list(Decoder(model).tokens(prompt, max_tokens=16)) == stock_decode(module, prompt)


def test_a_window_stays_one_in_buffers(tmp_path):
    module = zoo.build("gemma3_text")
    program = module_program(lambda: module)
    path = export_onnx(program, tmp_path / "x.onnx", cache="buffer").path
    windows = {
        a.i for node in graph_of(path).node for a in node.attribute if a.name == "local_window_size"
    }
    assert len(windows) == 2 and -1 in windows
    assert list(Decoder(load(path)).tokens([5, 9, 2], max_tokens=16)) == stock_decode(
        module, [5, 9, 2]
    )


def test_partly_turned_heads_decode_the_same_in_buffers(tmp_path):
    module = zoo.build("phi")
    program = module_program(lambda: module)
    model = load(export_onnx(program, tmp_path / "x.onnx", cache="buffer").path)
    assert list(Decoder(model).tokens([5, 9], max_tokens=16)) == stock_decode(module, [5, 9])


@pytest.mark.parametrize(
    ("name", "text"),
    (("tiny", "width of heads of 6"), ("gpt_oss", "something of its own"), ("net", "has no cache")),
)
def test_what_buffers_cannot_hold_is_refused(name, text, tmp_path):
    if name == "net":
        program = network()
    elif name == "tiny":
        program = decoder()[1]
    else:
        program = module_program(lambda: zoo.build(name))
    with pytest.raises(InputError, match=text):
        export_onnx(program, tmp_path / "x.onnx", cache="buffer")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("bits", "dtype"), ((4, mx.float32), (4, mx.bfloat16), (6, mx.float16), (8, mx.float32))
)
def test_quantised_weights_lose_nothing(bits, dtype, tmp_path):
    _, program = decoder(WIDE, bits=bits, dtype=dtype)
    written = export_onnx(program, tmp_path / "x.onnx", accuracy_level=0)
    nodes = [node for node in graph_of(written.path).node if node.op_type == "MatMulNBits"]
    assert len(nodes) == 15 and not written.notes
    assert error(program, load(written.path)) < 1e-5


def test_quantised_experts_and_tied_embeddings_stay_packed(tmp_path):
    config = {**tiny.MIXTRAL, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 101,
              "tie_word_embeddings": True}  # fmt: skip
    module, program = decoder(config, bits=4)
    written = export_onnx(program, tmp_path / "x.onnx", accuracy_level=0)
    held = program.fetch(list(program.graph.parameters)).values()
    assert written.weight_bytes < 1.05 * sum(array.nbytes for array in held)
    model = load(written.path)
    assert error(program, model) < 1e-5
    assert decode(program, model.run, [5, 9]) == stock_decode(module, [5, 9])


def test_other_kinds_of_quantised_weights_become_plain_ones_and_it_says_so(tmp_path):
    _, program = decoder(WIDE, bits=4, mode="mxfp4")
    written = export_onnx(program, tmp_path / "x.onnx")
    assert "layers.0.self_attn.q_proj.weight: mxfp4 4-bit" in written.notes[0]
    assert error(program, load(written.path)) < 1e-5


def test_int8_activations_are_an_option_and_near(tmp_path):
    _, program = decoder(WIDE, bits=4)
    exact, fast = (
        export_onnx(program, tmp_path / f"{level}.onnx", accuracy_level=level).path
        for level in (0, 4)
    )
    assert 1e-4 < error(program, load(fast)) < 0.1 and error(program, load(exact)) < 1e-5


@pytest.mark.parametrize(
    ("config", "dtype"),
    ((None, mx.float32), (None, mx.float16), (None, mx.bfloat16), (tiny.MIXTRAL, mx.float32)),
)
def test_float16_is_near_whatever_the_model_was_traced_in(config, dtype, tmp_path):
    module, program = decoder(config)
    traced = program if dtype == mx.float32 else module_program(lambda: module, dtype=dtype)
    half = export_onnx(traced, tmp_path / "half.onnx", dtype="float16")
    whole = sum(a.nbytes for a in program.fetch(list(program.graph.parameters)).values())
    assert half.weight_bytes < 0.55 * whole
    types = {one.name: one.type for one in load(half.path).inputs.values()}
    assert types["past_key_values.0.key"] == "tensor(float16)"
    assert load(half.path).session.get_outputs()[0].type == "tensor(float)"
    assert error(program, load(half.path)) < 2e-2


def test_large_weights_lie_beside_the_file_at_page_borders(tmp_path):
    _, program = decoder({**WIDE, "vocab_size": 900})
    inline = export_onnx(program, tmp_path / "one.onnx")
    beside = export_onnx(program, tmp_path / "two.onnx", external_bytes=1000)
    assert inline.data is None and beside.data == tmp_path / "two.onnx.data"
    places = [
        int(entry.value)
        for tensor in graph_of(beside.path).initializer
        for entry in tensor.external_data if entry.key == "offset"
    ]  # fmt: skip
    assert len(places) > 10 and all(place % 4096 == 0 for place in places)
    assert beside.path.stat().st_size < 100_000
    feeds = program.feeds(SHAPES[0])
    for a, b in zip(load(inline.path).run(feeds), load(beside.path).run(feeds), strict=True):
        assert np.array_equal(a, b)


def test_weights_are_fetched_one_at_a_time(tmp_path):
    _, program = decoder()
    asked = []

    def fetch(paths):
        asked.append(len(list(paths)))
        return program.fetch(paths)

    export_onnx(replace(program, fetch=fetch), tmp_path / "x.onnx")
    assert max(asked) == 1


def test_a_failing_export_leaves_nothing_and_keeps_what_was_there(tmp_path):
    _, program = decoder()
    path = export_onnx(program, tmp_path / "x.onnx").path
    before = path.read_bytes()

    def fetch(paths):
        raise InputError("the weights are gone")

    with pytest.raises(InputError, match="gone"):
        export_onnx(replace(program, fetch=fetch), path, external_bytes=0)
    assert [p.name for p in tmp_path.iterdir()] == ["x.onnx"] and path.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "text"),
    (({"dtype": "int3"}, "dtype int3"), ({"cache": "none"}, "cache none"),
     ({"accuracy_level": 9}, "accuracy_level 9")),
)  # fmt: skip
def test_options_are_checked(change, text):
    with pytest.raises(InputError, match=text):
        OnnxOptions(**change)


class Net(nn.Module):
    """Strided, grouped and residual convolutions, batch norm, pooling, a linear head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm(8)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pool = nn.MaxPool2d(2, 2)
        self.head = nn.Linear(8, 5)

    def __call__(self, x):
        x = nn.relu(self.norm(self.stem(x)))
        x = self.pool(x + nn.relu6(self.depth(x)))
        return self.head(x.mean((1, 2)))


def network():
    net = Net().eval()
    net.norm.running_mean = mx.random.normal((8,))
    net.norm.running_var = mx.random.uniform(1, 2, (8,))
    held = tiny.parameters(net)

    def fn(parameters, x):
        net.update(tree_unflatten(list(parameters.items())))
        return net(x)

    return program_of(fn, {"pixels": mx.zeros((2, 16, 16, 3))}, parameters=held, outputs=["scores"],
                      dynamic={"pixels": {0: "batch"}})  # fmt: skip


def test_a_convolutional_network_with_an_open_batch(tmp_path):
    program = network()
    path = export_onnx(program, tmp_path / "x.onnx").path
    for batch in (1, 4):
        feeds = program.feeds({"batch": batch})
        assert worst(load(path).run(feeds), program.run(feeds)) < 1e-5
    kinds = [node.op_type for node in graph_of(path).node]
    assert kinds.count("Conv") == 2 and kinds.count("Transpose") == 1
    assert not {"Sub", "Div", "Sqrt"} & set(kinds)  # batch norm lies in the weights


def test_a_convolution_that_is_read_twice_is_computed_once(tmp_path):
    def fn(parameters, x):
        y = mx.conv2d(x, parameters["w"])
        return y * (y + 3)

    program = program_of(fn, {"x": mx.zeros((1, 5, 5, 3))}, parameters={"w": mx.ones((4, 3, 3, 3))},
                         outputs=["y"])  # fmt: skip
    path = export_onnx(program, tmp_path / "x.onnx").path
    assert [node.op_type for node in graph_of(path).node].count("Conv") == 1
    feeds = program.feeds()
    assert worst(load(path).run(feeds), program.run(feeds)) < 1e-6


def test_a_model_without_a_cache_gets_no_script(tmp_path):
    add_scripts(tmp_path / "model.onnx", network())
    assert not any(tmp_path.iterdir())
    _, program = decoder()
    add_scripts(tmp_path / "model.onnx", program)
    assert {p.name for p in tmp_path.iterdir()} == {"README.md", "bpe.py", "generate.py"}
    assert "| past_key_values.0.key | batch, 2, past, 6 |" in (tmp_path / "README.md").read_text()
