import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_unflatten
from mlx_compress.bridges.mlx_lm import trace_logits

import plain
import tiny
from mlx_compress import stream
from mlx_compress.axes import named_axes
from mlx_compress.calibrate import calibrate
from mlx_compress.contractions import consumers, contractions
from mlx_compress.errors import InputError
from mlx_compress.graph import trace


@pytest.fixture(autouse=True)
def no_compile():
    mx.disable_compile()
    yield
    mx.enable_compile()


class Recorder:
    """Stands in for a layer and notes its inputs: (x, the experts picked or None)."""

    def __init__(self, layer):
        self.layer, self.calls = layer, []

    def __call__(self, x, *rest, **options):
        self.calls.append((x, rest[0] if rest else None))
        return self.layer(x, *rest, **options)


def cubes(outputs):
    return (outputs[0].astype(mx.float32) ** 3).sum()


def axes_of(model, batches):
    return named_axes(trace_logits(model, batches[0][0]))


def fetcher(model):
    held = tiny.parameters(model)
    return lambda paths: {path: held[path] for path in paths}


def recorded(model, owner, name, batches):
    """What the layer `name` of the module `owner` is given in each batch: (x, experts)."""
    layer = getattr(owner, name)
    recorder = Recorder(layer)
    setattr(owner, name, recorder)
    for (tokens,) in batches:
        mx.eval(model(tokens))
    setattr(owner, name, layer)
    return recorder.calls


def rows_of(x, experts=None, expert=None):
    """The rows of an activation; of a routed one [..., 1, n], those that go to `expert`."""
    rows = np.array(x).reshape(-1, x.shape[-1])
    return rows if experts is None else rows[np.array(experts).reshape(-1) == expert]


def loop_peak(batches):
    peak = np.zeros(batches[0].shape[-1])
    for row in np.concatenate(batches):
        for k, x in enumerate(row):
            peak[k] = max(peak[k], abs(x))
    return peak


def gradients(model, tokens, loss=cubes):
    """dL/dw of every parameter, as MLX finds it for the model itself."""
    held = tiny.parameters(model)

    def of(values):
        model.update(tree_unflatten(list(values.items())))
        return loss([model(tokens)])

    slopes = mx.grad(of)(held)
    model.update(tree_unflatten(list(held.items())))
    return {path: np.array(g) for path, g in slopes.items()}


# ---- where activations meet weights


def test_every_projection_of_a_llama_is_a_contraction():
    model = tiny.build(tiny.LLAMA)
    named = axes_of(model, tiny.batches())
    weights = [place.weight for place in contractions(named)]
    assert sorted(weights) == sorted(
        (path, 1) for path in tiny.parameters(model) if "proj" in path or "lm_head" in path
    )


def test_a_tied_embedding_is_read_along_its_columns():
    model = tiny.build({**tiny.LLAMA, "tie_word_embeddings": True})
    places = contractions(axes_of(model, tiny.batches()))
    assert places[-1].weight == ("model.embed_tokens.weight", 1)


def test_what_reads_a_dimension_is_found():
    named = axes_of(tiny.build(tiny.LLAMA), tiny.batches())
    mlp, heads = "model.layers.0.mlp.channels", "model.layers.1.self_attn.heads"
    found = consumers(named, [mlp, heads, "width"])
    assert [p.weight[0] for p in found[mlp]] == ["model.layers.0.mlp.down_proj.weight"]
    assert [p.weight[0] for p in found[heads]] == ["model.layers.1.self_attn.o_proj.weight"]
    assert len(found["width"]) == 2 * 5 + 1


def test_experts_are_contractions_that_say_which_expert_takes_a_row():
    named = axes_of(tiny.build(tiny.MIXTRAL), tiny.batches())
    places = [p for p in contractions(named) if p.experts is not None]
    assert len(places) == 6
    assert {named._words(p.expert_axis) for p in places} == {
        "model.layers.0.block_sparse_moe.experts",
        "model.layers.1.block_sparse_moe.experts",
    }


def test_a_depthwise_convolution_reads_a_channel_by_its_own_kernel():
    model, inputs = plain.build("mobilenet")
    named = named_axes(trace(model, *inputs))
    shapes = named.graph.shapes()
    depthwise = [path for path, shape in shapes.items() if len(shape) == 4 and shape[-1] == 1]
    found = {p.weight[0]: p.weight[1] for p in contractions(named) if p.weight}
    assert depthwise and all(found[path] == 0 for path in depthwise)


