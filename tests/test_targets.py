"""The error of a product is read where it can still be put right, and comes back at its scale."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_compress.axes import named_axes
from mlx_compress.contractions import contractions
from mlx_compress.execute import run
from mlx_compress.graph import trace
from mlx_compress.targets import Step, Targets, scales_of

ROWS, WIDTH = (3, 4, 5), 6


def noise(*shape, seed=0):
    return mx.random.normal(shape, key=mx.random.key(seed))


HELD = {
    "w": noise(5, WIDTH),
    "b": noise(WIDTH, seed=1),
    "d": mx.arange(1.0, 7.0),
    "g": mx.array([2.0, -1.0, 0.5, 0.0, 3.0, -4.0]),
    "places": noise(4, WIDTH, seed=2),
}


def traced(fn, held=HELD):
    """The target of the first contraction, and the graph. `held` may have more than `fn` uses."""
    graph = trace(fn, noise(*ROWS), parameters=held)
    place = min(contractions(named_axes(graph)), key=lambda place: place.output)
    return Targets(graph).of(place), graph


def moved(fn, held, value_of):
    """How far the end moves, [outputs], when a value (an id, of target and graph) grows by 1."""
    target, graph = traced(fn, held)
    ends = []
    for step in (0.0, 1.0):
        shift = {value_of(target, graph): lambda y, step=step: y + step}
        _, taps = run(graph, [noise(*ROWS)], held, taps=[target.end], replace=shift)
        ends.append(np.array(taps[target.end]).reshape(-1, WIDTH))
    known = {graph.parameters[path]: array for path, array in held.items()} | dict(graph.constants)
    return target, scales_of(graph, target, graph.nodes, known), (ends[1] - ends[0])[0]


def wide(p, x):
    return mx.concatenate([x, x[..., :1]], axis=-1)


CHAINS = {
    "scaled, and added to": lambda p, x: mx.tanh((x @ p["w"]) * p["g"] + wide(p, x)),
    "taken off": lambda p, x: mx.tanh(wide(p, x) - p["g"] * (x @ p["w"])),
    "taken off a bias": lambda p, x: mx.tanh((p["b"] - x @ p["w"]) / p["d"]),
    "less a bias": lambda p, x: mx.tanh(p["d"] * (x @ p["w"] - p["b"]) - wide(p, x)),
    "a bias behind": lambda p, x: mx.tanh(0.5 * (x @ p["w"]) + wide(p, x) + p["b"]),
    "in heads": lambda p, x: mx.tanh((x @ p["w"]).reshape(3, 4, 2, 3).reshape(3, 4, 6) * p["g"]),
    "normed": lambda p, x: mx.tanh((x @ p["w"] - p["b"]) * mx.rsqrt(p["d"] + 1e-5) * p["g"]),
    "a fused bias": lambda p, x: mx.tanh(mx.addmm(p["b"], x, p["w"]) * p["g"]),
    "a fused bias, scaled": lambda p, x: mx.tanh(mx.addmm(p["b"], x, p["w"], alpha=2, beta=0.5)),
}


@pytest.mark.parametrize("name", CHAINS)
def test_the_slope_is_what_a_step_of_the_product_makes_of_the_end(name):
    target, scales, want = moved(CHAINS[name], HELD, lambda target, graph: target.place.output)
    np.testing.assert_allclose(target.slope(scales), target.gain * want, rtol=1e-3, atol=1e-5)
    assert target.gain == (2 if "scaled" in name and "fused" in name else 1)


BIASED = [name for name in CHAINS if "bias" in name or name == "normed"]


@pytest.mark.parametrize("name", BIASED)
def test_the_slope_of_a_bias_is_what_a_step_of_it_makes_of_the_end(name):
    target, scales, want = moved(CHAINS[name], HELD, lambda target, graph: graph.parameters["b"])
    assert target.bias.path == "b"
    np.testing.assert_allclose(target.bias_slope(scales), want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", CHAINS.keys() - BIASED)
def test_a_chain_without_a_bias_has_none(name):
    assert traced(CHAINS[name])[0].bias is None


def test_all_is_followed_that_is_added_until_another_reads_it():
    def net(p, x):
        stream = (x @ p["w"]) + mx.sin(wide(p, x)) + mx.cos(wide(p, x))
        return mx.exp(stream), mx.tanh(stream)

    target, graph = traced(net)
    assert {node.op for node in graph.nodes if target.end in node.inputs} == {"Exp", "Tanh"}


NOT_FOLLOWED = {
    "by another value": lambda p, x: mx.tanh((x @ p["w"]) * wide(p, x)),
    "by a scale that depends on the place": lambda p, x: mx.tanh((x @ p["w"]) * p["places"]),
    "as the divisor": lambda p, x: mx.tanh(p["g"] / (x @ p["w"])),
    "through a transposition": lambda p, x: (x @ p["w"]).swapaxes(1, 2) + 1,
    "by itself": lambda p, x: mx.tanh((lambda y: y * y)(x @ p["w"])),
    "twice": lambda p, x: mx.tanh((lambda y: y + y)(x @ p["w"])),
    "by a scale of part of a head": lambda p, x: mx.tanh(
        (x @ p["w"]).reshape(3, 4, 2, 3) * p["g"][:3]
    ),
}


@pytest.mark.parametrize("name", NOT_FOLLOWED)
def test_a_product_is_not_followed(name):
    target, _ = traced(NOT_FOLLOWED[name])
    assert target.bias is None and set(target.steps) <= {Step()}


def test_a_bias_is_of_one_entry_for_each_output_and_nothing_else_reads_it():
    assert traced(lambda p, x: mx.tanh(x @ p["w"] + p["places"]))[0].bias is None
    assert traced(lambda p, x: mx.tanh(x @ p["w"] + p["b"]) * p["b"])[0].bias is None
    square = {"w": noise(5, 4), "b": noise(4)}  # as many places as outputs

    def along_places(p, x):
        return mx.tanh(x @ p["w"] + p["b"][:, None])

    assert traced(along_places, square)[0].bias is None
    assert traced(lambda p, x: mx.tanh(x @ p["w"] + p["b"]), square)[0].bias.path == "b"


def test_a_scale_along_the_places_is_not_taken_for_one_along_the_outputs():
    square = {"w": noise(5, 4), "g": noise(4)}
    target, _ = traced(lambda p, x: mx.tanh((x @ p["w"]) * p["g"][:, None]), square)
    assert set(target.steps) <= {Step()}


def alone(fn, held=HELD):
    graph = trace(fn, noise(*ROWS), parameters=held)
    targets = Targets(graph)
    return [targets.is_alone(place) for place in contractions(named_axes(graph))]


def test_a_weight_is_alone_unless_it_is_read_twice_or_has_two_names():
    assert alone(lambda p, x: x @ p["w"]) == [True]
    turned = {"w": HELD["w"].T}
    assert alone(lambda p, x: x @ p["w"].T, turned) == [True]
    assert alone(lambda p, x: (x @ p["w"], mx.sin(p["w"]))) == [False]
    assert alone(lambda p, x: (x @ p["w"], mx.cos(x) @ p["w"])) == [False, False]

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
            self.two.weight = self.one.weight

        def __call__(self, x):
            return self.one(x)

    graph = trace(Tied(), noise(*ROWS))
    assert not any(map(Targets(graph).is_alone, contractions(named_axes(graph))))
