"""What blocks hand on and attend to is found in the graph, weighed, and held to the teacher's."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx_compress.bridges.students import continued

import judging
import zoo
from mlx_compress.attribution import block_shares, candidates
from mlx_compress.blocks import blocks_of
from mlx_compress.distill_samples import Answers
from mlx_compress.distill_text import Live, NextToken
from mlx_compress.errors import InputError
from mlx_compress.execute import run
from mlx_compress.explained import Explainer, Traced
from mlx_compress.graph import trace
from mlx_compress.heads import first_array
from mlx_compress.inner import PROJECTION, Matching, block_weights, groups, inside_bytes
from mlx_compress.options import DistillOptions
from mlx_compress.training import train
from mlx_compress.training_state import TrainingFolder
from mlx_compress.training_text import Text
from tiny import LLAMA, VOCABULARY, build, parameters

TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (6, 9)).astype(np.int32)
TEXT = Text("train", TOKENS, np.ones(TOKENS.shape, bool))
HELD = Text("held out", TOKENS, TEXT.mask)
INPUTS = mx.array(TOKENS[:3, :-1])
NARROW = {**LLAMA, "hidden_size": 12, "num_hidden_layers": 1}
DEEP = {**LLAMA, "num_hidden_layers": 4}
FEW_HEADS = {**LLAMA, "num_attention_heads": 2, "num_key_value_heads": 1}
OF_DISTILLING = {"iters": 12, "warmup": 2, "learning_rate": 1e-2, "steps_per_eval": 4,
                 "batch_size": 2}  # fmt: skip


class Kept:
    """What the layers of a model hand on when it runs, by way of a class of their own."""

    def __init__(self, model, tokens):
        self.states = []
        for layer in model.layers:
            kind = type(layer)

            def call(layer, *args, kind=kind, **more):
                out = kind.__call__(layer, *args, **more)
                self.states.append(first_array(out))
                return out

            layer.__class__ = type(kind.__name__, (kind,), {"__call__": call})
        model(tokens)


# Among them parallel branches, experts, a scan, norms behind branches, and a scaled stream.
@pytest.mark.parametrize("name", [
    "llama", "gpt2", "phi", "gemma2", "olmo2", "mixtral", "mamba2", "qwen3_next", "granite",
    "cohere", "deepseek_v3", "nemotron_h",
])  # fmt: skip
def test_blocks_end_with_what_layers_hand_on(name):
    model, tokens = zoo.build(name), mx.array(TOKENS[:2, :-1])
    graph = trace(model, tokens)
    blocks = blocks_of(graph)
    _, values = run(graph, [tokens], parameters(model), taps=[block.end for block in blocks])
    states = Kept(model, tokens).states
    assert len(blocks) == len(states)
    for block, state in zip(blocks, states, strict=True):
        np.testing.assert_allclose(values[block.end], state, atol=2e-4, err_msg=name)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "deepseek_v3", "qwen3_next"])
def test_attention_maps_look_back_only_and_sum_to_one(name):
    model, tokens = zoo.build(name), mx.array(TOKENS[:2, :-1])
    graph = trace(model, tokens)
    maps = [i for block in blocks_of(graph) for i in block.maps]
    assert maps
    for value in run(graph, [tokens], parameters(model), taps=maps)[1].values():
        assert value.shape[0] == 2 and value.shape[-2:] == (8, 8)
        np.testing.assert_allclose(value.sum(axis=-1), 1, atol=1e-5)
        assert not np.triu(np.array(value), 1).any()


def test_a_router_is_no_attention():
    graph = trace(zoo.build("mixtral"), mx.array(TOKENS[:2, :-1]))
    assert [len(block.maps) for block in blocks_of(graph)] == [1, 1]


def test_a_student_block_stands_for_those_of_the_teacher_that_lie_as_deep():
    assert groups(2, 5) == [range(0, 3), range(3, 5)]
    assert groups(3, 3) == [range(0, 1), range(1, 2), range(2, 3)]
    assert [each[-1] for each in groups(4, 2)] == [0, 0, 1, 1]
    shares = mx.array([[0.1, 0.2, 0.3, 0.4, 0.0]])
    np.testing.assert_allclose(block_weights(shares, 2), [1.2, 0.8], atol=1e-6)


def test_the_share_of_a_block_is_what_scaling_it_changes():
    """By scaling what each layer adds, in the model itself."""
    positions, tokens = mx.array([6, 4, 2]), mx.array([1, 2, 3])
    model = build(DEEP)
    scales = [1.0] * len(model.layers)
    for k, layer in enumerate(model.layers):
        kind = type(layer)

        def call(layer, x, *args, kind=kind, k=k, **more):
            return x + scales[k] * (kind.__call__(layer, x, *args, **more) - x)

        layer.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    wanted = np.zeros((3, len(scales)))
    for k in range(len(scales)):
        ends = []
        for side in (1.01, 0.99):
            scales[k] = side
            ends.append(model(INPUTS)[mx.arange(3), positions, tokens])
        scales[k] = 1.0
        wanted[:, k] = np.abs(np.array(ends[0] - ends[1]) / 0.02)
    wanted /= wanted.sum(axis=1, keepdims=True)
    graph = trace(build(DEEP), INPUTS)
    explain = candidates(positions, tokens)
    weights = parameters(build(DEEP))
    found = block_shares(graph, [INPUTS], weights, explain, blocks_of(graph))
    np.testing.assert_allclose(found, wanted, atol=5e-3)


def inside(config, seed, options, tokens=INPUTS):
    """A model's graph, and values inside it by a `Matching` with itself."""
    model = build(config, seed)
    graph = trace(model, tokens)
    taps = Matching(graph, graph, options).own_taps
    return graph, run(graph, [tokens], parameters(model), taps=taps)[1]


