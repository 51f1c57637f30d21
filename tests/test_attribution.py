import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import judging
from mlx_compress import distill_samples
from mlx_compress.attribution import attribution, candidates, embedded, misalignment
from mlx_compress.distill_samples import Answers
from mlx_compress.distill_text import Live, NextToken
from mlx_compress.errors import InputError
from mlx_compress.explained import Explainer, Traced
from mlx_compress.graph import trace
from mlx_compress.options import DistillOptions
from mlx_compress.training import train
from mlx_compress.training_state import TrainingFolder
from mlx_compress.training_text import Text
from test_distill_samples import other
from tiny import LLAMA, VOCABULARY, build, parameters

TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (6, 9)).astype(np.int32)
TEXT = Text("train", TOKENS, np.ones(TOKENS.shape, bool))
HELD = Text("held out", TOKENS, TEXT.mask)
POSITIONS, CHOSEN = mx.array([6, 4, 2]), mx.array([1, 2, 3])
INPUTS = mx.array(TOKENS[:3, :-1])


def explained(weights, *, steps=1):
    graph = trace(build(LLAMA), INPUTS)
    return attribution(graph, [INPUTS], weights, candidates(POSITIONS, CHOSEN), steps=steps)


@pytest.mark.parametrize("steps", [1, 3])
def test_it_is_the_gradient_by_the_embeddings_times_them(steps):
    """By moving each embedding alone, in the model itself."""
    model = build(LLAMA)
    table = model.model.embed_tokens.weight
    width, size = table.shape[1], INPUTS.size

    class Table(nn.Module):
        def __call__(self, tokens):
            return self.share * table[tokens] + self.moved

    model.model.embed_tokens = looked_up = Table()
    found = np.zeros((size, width))
    rows = mx.arange(len(INPUTS))
    for step in range(steps):
        looked_up.share = (step + 1) / steps
        for place in np.ndindex(size, width):
            ends = []
            for side in (1e-2, -1e-2):
                moved = np.zeros((size, width), np.float32)
                moved[place] = side
                looked_up.moved = mx.array(moved.reshape(*INPUTS.shape, width))
                ends.append(model(INPUTS)[rows, POSITIONS, CHOSEN].sum().item())
            found[place] += (ends[0] - ends[1]) / 2e-2 / steps
    found = np.linalg.norm(found.reshape(*INPUTS.shape, width) * np.array(table[INPUTS]), axis=-1)
    found /= np.linalg.norm(found, axis=-1, keepdims=True)
    np.testing.assert_allclose(explained(parameters(build(LLAMA)), steps=steps), found, atol=2e-2)


def test_nothing_rests_on_what_comes_later():
    found = np.array(explained(parameters(build(LLAMA))))
    for row, position in zip(found, POSITIONS.tolist(), strict=True):
        assert (row[position + 1 :] < 1e-8).all() and abs(np.square(row).sum() - 1) < 1e-5


def test_the_gradient_of_a_misalignment_is_that_of_finite_differences():
    theirs, weights = explained(parameters(build(LLAMA, 1))), parameters(build(LLAMA))
    loss = lambda held: misalignment(explained(held), theirs).mean()  # noqa: E731
    grads = mx.grad(loss)(weights)
    for path in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight",
                 "model.embed_tokens.weight", "model.norm.weight"):  # fmt: skip
        step = mx.random.normal(weights[path].shape, key=mx.random.key(3))
        ends = [loss(weights | {path: weights[path] + side * step}) for side in (2e-3, -2e-3)]
        along = ((ends[0] - ends[1]) / 4e-3).item()
        assert abs((grads[path] * step).sum().item() - along) < 0.05 * abs(along) + 2e-3, path


def test_a_model_of_pixels_has_no_tokens_to_rest_on():
    with pytest.raises(InputError, match="looks no token up in a table"):
        embedded(judging.convolutions().at())


def objective(**changed):
    options = DistillOptions(**{
        "iters": 16, "batch_size": 3, "warmup": 0, "learning_rate": 1e-2, "steps_per_eval": 8,
        "attribution_every": 1,
    } | changed)  # fmt: skip
    teacher = build(LLAMA)
    explainer = Explainer(Traced(teacher), options)
    return NextToken(build(LLAMA, 1), Live(teacher), TEXT, HELD, options, explainer=explainer)


def apart(found: NextToken) -> float:
    """Of the student, at all views of the text."""
    total = 0
    for number in range(2):
        positions, tokens, theirs = found.explainer.view(TEXT, np.arange(6), number)
        own = found.traced.attribution(mx.array(TOKENS[:, :-1]), positions, tokens)
        total += misalignment(own, theirs).mean().item() / 2
    return total


