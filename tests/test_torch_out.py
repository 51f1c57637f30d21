"""Graphs as torch modules: every primitive, the zoo, .pt2 files, and folders for transformers."""

import json
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from mlx_compress.bridges.decoder import module_program
from mlx_compress.bridges.torch import from_torch, save_torch, to_torch
from mlx_compress.bridges.torch.primitives import TORCH
from mlx_compress.bridges.torch.quantised import dequantised

import plain
import test_execute
import tiny
import zoo
from mlx_compress import recipe
from mlx_compress.errors import InputError
from mlx_compress.execute import OPS, run
from mlx_compress.graph import Graph, Node, Value, trace
from mlx_compress.options import Options
from mlx_compress.patterns import recognise
from mlx_compress.program import Program, of_arrays, program_of

TOLERANCE = 1e-4
# Between them they hold every primitive that occurs in the zoo.
COVER = ("deepseek_v41", "recurrent_gemma", "llama4", "phi3small", "bailing_hybrid",
         "prism_hadamard_qwen35", "gpt_bigcode", "afm7", "apertus", "phimoe")  # fmt: skip
TOKENS = mx.array([[3, 7, 1, 9, 22, 5, 4]])


@pytest.fixture(autouse=True)
def no_compile():
    mx.disable_compile()
    yield
    mx.enable_compile()


def numbers(array):
    wide = array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array
    return np.array(wide)


def in_torch(module, arrays):
    tensors = [torch.from_numpy(np.array(a)) for a in arrays]
    with torch.no_grad():
        out = module(*tensors)
    out = out if isinstance(out, tuple) else (out,)
    return [t.float().numpy() if t.is_floating_point() else t.numpy() for t in out]


def assert_close(got, want, tolerance=TOLERANCE):
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        finite = np.isfinite(w)
        assert np.array_equal(g[~finite], w[~finite], equal_nan=g.dtype.kind == "f")
        size = np.abs(w[finite]).max(initial=1e-3)
        assert np.abs(g[finite].astype(np.float64) - w[finite]).max(initial=0) <= tolerance * size


# ---- every primitive


def test_the_table_has_the_primitives_that_mlx_runs():
    assert sorted(set(TORCH) ^ set(OPS)) == []


AFFINE_ONLY = "requantise them by affine"


@pytest.mark.parametrize("case", test_execute.CASES, ids=[op for op, *_ in test_execute.CASES])
def test_torch_computes_what_mlx_does(case):
    op, fn, *inputs = case
    graph = trace(fn, *inputs)
    module = to_torch(graph, {})
    modes = [n.attributes[2] for n in graph.nodes if n.op in ("QuantizedMatmul", "GatherQMM")]
    if any(modes):
        with pytest.raises(InputError, match=AFFINE_ONLY):
            in_torch(module, inputs)
        return
    want = [numbers(a) for a in run(graph, inputs, {})[0]]
    got = in_torch(module, inputs)
    if op in ("ArgPartition", "Partition"):  # any order on each side of the kth will do
        want, got = ([np.sort(a, axis=k - 1 if k else 0) for k, a in enumerate(e)]
                     for e in (want, got))  # fmt: skip
    assert_close(got, want)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [32, 64])
def test_dequantised_weights_are_those_of_mlx(bits, group_size):
    weight = mx.random.normal((6, 128), key=mx.random.key(bits))
    packed = mx.quantize(weight, group_size=group_size, bits=bits)
    want = mx.dequantize(*packed, group_size=group_size, bits=bits)
    mx.eval(packed)
    got = dequantised(*map(torch.from_dlpack, packed), group_size, bits)
    np.testing.assert_allclose(got.numpy(), np.array(want), atol=1e-6)


@pytest.mark.parametrize("name", COVER)
def test_models_of_the_zoo_give_the_same_logits(name):
    model = zoo.build(name)
    parameters = dict(tree_flatten(model.parameters()))
    graph = trace(model, TOKENS)
    want = [np.array(a) for a in run(graph, [TOKENS], parameters)[0]]
    for form in (graph, recognise(graph)):
        module = to_torch(form, parameters)
        assert module.state_dict().keys() == parameters.keys()
        assert_close(in_torch(module, [TOKENS]), want)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_goes_out_as_it_is(dtype):
    model = tiny.build(tiny.LLAMA)
    parameters = {p: a.astype(dtype) for p, a in tiny.parameters(model).items()}
    graph = recognise(trace(model, TOKENS, dtype=dtype))
    module = to_torch(graph, parameters)
    assert {str(t.dtype) for t in module.state_dict().values()} == {f"torch.{str(dtype)[9:]}"}
    want = [numbers(a) for a in run(graph, [TOKENS], parameters)[0]]
    assert_close(in_torch(module, [TOKENS]), want, 2e-2 if dtype == mx.float16 else 1e-1)


# ---- the module


def mlp():
    named, inputs, parameters = plain.traced("mlp")
    return named.graph, inputs, parameters


def test_weights_share_their_memory_and_can_be_trained():
    graph, inputs, parameters = mlp()
    copies = {p: mx.array(np.array(a)) for p, a in parameters.items()}
    module = to_torch(graph, copies)
    weight = dict(module.named_parameters())["layers.0.weight"]
    with torch.no_grad():
        weight[0, 0] = 7.0
    assert copies["layers.0.weight"][0, 0].item() == 7.0
    module(*[torch.from_numpy(np.array(a)) for a in inputs]).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def test_integers_are_buffers_and_constants_stay_out_of_the_state_dict():
    quantised = nn.QuantizedLinear(64, 8, bits=4, group_size=32)
    x = mx.random.normal((3, 64))
    mx.eval(quantised.parameters())
    graph = trace(lambda x: quantised(x) * mx.array([[0.5] * 8]), x)
    assert to_torch(graph, {}).state_dict() == {}
    graph = trace(quantised, x)
    module = to_torch(graph, dict(tree_flatten(quantised.parameters())))
    assert dict(module.named_buffers())["weight"].dtype == torch.uint32
    assert {name for name, _ in module.named_parameters()} == {"scales", "biases", "bias"}
    assert_close(in_torch(module, [x]), [np.array(quantised(x))])