def test_a_model_matches_itself():
    options = DistillOptions(hidden_weight=1, attention_weight=1)
    graph, values = inside(LLAMA, 0, options)
    matching = Matching(graph, graph, options)
    assert abs(matching.loss(values, values, mx.ones(INPUTS.shape), {}).item()) < 1e-5
    assert not matching.start()


def test_the_loss_is_that_of_the_blocks_as_a_slow_loop_adds_it_up():
    """Of every second block of a teacher; a block counts by its weight, tokens by the mask."""
    options = DistillOptions(hidden_weight=0.5, attention_weight=2)
    (own, mine), (theirs, yours) = inside(FEW_HEADS, 1, options), inside(DEEP, 0, options)
    mask = np.ones(INPUTS.shape)
    mask[0, 3:] = 0
    matching = Matching(own, theirs, options, weights=mx.array([0.5, 1.5]))
    total = 0.0
    for weight, k, place in ((0.5, 0, 1), (1.5, 1, 3)):
        a, b = blocks_of(own)[k], blocks_of(theirs)[place]
        x, y = np.array(mine[a.end]), np.array(yours[b.end])
        p, q = (np.array(v).reshape(3, -1, 8, 8).mean(axis=1)
                for v in (mine[a.maps[0]], yours[b.maps[0]]))  # fmt: skip
        for row, t in np.argwhere(mask):
            one, two = x[row, t], y[row, t]
            cosine = one @ two / np.linalg.norm(one) / np.linalg.norm(two)
            keys = slice(0, t + 1)
            kl = np.sum(q[row, t, keys] * np.log(q[row, t, keys] / p[row, t, keys]))
            total += weight * (0.5 * (1 - cosine) + 2 * kl) / mask.sum() / 2
    found = matching.loss(mine, yours, mx.array(mask), {})
    assert abs(found.item() - total) < 1e-4 * abs(total)


def objective(student, teacher, options, **more):
    live = Live(teacher)
    explainer = Explainer(Traced(teacher), options)
    return NextToken(student, live, TEXT, HELD, options, explainer=explainer, **more)


@pytest.mark.parametrize("whole", [True, False])
def test_its_gradient_is_that_of_finite_differences(whole, monkeypatch):
    """Also where the head is apart, and by what states are projected by."""
    if not whole:
        monkeypatch.setattr("mlx_compress.distill_text.LOGITS_BYTES", 0)
    options = DistillOptions(hidden_weight=3, attention_weight=2, hard_labels=0.5, batch_size=6)
    goal = objective(build(NARROW, 1), build(LLAMA), options)
    assert (goal.apart is None) == whole
    start = goal.start()
    assert [path for path in start if PROJECTION in path] == [f"{PROJECTION}0"]
    loss, grads = goal.gradients(start, 0, 1.0)
    assert grads.keys() == start.keys()
    for path in (f"{PROJECTION}0", "model.layers.0.mlp.up_proj.weight", "lm_head.weight",
                 "model.layers.0.self_attn.q_proj.weight"):  # fmt: skip
        step = mx.random.normal(start[path].shape, key=mx.random.key(3))
        ends = [goal.gradients(start | {path: start[path] + side * step}, 0, 1.0)[0]
                for side in (2e-3, -2e-3)]  # fmt: skip
        along = ((ends[0] - ends[1]) / 4e-3).item()
        assert abs((grads[path] * step).sum().item() - along) < 0.03 * abs(along) + 2e-3, path