def test_a_grouped_convolution_has_no_slot_for_each_of_its_inputs():
    model = nn.Sequential(nn.Conv1d(4, 6, 1), nn.Conv1d(6, 8, 3, groups=2), nn.Linear(8, 2))
    places = contractions(named_axes(trace(model, mx.zeros((2, 5, 4)))))
    paths = [place.weight and place.weight[0] for place in places]
    assert paths == ["layers.0.weight", None, "layers.2.weight"]


# ---- moments


@pytest.mark.parametrize("rows", [2, 40])  # from 64 picks on, mlx-lm sorts rows by expert
def test_moments_are_sums_over_the_rows_that_a_layer_is_given(rows):
    batches = tiny.batches(rows=rows)
    model = tiny.build(tiny.MIXTRAL)
    named = axes_of(model, batches)
    channels = "model.layers.0.block_sparse_moe.switch_mlp.channels"
    statistics = calibrate(named, batches, fetcher(model), dims=[channels])
    ((key, held),) = statistics.moments.items()
    assert held.batches == 3 and held.taylor is None and held.square.shape == (3, 10)
    layers = model.model.layers[0].block_sparse_moe.switch_mlp
    calls = recorded(model, layers, "down_proj", batches)
    for expert in range(3):
        given = [rows_of(x, picked, expert) for x, picked in calls]
        square = sum((x**2).sum(axis=0) for x in given)
        norm = sum(np.sqrt((x**2).sum(axis=0)) for x in given)
        np.testing.assert_allclose(held.square[expert], square, rtol=1e-4)
        np.testing.assert_allclose(held.norm[expert], norm, rtol=1e-4)


@pytest.mark.parametrize("rows", [2, 40])
def test_peaks_are_the_largest_magnitudes_of_all_rows(rows):
    batches = tiny.batches(rows=rows)
    model = tiny.build(tiny.MIXTRAL)
    experts, heads = "model.layers.0.block_sparse_moe.switch_mlp.channels", "self_attn.heads"
    dims = [experts, f"model.layers.1.{heads}"]
    statistics = calibrate(axes_of(model, batches), batches, fetcher(model), dims=dims)
    held = {key[1] is None: moments for key, moments in statistics.moments.items()}
    layers = model.model.layers
    calls = recorded(model, layers[1].self_attn, "o_proj", batches)
    np.testing.assert_array_equal(held[True].peak, loop_peak([rows_of(x) for x, _ in calls]))
    calls = recorded(model, layers[0].block_sparse_moe.switch_mlp, "down_proj", batches)
    for expert in range(3):
        given = [rows_of(x, picked, expert) for x, picked in calls]
        np.testing.assert_allclose(held[False].peak[expert], loop_peak(given), rtol=1e-5)


@pytest.mark.parametrize("rows", [2, 40])
def test_a_row_that_several_experts_read_counts_for_each_of_them(rows):
    batches = tiny.batches(rows=rows)
    model = tiny.build(tiny.MIXTRAL)
    named = axes_of(model, batches)
    statistics = calibrate(named, batches, fetcher(model), dims=["width"])
    moments = [held for (_, experts), held in statistics.moments.items() if experts is not None]
    assert len(moments) == 2  # one for each layer: gate and up read the same value
    for held, layer in zip(moments, model.model.layers, strict=True):
        assert held.square.shape == (3, 16)
        calls = recorded(model, layer, "block_sparse_moe", batches)
        router = layer.block_sparse_moe.gate
        for expert in range(3):
            square = np.zeros(16)
            for x, _ in calls:
                weakest = np.argmin(np.array(router(x)), axis=-1)  # two of three are picked
                square += (np.array(x)[weakest != expert] ** 2).sum(axis=0)
            np.testing.assert_allclose(held.square[expert], square, rtol=1e-4)


def test_every_row_goes_to_as_many_experts_as_the_router_picks():
    batches = tiny.batches()
    model = tiny.build(tiny.MIXTRAL)
    layers = model.model.layers[1].block_sparse_moe.switch_mlp
    calls = recorded(model, layers, "down_proj", batches)
    assert all(picked.size == 2 * 7 * 2 for _, picked in calls)


