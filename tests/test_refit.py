"""The refit is the least squares fit that a slow solver finds, and never forgets what it keeps."""

from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import plain
import tiny
from mlx_compress.axes import named_axes
from mlx_compress.calibrate import calibrate
from mlx_compress.contractions import contractions
from mlx_compress.edit import edit_graph
from mlx_compress.errors import ResourceError
from mlx_compress.execute import run
from mlx_compress.graph import trace
from mlx_compress.plan import Cut, PrunePlan
from mlx_compress.prune import prune_parameters, pruned_fetch
from mlx_compress.refit import LAMBDAS, fit_kept, refit
from mlx_compress.second import OnDisk, patches, window_of


def least_squares(x, weight, keep, lam):
    """The kept rows by NumPy's solver on the stacked problem, held near the old ones by lam."""
    y = x @ weight
    pull = np.sqrt(lam * np.mean(np.sum(x**2, axis=0))) * np.eye(len(keep))
    rows = np.vstack([x[:, keep], pull])
    return np.linalg.lstsq(rows, np.vstack([y, pull @ weight[keep]]), rcond=None)[0]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(3, 60), st.integers(2, 9))
def test_the_fit_is_the_least_squares_solution(seed, rows, slots):
    rng = np.random.default_rng(seed)
    x, weight = rng.standard_normal((rows, slots)), rng.standard_normal((slots, 4))
    x[:, 0] += x[:, 1]
    keep = np.sort(rng.choice(slots, rng.integers(1, slots), replace=False))
    halves = np.stack([part.T @ part for part in (x[: rows // 2], x[rows // 2 :])])
    fitted, lam = fit_kept(weight, halves, keep)
    assert lam in LAMBDAS
    np.testing.assert_allclose(fitted, least_squares(x, weight, keep, lam), rtol=1e-6, atol=1e-8)


def test_lambda_is_the_one_that_serves_data_that_was_not_fitted():
    rng = np.random.default_rng(0)
    mix, weight = rng.standard_normal((6, 24)), rng.standard_normal((24, 5))
    keep = np.arange(6, 24)

    def chosen(rows, noise):
        x = [rng.standard_normal((rows, 6)) @ mix + noise * rng.standard_normal((rows, 24))
             for _ in range(2)]  # fmt: skip
        return fit_kept(weight, np.stack([part.T @ part for part in x]), keep)[1]

    assert chosen(4000, 0.01) == LAMBDAS[0]
    assert chosen(5, 1.0) > LAMBDAS[0]  # far fewer rows than slots


def test_nothing_removed_changes_nothing_and_no_data_prunes_plainly():
    weight = np.arange(12.0).reshape(4, 3)
    assert fit_kept(weight, np.ones((2, 4, 4)), np.arange(4))[0] is weight
    fitted, _ = fit_kept(weight, np.zeros((2, 4, 4)), np.array([0, 2]))
    np.testing.assert_array_equal(fitted, weight[[0, 2]])


# ---- models


def outputs(graph, inputs, parameters):
    return np.array(run(graph, inputs, parameters)[0][0]).astype(np.float64)


class Case:
    """A model with its statistics: plain and refitted errors of a plan."""

    def __init__(self, fn, batches, parameters):
        self.batches, self.parameters = batches, parameters
        given = None if isinstance(fn, nn.Module) else parameters
        self.named = named_axes(trace(fn, *batches[0], parameters=given))
        self.fetch = lambda paths: {path: parameters[path] for path in paths}
        dims = [d.name for d in self.named.free()]
        self.statistics = calibrate(self.named, batches, self.fetch, dims=dims, second={})

    def errors(self, plan):
        """The mean squared error of the output after plain pruning, and after the refit."""
        graph = edit_graph(self.named, plan)
        cutter = refit(self.named, plan, self.statistics)
        fitted = pruned_fetch(self.fetch, cutter)(graph.parameters)
        weights = (prune_parameters(self.named, plan, self.parameters), fitted)
        want = [outputs(self.named.graph, b, self.parameters) for b in self.batches]
        return [
            np.mean([np.mean((outputs(graph, b, w) - y) ** 2)
                     for b, y in zip(self.batches, want, strict=True)])
            for w in weights
        ], cutter  # fmt: skip

    def cut(self, **keep):
        dims = self.named.dimensions
        return PrunePlan({n: Cut(n, dims[n].kind, dims[n].size, list(k), None, dims[n].slots)
                          for n, k in keep.items()})  # fmt: skip


def noise(*shape, seed=0):
    return mx.random.normal(shape, key=mx.random.key(seed))


def test_what_was_fitted_is_held_until_it_is_forgotten(monkeypatch):
    from mlx_compress import refit as module

    weights = {"a": noise(6, 4), "b": noise(4, 3, seed=1)}
    case = Case(lambda p, x: mx.tanh(x @ p["a"]) @ p["b"], [[noise(20, 6, seed=2)]], weights)
    name = next(d.name for d in case.named.free() if d.size == 4)
    fits, plain = [], module._refitted
    monkeypatch.setattr(module, "_refitted", lambda *given: fits.append(1) or plain(*given))
    cutter = refit(case.named, case.cut(**{name: (0, 2)}), case.statistics, hold=True)
    once, again = cutter("b", weights["b"]), cutter("b", weights["b"])
    assert len(fits) == 1 and mx.array_equal(once, again)
    cutter.forget(["b"])
    assert mx.array_equal(cutter("b", weights["b"]), once) and len(fits) == 2


def test_planted_copies_are_pruned_to_the_exact_optimum():
    up, down = noise(6, 8), noise(8, 5, seed=1)
    up = mx.concatenate([up, up @ mx.eye(8)[:, ::-1], (up[:, :4] + up[:, 4:]) / 2], axis=1)
    down = mx.concatenate([down, noise(12, 5, seed=2)], axis=0)  # 20 channels, 12 of them copies

    def net(p, x):
        return (x @ p["up"]) @ p["down"]

    case = Case(net, [[noise(64, 6, seed=k)] for k in range(4)], {"up": up, "down": down})
    (plain_error, error), cutter = case.errors(case.cut(channels=range(8)))
    size = np.mean(outputs(case.named.graph, case.batches[0], case.parameters) ** 2)
    assert error < 1e-5 * size < plain_error
    assert cutter.chosen == {"down": LAMBDAS[0]} and not cutter.left


@pytest.mark.parametrize("config", [tiny.LLAMA, tiny.MIXTRAL])
def test_a_language_model_loses_less_in_every_way_of_pruning_it(config):
    model = tiny.build(config)
    batches = tiny.batches(count=6, rows=4)
    held = tiny.parameters(model)

    case = Case(model, batches, held)
    for kind in ("channels", "heads"):
        plan = plain.random_plan(case.named, case.named.free((kind,)), seed=3)
        (plain_error, error), cutter = case.errors(plan)
        assert error < plain_error
        assert len(cutter.chosen) == 2 and not cutter.left  # what each layer's units go into


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"dilation": 2}])
def test_a_convolution_is_refitted_over_its_patches(options):
    def net(p, x):
        y = nn.relu(mx.conv2d(x, p["a"]))
        return mx.conv2d(y, p["b"], **options)

    held = {"a": noise(10, 3, 3, 3) / 5, "b": noise(4, 3, 3, 10, seed=1) / 9}
    case = Case(net, [[noise(4, 9, 9, 3, seed=k)] for k in range(4)], held)
    (plain_error, error), cutter = case.errors(case.cut(channels=[0, 2, 3, 5, 7, 8]))
    assert error < 0.7 * plain_error and list(cutter.chosen) == ["b"]


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"dilation": 2}])
def test_patches_times_a_kernel_are_the_convolution(options):
    x, kernel = noise(2, 7, 8, 3), noise(4, 3, 2, 3, seed=1)
    graph = trace(lambda x, w: mx.conv2d(x, w, **options), x, kernel)
    (node,) = [n for n in graph.nodes if n.op == "Convolution"]
    rows = patches(x, window_of(graph, node))
    want = mx.conv2d(x, kernel, **options)
    got = (rows @ kernel.reshape(4, -1).T).reshape(want.shape)
    np.testing.assert_allclose(np.array(got), np.array(want), rtol=1e-4, atol=1e-5)