@pytest.mark.parametrize("inner", [{"hidden_weight": 3.0}, {"attention_weight": 3.0}])
def test_a_student_comes_nearer_inside_than_by_text_alone(inner, tmp_path):
    plain = DistillOptions(hard_labels=1, **OF_DISTILLING)
    goals = [objective(build(LLAMA, 1), build(LLAMA), options)
             for options in (plain, replace(plain, **inner))]  # fmt: skip
    apart = []
    for k, goal in enumerate(goals):
        done = train(goal, goal.options, TrainingFolder(tmp_path / str(k), {})).weights
        text, both = (each.gradients(done, 0, 1.0)[0].item() for each in goals)
        apart.append(both - text)
    assert 0 < apart[1] < 0.9 * apart[0]


def test_blocks_count_as_the_answers_of_the_teacher_rest_on_them():
    options = DistillOptions(hidden_weight=1, attribution="weights", batch_size=2)
    weights = objective(build(LLAMA, 1), build(DEEP), options).matching.weights
    assert weights.shape == (2,) and abs(weights.mean().item() - 1) < 1e-5
    assert abs(weights[0] - weights[1]).item() > 0.01


def test_what_has_nothing_inside_to_compare_is_refused():
    options = DistillOptions(attention_weight=1)
    graphs = [trace(zoo.build(name), mx.array(TOKENS[:2, :-1])) for name in ("mamba2", "llama")]
    with pytest.raises(InputError, match="--attention-weight: no block of the student has atten"):
        Matching(*graphs, options)
    flat = trace(lambda held, x: x @ held["w"], INPUTS * 1.0, parameters={"w": mx.ones((8, 8))})
    with pytest.raises(InputError, match="no blocks were found to match"):
        Matching(flat, flat, options)


def test_a_number_below_zero_is_refused():
    with pytest.raises(InputError, match="--hidden-weight -1: must be 0 or more"):
        DistillOptions(hidden_weight=-1)


def test_a_run_that_is_cut_off_learns_its_projections_on(tmp_path):
    options = DistillOptions(hidden_weight=1, **OF_DISTILLING)
    make = lambda: objective(build(NARROW, 1), build(LLAMA), options)  # noqa: E731
    whole = train(make(), options, TrainingFolder(tmp_path / "whole", {}))
    place = TrainingFolder(tmp_path / "cut", {})

    def stop(stage, done, total):
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(make(), options, place, progress=stop)
    resumed = train(make(), options, place)
    assert resumed.losses == whole.losses
    assert mx.array_equal(resumed.weights[f"{PROJECTION}0"], whole.weights[f"{PROJECTION}0"])


@pytest.fixture
def sentences(tmp_path):
    """Pairs of texts to learn from and to judge by, some of them shorter than others."""
    place = judging.folder_of(tmp_path, lambda seed: judging.pairs(24, seed), ".jsonl")
    return judging.read(judging.encoder(deep=(6, 2)), place, "calibration").split(4)


def test_blocks_of_a_program_are_matched_with_the_gradient_of_finite_differences(sentences):
    options = DistillOptions(hidden_weight=2, attention_weight=3, batch_size=4)
    student, teacher = judging.encoder(deep=(4, 1)), judging.encoder(deep=(6, 2))
    goal = Answers(student, teacher, *sentences, options)
    plain = Answers(student, teacher, *sentences, DistillOptions(batch_size=4))
    weights = goal.start()
    loss, grads = goal.gradients(weights, 0, 1.0)
    assert loss.item() > plain.gradients(plain.start(), 0, 1.0)[0].item() + 0.01
    for path in (f"{PROJECTION}0", "layers.0.query.weight", "layers.0.mlp.weight", "table.weight"):
        step = mx.random.normal(weights[path].shape, key=mx.random.key(1))
        ends = [goal.gradients(weights | {path: weights[path] + side * step}, 0, 1.0)[0].item()
                for side in (5e-3, -5e-3)]  # fmt: skip
        along = (ends[0] - ends[1]) / 1e-2
        assert abs((grads[path] * step).sum().item() - along) < 0.03 * abs(along) + 2e-3, path
    same = Answers(teacher, teacher, *sentences, options)
    assert abs(same.gradients(same.start(), 0, 1.0)[0].item()) < 1e-4