def test_tied_parameters_stay_tied():
    def fn(p, x):
        return mx.maximum(x @ p["a.weight"].T, 0) @ p["b.weight"]

    shared = mx.random.normal((5, 4))
    parameters = {"a.weight": shared, "b.weight": shared}
    module = to_torch(trace(fn, mx.zeros((2, 4)), parameters=parameters), parameters)
    assert len(list(module.parameters())) == 1 and len(module.state_dict()) == 2


def test_what_does_not_fit_is_named():
    graph, inputs, parameters = mlp()
    with pytest.raises(InputError, match="layers.0.bias: the graph expects it"):
        to_torch(graph, {p: a for p, a in parameters.items() if p != "layers.0.bias"})
    with pytest.raises(InputError, match=r"layers.0.bias: shape \(3,\), but the graph expects"):
        to_torch(graph, {**parameters, "layers.0.bias": mx.zeros(3)})
    with pytest.raises(InputError, match="device nowhere: torch cannot use it.*try cpu"):
        to_torch(graph, parameters, device="nowhere")
    module = to_torch(graph, parameters)
    with pytest.raises(InputError, match="2 inputs given, but the graph takes 1"):
        in_torch(module, inputs * 2)
    with pytest.raises(InputError, match=r"input 0: shape \(5, 9\), but \(5, 6\) is expected"):
        module(torch.zeros(5, 9))
    value = Value((2,), mx.float32)
    nodes = (Node("Quake", (0,), (1,)), Node("Storm", (1,), (2,)))
    with pytest.raises(InputError, match="no rule for primitive Quake, Storm"):
        to_torch(Graph(nodes, dict.fromkeys(range(3), value), (0,), (2,), {}, {}), {})


# ---- .pt2 files

LOAD = """
import json, sys, torch, numpy as np
extra = {"program.json": ""}
program = torch.export.load(sys.argv[1], extra_files=extra)
record = json.loads(extra["program.json"])
held = np.load(sys.argv[2])
module = program.module()
for k in range(int(sys.argv[3])):
    inputs = [torch.from_numpy(held[f"{k}.{name}"]) for name in record["inputs"]]
    for name, tensor in zip(record["outputs"], module(*inputs), strict=True):
        want = held[f"{k}.{name}"]
        assert tensor.shape == want.shape, (name, tensor.shape, want.shape)
        assert np.abs(tensor.detach().numpy() - want).max() < 1e-4, name
assert "mlx" not in sys.modules
"""


def test_a_decoder_goes_out_with_its_cache_and_every_size_open(tmp_path):
    program = module_program(lambda: tiny.build(tiny.LLAMA), metadata={"model": "tiny"})
    save_torch(program, tmp_path / "model.pt2")
    corners = [(1, 8, 0), (2, 1, 5), (3, 6, 4), (1, 1, 0)]
    held = {}
    for k, corner in enumerate(corners):
        feeds = program.feeds(dict(zip(("batch", "length", "past"), corner, strict=True)))
        outputs = dict(zip(program.outputs, program.run(feeds), strict=True))
        held |= {f"{k}.{n}": np.array(a) for n, a in {**feeds, **outputs}.items()}
    np.savez(tmp_path / "cases.npz", **held)
    command = [sys.executable, "-W", "ignore", "-c", LOAD, tmp_path / "model.pt2"]
    done = subprocess.run(
        [*command, tmp_path / "cases.npz", str(len(corners))], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["cases.npz", "model.pt2"]


def test_what_went_out_comes_in_again(tmp_path):
    named, inputs, parameters = plain.traced("mobilenet")
    program = program_of(
        lambda p, x: run(named.graph, [x], p)[0], {"pixels": inputs[0]},
        parameters=parameters, outputs=["scores"],
    )  # fmt: skip
    save_torch(program, tmp_path / "net.pt2")
    back = from_torch(tmp_path / "net.pt2")
    assert back.parameters.keys() == parameters.keys()
    (got,) = back(back.parameters, *inputs)
    assert_close([np.array(got)], [np.array(program.run({"pixels": inputs[0]})[0])])


def test_a_file_that_cannot_be_written_is_an_error(tmp_path):
    graph, inputs, parameters = mlp()
    program = Program(graph, of_arrays(parameters), ("x",), ("y",))
    with pytest.raises(InputError, match="net.pt2: cannot be written"):
        save_torch(program, tmp_path / "absent" / "net.pt2")


# ---- transformers opens what is pruned


def test_transformers_opens_a_pruned_llama_and_gives_the_same_logits(tmp_path):
    import transformers

    tiny.save(tiny.LLAMA, tmp_path / "parent")
    model = recipe.open_model(tmp_path / "parent")
    planned = recipe.make_plan(model, Options(pruning_ratio=0.5, importance="magnitude"))
    recipe.save_pruned(model, planned, tmp_path / "out")
    from mlx_lm.utils import load_model

    want = load_model(tmp_path / "out")[0](TOKENS)
    opened = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", local_files_only=True
    )
    with torch.no_grad():
        got = opened(torch.from_numpy(np.array(TOKENS)).long()).logits
    assert_close([got.float().numpy()], [np.array(want.astype(mx.float32))])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert opened.config.intermediate_size == config["intermediate_size"] == 10
