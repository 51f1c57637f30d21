"""What `named_axes` says of small functions: each claim in the least code that shows it."""

import os
import re
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import pytest

import plain
from mlx_compress.axes import named_axes
from mlx_compress.graph import trace
from mlx_compress.options import KINDS


def axes(function, *inputs, **shapes):
    """The named axes of `function(x, **parameters)`; `inputs` are shapes."""
    graph = trace(
        lambda p, *x: function(*x, **p),
        *map(mx.zeros, inputs),
        parameters={name: mx.zeros(shape) for name, shape in shapes.items()},
    )
    return named_axes(graph)


def module_axes(module, *inputs):
    return named_axes(trace(module, *map(mx.zeros, inputs)))


def found(named):
    """Each free dimension with all that matters of it."""
    return {d.name: (d.kind, d.size, d.within, d.exact, d.slots) for d in named.free()}


def kinds(named):
    return sorted((d.kind, d.size) for d in named.free())


# ---- MLPs


def test_the_hidden_channels_of_an_mlp_are_one_dimension_with_three_slots():
    named = module_axes(nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 4)), (5, 6))
    slots = ("layers.0.weight", 0), ("layers.0.bias", 0), ("layers.2.weight", 1)
    assert found(named) == {"layers.channels": ("channels", 10, None, True, slots)}
    assert named.describe("layers.2.weight") == ["layers.2.fixed", "layers.channels"]


def test_fused_gate_and_up_projections_are_a_sum_of_the_same_channels():
    def mlp(x, gate_up, down):
        gate, up = mx.split(x @ gate_up, 2, axis=-1)
        return nn.silu(gate) * up @ down

    named = axes(mlp, (5, 4), gate_up=(4, 12), down=(6, 3))
    assert named.describe("gate_up")[1] == "(channels|channels)"
    assert named.coordinates("gate_up")[1]["channels"].tolist() == [*range(6), *range(6)]


def test_concatenated_activations_are_read_by_a_sum_of_their_channels():
    named = axes(
        lambda x, a, b, c: mx.concatenate([x @ a, x @ b, x], axis=-1) @ c,
        *[(5, 4)],
        **{"a": (4, 6), "b": (4, 7), "c": (17, 3)},
    )
    assert named.describe("c")[0] == "(channels|channels_2|fixed)"
    assert kinds(named) == [("channels", 6), ("channels", 7)]


# ---- attention


def same(a):
    return a


def attention(x, q, k, v, o, *, heads, turn=same, widen=same, mask=None):
    def split(w):
        return (x @ w).reshape(*x.shape[:2], -1, q.shape[1] // heads).transpose(0, 2, 1, 3)

    y = mx.fast.scaled_dot_product_attention(
        turn(split(q)), widen(turn(split(k))), widen(split(v)), scale=0.5, mask=mask
    )
    return y.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1) @ o


PROJECTIONS = {"q": (6, 24), "k": (6, 8), "v": (6, 8), "o": (24, 5)}


def test_grouped_query_attention_is_heads_times_query_heads_times_head_dim():
    named = axes(partial(attention, heads=6), (2, 7, 6), **PROJECTIONS)
    assert named.describe("q")[1] == "heads*query_heads*head_dim"
    assert named.describe("k")[1] == "heads*head_dim"
    assert named.describe("v")[1] == "heads*head_dim_2"
    assert named.describe("o")[0] == "heads*query_heads*head_dim_2"
    sizes = {d.name: (d.kind, d.size, d.within, d.exact) for d in named.free()}
    assert sizes == {
        "heads": ("heads", 2, None, True),
        "query_heads": ("query_heads", 3, "heads", True),
        "head_dim": ("head_dim", 4, None, True),
        "head_dim_2": ("head_dim", 4, None, True),
    }


def test_repeating_key_value_heads_for_each_query_head_says_the_same():
    repeat = partial(mx.repeat, repeats=3, axis=1)
    repeated = axes(partial(attention, heads=6, widen=repeat), (2, 7, 6), **PROJECTIONS)
    assert found(repeated) == found(axes(partial(attention, heads=6), (2, 7, 6), **PROJECTIONS))


