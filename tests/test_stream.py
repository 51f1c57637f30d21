import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_compress.bridges.mlx_lm import trace_logits

import plain
import zoo
from mlx_compress import stream
from mlx_compress.errors import InputError
from mlx_compress.execute import run
from mlx_compress.graph import Graph, Node, Value, trace, with_outputs
from mlx_compress.stream import groups, segments, stream_backward, stream_forward

LANGUAGE = ["llama", "gpt2", "mixtral", "gemma3n", "falcon_h1", "gemma4_text"]
PLAIN = ["mlp", "resnet_projected", "mobilenet", "fused_encoder", "lstm", "two_towers"]


@pytest.fixture(autouse=True)
def no_compile():
    mx.disable_compile()
    yield
    mx.enable_compile()


def language_model(name, *, batch=2, length=6, count=3):
    """(graph, parameters, batches of tokens) of a tiny model."""
    module = zoo.build(name)
    keys = mx.random.split(mx.random.key(1), count)
    batches = [[mx.random.randint(0, 101, (batch, length), key=key)] for key in keys]
    return trace_logits(module, batches[0][0]), parameters_of(module), batches


def plain_model(name, count=3):
    module, inputs = plain.build(name)
    return trace(module, *inputs), parameters_of(module), [inputs] * count


def model(name):
    return language_model(name) if name in LANGUAGE else plain_model(name)


def parameters_of(module):
    return dict(tree_flatten(module.parameters()))


class Spy:
    """A fetch that notes what was asked for."""

    def __init__(self, parameters):
        self.parameters, self.requests = parameters, []

    def __call__(self, paths):
        self.requests.append(list(paths))
        return {path: self.parameters[path] for path in self.requests[-1]}


def streamed(graph, parameters, batches, **options):
    """The outputs of each batch."""
    outputs = {}
    fetch = parameters if callable(parameters) else Spy(parameters)
    stream_forward(graph, batches, fetch, on_outputs=outputs.__setitem__, **options)
    return [outputs[b] for b in range(len(batches))]


def floats(graph, values):
    return [i for i in values if mx.issubdtype(graph.values[i].dtype, mx.floating)]


def close(left, right, tolerance=1e-5):
    scale = max(float(mx.abs(right).max()), 1e-6)
    return float(mx.abs(left - right).max()) <= tolerance * scale


# ---- segments


@pytest.mark.parametrize("name", LANGUAGE + PLAIN)
def test_every_node_that_depends_on_the_inputs_is_in_exactly_one_segment(name):
    graph, _, _ = model(name)
    dynamic, nodes = set(graph.inputs), []
    for node in graph.nodes:
        if dynamic & set(node.inputs):
            dynamic |= set(node.outputs)
            nodes.append(node)
    pieces = segments(graph)
    placed = [node for piece in pieces for node in piece.nodes if node in nodes]
    assert placed == nodes


@pytest.mark.parametrize("name", LANGUAGE + PLAIN)
def test_a_segment_reads_what_the_one_before_hands_on(name):
    graph, _, _ = model(name)
    pieces = segments(graph)
    assert set(pieces[0].reads) <= set(graph.inputs) and pieces[-1].hands_on == ()
    for before, after in zip(pieces, pieces[1:], strict=False):
        assert before.hands_on == after.reads


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_transformer_is_cut_between_its_branches_where_one_value_crosses(name):
    graph, _, _ = language_model(name)
    pieces = segments(graph)
    assert len(pieces) == 6  # embedding, attention and MLP of two layers, head
    for piece in pieces[:-1]:
        (crossing,) = piece.hands_on
        assert math.prod(graph.values[crossing].shape) == 2 * 6 * 64
    owners = [{path.rsplit(".", 2)[0] for path in p.parameters if "proj" in path} for p in pieces]
    assert all(len({".".join(o.split(".")[:4]) for o in each}) <= 1 for each in owners)
    assert "self_attn" in str(owners[1]) and "self_attn" not in str(owners[2])


