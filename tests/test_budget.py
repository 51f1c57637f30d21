"""What plans spend, against what is counted by hand; and plans that meet each target."""

import math
from dataclasses import replace
from functools import cache

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_compress.bridges.mlx_lm import open_model, trace_logits

import tiny
import zoo
from mlx_compress import budget as budgets
from mlx_compress import latency
from mlx_compress.allocate import prunable, prunable_layers, request, stand_in
from mlx_compress.archive import load_program
from mlx_compress.axes import named_axes
from mlx_compress.budget import DENSE, TOLERANCE, block_parameters
from mlx_compress.cost import cost
from mlx_compress.errors import InputError
from mlx_compress.graph import trace
from mlx_compress.layers import layer_dimensions, without
from mlx_compress.options import BUDGETS, Options
from mlx_compress.plan import PrunePlan
from mlx_compress.program import program_of
from mlx_compress.prune import prune_parameters
from mlx_compress.recipe import make_plan, save_pruned
from mlx_compress.shrink import plan_program, save_pruned_program

LAYERS, HIDDEN, CHANNELS, LENGTH = 3, 32, 128, 24
LLAMA = {
    **tiny.LLAMA,
    "hidden_size": HIDDEN,
    "intermediate_size": CHANNELS,
    "num_hidden_layers": LAYERS,
}
HEADS, GROUPS, WIDE = (LLAMA[f"{k}"] for k in ("num_attention_heads", "num_key_value_heads",
                                               "head_dim"))  # fmt: skip
CHOSEN = {"importance": "magnitude", "refit": False, "max_seq_length": LENGTH}
SIDE = 6
quick = settings(max_examples=5, deadline=None, derandomize=True)