def test_one_shared_key_value_head_leaves_only_query_heads():
    shapes = {"q": (6, 24), "k": (6, 4), "v": (6, 4), "o": (24, 5)}
    named = axes(partial(attention, heads=6), (2, 7, 6), **shapes)
    assert named.describe("q")[1] == "query_heads*head_dim"
    assert ("query_heads", 6) in kinds(named) and named.dimensions["query_heads"].within is None


@pytest.mark.parametrize("traditional", [False, True])
def test_rotary_positions_freeze_the_head_dims_of_queries_and_keys_but_not_of_values(traditional):
    turn = nn.RoPE(4, traditional=traditional)
    named = axes(partial(attention, heads=6, turn=turn), (2, 7, 6), **PROJECTIONS)
    assert [d.slots for d in named.free(["head_dim"])] == [(("v", 1), ("o", 0))]
    frozen = [d for d in named.dimensions.values() if not d.free and ("q", 1) in d.slots]
    assert any("positions" in d.frozen for d in frozen)


def test_a_mask_that_two_layers_share_couples_nothing():
    mask = mx.triu(mx.full((7, 7), -1e9), k=1)

    def layers(x, **p):
        for n in "12":
            x = attention(x, *[p[name + n] for name in "qkvo"], heads=4, mask=mask)
        return x

    shapes = {"q": (6, 12), "k": (6, 12), "v": (6, 12), "o": (12, 6)}
    named = axes(layers, (2, 7, 6), **{name + n: s for n in "12" for name, s in shapes.items()})
    layers_of = [[path[1] for path, _ in d.slots] for d in named.free(["heads"])]
    assert layers_of == [["1"] * 4, ["2"] * 4]


def test_a_scalar_that_all_layers_share_couples_nothing():
    half = mx.array(0.5)
    shapes = {"a": (4, 6), "b": (6, 6), "c": (6, 3)}
    named = axes(lambda x, a, b, c: ((x @ a * half) @ b * half) @ c, (5, 4), **shapes)
    assert [d.slots for d in named.free()] == [(("a", 1), ("b", 0)), (("b", 1), ("c", 0))]


# ---- experts


def routed(x, router, up, down):
    chosen = mx.argpartition(-(x @ router), kth=1, axis=-1)[..., :2]
    y = mx.gather_mm(mx.expand_dims(x, (-2, -3)), up, rhs_indices=chosen)
    return mx.gather_mm(nn.relu(y), down, rhs_indices=chosen).squeeze(-2).sum(axis=-2)


def test_channels_of_experts_are_chosen_within_each_expert():
    named = axes(routed, (5, 4), router=(4, 3), up=(3, 4, 8), down=(3, 8, 2))
    experts = ("experts", 3, None, False, (("router", 1), ("up", 0), ("down", 0)))
    channels = ("channels", 8, "experts", True, (("up", 2), ("down", 1)))
    assert found(named) == {"experts": experts, "channels": channels}


def test_channels_of_experts_that_are_not_picked_alike_are_not_chosen_within_them():
    def best_and_worst(x, router, up, down):
        best, worst = (f(x @ router, axis=-1, keepdims=True) for f in (mx.argmax, mx.argmin))
        y = mx.gather_mm(mx.expand_dims(x, (-2, -3)), up, rhs_indices=best)
        return mx.gather_mm(nn.relu(y), down, rhs_indices=worst).squeeze((-2, -3))

    named = axes(best_and_worst, (5, 4), router=(4, 3), up=(3, 4, 8), down=(3, 8, 2))
    assert len(named.dimensions["experts"].slots) == 3
    assert named.dimensions["channels"].within is None


# ---- what is never offered