def test_a_segment_names_only_the_parameters_that_its_nodes_need():
    graph, _, _ = language_model("llama")
    for piece in segments(graph):
        read = {i for node in piece.nodes for i in node.inputs}
        assert {graph.parameters[path] for path in piece.parameters} <= read


def test_small_pieces_are_joined_until_each_holds_a_fair_part_of_the_weights():
    deep = nn.Sequential(*(nn.Linear(4, 4) for _ in range(300)))
    pieces = segments(trace(deep, mx.zeros((1, 4))))
    assert 20 <= len(pieces) <= 48
    held = [len(piece.parameters) for piece in pieces]
    assert sum(held) == 600 and max(held) <= 3 * min(held)


def test_a_primitive_without_a_rule_is_named_before_anything_runs():
    values = {0: Value((2,), mx.float32), 1: Value((2,), mx.float32)}
    graph = Graph((Node("Quux", (0,), (1,)),), values, (0,), (1,), {}, {})
    with pytest.raises(InputError, match="Quux"):
        segments(graph)


# ---- forwards


@pytest.mark.parametrize("name", LANGUAGE + PLAIN)
def test_streaming_equals_running_the_whole_graph(name):
    graph, parameters, batches = model(name)
    for outputs, batch in zip(streamed(graph, parameters, batches), batches, strict=True):
        wanted, _ = run(graph, batch, parameters)
        assert all(close(out, want) for out, want in zip(outputs, wanted, strict=True))


def test_each_parameter_is_asked_for_once_and_segment_by_segment():
    graph, parameters, batches = language_model("llama")
    spy = Spy(parameters)
    streamed(graph, spy, batches)
    assert spy.requests == [list(piece.parameters) for piece in segments(graph)]
    asked = [path for request in spy.requests for path in request]
    assert sorted(asked) == sorted(parameters)


def test_the_backward_pass_asks_for_the_segments_once_more_from_the_last_to_the_first():
    graph, parameters, batches = language_model("llama")
    spy = Spy(parameters)
    kept = stream_forward(graph, batches, spy, keep=True)
    spy.requests.clear()
    stream_backward(
        graph, kept, spy, lambda b, out: out[0].sum(), taps=(), on_gradients=lambda *_: None
    )
    assert spy.requests == [list(piece.parameters) for piece in reversed(segments(graph))]
    assert kept == []


def test_weights_of_another_dtype_are_cast_to_the_graphs():
    graph, parameters, batches = language_model("llama")
    half = {path: array.astype(mx.float16) for path, array in parameters.items()}
    back = {path: array.astype(mx.float32) for path, array in half.items()}
    (got, *_), (want, *_) = streamed(graph, half, batches), streamed(graph, back, batches)
    assert got[0].dtype == mx.float32 and mx.array_equal(got[0], want[0])


@pytest.mark.parametrize("name", ["llama", "mixtral", "mlp"])
def test_taps_are_the_values_of_the_whole_run_each_told_once(name):
    graph, parameters, batches = model(name)
    taps = [node.outputs[0] for node in graph.nodes if node.op in ("Matmul", "AddMM", "GatherMM")]
    told = []

    def on_taps(b, values):
        told.extend((b, i, array) for i, array in values.items())

    streamed(graph, parameters, batches, taps=taps, on_taps=on_taps)
    assert sorted((b, i) for b, i, _ in told) == [
        (b, i) for b in range(len(batches)) for i in sorted(taps)
    ]
    whole = [run(graph, batch, parameters, taps=taps)[1] for batch in batches]
    assert all(close(array, whole[b][i]) for b, i, array in told)


def test_an_output_that_depends_on_parameters_alone_is_computed_too():
    graph = trace(
        lambda p, x: [x @ p["w"], mx.exp(p["w"])],
        mx.zeros((2, 3)),
        parameters={"w": mx.zeros((3, 4))},
    )
    parameters = {"w": mx.random.normal((3, 4), key=mx.random.key(0))}
    ((product, alone),) = streamed(graph, parameters, [[mx.ones((2, 3))]])
    assert close(product, parameters["w"].sum(axis=0)[None] * mx.ones((2, 1)))
    assert close(alone, mx.exp(parameters["w"]))