class Net(nn.Module):
    """Two convolutions of [B, 6, 6, 3], pooled, and two layers."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 80, 3, padding=1), nn.Conv2d(80, 24, 3, padding=1)
        self.up, self.down = nn.Linear(24, 96), nn.Linear(96, 5)

    def __call__(self, x):
        x = nn.relu(self.two(nn.relu(self.one(x))))
        return self.down(nn.relu(self.up(x.mean((1, 2)))))


@pytest.fixture(autouse=True)
def no_compile():
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("budget") / "llama"
    tiny.save(LLAMA, place, dtype=mx.float16)
    return place


@pytest.fixture
def model(folder):
    return open_model(folder)


@cache
def net():
    mx.random.seed(0)
    image = {"image": mx.zeros((2, SIDE, SIDE, 3))}
    return program_of(Net(), image, outputs=["scores"], dynamic={"image": {0: "batch"}})


@pytest.fixture
def clock(monkeypatch):
    """A machine whose passes take 1 ms and 4 ms for the work of the dense model, give or take."""
    drift = np.random.default_rng(0)
    seen = []

    def milliseconds(graphs, inputs):
        seen.append(len(graphs))
        work = [cost(graph).macs for graph in graphs]
        return [1 + 4 * w / max(work) * drift.uniform(0.995, 1.005) for w in work]

    monkeypatch.setattr(budgets, "milliseconds", milliseconds)
    return seen


# ---- counted by hand


def llama_macs(channels, heads):
    """Multiply-accumulates of a pass of LENGTH tokens, one product after the other.

    `channels` and `heads` (KV heads, each read by two query heads) by layer.
    """
    total = LENGTH * HIDDEN * tiny.VOCABULARY
    for wide, kept in zip(channels, heads, strict=True):
        queries = kept * (HEADS // GROUPS)
        total += LENGTH * HIDDEN * WIDE * (2 * queries + 2 * kept)  # q, o; k, v
        total += 2 * queries * LENGTH * LENGTH * WIDE  # scores, and what they weigh
        total += 3 * LENGTH * HIDDEN * wide
    return total


def net_macs(one, two, up):
    pixels, window = SIDE * SIDE, 9
    return pixels * window * (3 * one + one * two) + two * up + up * 5


def kept(plan, kind, size):
    """The counts of one kind, by layer; `size` where a layer is whole."""
    return [
        next((c.kept for c in plan if f".{k}." in c.name and c.kind == kind), size)
        for k in range(LAYERS)
    ]


@quick
@given(st.data())
def test_macs_of_a_language_model_are_those_of_its_products(data):
    named = llama_named(LENGTH)
    counts = {d.name: data.draw(st.integers(1, d.size)) for d in named.free(("channels", "heads"))}
    plan = stand_in(named, counts)
    wanted = llama_macs(kept(plan, "channels", CHANNELS), kept(plan, "heads", GROUPS))
    whole = llama_macs([CHANNELS] * LAYERS, [GROUPS] * LAYERS)
    (share,) = measured("macs")[1].measure([plan])
    assert share == pytest.approx(wanted / whole, rel=1e-9)


@cache
def llama_named(length):
    return named_axes(trace_logits(tiny.build(LLAMA), mx.zeros((1, length), mx.int32)))


@quick
@given(st.integers(1, 80), st.integers(1, 24), st.integers(1, 96))
def test_macs_of_a_program_are_those_of_one_sample(one, two, up):
    named = named_axes(net().at())
    sizes = {80: one, 24: two, 96: up}
    counts = {d.name: sizes[d.size] for d in named.free(("channels",))}
    (share,) = of_net().measure([stand_in(named, counts)])
    assert share == pytest.approx(net_macs(one, two, up) / net_macs(80, 24, 96), rel=1e-9)


@cache
def of_net():
    return budgets.program_budget(net(), Options(macs=0.5))


def test_megabytes_are_those_of_the_files_that_are_written(model, tmp_path):
    planned = make_plan(model, Options(disk_mb=0.06, **CHOSEN))
    save_pruned(model, planned, tmp_path / "out")
    held = mx.load(str(tmp_path / "out" / "model.safetensors"))
    written = sum(array.nbytes for array in held.values()) / 1e6
    assert {array.dtype for array in held.values()} == {mx.float16}
    assert written == pytest.approx(0.06, rel=TOLERANCE)
    assert any(n.startswith(f"disk_mb: {written:.4g} of the dense model's") for n in planned.notes)


def test_megabytes_of_a_program_are_those_of_the_files_that_are_written(tmp_path):
    planned = plan_program(net(), Options(disk_mb=0.05, **CHOSEN))
    save_pruned_program(net(), planned, tmp_path / "out")
    held = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert sum(a.nbytes for a in held.values()) / 1e6 == pytest.approx(0.05, rel=TOLERANCE)
    assert load_program(tmp_path / "out")


# ---- meeting a target


def reached(note):
    """(what was reached, what was asked for), as a note tells."""
    words = note.split()
    return float(words[1]), float(words[words.index("asked") - 1])


@pytest.mark.parametrize("target", [{"params": 0.6}, {"macs": 0.6}, {"latency_ms": 3.4}])
def test_a_language_model_meets_every_target(model, clock, target):
    planned = make_plan(model, Options(**target, **CHOSEN))
    note = next(n for n in planned.notes if n.startswith(*target))
    got, asked = reached(note)
    assert [asked] == list(target.values())
    assert got == pytest.approx(asked, rel=TOLERANCE)
    if "macs" in target:
        counts = kept(planned.plan, "channels", CHANNELS), kept(planned.plan, "heads", GROUPS)
        whole = llama_macs([CHANNELS] * LAYERS, [GROUPS] * LAYERS)
        assert llama_macs(*counts) / whole == pytest.approx(got, abs=1e-4)
        assert f"1 x {LENGTH} tokens" in note


@pytest.mark.parametrize("target", [{"params": 0.6}, {"macs": 0.6}, {"latency_ms": 3.4}])
def test_a_program_meets_every_target(clock, target):
    planned = plan_program(net(), Options(**target, **CHOSEN, dims=("channels",)))
    note = next(n for n in planned.notes if n.startswith(*target))
    assert reached(note)[0] == pytest.approx(*target.values(), rel=TOLERANCE)
    if "params" not in target:
        assert "1 x 6 x 6 x 3" in note


@pytest.mark.parametrize("target", [{"macs": 0.55}, {"disk_mb": 0.06}, {"latency_ms": 3.2}])
def test_whole_layers_meet_every_target_as_nearly_as_they_can(model, clock, target):
    planned = make_plan(model, Options(**target, **CHOSEN, dims=("layers",)))
    budget = budgets.language_budget(model, Options(**target, max_seq_length=LENGTH))
    (asked,) = target.values()
    (layers,) = (d for d in layer_dimensions(llama_named(LENGTH)) if d.kind == "layers")
    fewer = [PrunePlan({layers.name: without(layers, range(k))}) for k in range(1, LAYERS)]
    every = [DENSE, *fewer]
    best = min(abs(spent - asked) for spent in budget.measure(every))
    (found,) = budget.measure([*every[:1], planned.plan])[1:]
    assert abs(found - asked) == pytest.approx(best, abs=0.03 * asked)
    assert any(n.startswith(*target) for n in planned.notes)


def test_after_a_config_has_its_way_the_note_tells_what_is_left(tmp_path):
    """Attention that cannot be pruned is left whole, the channels make up for it."""
    tiny.save({**zoo.CONFIGS["qwen2"], "vocab_size": tiny.VOCABULARY}, tmp_path / "model")
    model = open_model(tmp_path / "model")
    planned = make_plan(model, Options(macs=0.7, **CHOSEN))
    assert any("left whole" in note for note in planned.notes)
    named = budgets.language_budget(model, Options(macs=0.7, max_seq_length=LENGTH))
    note = next(n for n in planned.notes if n.startswith("macs"))
    assert reached(note)[0] == pytest.approx(named.measure([planned.plan])[0], abs=1e-4)
    assert reached(note)[0] == pytest.approx(0.7, rel=TOLERANCE)


def test_a_miss_is_told():
    budget = budgets.parameters(llama_named(8))
    note = budget.told(Options(params=0.5), DENSE)
    assert note == "params: 1 of the dense model's, 0.5 asked for: 100.0% above"


# ---- what cannot be


@pytest.mark.parametrize("target", [{"params": 0.01}, {"macs": 0.02}, {"disk_mb": 0.001}])
def test_what_nothing_can_meet_is_refused_with_the_least(model, target):
    options = Options(**target, **CHOSEN)
    with pytest.raises(InputError, match=r"the least that heads, channels can reach is 0\.\d+; "):
        make_plan(model, options)
    with pytest.raises(InputError, match=r"the least that layers can reach is 0\.\d+; "):
        make_plan(model, replace(options, dims=("layers",)))


def test_what_a_machine_cannot_do_is_refused(model, clock):
    with pytest.raises(InputError, match=r"--target latency_ms=0.5: the least that .* is \d\.\d"):
        make_plan(model, Options(latency_ms=0.5, **CHOSEN))


@pytest.mark.parametrize("target", [{"disk_mb": 3}, {"latency_ms": 50}])
@pytest.mark.parametrize("dims", [("channels",), ("layers",)])
def test_what_the_dense_model_meets_is_refused(model, clock, target, dims):
    with pytest.raises(InputError, match="the dense model has .* already; ask for less"):
        make_plan(model, Options(**target, **CHOSEN, dims=dims))


def test_units_and_whole_layers_share_a_target_only_in_a_search():
    named = llama_named(LENGTH)
    options = Options(params=0.5, dims=("channels", "layers"))
    dims = prunable(named, options)
    with pytest.raises(InputError, match="--dims channels,layers: units or whole layers"):
        request(named, dims, options)
    assert request(named, dims, replace(options, max_trials=1)).counts


def test_experts_that_a_router_ranks_have_no_graph_to_count_in(tmp_path):
    tiny.save(tiny.MIXTRAL, tmp_path / "model")
    options = Options(macs=0.7, **CHOSEN, dims=("experts",))
    with pytest.raises(InputError, match="--target macs: cannot be told .*ranks.*--target params"):
        make_plan(open_model(tmp_path / "model"), options)


def test_an_unknown_target_names_the_known_ones(call):
    for text, words in (("watts=3", "watts: unknown"), ("macs=half", "macs=half: write it as")):
        code, _, err = call("prune", "--model", "none", "--target", text, "--dry-run")
        assert code == 2 and f"--target {words}" in " ".join(err.split())
        assert all(name in err for name in BUDGETS)


# ---- monotone


@cache
def measured(name):
    """Of the Llama: (named axes, its budget)."""
    named = llama_named(LENGTH)
    parameters = dict(tree_flatten(tiny.build(LLAMA).parameters()))
    return named, {
        "params": lambda: budgets.parameters(named),
        "macs": lambda: budgets.macs(named),
        "disk_mb": lambda: budgets.disk_mb(named, lambda paths: {p: parameters[p] for p in paths}),
        "latency_ms": lambda: budgets.latency_ms(named, []),
    }[name]()


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.floats(0, 1), st.floats(0, 1), st.sampled_from(sorted(BUDGETS)))
def test_a_larger_ratio_never_spends_more(one, two, name):
    named, budget = measured(name)
    dims = prunable(named, Options(params=0.5))
    noise = np.random.default_rng(0)

    def plan(ratio):
        return stand_in(named, {d.name: max(1, round(d.size * (1 - ratio))) for d in dims})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budgets, "milliseconds", lambda graphs, _: noise.uniform(1, 9, len(graphs)))
        spent = budget.along([plan(k / 8) for k in range(9)])
        low, high = sorted((one, two))
        assert spent(plan(low)) >= spent(plan(high)) - 1e-12


@quick
@given(st.lists(st.floats(0.1, 100), min_size=2, max_size=12), st.integers(0, 99))
def test_times_between_those_measured_never_fall(times, seed):
    work = np.random.default_rng(seed).permutation(len(times)).tolist()
    time_of = latency.interpolated(work, times)
    line = [time_of(w) for w in np.linspace(-1, len(times), 50)]
    assert all(a <= b + 1e-9 for a, b in zip(line, line[1:], strict=False))
    assert min(times) - 1e-9 <= line[0] and line[-1] <= max(times) + 1e-9
    if sorted(work) == work and sorted(times) == times:
        assert [time_of(w) for w in work] == pytest.approx(times)


# ---- time


def test_the_same_plans_are_timed_once(clock):
    named = llama_named(LENGTH)
    budget = budgets.latency_ms(named, [])
    options = Options(latency_ms=3.5)
    dims = prunable(named, options)
    for asked in (3.5, 4.0):
        counts = request(named, dims, replace(options, latency_ms=asked), budget).counts
        assert counts
    assert clock == [9]
    prunable_layers(named, replace(options, dims=("layers",)), budget)
    assert clock[1:] == [LAYERS]  # whole, and without 1, 2


def test_graphs_take_turns_and_the_first_round_does_not_count(monkeypatch):
    ran, now = [], [0.0]

    def run(graph, inputs, weights):
        ran.extend(weights)
        now[0] += 100 if len(ran) <= 2 else len(weights) * {"a": 1, "b": 2}[ran[-1]]
        return [[mx.zeros(())]]

    monkeypatch.setattr(latency, "run", run)
    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])
    graphs = [trace(lambda p: sum(p.values()), parameters={n: mx.zeros((2,))}) for n in "ab"]
    assert latency.milliseconds(graphs, []) == [1e3, 2e3]
    assert "".join(ran) == "ab" + "abba" * (latency.LEAST // 2) + "ab" * (latency.LEAST % 2)


def test_weights_lie_side_by_side_in_one_array():
    graph = named_axes(net().at()).graph
    pools = latency._pools([graph])
    weights = latency._weights(graph, pools)
    flat = np.concatenate([np.array(a).ravel() for a in weights.values()])
    np.testing.assert_array_equal(flat, np.array(pools[mx.float32]))
    assert {p: a.shape for p, a in weights.items()} == graph.shapes()
    assert flat.min() > 0


def test_more_work_takes_more_time():
    def graph(width):
        return trace(lambda p, x: (x @ p["a"]) @ p["b"], mx.zeros((64, 64)), parameters={
            "a": mx.zeros((64, width)), "b": mx.zeros((width, 64))})  # fmt: skip

    less, more = latency.milliseconds([graph(64), graph(16384)], [mx.ones((64, 64))])
    assert 0 < 2 * less < more


# ---- counting parameters


@cache
def of_zoo(name):
    """(the named axes, the parameters) of a model of the zoo."""
    module = zoo.build(name)
    named = named_axes(trace_logits(module, mx.zeros((1, 8), mx.int32)))
    return named, dict(tree_flatten(module.parameters()))


@pytest.mark.parametrize(
    "name, outside",
    [
        ("llama", ("embed_tokens", "lm_head")),
        ("qwen2", ("embed_tokens",)),
        ("gpt2", ("wte", "wpe")),
        ("gpt_oss", ("embed_tokens", "lm_head")),  # experts' biases are gathered like rows
        ("phimoe", ("embed_tokens", "lm_head")),  # experts that cannot be removed
        ("gemma3n", ("embed_tokens.", "embed_tokens_per_layer")),
    ],
)
def test_block_parameters_are_all_but_embeddings_and_head(name, outside):
    named, parameters = of_zoo(name)
    inside = [a.size for path, a in parameters.items() if not any(o in path for o in outside)]
    assert block_parameters(named) == sum(inside)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.data())
@pytest.mark.parametrize("name", ["llama", "mixtral", "phi3"])
def test_block_parameters_after_pruning_are_those_that_are_left(name, data):
    named, parameters = of_zoo(name)
    dims = data.draw(st.lists(st.sampled_from(named.free()), unique_by=lambda d: d.name))
    counts = {d.name: data.draw(st.integers(1, d.size)) for d in dims}
    left = prune_parameters(named, stand_in(named, counts), parameters)
    outside = ("model.embed_tokens.weight", "lm_head.weight")
    wanted = sum(math.prod(a.shape) for path, a in left.items() if path not in outside)
    assert block_parameters(named, counts) == wanted


def test_parameters_that_are_gone_do_not_count():
    named, parameters = of_zoo("llama")
    gone = {"model.norm.weight", "lm_head.weight"}
    assert block_parameters(named) - block_parameters(named, gone=gone) == 64