def test_what_is_aligned_comes_nearer_than_what_is_not(tmp_path):
    found = {}
    for name, changed in {"align": {"attribution": "align", "attribution_weight": 3.0},
                          "none": {}}.items():  # fmt: skip
        goal = objective(**changed)
        before = apart(goal)
        train(goal, goal.options, TrainingFolder(tmp_path / name, {}))
        found[name] = apart(goal)
    assert found["align"] < 0.8 * found["none"] and found["align"] < before


def test_alignment_takes_its_turn(tmp_path):
    goal = objective(attribution="align", attribution_every=3)
    goal._set(goal.start())
    views = [goal._explained(goal._batch(TEXT, np.arange(3)), np.arange(3), step).view
             for step in range(7)]  # fmt: skip
    assert [view is not None for view in views] == [True, False, False] * 2 + [True]
    assert not mx.array_equal(views[0][0], views[3][0]) and mx.array_equal(views[0][0], views[6][0])


def test_the_teacher_is_asked_once_for_each_view(monkeypatch):
    explainer, asked = objective().explainer, []
    ask = explainer._ask
    monkeypatch.setattr(Explainer, "_ask", lambda self, *args: asked.append(1) or ask(*args))
    first, second = (explainer.view(TEXT, np.arange(3), 0) for _ in range(2))
    assert len(asked) == 1 and all(map(mx.array_equal, first, second))
    explainer.view(TEXT, np.arange(3), 1)
    assert len(asked) == 2


def test_tokens_weigh_what_the_teacher_rests_on():
    goal = objective(attribution="weights")
    weights = goal._explained(goal._batch(TEXT, np.arange(3)), np.arange(3), 0).shares
    np.testing.assert_allclose(weights.mean(axis=1), 1, atol=1e-3)
    maps = sum(goal.explainer.view(TEXT, np.arange(3), n)[2] for n in range(2))
    np.testing.assert_allclose(weights[:, :-1], maps / maps.mean(1, keepdims=True), rtol=1e-5)


def test_pairs_of_sentences_are_alike_by_the_same_words(tmp_path):
    place = judging.folder_of(tmp_path, lambda seed: judging.pairs(24, seed), ".jsonl")
    net = judging.encoder()
    samples = judging.read(net, place, "calibration").split(4)
    options = DistillOptions(attribution="align", attribution_every=1, batch_size=4)
    goal = Answers(other(net), net, *samples, options)
    weights = goal.start()
    loss, grads = goal.gradients(weights, 0, 1.0)
    plain, _ = Answers(other(net), net, *samples, DistillOptions(batch_size=4)).gradients(
        weights, 0, 1.0
    )
    assert loss.item() > plain.item() + 1e-3
    path = "mix.weight"
    step = mx.random.normal(weights[path].shape, key=mx.random.key(1))
    ends = [goal.gradients(weights | {path: weights[path] + side * step}, 0, 1.0)[0].item()
            for side in (5e-3, -5e-3)]  # fmt: skip
    along = (ends[0] - ends[1]) / 1e-2
    assert abs((grads[path] * step).sum().item() - along) < 0.05 * abs(along) + 2e-3
    same = Answers(net, net, *samples, options)
    assert same.gradients(same.start(), 0, 1.0)[0].item() < 1e-5


@pytest.mark.parametrize(("every", "steps", "asked"), [(1, 8, 4), (2, 2, 1)])
def test_a_sample_is_explained_once_and_when_it_is_due(tmp_path, monkeypatch, every, steps, asked):
    """16 samples make 4 batches; their second round has other ones."""
    place = judging.folder_of(tmp_path, lambda seed: judging.pairs(24, seed), ".jsonl")
    net, explained = judging.encoder(), []
    samples = judging.read(net, place, "calibration").split(4)
    options = DistillOptions(attribution="align", attribution_every=every, batch_size=4)
    goal, explain = Answers(other(net), net, *samples, options), distill_samples.attribution
    theirs = goal._teacher[0]

    def counted(graph, *args, **more):
        explained.append(graph is theirs)
        return explain(graph, *args, **more)

    monkeypatch.setattr(distill_samples, "attribution", counted)
    for step in range(steps):
        goal.gradients(goal.start(), step, 1.0)
    assert sum(explained) == asked
    assert len(explained) - asked == -(-steps // every), "the student's own are asked each time"
