import inspect
import re

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_compress.execute import run
from mlx_compress.graph import TraceError, Value, signature, trace, with_outputs

X = mx.array([[1.0, -2.0, 3.0], [0.5, 0.0, -1.0]])


def ops(graph):
    return [node.op for node in graph.nodes]


def outputs_of(graph, *inputs, parameters=None):
    return run(graph, inputs, parameters or {})[0]


class Scaled(nn.Module):
    """Parameters in lists and dicts, private arrays, and caches that a call fills."""

    def __init__(self):
        super().__init__()
        self.scales = [mx.random.normal((3,)), mx.random.normal((3,))]
        self.named = {"shift": mx.random.normal((3,))}
        self.inner = nn.Linear(3, 4)
        self.fixed = (mx.random.normal((3,)),)
        self._angles = mx.random.normal((3,))
        self._cache, self._calls, self._last = {}, [], None

    def __call__(self, x):
        self._cache["x"], self._last, self.inner.seen = x, x, x
        self._calls.append(x)
        self.inner.train(False)
        y = x * self.scales[0] * self.scales[1] + self.named["shift"]
        return self.inner(y + self.fixed[0] * self._angles)


class Looks(Scaled):
    def __call__(self, x):
        return super().__call__(x) * x.sum().item()


def contents(module):
    """Every array and setting a module holds, by identity, private ones and caches included."""
    leaves = [(path, id(leaf)) for path, leaf in tree_flatten(module)]
    return leaves, [(id(m), list(m), dict(vars(m))) for m in module.modules()]


def test_a_graph_holds_the_shapes_dtypes_and_paths_of_a_module():
    graph = trace(Scaled(), X)
    assert graph.shapes() == {
        "scales.0": (3,),
        "scales.1": (3,),
        "named.shift": (3,),
        "inner.weight": (4, 3),
        "inner.bias": (4,),
    }
    assert [graph.values[i] for i in graph.inputs] == [Value((2, 3), mx.float32)]
    assert [graph.values[i] for i in graph.outputs] == [Value((2, 4), mx.float32)]
    assert ops(graph)[-3:] == ["Transpose", "Broadcast", "AddMM"]


def test_nodes_stand_in_topological_order():
    graph = trace(Scaled(), X)
    known = {*graph.inputs, *graph.parameters.values(), *graph.constants}
    for node in graph.nodes:
        assert known.issuperset(node.inputs) and not known.intersection(node.outputs)
        known.update(node.outputs)
    assert known == set(graph.values)


def test_the_contents_of_an_input_do_not_matter():
    module = Scaled()
    assert trace(module, X).nodes == trace(module, mx.full((2, 3), float("nan"))).nodes


def test_a_tree_of_outputs_is_flattened_in_order():
    def tree(x):
        return {"a": [x + 1, None, (x, "text")], "b": mx.array([7.0, 8.0]), "c": [x + 1, 3]}

    graph = trace(tree, X)
    assert graph.outputs[1] == graph.inputs[0]
    expected = [X + 1, X, mx.array([7.0, 8.0]), X + 1]
    for got, wanted in zip(outputs_of(graph, X), expected, strict=True):
        assert mx.array_equal(got, wanted)


def test_a_function_of_parameters_and_inputs_is_traced():
    weights = {"w": mx.random.normal((3, 5)), "unread": mx.zeros((2,), mx.int32)}
    graph = trace(lambda p, x, y: x @ p["w"] * y, X, mx.array(2.0), parameters=weights)
    assert graph.shapes() == {"w": (3, 5), "unread": (2,)}
    (got,) = outputs_of(graph, X, mx.array(2.0), parameters=weights)
    assert mx.allclose(got, X @ weights["w"] * 2, atol=1e-6)


def test_more_parameters_than_a_call_can_have_keywords_are_traced():
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(600)))
    graph = trace(model, mx.ones((2, 1)))
    assert len(graph.parameters) == 1200
    assert ops(graph).count("AddMM") == 600


@pytest.mark.parametrize("make", [Scaled, Looks])
def test_tracing_leaves_a_module_as_it_was_also_when_it_fails(make):
    module = make()
    before = contents(module)
    if make is Looks:
        with pytest.raises(TraceError):
            trace(module, X)
    else:
        trace(module, X)
    assert contents(module) == before
    assert module._cache == {} and module._calls == [] and module.inner.training
    mx.eval(module.parameters())


def test_lazily_initialised_parameters_are_not_captured():
    graph = trace(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), X)
    assert "RandomBits" not in ops(graph)
    assert graph.constants == {}


def test_arrays_outside_the_parameters_become_constants():
    module = Scaled()
    graph = trace(module, X)
    assert "RandomBits" not in ops(graph)
    for private in (module._angles, module.fixed[0]):
        assert any(mx.array_equal(private, constant) for constant in graph.constants.values())


def test_tracing_evaluates_no_weights():
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(4)))
    before = mx.get_active_memory()
    trace(model, mx.zeros((2, 1024)))
    assert mx.get_active_memory() - before < 2**20
    mx.eval(model.parameters())
    assert mx.get_active_memory() - before > 4 * 2**20