def test_an_early_value_can_be_an_output_beside_the_last_one():
    graph, parameters, batches = language_model("llama")
    early = segments(graph)[1].hands_on[0]
    both = with_outputs(graph, [early, *graph.outputs])
    got = streamed(both, parameters, batches)[0]
    want, kept = run(graph, batches[0], parameters, taps=[early])
    assert close(got[0], kept[early]) and close(got[1], want[0])


def test_progress_counts_every_batch_of_every_segment():
    graph, parameters, batches = language_model("llama")
    told = []
    streamed(graph, parameters, batches, progress=lambda *step: told.append(step))
    total = len(segments(graph)) * len(batches)
    assert told == [("forward", k, total) for k in range(1, total + 1)]


# ---- backwards


def whole_gradients(graph, parameters, batch, loss, taps):
    """Value and gradient at each tap, by differentiating the whole graph at once."""
    shifts = [mx.zeros(graph.values[i].shape, graph.values[i].dtype) for i in taps]

    def run_shifted(*arrays):
        moves = zip(taps, arrays, strict=True)
        edits = {i: (lambda value, move=move: value + move) for i, move in moves}
        edits |= {i: mx.stop_gradient for i in graph.values if not floats(graph, [i])}
        outputs, kept = run(graph, batch, parameters, taps=taps, replace=edits)
        return loss(outputs), [kept[i] for i in taps]

    (_, values), gradients = mx.value_and_grad(run_shifted, argnums=list(range(len(taps))))(*shifts)
    return {i: (v, g) for i, v, g in zip(taps, values, gradients, strict=True)}


def streamed_gradients(graph, parameters, batches, loss, taps):
    told: dict = {}
    spy = Spy(parameters)
    kept = stream_forward(graph, batches, spy, keep=True)
    stream_backward(
        graph, kept, spy, lambda b, outputs: loss(outputs), taps=taps,
        on_gradients=lambda b, found: told.setdefault(b, {}).update(found),
    )  # fmt: skip
    return told


def cubes(outputs):
    return (outputs[0].astype(mx.float32) ** 3).sum()


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2", "resnet_projected", "mlp"])
def test_streamed_gradients_equal_those_of_the_whole_graph(name):
    graph, parameters, batches = model(name)
    ops = ("Matmul", "AddMM", "GatherMM", "Convolution")
    taps = [node.inputs[0] for node in graph.nodes if node.op in ops]
    taps = [i for i in dict.fromkeys(taps) if i not in graph.inputs]
    assert taps
    told = streamed_gradients(graph, parameters, batches, cubes, taps)
    assert sorted(told) == list(range(len(batches)))
    for b, batch in enumerate(batches):
        whole = whole_gradients(graph, parameters, batch, cubes, taps)
        assert told[b].keys() == whole.keys()
        for i, (value, gradient) in whole.items():
            assert close(told[b][i][0], value), i
            assert close(told[b][i][1], gradient, 1e-4), i


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_gradients_lead_back_to_those_that_mlx_finds_for_the_weights(name):
    module = zoo.build(name)
    tokens = mx.random.randint(0, 101, (2, 6), key=mx.random.key(1))
    graph, parameters = trace_logits(module, tokens), parameters_of(module)
    path = next(p for p in parameters if "layers.0" in p and "o_proj" in p)
    (node,) = (n for n in graph.nodes if n.op == "Matmul" and reads(graph, n, path))
    told = streamed_gradients(graph, parameters, [[tokens]], cubes, [node.inputs[0]])
    value, gradient = told[0][node.inputs[0]]

    def loss(weight):
        module.update(tree_unflatten([(path, weight)]))
        return cubes([module(tokens)])

    slope = mx.grad(loss)(parameters[path])
    mine = (value * gradient).reshape(-1, value.shape[-1]).sum(axis=0)
    assert close(mine, (parameters[path] * slope).sum(axis=0), 1e-4)