@pytest.mark.parametrize("name, sizes", [
    ("mlp", [(2, 6), (1, 6), (6, 6), (9, 6), (10, 6)]),
    ("resnet_projected", [(2, 8, 8, 3), (1, 12, 8, 3), (4, 12, 12, 3), (7, 8, 8, 3)]),
    ("encoder", [(2, 6, 5), (1, 12, 5), (12, 14, 5), (14, 12, 5), (3, 3, 5), (4, 4, 5), (1, 2, 5)]),
    ("gru", [(2, 4, 5), (7, 2, 5), (8, 3, 5)]),
])  # fmt: skip
def test_dimensions_are_the_same_whatever_the_sizes_of_batch_and_sequence(name, sizes):
    model, _ = plain.build(name)
    first, *others = [found(module_axes(model, size)) for size in sizes]
    assert first
    for other in others:
        assert other == first


def test_a_layer_over_positions_has_prunable_channels_but_not_prunable_positions():
    def mixer(x, enter, up, down, leave):
        x = x @ enter
        y = nn.gelu(x.transpose(0, 2, 1) @ up) @ down
        return (x + y.transpose(0, 2, 1)) @ leave

    shapes = {"enter": (3, 8), "up": (8, 8), "down": (8, 8), "leave": (8, 2)}
    named = axes(mixer, (8, 8, 3), **shapes)
    assert [d.slots for d in named.free()] == [
        (("enter", 1), ("leave", 0)),
        (("up", 1), ("down", 0)),
    ]


def squared(x, a, b):
    y = x @ a
    return (y[:, :, None] * y[:, None]).reshape(len(y), -1) @ b


HIDDEN = {"a": (4, 6), "b": (6, 3)}
# The reason, a function of x [5, 4] and a parameter's axis for which it gives that reason.
FROZEN = {
    "the model's input": (lambda x, a, b: x @ a @ b, HIDDEN, ("a", 0)),
    "the model's output": (lambda x, a, b: x @ a @ b, HIDDEN, ("b", 1)),
    "meets a constant array": (lambda x, a, b: x @ a * mx.array([2.0] * 6) @ b, HIDDEN, ("a", 1)),
    "no rule for FFT": (lambda x, a, b: mx.abs(mx.fft.fft(x @ a)) @ b, HIDDEN, ("a", 1)),
    "Scan runs along it": (lambda x, a, b: mx.cumsum(x @ a, axis=-1) @ b, HIDDEN, ("a", 1)),
    "Sort runs along it": (lambda x, a, b: mx.sort(x @ a, axis=-1) @ b, HIDDEN, ("b", 0)),
    "no other parameter shares it": (lambda x, a: (x @ a).sum(-1), {"a": (4, 6)}, ("a", 1)),
    "not used by the traced call": (lambda x, a: x, {"a": (6,)}, ("a", 0)),
    "stands twice in one axis": (squared, {"a": (4, 6), "b": (36, 3)}, ("a", 1)),
    "strided slice": (lambda x, a, b: (x @ a)[:, ::-1] @ b, HIDDEN, ("a", 1)),
    "convolved": (lambda x, a: mx.conv1d(x[None], a), {"a": (3, 2, 4)}, ("a", 1)),
    "indexed by position": (lambda x, a: x @ a[mx.array([0, 2])].T, {"a": (6, 4)}, ("a", 0)),
    "positions are counted along it": (
        lambda x, a, b: (x @ a + mx.arange(6)) @ b, HIDDEN, ("a", 1)
    ),
    "Reshape cuts it in a way that does not fit": (
        lambda x, a, b: (x @ a).reshape(5, 2, 3).transpose(0, 2, 1).reshape(5, 2, 3) @ b[:3],
        {"a": (4, 6), "b": (5, 3)}, ("a", 1)
    ),
    "cut in ways that do not fit together": (
        lambda x, a, b: (x @ a + (x @ a).reshape(5, 2, 3).transpose(0, 2, 1).reshape(5, 6)) @ b,
        HIDDEN, ("a", 1)
    ),
}  # fmt: skip


@pytest.mark.parametrize("reason", FROZEN)
def test_what_is_frozen_says_why(reason):
    function, shapes, slot = FROZEN[reason]
    named = axes(function, (5, 4), **shapes)
    there = [d for d in named.dimensions.values() if slot in d.slots]
    assert there and {(d.kind, d.frozen) for d in there} == {("fixed", reason)}