def looks_with_item(x):
    total = x.sum()
    return x * total.item()  # the line to be named


def looks_with_if(x):
    total = x.sum()
    return x if total > 0 else -x


@pytest.mark.parametrize("fn", [looks_with_item, looks_with_if])
def test_looking_at_a_value_is_an_error_of_one_line_with_place_and_remedy(fn):
    with pytest.raises(TraceError) as caught:
        trace(fn, X)
    line = inspect.getsourcelines(fn)[1] + 2
    assert f"{fn.__name__} cannot be traced at {__file__}:{line}" in str(caught.value)
    assert "must not look at the contents of an array: leave" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_error_within_the_call_is_told_with_its_place():
    line = inspect.currentframe().f_lineno + 2
    with pytest.raises(TraceError, match=rf":{line} .*\[matmul\]"):
        trace(lambda x: x @ mx.ones((7, 7)), X)

    def refuses(x):
        raise ValueError("too wide\nand too deep")

    with pytest.raises(TraceError, match="refuses cannot be traced at .*: too wide$"):
        trace(refuses, X)


def test_a_primitive_that_mlx_cannot_record_is_named():
    expected = r"^bitwise_invert cannot be traced: .*BitwiseInvert MLX cannot record it"
    with pytest.raises(TraceError, match=expected):
        trace(mx.bitwise_invert, mx.array([1, 2]))


def test_dtype_replaces_that_of_floating_parameters_only():
    weights = {"w": mx.ones((3, 2)), "half": mx.ones((2,), mx.float16), "ids": mx.array([1, 0])}

    def call(p, x):
        return (x.astype(p["w"].dtype) @ p["w"] + p["half"])[p["ids"]]

    graph = trace(call, X, parameters=weights, dtype=mx.bfloat16)
    assert {path: graph.values[i].dtype for path, i in graph.parameters.items()} == {
        "w": mx.bfloat16,
        "half": mx.bfloat16,
        "ids": mx.int32,
    }
    assert graph.values[graph.outputs[0]].dtype == mx.bfloat16
    assert weights["w"].dtype == mx.float32


def test_two_traces_of_one_computation_have_one_signature():
    assert signature(trace(Scaled(), X)) == signature(trace(Scaled(), X))
    assert signature(trace(Scaled(), X)) != signature(trace(Scaled(), X[:1]))
    assert signature(trace(mx.sin, X)) != signature(trace(mx.cos, X))


def test_a_signature_leaves_out_what_only_moves_data_and_axes_of_one():
    plain = signature(trace(lambda x: mx.split(mx.exp(x), [1], axis=1), X))
    assert plain == [("Exp", (2, 3)), ("Split", (2,), (2, 2))]
    assert plain == signature(trace(lambda x: mx.split(mx.exp(x.T[None]), [1], axis=2), X.T))


def test_other_outputs_drop_the_nodes_that_they_do_not_need():
    graph = trace(lambda x: [mx.sin(mx.exp(x)), mx.cos(x), *mx.split(x, 3, axis=1)], X)
    exp = next(node for node in graph.nodes if node.op == "Exp")
    assert ops(with_outputs(graph, exp.outputs)) == ["Exp"]
    last = with_outputs(graph, [graph.outputs[-1], graph.outputs[1]])
    assert sorted(ops(last)) == ["Cos", "Split"]
    for got, wanted in zip(outputs_of(last, X), [X[:, 2:], mx.cos(X)], strict=True):
        assert mx.array_equal(got, wanted)
    assert with_outputs(graph, graph.outputs) == graph


def test_what_does_not_change_a_value_is_let_through_and_put_back():
    functions = mx.contiguous, mx.eval, mx.async_eval

    def evaluates(x):
        y = mx.contiguous(mx.exp(x), allow_col_major=True)
        mx.eval(y, [x])
        mx.async_eval(y)
        return mx.sin(y)

    assert ops(trace(evaluates, X)) == ["Exp", "Sin"]
    assert (mx.contiguous, mx.eval, mx.async_eval) == functions
    with pytest.raises(TraceError):
        trace(looks_with_item, X)
    assert (mx.contiguous, mx.eval, mx.async_eval) == functions


def test_compiled_functions_are_traced_through():
    assert ops(trace(mx.compile(lambda x: mx.sin(mx.exp(x))), X)) == ["Exp", "Sin"]


def test_fast_operations_appear_as_the_primitives_that_they_are_made_of():
    graph = trace(lambda x: mx.fast.rms_norm(x, None, 1e-5), X)
    assert {"Square", "Reduce", "Sqrt", "Multiply"} <= set(ops(graph))
    assert not re.search("Norm|Custom", " ".join(ops(graph)))


def test_a_module_held_under_two_paths_is_one_parameter():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = self.first

        def __call__(self, x):
            return self.second(nn.relu(self.first(x)))

    graph = trace(Twice(), mx.zeros((3, 4)))
    assert graph.parameters["first.weight"] == graph.parameters["second.weight"]
    assert sum(n.op == "AddMM" for n in graph.nodes) == 2