def test_what_is_padding_is_not_matched(sentences):
    """Whatever its states are: the last token of the table only ever stands for padding."""
    options = DistillOptions(hidden_weight=2, attention_weight=3, batch_size=4)
    student, teacher = judging.encoder(deep=(4, 1)), judging.encoder(deep=(6, 2))
    goal = Answers(student, teacher, *sentences, options)
    weights = goal.start()
    before = goal.gradients(weights, 0, 1.0)[0].item()
    table = mx.array(weights["table.weight"])
    table[0] = 50.0
    after = goal.gradients(weights | {"table.weight": table}, 0, 1.0)[0].item()
    assert abs(after - before) < 1e-5


def test_blocks_of_a_program_count_as_answers_rest_on_them(sentences):
    options = DistillOptions(hidden_weight=2, attribution="weights", batch_size=4)
    programs = judging.encoder(deep=(4, 2)), judging.encoder(deep=(6, 4))
    weights = Answers(*programs, *sentences, options).matching.weights
    assert weights.shape == (2,) and abs(weights.mean().item() - 1) < 1e-5


def test_values_of_other_shapes_are_left_out():
    """Of four blocks at two sizes and of two, the last and the first are alike."""
    options = DistillOptions(hidden_weight=1)
    graphs = [judging.residuals(blocks).at({"batch": 2}) for blocks in (1, 3)]
    assert [len(pair.states) for pair in Matching(*graphs, options).pairs] == [1, 1]
    graphs = [judging.residuals(blocks).at({"batch": 2}) for blocks in (3, 1)]
    assert [len(pair.states) for pair in Matching(*graphs, options).pairs] == [1, 1, 0, 1]
    with pytest.raises(InputError, match="--attention-weight: no block of the student has att"):
        Matching(*graphs, replace(options, attention_weight=1))


def test_only_what_is_asked_for_is_held():
    graph = trace(build(LLAMA), INPUTS)
    ends = {block.end for block in blocks_of(graph)}
    maps = {i for block in blocks_of(graph) for i in block.maps}
    for wanted, ids in (({"hidden_weight": 1}, ends), ({"attention_weight": 1}, maps)):
        options = DistillOptions(**wanted)
        assert set(Matching(graph, graph, options).their_taps) == ids
        sizes = sum(4 * np.prod(graph.values[i].shape) for i in ids)
        assert inside_bytes(graph, options) == sizes


def test_tokens_count_where_blocks_hand_on_several_states_of_each():
    """As gemma3n's do, [4, B, T, D]."""
    tokens = mx.array(TOKENS[:2, :-1])
    options = DistillOptions(hidden_weight=1)
    values = []
    for seed in (0, 1):
        mx.random.seed(seed)
        model = zoo.build("gemma3n")
        graph = trace(model, tokens)
        taps = Matching(graph, graph, options).own_taps
        weights = {p: a + 0.05 * seed * mx.random.normal(a.shape)
                   for p, a in parameters(model).items()}  # fmt: skip
        values.append(run(graph, [tokens], weights, taps=taps)[1])
    matching, one = Matching(graph, graph, options), mx.zeros(tokens.shape)
    one[0, 3] = 1
    masks = (mx.ones(tokens.shape), one, mx.zeros(tokens.shape))
    whole, single, none = (matching.loss(*values, mask, {}).item() for mask in masks)
    assert none == 0 and abs(whole - single) > 1e-6 * abs(whole)


def test_tokens_that_no_answer_rests_on_are_matched_all_the_same():
    options = DistillOptions(hidden_weight=1, attribution="weights", batch_size=2)
    goal = objective(build(LLAMA, 1), build(LLAMA), options)
    batch = goal._explained(goal._batch(TEXT, np.arange(2)), np.arange(2), 0)
    assert (batch.shares == 0).any() and (batch.mask == 1).all()


@pytest.mark.parametrize("more", [
    {"dtype": "bfloat16"}, {"on_policy": 1.0}, {"grad_accumulation_steps": 2},
    {"attribution": "align", "attribution_every": 1}, {"mask_prompt": True},
])  # fmt: skip
def test_matching_goes_with_other_options(more):
    """It adds to the loss, and everything that is trained gets a gradient."""
    losses = []
    for inner in ({}, {"hidden_weight": 1.0, "attention_weight": 1.0}):
        options = DistillOptions(batch_size=2, **more, **inner)
        goal = objective(build(NARROW, 1), build(LLAMA), options, write=continued)
        loss, grads = goal.gradients(goal.start(), 0, 1.0)
        assert grads.keys() == goal.start().keys()
        assert all(np.isfinite(np.array(grad)).all() and mx.any(grad) for grad in grads.values())
        losses.append(loss.item())
    assert losses[1] > losses[0] + 0.1