def test_primitives_without_a_rule_are_named_and_counted():
    named = axes(lambda x, a: mx.abs(mx.fft.fft(mx.fft.fft(x @ a))), (5, 4), a=(4, 6))
    assert named.unknown == {"FFT": 2}


def test_the_vocabulary_of_an_embedding_is_frozen_but_not_its_width():
    named = axes(lambda x, a, b: a[x.astype(mx.int32)] @ b, (5,), a=(11, 6), b=(6, 3))
    assert named.dimensions["fixed"].frozen == "indexed by position"
    assert found(named) == {"channels": ("channels", 6, None, True, (("a", 1), ("b", 0)))}


# ---- convolutions


def test_a_depthwise_convolution_shares_the_channels_of_what_feeds_it():
    named = axes(
        lambda x, a, d, b: mx.conv2d(mx.conv2d(mx.conv2d(x, a), d, groups=8), b),
        *[(2, 6, 6, 3)],
        **{"a": (8, 1, 1, 3), "d": (8, 3, 3, 1), "b": (5, 1, 1, 8)},
    )
    assert [d.slots for d in named.free()] == [(("a", 0), ("d", 0), ("b", 3))]


def test_a_grouped_convolution_has_groups_and_channels_within_a_group():
    named = axes(
        lambda x, a, g, b: mx.conv2d(mx.conv2d(mx.conv2d(x, a), g, groups=2), b),
        *[(2, 6, 6, 3)],
        **{"a": (6, 1, 1, 3), "g": (8, 3, 3, 3), "b": (5, 1, 1, 8)},
    )
    assert named.describe("a")[0] == "channels*channels_2"
    assert named.describe("g")[::3] == ["channels*channels_3", "channels_2"]
    assert named.describe("b")[3] == "channels*channels_3"
    assert kinds(named) == [("channels", 2), ("channels", 3), ("channels", 4)]


def test_a_shortcut_that_pads_channels_keeps_the_old_ones_in_their_place():
    named = axes(
        lambda x, a, b, c: (mx.pad(x @ a, [(0, 0), (1, 2)]) + x @ b) @ c,
        *[(5, 4)],
        **{"a": (4, 5), "b": (4, 8), "c": (8, 3)},
    )
    assert named.describe("b")[1] == "(1|channels|channels_2)"
    assert named.coordinates("c")[0]["channels"].tolist() == [-1, 0, 1, 2, 3, 4, -1, -1]
    assert named.coordinates("c")[0]["channels_2"].tolist() == [-1] * 6 + [0, 1]