def test_moments_do_not_depend_on_how_windows_are_batched_but_norms_do():
    model = tiny.build(tiny.LLAMA)
    dims = ["model.layers.0.mlp.channels", "model.layers.1.self_attn.heads", "width"]
    wide = tiny.batches(count=1, rows=4)
    narrow = [[wide[0][0][k : k + 2]] for k in (0, 2)]
    one, two = (
        list(
            calibrate(
                axes_of(model, batches), batches, fetcher(model), dims=dims,
                loss=lambda b, out: cubes(out),
            ).moments.values()
        )
        for batches in (wide, narrow)
    )  # fmt: skip
    assert len(one) == len(two) == 7
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a.square, b.square, rtol=1e-4)
        np.testing.assert_allclose(a.taylor, b.taylor, rtol=1e-3, atol=1e-5)
        assert (a.norm < b.norm).all()


def test_taylor_terms_take_the_magnitude_sequence_by_sequence():
    model = tiny.build(tiny.LLAMA)
    batches = tiny.batches(count=2)
    path = "model.layers.0.mlp.down_proj.weight"
    statistics = calibrate(
        axes_of(model, batches), batches, fetcher(model), dims=["model.layers.0.mlp.channels"],
        loss=lambda b, out: cubes(out),
    )  # fmt: skip
    ((_, held),) = statistics.moments.items()
    weight = np.array(tiny.parameters(model)[path])
    alone = [
        (weight * gradients(model, tokens[k : k + 1])[path]).sum(axis=0)
        for (tokens,) in batches
        for k in range(2)
    ]
    np.testing.assert_allclose(held.taylor, np.abs(alone).sum(axis=0), rtol=1e-3, atol=1e-5)


# ---- what is not finite


def spoiled(path, value):
    model = tiny.build(tiny.LLAMA)
    weights = tiny.parameters(model)
    weights[path] = mx.where(mx.arange(weights[path].size).reshape(weights[path].shape) == 3,
                             value, weights[path])  # fmt: skip
    model.update(tree_unflatten(list(weights.items())))
    return model


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("path", ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"])
def test_a_parameter_that_is_not_finite_is_named(path, value):
    model, batches = spoiled(path, value), tiny.batches()
    named = axes_of(model, batches)
    with pytest.raises(InputError, match=f"^{path}: holds NaN or infinity.*repair the checkpoint"):
        calibrate(named, batches, fetcher(model), dims=["model.layers.1.mlp.channels"])


def test_what_spoils_only_the_gradients_is_named_too():
    model, batches = spoiled("lm_head.weight", float("nan")), tiny.batches()
    named = axes_of(model, batches)
    dims = ["model.layers.1.mlp.channels"]
    calibrate(named, batches, fetcher(model), dims=dims)
    with pytest.raises(InputError, match=r"^lm_head.weight: holds NaN"):
        calibrate(named, batches, fetcher(model), dims=dims, loss=lambda b, out: cubes(out))


def test_infinity_that_arises_from_finite_weights_is_told_with_its_place():
    model, batches = spoiled("model.layers.0.mlp.up_proj.weight", 3e38), tiny.batches()
    place = "model.layers.0.mlp.down_proj.weight"
    with pytest.raises(InputError, match=f"^{place}: NaN or infinity arises there.*magnitude"):
        calibrate(axes_of(model, batches), batches, fetcher(model),
                  dims=["model.layers.0.mlp.channels"])  # fmt: skip


def test_what_is_kept_for_the_way_back_in_groups_changes_nothing(monkeypatch):
    model, batches = tiny.build(tiny.LLAMA), tiny.batches()
    named = axes_of(model, batches)
    dims = [d.name for d in named.free(("channels", "heads"))]

    def measured():
        return calibrate(
            named, batches, fetcher(model), dims=dims,
            loss=lambda b, outputs: (b + 1) * cubes(outputs),
        )  # fmt: skip

    whole = measured()
    monkeypatch.setattr(stream, "KEPT", 0.0)
    monkeypatch.setattr(stream, "KEPT_BYTES", 1)
    parts = measured()
    assert len(batches) > 1
    for key, held in whole.moments.items():
        np.testing.assert_allclose(parts.moments[key].square, held.square, rtol=1e-6)
        np.testing.assert_allclose(parts.moments[key].taylor, held.taylor, rtol=1e-6)
        assert parts.moments[key].batches == held.batches == len(batches)