def test_a_grouped_convolution_is_cut_plainly():
    def net(p, x):
        return mx.conv2d(mx.conv2d(x, p["a"]), p["b"], groups=2)

    held = {"a": noise(8, 1, 1, 3), "b": noise(4, 1, 1, 4, seed=1)}
    named = named_axes(trace(net, noise(1, 4, 4, 3), parameters=held))
    assert [place.layout is not None for place in contractions(named)] == [True, False]


@pytest.mark.parametrize("config", [tiny.LLAMA, tiny.MIXTRAL])
def test_the_memory_of_second_moments_is_known_before_they_are_collected(config):
    model, batches = tiny.build(config), tiny.batches()
    case = Case(model, batches, tiny.parameters(model))
    known = {place.second_key: place.second_bytes for place in contractions(case.named)}
    held = case.statistics.second
    assert held and all(array.nbytes == known[key] for key, array in held.items())


def test_second_moments_are_sums_over_tokens_of_two_halves():
    held = {"a": noise(4, 6), "b": noise(6, 3, seed=1)}
    batches = [[noise(4, 5, 4, seed=k)] for k in range(3)]
    case = Case(lambda p, x: mx.tanh(x @ p["a"]) @ p["b"], batches, held)
    (moments,) = case.statistics.second.values()
    want = np.zeros((2, 6, 6))
    for (x,) in batches:
        y = np.tanh(np.array(x) @ np.array(held["a"]))
        for half, part in enumerate((y[:2], y[2:])):
            for row in part.reshape(-1, 6):
                want[half] += np.outer(row, row)
    np.testing.assert_allclose(moments, want, rtol=1e-4)


def test_moments_on_disk_serve_the_same_fit_in_float32():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50, 8))
    held = OnDisk()
    held[3, None, None] = np.stack([x[:25].T @ x[:25], x[25:].T @ x[25:]])
    weight, keep = rng.standard_normal((8, 3)), np.array([0, 2, 5])
    want, _ = fit_kept(weight, np.stack([x[:25].T @ x[:25], x[25:].T @ x[25:]]), keep)
    np.testing.assert_allclose(fit_kept(weight, held[3, None, None], keep)[0], want, rtol=1e-4)
    assert len(held) == 1 and list(held) == [(3, None, None)]
    folder = held.folder
    assert folder.exists()
    del held
    assert not folder.exists()


def test_a_full_disk_is_said_with_the_remedy(monkeypatch):
    held = OnDisk()
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=10))
    with pytest.raises(ResourceError, match="point TMPDIR to a larger disk, or give --no-refit"):
        held[1, None, None] = np.ones((2, 4, 4))