@pytest.mark.parametrize("first", [0, 1])
def test_every_other_channel_can_go_only_with_its_neighbour(first):
    named = axes(lambda x, a, b: (x @ a)[:, first::2] @ b, (5, 4), a=(4, 8), b=(4, 3))
    assert named.coordinates("a")[1]["channels"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert found(named)["channels"][-1] == (("a", 1), ("b", 0))


def test_a_reshape_that_cuts_across_an_axis_freezes_that_axis_alone():
    def windows(x, a, b):
        y = mx.roll(x @ a, 1, axis=1)
        return y.reshape(2, 3, 2, 8).sum(axis=2) @ b

    assert kinds(axes(windows, (2, 6, 4), a=(4, 8), b=(8, 3))) == [("channels", 8)]


# ---- kinds, names, exactness


def test_what_attention_adds_up_over_is_a_head_dim_even_if_its_heads_cannot_be_pruned():
    slopes = mx.array([1.0, 2.0]).reshape(2, 1, 1)

    def alibi(x, q, k):
        q, k = ((x @ w).reshape(3, 7, 2, 4).swapaxes(1, 2) for w in (q, k))
        return mx.softmax(q @ k.swapaxes(2, 3) * slopes, axis=-1)

    assert kinds(axes(alibi, (3, 7, 6), q=(6, 8), k=(6, 8))) == [("head_dim", 4)]


def test_what_a_product_of_two_activations_without_heads_adds_up_over_is_channels():
    named = axes(lambda x, a, b: (x @ a) @ (x @ b).swapaxes(1, 2), (3, 5, 4), a=(4, 6), b=(4, 6))
    assert kinds(named) == [("channels", 6)]


def test_what_a_residual_sum_carries_between_blocks_is_the_width():
    def residual(x, **p):
        x = x @ p["stem.a"]
        return (x + nn.relu(x @ p["block.up"]) @ p["block.down"]) @ p["head.a"]

    shapes = {"stem.a": (4, 6), "block.up": (6, 9), "block.down": (9, 6), "head.a": (6, 3)}
    named = axes(residual, (5, 4), **shapes)
    assert [d.name for d in named.free()] == ["width", "block.channels"]
    assert kinds(named) == [("channels", 9), ("width", 6)]


def test_adding_a_constant_or_a_bias_twice_makes_no_residual_stream():
    def biased(x, **p):
        y = mx.tanh(x @ p["one.a"] + p["one.b"] + 1.0)
        return (y + p["one.b"] + 1.0) @ p["two.a"]

    named = axes(biased, (5, 4), **{"one.a": (4, 6), "one.b": (6,), "two.a": (6, 3)})
    assert kinds(named) == [("channels", 6)]


@pytest.mark.parametrize("name", plain.MODELS)
def test_names_are_unique_and_begin_with_the_innermost_common_module(name):
    model, inputs = plain.build(name)
    named = named_axes(trace(model, *inputs))
    assert named.unknown == {} and named.free()
    for key, d in named.dimensions.items():
        modules = [path.split(".")[:-1] for path, _ in d.slots]
        *prefix, word = d.name.split(".")
        assert key == d.name and prefix == os.path.commonprefix(modules)
        assert re.fullmatch(rf"{d.kind}(_\d+)?", word) and d.kind in (*KINDS, "fixed")


EXACT = {
    "tanh": (lambda x, a, b: mx.tanh(x @ a) @ b, True),
    "exp": (lambda x, a, b: mx.exp(x @ a) @ b, True),
    "maximum of others": (lambda x, a, b: (x @ a).max(axis=0) @ b, True),
    "softmax": (lambda x, a, b: mx.softmax(x @ a, axis=-1) @ b, False),
    "mean": (lambda x, a, b: (x @ a - (x @ a).mean(-1, keepdims=True)) @ b, False),
    "rms norm": (lambda x, a, b: mx.fast.rms_norm(x @ a, None, 1e-5) @ b, False),
    "largest": (lambda x, a, b: ((x @ a) / (x @ a).max(-1, keepdims=True)) @ b, False),
    "product": (lambda x, a, b: (x @ a) @ (x @ b.T).T, True),
    "product of relu6": (lambda x, a, b: nn.relu6(x @ a) @ nn.relu6(x @ b.T).T, True),
    "product of one exp": (lambda x, a, b: mx.exp(x @ a) @ (x @ b.T).T, True),
    "product of two exps": (lambda x, a, b: mx.exp(x @ a) @ mx.exp(x @ b.T).T, False),
    "product of shifted": (lambda x, a, b: (x @ a + 1) @ (x @ b.T - 1).T, False),
    "product of biased": (
        lambda x, a, b: mx.addmm(mx.array(1.0), x, a) @ mx.addmm(mx.array(1.0), x, b.T).T, False
    ),
    "product with an inverse": (lambda x, a, b: (x @ a) @ (1 / (x @ b.T)).T, False),
    "normed weight": (lambda x, a, b: x @ (a / mx.linalg.norm(a, axis=0)) @ b, False),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_a_dimension_is_exact_where_removing_equals_zeroing(name):
    function, exact = EXACT[name]
    named = axes(function, (5, 4), a=(4, 6), b=(6, 4))
    (dimension,) = named.free()
    assert (dimension.size, dimension.exact) == (6, exact)


def test_a_softmax_over_repeated_units_is_not_exact_for_their_number_either():
    def repeated(x, a, b, c):
        y = mx.softmax(mx.repeat(x @ a, 4, axis=-1), axis=-1)
        return y @ (b * c)

    named = axes(repeated, (5, 4), a=(4, 6), b=(24, 3), c=(24, 1))
    assert {d.size: d.exact for d in named.free()} == {6: False, 4: False}