def reads(graph, node, path):
    made = {out: n for n in graph.nodes for out in n.outputs}
    second = made.get(node.inputs[1])
    return second is not None and graph.parameters[path] in second.inputs


def test_a_loss_sees_its_batch():
    graph, parameters, batches = plain_model("mlp", count=3)
    tap = segments(graph)[0].hands_on[0]
    told = {}
    spy = Spy(parameters)
    stream_backward(
        graph, stream_forward(graph, batches, spy, keep=True), spy,
        lambda b, outputs: (b + 1) * outputs[0].sum(), taps=[tap],
        on_gradients=lambda b, found: told.update({b: found[tap][1]}) if found else None,
    )  # fmt: skip
    assert close(told[1], 2 * told[0]) and close(told[2], 3 * told[0])


# ---- memory


def saved_mlp(folder, width=1024, layers=6):
    """A deep MLP whose weights lie on disk: (graph, a fetch, the bytes of its weights)."""
    module = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
    graph = trace(module, mx.zeros((4, width)))
    weights = parameters_of(module)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    total = sum(array.nbytes for array in weights.values())

    def fetch(paths):
        lazy = mx.load(str(folder / "model.safetensors"))
        return {path: lazy[path] for path in paths}

    return graph, fetch, total


def saved_llama(folder):
    from mlx_lm.utils import _get_classes

    size = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}
    config = {**zoo.CONFIGS["llama"], **size}
    model_class, args_class = _get_classes(config)
    module = model_class(args_class.from_dict(config))
    graph = trace_logits(module, mx.zeros((1, 4), mx.int32))
    weights = parameters_of(module)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    total = sum(array.nbytes for array in weights.values())

    def fetch(paths):
        lazy = mx.load(str(folder / "model.safetensors"))
        return {path: lazy[path] for path in paths}

    return graph, fetch, total


@pytest.mark.parametrize("save", [saved_mlp, saved_llama])
@pytest.mark.parametrize("backward", [False, True])
def test_only_a_part_of_the_weights_is_in_memory_at_a_time(tmp_path, save, backward):
    graph, fetch, total = save(tmp_path)
    shape, dtype = (graph.values[graph.inputs[0]].shape, graph.values[graph.inputs[0]].dtype)
    batches = [[mx.zeros(shape, dtype)] for _ in range(2)]
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    kept = stream_forward(graph, batches, fetch, keep=backward)
    if backward:
        stream_backward(graph, kept, fetch, lambda b, out: out[0].sum(), taps=(),
                        on_gradients=lambda *_: None)  # fmt: skip
    assert mx.get_peak_memory() - before < total / 2


def test_the_random_models_of_these_tests_are_not_degenerate():
    graph, parameters, batches = language_model("llama")
    (first, *_), *_ = streamed(graph, parameters, batches)
    assert np.isfinite(np.array(first)).all() and float(mx.std(first)) > 0.1


def test_batches_are_grouped_so_that_what_is_kept_stays_small(monkeypatch):
    graph, _, batches = language_model("llama")
    told = []
    each = sum(
        math.prod(graph.values[i].shape) * graph.values[i].dtype.size
        for i in {i for piece in segments(graph) for i in piece.reads}
    )
    five = [batches[0]] * 5
    monkeypatch.setattr(stream, "KEPT", 0.0)
    monkeypatch.setattr(stream, "KEPT_BYTES", 2 * each)
    for first, group, progress in groups(graph, five, lambda *a: told.append(a)):
        assert first in (0, 2, 4) and len(group) == min(2, 5 - first)
        for done in range(3 * len(group)):  # as a pass over three segments reports
            progress("forward", done + 1, 3 * len(group))
    assert told == [("forward", k + 1, 15) for k in range(15)]
    monkeypatch.setattr(stream, "KEPT_BYTES", 1)
    assert [len(group) for _, group, _ in groups(graph, five)] == [1] * 5
