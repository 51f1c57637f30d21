"""Each weight takes away what is wrong behind it, on the inputs that it has in the pruned model."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import plain
import reference
import tiny
from mlx_compress.axes import named_axes
from mlx_compress.calibrate import calibrate
from mlx_compress.edit import edit_graph
from mlx_compress.execute import run
from mlx_compress.graph import trace
from mlx_compress.layers import dropped_parameters, layer_dimensions, without
from mlx_compress.plan import Cut, PrunePlan
from mlx_compress.prune import (
    picks,
    prune_parameters,
    pruned_fetch,
    pruner,
    spread_array,
    zero_parameters,
)
from mlx_compress.refit import Fitted, refit
from mlx_compress.sequential import refit_in_sequence
from mlx_compress.stages import fits_of, stages


def noise(*shape, seed=0):
    return mx.random.normal(shape, key=mx.random.key(seed))


class Case:
    """A model and batches for it, of which the last two are held out."""

    def __init__(self, fn, held, batches):
        self.fn, self.held, self.batches = fn, held, batches
        given = None if isinstance(fn, nn.Module) else held
        self.named = named_axes(trace(fn, *batches[0], parameters=given))
        self.fitted_on, self.held_out = batches[:-2], batches[-2:]

    def fetch(self, paths):
        return {path: self.held[path] for path in paths}

    def plan(self, kinds=("channels",), keep=None):
        """Keeps units as `keep` says by name, or a random part of each dimension."""
        if keep is None:
            return plain.random_plan(self.named, self.named.free(kinds), seed=3)
        dims = self.named.dimensions
        return PrunePlan({n: Cut(n, dims[n].kind, dims[n].size, list(k), None, dims[n].slots)
                          for n, k in keep.items()})  # fmt: skip

    def fit(self, plan, **options):
        return refit_in_sequence(
            self.named, plan, self.fitted_on, self.fetch, held_out=self.held_out, **options
        )

    def closed(self, plan):
        statistics = calibrate(
            self.named, self.fitted_on, self.fetch, dims=list(plan.cuts), second={}
        )
        return refit(self.named, plan, statistics)

    def spread(self, plan, cut):
        """All parameters as a plan and its cutter leave them, in their old shapes."""
        gone = dropped_parameters(self.named, plan)
        return {
            path: mx.zeros_like(a) if path in gone
            else spread_array(cut(path, a), picks(self.named, plan, path), a.shape)
            for path, a in self.held.items()
        }  # fmt: skip

    def error(self, plan, cut, values=None, batches=None):
        """The squared error, in parts of the dense size, of outputs or of other values."""
        spread, total, size = self.spread(plan, cut), 0.0, 0.0
        for batch in batches or self.fitted_on:
            both = []
            for weights in (self.held, spread):
                outputs, taps = run(self.named.graph, batch, weights, taps=values or ())
                both.append([taps[i] for i in values] if values else outputs)
            for want, got in zip(*both, strict=True):
                total += float(((want - got) ** 2).sum())
                size += float((want**2).sum())
        return total / size


# ---- the slow way


def check(case, plan, *, path, layout, biases=(), **options):
    """One fitted weight, and bias, against NumPy on the function itself, which is affine in them.

    `layout` are the weight's axes as (slots..., outputs). The weights before it are as they were
    fitted; those behind it do not matter.
    """
    cutter = case.fit(plan, **options)
    spread = case.spread(plan, cutter)
    start = zero_parameters(case.named, plan, case.held)
    kept = np.array(zero_parameters(case.named, plan, {p: mx.ones_like(a) for p, a in
                                                       case.held.items()})[path])  # fmt: skip
    moved = kept.transpose(layout)
    outputs = [k for k in range(moved.shape[-1]) if moved[..., k].any()]
    slots = np.flatnonzero(moved[..., outputs[0]])
    shape = (len(slots), len(outputs))

    def run_with(changes):
        change, rest = np.split(changes, [shape[0] * shape[1]])
        whole = np.zeros((moved.size // moved.shape[-1], moved.shape[-1]))
        whole[np.ix_(slots, outputs)] = change.reshape(shape)
        back = whole.reshape(moved.shape).transpose(np.argsort(layout))
        new = {**spread, path: start[path] + mx.array(back, mx.float32)}
        for k, bias in enumerate(biases):
            wide = np.zeros(start[bias].shape)
            wide[outputs] = rest[k * len(outputs) : (k + 1) * len(outputs)]
            new[bias] = start[bias] + mx.array(wide, mx.float32)
        return np.concatenate([np.array(case.fn(new, *b), np.float64).reshape(-1)
                               for b in case.fitted_on])  # fmt: skip

    wanted = np.concatenate([np.array(case.fn(case.held, *batch), np.float64).reshape(-1)
                             for batch in case.fitted_on])  # fmt: skip
    change, rest = reference.fitted_change(
        run_with, wanted, shape, len(biases) * len(outputs), cutter.chosen[path]
    )
    got = np.array(spread[path] - start[path]).transpose(layout).reshape(-1, moved.shape[-1])
    np.testing.assert_allclose(got[np.ix_(slots, outputs)], change, rtol=0.01, atol=2e-3)
    for k, bias in enumerate(biases):
        moved_by = np.array(spread[bias] - start[bias])[outputs]
        want = rest[k * len(outputs) : (k + 1) * len(outputs)]
        np.testing.assert_allclose(moved_by, want, rtol=0.01, atol=2e-3)
    return cutter


SEQUENCES = [[noise(4, 3, 5, seed=k)] for k in range(8)]
IMAGES = [[noise(2, 5, 5, 3, seed=k)] for k in range(8)]
TWO = {
    "a": noise(5, 8), "b": noise(8, 5, seed=1) / 3, "c": noise(5, 9, seed=2),
    "d": noise(9, 5, seed=3) / 3,
}  # fmt: skip


def first(p, x):
    """A block that is pruned as well, so that what follows reads other inputs."""
    return x + nn.relu(x @ p["a"]) @ p["b"]


def joined(p, x):
    s = first(p, x)
    return s + mx.tanh(s @ p["c"]) @ p["d"]


def negated(p, x):
    s = first(p, x)
    return s - 2 * (mx.tanh(s @ p["c"]) @ p["d"]) / p["g"]


def fused(p, x):
    s = first(p, x)
    return mx.addmm(s.reshape(-1, 5), mx.tanh(s @ p["c"]).reshape(-1, 9), p["d"], alpha=0.5)


def biased(p, x):
    s = first(p, x)
    y = mx.addmm(p["e"], mx.tanh(s @ p["c"]).reshape(-1, 9), p["d"], beta=2)
    return s - y.reshape(x.shape)


def less_bias(p, x):
    s = first(p, x)
    return p["g"] * (mx.tanh(s @ p["c"]) @ p["d"] - p["e"]) - s


G = mx.array([2.0, -1.0, 0.5, 3.0, -4.0])
LINEAR = {
    "joined": (joined, {}, ()),
    "negated": (negated, {"g": G}, ()),
    "fused": (fused, {}, ()),
    "biased": (biased, {"e": noise(5, seed=4)}, ("e",)),
    "less bias": (less_bias, {"e": noise(5, seed=4), "g": G}, ("e",)),
}


@pytest.mark.parametrize("name", LINEAR)
def test_a_product_is_fitted_as_by_hand(name):
    fn, more, biases = LINEAR[name]
    case = Case(fn, {**TWO, **more}, SEQUENCES)
    check(case, case.plan(), path="d", layout=(0, 1), biases=biases, mend=False)


CONVOLVED = {
    "a": noise(6, 3, 3, 3) / 4, "b": noise(3, 3, 3, 6, seed=1) / 6,
    "c": noise(4, 1, 1, 3, seed=2), "d": noise(3, 3, 3, 4, seed=3) / 4,
    "mean": noise(3, seed=4), "var": mx.array([0.5, 1.0, 2.0]), "scale": mx.array([2.0, -1.0, 0.3]),
    "shift": noise(3, seed=5),
}  # fmt: skip


def norm(p, x):
    return (x - p["mean"]) * mx.rsqrt(p["var"] + 1e-5) * p["scale"] + p["shift"]


def convolved(p, x):
    s = x + mx.conv2d(nn.relu(mx.conv2d(x, p["a"], padding=1)), p["b"], padding=1)
    return s + norm(p, mx.conv2d(nn.relu(mx.conv2d(s, p["c"])), p["d"], padding=1))


def test_a_convolution_before_a_norm_is_fitted_as_by_hand_and_the_mean_with_it():
    case = Case(convolved, CONVOLVED, IMAGES)
    check(case, case.plan(), path="d", layout=(1, 2, 3, 0), biases=("mean",), mend=False)


def test_a_weight_that_only_reads_what_is_off_is_mended_as_by_hand():
    def reads(p, x):
        return mx.concatenate([nn.relu(first(p, x) @ p["c"]), x], axis=-1)

    def inner(p, x):
        return first(p, x) @ p["c"]

    case = Case(reads, TWO, SEQUENCES)
    plan = case.plan(keep={"channels": [0, 1, 3, 5, 6]})
    cutter = case.fit(plan)
    assert set(cutter.fitted) == {"b", "c"} and set(case.fit(plan, mend=False).fitted) == {"b"}
    case.fn = inner  # what is behind it is not affine
    check(case, plan, path="c", layout=(0, 1))


def test_two_in_one_stage_are_fitted_one_after_the_other():
    def parallel(p, x):
        return x + (nn.relu(x @ p["a"]) @ p["b"] + mx.tanh(x @ p["c"]) @ p["d"])

    case = Case(parallel, TWO, SEQUENCES)
    plan = case.plan()
    cutter = check(case, plan, path="d", layout=(0, 1), mend=False)
    assert set(cutter.chosen) == {"b", "d"}
    alone = zero_parameters(case.named, plan, case.held)["d"]
    before = Fitted(pruner(case.named, plan), {"b": cutter.fitted["b"]})
    assert case.error(plan, cutter) < case.error(plan, before)
    assert not mx.array_equal(case.spread(plan, cutter)["d"], alone)
    found = stages(case.named.graph, fits_of(case.named, plan, mend=False)[0])
    assert [[fit.path for fit in stage.fits] for stage in found] == [["b", "d"]]


# ---- properties


def redundant(p, x):
    s = x + (x @ p["a"]) @ p["b"]
    return s + (s @ p["c"]) @ p["d"]


def test_what_is_planted_twice_is_restored_behind_a_layer_that_lost_something():
    square = noise(5, 5, seed=7)
    held = {"a": noise(5, 8), "b": noise(8, 5, seed=1) / 3,
            "c": mx.concatenate([square, square[:, ::-1]], axis=1), "d": noise(10, 5, seed=3) / 3}
    case = Case(redundant, held, [[noise(40, 5, seed=k)] for k in range(6)])
    plan = case.plan(keep={"channels": [0, 1, 2], "channels_2": range(5)})
    closed = case.closed(plan)
    assert case.error(plan, closed, batches=case.held_out) > 1e-2
    for start in (None, closed):
        fitted = case.fit(plan, start=start)
        assert case.error(plan, fitted, batches=case.held_out) <= 1e-5


def of_model(name):
    _, inputs, held = plain.traced(name)

    def batch(k):
        keys = mx.random.split(mx.random.key(k), len(inputs))
        return [
            mx.random.normal(a.shape, key=key) if a.dtype == mx.float32
            else mx.random.randint(0, plain.VOCABULARY, a.shape, key=key)
            for a, key in zip(inputs, keys, strict=True)
        ]  # fmt: skip

    return Case(plain.build(name)[0], held, [batch(k) for k in range(8)])


@pytest.mark.parametrize("name", plain.MODELS)
def test_no_fit_makes_the_error_larger_where_it_is_read(name):
    case = of_model(name)
    kinds = ("width", "channels", "heads", "query_heads", "experts")
    plan = plain.random_plan(case.named, [d for d in case.named.free(kinds) if d.exact], seed=1)
    cutter = case.fit(plan)
    before = Fitted(cutter.start)
    for fit in planned(case, plan):
        if fit.path in cutter.chosen:
            paths = {fit.path, *([fit.target.bias.path] if fit.target.bias else [])}
            new = before.fitted | {path: cutter.fitted[path] for path in paths}
            after, ends = Fitted(cutter.start, new), [fit.target.end]
            worse = case.error(plan, after, ends) / case.error(plan, before, ends)
            assert worse < 1 + 1e-4, fit.path
            before = after
    assert before.fitted.keys() == cutter.fitted.keys()


def planned(case, plan):
    """What is fitted, in order."""
    fits, _ = fits_of(case.named, plan, mend=True)
    return [fit for stage in stages(case.named.graph, fits) for fit in stage.fits]


@pytest.mark.parametrize("name", ["resnet_projected", "fused_encoder", "decoder"])
def test_a_plan_that_removes_nothing_changes_nothing(name):
    case = of_model(name)
    dims = [d for d in case.named.free(["channels", "heads"]) if d.within is None]
    plan = PrunePlan({d.name: Cut(d.name, d.kind, d.size, list(range(d.size)), None, d.slots)
                      for d in dims})  # fmt: skip
    cutter = case.fit(plan)
    assert not cutter.fitted and not cutter.chosen and not cutter.left


def test_the_same_data_give_the_same_bits():
    case = of_model("resnet_projected")
    plan = case.plan()
    one, two = (case.fit(plan) for _ in range(2))
    assert one.chosen == two.chosen and one.fitted.keys() == two.fitted.keys()
    assert all(mx.array_equal(one.fitted[path], two.fitted[path]).item() for path in one.fitted)


def test_what_is_held_in_memory_shows_in_no_bit(monkeypatch):
    case = of_model("fused_encoder")
    plan = case.plan(("channels", "heads"))
    one = case.fit(plan)
    monkeypatch.setattr("mlx_compress.sequential.HELD", 0)
    two = case.fit(plan)
    assert one.fitted and one.fitted.keys() == two.fitted.keys()
    assert all(mx.array_equal(one.fitted[path], two.fitted[path]).item() for path in one.fitted)


def test_without_held_out_batches_the_last_quarter_is():
    case = of_model("fused_encoder")
    plan = case.plan()
    one, two = (
        refit_in_sequence(case.named, plan, fitted_on, case.fetch, held_out=held_out)
        for fitted_on, held_out in ((case.batches, ()), (case.fitted_on, case.held_out))
    )
    assert all(mx.array_equal(one.fitted[path], two.fitted[path]).item() for path in one.fitted)
    single = refit_in_sequence(case.named, plan, case.batches[:1], case.fetch)
    assert not single.fitted  # there is nothing to judge on


# ---- what is left, and other weights


LEFT = {
    "mobilenet": ("width_2", {"grouped.weight": "it is grouped or transformed"}),
    "decoder": ("experts.channels", {"experts.down": "it is routed"}),
    "lstm": ("layers.channels", {"layers.0.Wh": "it is used more than once"}),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_be_fitted_is_left_with_the_reason(name):
    case = of_model(name)
    dim, left = LEFT[name]
    plan = plain.random_plan(case.named, [case.named.dimensions[dim]], seed=0)
    assert case.fit(plan).left == left


def test_a_depthwise_kernel_loses_nothing_and_is_not_missed():
    case = of_model("mobilenet")
    cutter = case.fit(case.plan(), mend=False)
    assert not cutter.left and "blocks.0.depthwise.weight" not in cutter.fitted


def test_shared_weights_are_left_alone():
    def shared(p, x):
        y = nn.relu(x @ p["a"])
        return y @ p["b"] + nn.relu(x @ p["a"] + 1) @ p["b"]

    case = Case(shared, {"a": noise(5, 8), "b": noise(8, 5, seed=1)}, SEQUENCES)
    cutter = case.fit(case.plan())
    assert cutter.left == {"b": "it is used more than once"} and not cutter.fitted


def test_a_dead_output_keeps_its_weights():
    scale = mx.array([2.0, 0.0, 0.3])
    case = Case(convolved, {**CONVOLVED, "scale": scale}, IMAGES)
    plan = case.plan()
    cutter = case.fit(plan, mend=False)
    plainly = prune_parameters(case.named, plan, case.held)["d"]
    assert mx.array_equal(cutter.fitted["d"][1], plainly[1]).item()
    assert not mx.array_equal(cutter.fitted["d"][0], plainly[0]).item()
    assert cutter.fitted["mean"][1].item() == CONVOLVED["mean"][1].item()


def test_a_dead_unit_keeps_its_weights():
    up = mx.concatenate([noise(5, 5), mx.zeros((5, 1)), noise(5, 2, seed=9)], axis=1)
    case = Case(joined, {**TWO, "a": up}, SEQUENCES)
    plan = case.plan(keep={"channels": [1, 2, 5, 6]})
    fitted = case.fit(plan, mend=False).fitted["b"]
    np.testing.assert_allclose(np.array(fitted[2]), np.array(TWO["b"][5]), atol=1e-5)
    assert not np.allclose(np.array(fitted[0]), np.array(TWO["b"][1]), atol=1e-3)


def test_weights_of_half_precision_go_on_as_they_are_saved():
    half = {path: array.astype(mx.float16) for path, array in TWO.items()}
    single = {path: array.astype(mx.float32) for path, array in half.items()}
    case = Case(joined, single, SEQUENCES)
    plan = case.plan()
    case.held = half
    cutter = case.fit(plan, mend=False)
    assert all(array.dtype == mx.float16 for array in cutter.fitted.values())
    case.held = single
    start = Fitted(pruner(case.named, plan), {"b": cutter.fitted["b"]})
    again = case.fit(plan, mend=False, start=start)  # nothing is left for b to do
    want, got = (np.array(c("d", case.held["d"])) for c in (again, cutter))
    np.testing.assert_allclose(got, want, atol=2e-3)


@pytest.mark.parametrize("kinds", [("channels",), ("heads",), ("channels", "heads")])
def test_a_language_model_loses_less_than_by_the_closed_form(kinds):
    model = tiny.build(tiny.LLAMA)
    case = Case(model, tiny.parameters(model), tiny.batches(count=24, rows=4))
    plan = case.plan(kinds)
    closed = case.closed(plan)
    fitted = case.fit(plan, start=closed, mend=False)
    ends = [case.named.graph.outputs[0]]
    assert case.error(plan, fitted, ends) < case.error(plan, closed, ends)
    assert len(fitted.chosen) == 2 * len(kinds) and not fitted.left


def test_what_stays_of_a_model_that_loses_a_layer_makes_up_for_some_of_it():
    model = tiny.build({**tiny.LLAMA, "num_hidden_layers": 3})
    case = Case(model, tiny.parameters(model), tiny.batches(count=24, rows=4))
    blocks = next(d for d in layer_dimensions(case.named) if d.kind == "layers")
    cuts = case.plan().cuts
    gone = [name for name in cuts if ".1." in name]
    cut = without(blocks, [1])
    plan = PrunePlan({cut.name: cut} | {n: c for n, c in cuts.items() if n not in gone})
    fitted = case.fit(plan)
    assert not any(path.startswith("model.layers.1.") for path in fitted.fitted)
    assert any(path.startswith("model.layers.2.self_attn") for path in fitted.fitted)
    assert case.error(plan, fitted) < case.error(plan, pruner(case.named, plan))
    pruned = run(edit_graph(case.named, plan), case.batches[0],
                 pruned_fetch(case.fetch, fitted)(edit_graph(case.named, plan).parameters))
    zeroed = run(case.named.graph, case.batches[0], case.spread(plan, fitted))
    np.testing.assert_allclose(np.array(pruned[0][0]), np.array(zeroed[0][0]), atol=1e-4)
