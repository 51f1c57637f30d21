import re

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_unflatten

import reference
import tiny
from mlx_compress.axes import Dimension, NamedAxes
from mlx_compress.calibrate import calibrate
from mlx_compress.errors import InputError
from mlx_compress.importance import CRITERIA, Sources, criterion, needs, unit_sums
from mlx_compress.options import IMPORTANCES
from mlx_compress.osscar import DAMPING
from test_calibrate import axes_of, cubes, fetcher, gradients, recorded, rows_of

LLAMA_LAYER, MOE = "model.layers.1", "model.layers.1.block_sparse_moe"
MLP = f"{LLAMA_LAYER}.mlp.channels"
HEADS = f"{LLAMA_LAYER}.self_attn.heads"
QUERY_HEADS = f"{LLAMA_LAYER}.self_attn.query_heads"
CHANNELS = f"{MOE}.switch_mlp.channels"
D = 6  # of a head of the Llama; the Mixtral's are 4


@pytest.fixture(autouse=True)
def no_compile():
    mx.disable_compile()
    yield
    mx.enable_compile()


def scored(name, model, dims, batches=None, *, loss=cubes, seed=0):
    """{dimension: scores} of a model by one criterion."""
    batches = tiny.batches() if batches is None else batches
    named, needed = axes_of(model, batches), needs(name)
    statistics = None
    if "data" in needed:
        statistics = calibrate(
            named, batches, fetcher(model), dims=dims,
            loss=(lambda b, out: loss(out)) if "gradients" in needed else None,
            second={} if "second" in needed else None,
        )  # fmt: skip
    dims = tuple(named.dimensions[dim] for dim in dims)
    return criterion(name)(Sources(named, dims, fetcher(model), statistics, seed))


def changed(model, edits):
    """The same model with `edits[path](array)` in place of some parameters."""
    weights = tiny.parameters(model)
    edited = [(path, mx.array(edit(np.array(weights[path])))) for path, edit in edits.items()]
    model.update(tree_unflatten(edited))
    return model


def span(unit, size):
    return range(unit * size, (unit + 1) * size)


def head_slots(unit, group, size):
    """Entries of the query rows and of o_proj's columns that belong to a KV head."""
    return range(unit * group * size, (unit + 1) * group * size)


def llama_unit(name, unit):
    """The parameters' entries of a unit of the tiny Llama, written down by hand."""
    attention, mlp = f"{LLAMA_LAYER}.self_attn", f"{LLAMA_LAYER}.mlp"
    if name == MLP:
        rows = {f"{mlp}.{p}_proj.weight": {0: [unit]} for p in ("gate", "up")}
        return rows | {f"{mlp}.down_proj.weight": {1: [unit]}}
    if name == HEADS:
        wide = head_slots(unit, 2, D)
        rows = {f"{attention}.{p}_proj.weight": {0: span(unit, D)} for p in ("k", "v")}
        return rows | {f"{attention}.q_proj.weight": {0: wide},
                       f"{attention}.o_proj.weight": {1: wide}}  # fmt: skip
    slots = span(unit[0] * 2 + unit[1], D)
    return {f"{attention}.q_proj.weight": {0: slots}, f"{attention}.o_proj.weight": {1: slots}}


def width_unit(path_shapes, unit):
    out = {}
    for path, shape in path_shapes.items():
        if len(shape) == 1:
            out[path] = {0: [unit]}
        else:
            out[path] = {0 if "o_proj" in path or "down_proj" in path else 1: [unit]}
    return out


def units(scores):
    return [index if len(index) > 1 else index[0] for index in np.ndindex(*scores.shape)]


# ---- against loops


def test_the_names_on_the_command_line_are_those_of_the_criteria():
    assert ("auto", *CRITERIA) == IMPORTANCES


def reading(model, name):
    """The layer that reads a dimension of the Llama: (its owner, its name, slots per unit)."""
    layer = model.model.layers[1]
    if name == MLP:
        return layer.mlp, "down_proj", lambda u: [u]
    if name == HEADS:
        return layer.self_attn, "o_proj", lambda u: head_slots(u, 2, D)
    return layer.self_attn, "o_proj", lambda u: span(u[0] * 2 + u[1], D)


class Given:
    """What loops need: the layer that reads a dimension of the Llama, its inputs and gradients."""

    def __init__(self, name):
        self.name, self.model, self.batches = name, tiny.build(tiny.LLAMA), tiny.batches()
        owner, layer, self.slots = reading(self.model, name)
        path = f"{LLAMA_LAYER}.{'mlp' if name == MLP else 'self_attn'}.{layer}.weight"
        self.weights = tiny.parameters(self.model)
        self.weight = np.array(self.weights[path])
        self.rows = [rows_of(x) for x, _ in recorded(self.model, owner, layer, self.batches)]
        sequences = [tokens[k : k + 1] for (tokens,) in self.batches for k in range(len(tokens))]
        self.pairs = [(self.weight, gradients(self.model, each)[path]) for each in sequences]
        self.units = units(np.zeros({MLP: 20, HEADS: 2, QUERY_HEADS: (2, 2)}[name]))

    def each(self, score):
        return [score(unit) for unit in self.units]


def loop_osscar(given):
    owner = np.full(given.weight.shape[1], -1)
    for k, unit in enumerate(given.units):
        owner[list(given.slots(unit))] = k
    moments = reference.outer_products(np.concatenate(given.rows))
    weight = given.weight.T.astype(np.float64)
    return reference.greedy_costs(weight, moments, owner.tolist(), DAMPING)


LOOPS = {
    "magnitude": lambda g: g.each(lambda u: reference.unit_norms(g.weights, llama_unit(g.name, u))),
    "activation": lambda g: g.each(lambda u: reference.handed_on(g.rows, g.slots(u))),
    "wanda": lambda g: g.each(lambda u: reference.weight_times_input(g.weight, g.rows, g.slots(u))),
    "fluctuation": lambda g: g.each(
        lambda u: reference.weights_times_variance(g.weight, g.rows, g.slots(u))
    ),
    "fisher": lambda g: g.each(
        lambda u: reference.squared_weight_times_gradient(g.pairs, g.slots(u))
    ),
    "taylor": lambda g: g.each(
        lambda u: sum(reference.weight_times_gradient([p], g.slots(u)) for p in g.pairs)
    ),
    "combined": lambda g: reference.mean_parts(
        [LOOPS[part](g) for part in ("magnitude", "wanda", "taylor")]
    ),
    "osscar": loop_osscar,
    "activation+fisher": lambda g: reference.mean_parts(
        [LOOPS[part](g) for part in ("activation", "fisher")]
    ),
}


def test_every_criterion_has_a_loop_that_it_must_equal():
    assert CRITERIA.keys() - {"random"} <= LOOPS.keys()


@pytest.mark.parametrize("name", [MLP, HEADS, QUERY_HEADS])
def test_scores_equal_loops_over_what_the_reading_layer_is_given(name):
    given = Given(name)
    for each, loop in LOOPS.items():
        scores = scored(each, given.model, [name], given.batches)[name]
        rtol = 2e-3 if "gradients" in needs(each) else 2e-4
        np.testing.assert_allclose(scores.ravel(), loop(given), rtol, 1e-5, err_msg=each)


def test_magnitude_of_the_width_equals_a_loop():
    model = tiny.build(tiny.LLAMA)
    weights = tiny.parameters(model)
    shapes = {path: array.shape for path, array in weights.items()}
    scores = scored("magnitude", model, ["width"])["width"]
    wanted = [reference.unit_norms(weights, width_unit(shapes, u)) for u in range(16)]
    np.testing.assert_allclose(scores, wanted, rtol=1e-5)


def test_magnitude_of_experts_and_of_their_channels_equals_a_loop():
    model = tiny.build(tiny.MIXTRAL)
    weights = tiny.parameters(model)
    scores = scored("magnitude", model, [f"{MOE}.experts", CHANNELS])
    for e in range(3):
        own = {f"{MOE}.switch_mlp.{p}_proj.weight": {0: [e]} for p in ("gate", "up", "down")}
        whole = own | {f"{MOE}.gate.weight": {0: [e]}}
        assert scores[f"{MOE}.experts"][e] == pytest.approx(
            reference.unit_norms(weights, whole), 1e-5
        )
        for c in range(10):
            unit = {path: {0: [e], 2 if "down" in path else 1: [c]} for path in own}
            assert scores[CHANNELS][e, c] == pytest.approx(
                reference.unit_norms(weights, unit), 1e-5
            )


def test_activation_and_wanda_of_experts_channels_see_only_the_rows_of_each_expert():
    model, batches = tiny.build(tiny.MIXTRAL), tiny.batches()
    owner = model.model.layers[1].block_sparse_moe.switch_mlp
    calls = recorded(model, owner, "down_proj", batches)
    weight = np.array(owner.down_proj.weight)
    activation = scored("activation", model, [CHANNELS], batches)[CHANNELS]
    wanda = scored("wanda", model, [CHANNELS], batches)[CHANNELS]
    for e in range(3):
        given = [rows_of(x, picked, e) for x, picked in calls]
        for c in range(10):
            assert activation[e, c] == pytest.approx(reference.handed_on(given, [c]), 1e-4)
            wanted = reference.weight_times_input(weight[e], given, [c])
            assert wanda[e, c] == pytest.approx(wanted, 1e-4)


def width_places(model, batches):
    """For each value that the width is read from: (its rows by batch, the weights that read it)."""
    out = []
    for layer in model.model.layers:
        for owner, names in ((layer.self_attn, ("q", "k", "v")), (layer.mlp, ("gate", "up"))):
            calls = recorded(model, owner, f"{names[0]}_proj", batches)
            paths = [np.array(getattr(owner, f"{n}_proj").weight) for n in names]
            out.append(([rows_of(x) for x, _ in calls], paths))
    calls = recorded(model, model, "lm_head", batches)
    return [*out, ([rows_of(x) for x, _ in calls], [np.array(model.lm_head.weight)])]


def test_the_width_is_scored_once_at_each_value_that_layers_read():
    model, batches = tiny.build(tiny.LLAMA), tiny.batches()
    places = width_places(model, batches)
    activation = scored("activation", model, ["width"], batches)["width"]
    wanda = scored("wanda", model, ["width"], batches)["width"]
    for u in range(16):
        norms = [reference.handed_on(rows, [u]) ** 2 for rows, _ in places]
        assert activation[u] == pytest.approx(sum(norms) ** 0.5, 1e-4)
        products = [reference.weight_times_input(w, rows, [u]) for rows, ws in places for w in ws]
        assert wanda[u] == pytest.approx(sum(products), 1e-4)


def test_fluctuation_of_experts_channels_counts_the_rows_of_each_expert():
    model, batches = tiny.build(tiny.MIXTRAL), tiny.batches()
    owner = model.model.layers[1].block_sparse_moe.switch_mlp
    calls = recorded(model, owner, "down_proj", batches)
    weight = np.array(owner.down_proj.weight)
    scores = scored("fluctuation", model, [CHANNELS], batches)[CHANNELS]
    for e in range(3):
        given = [rows_of(x, picked, e) for x, picked in calls]
        wanted = [reference.weights_times_variance(weight[e], given, [c]) for c in range(10)]
        np.testing.assert_allclose(scores[e], wanted, rtol=1e-3)


def test_osscar_of_experts_channels_counts_the_rows_of_each_expert():
    model, batches = tiny.build(tiny.MIXTRAL), tiny.batches()
    owner = model.model.layers[1].block_sparse_moe.switch_mlp
    calls = recorded(model, owner, "down_proj", batches)
    weight = np.array(owner.down_proj.weight, dtype=np.float64)
    scores = scored("osscar", model, [CHANNELS], batches)[CHANNELS]
    for e in range(3):
        rows = np.concatenate([rows_of(x, picked, e) for x, picked in calls])
        moments = reference.outer_products(rows)
        wanted = reference.greedy_costs(weight[e].T, moments, range(10), DAMPING)
        np.testing.assert_allclose(scores[e], wanted, rtol=1e-3)


# ---- Taylor and Fisher


def test_taylor_of_the_width_adds_up_the_weights_that_read_one_value():
    model, batches = tiny.build(tiny.LLAMA), tiny.batches(count=1, rows=1)
    weights, slopes = tiny.parameters(model), gradients(model, batches[0][0])
    scores = scored("taylor", model, ["width"], batches)["width"]
    groups = [["lm_head.weight"]]
    for k in range(2):
        groups += [
            [f"model.layers.{k}.self_attn.{p}_proj.weight" for p in "qkv"],
            [f"model.layers.{k}.mlp.{p}_proj.weight" for p in ("gate", "up")],
        ]
    for u in range(16):
        wanted = sum(
            reference.weight_times_gradient([(np.array(weights[p]), slopes[p]) for p in group], [u])
            for group in groups
        )
        assert scores[u] == pytest.approx(wanted, 1e-3, 1e-5)


def test_taylor_and_fisher_of_experts_channels_are_weights_times_gradients_by_batch():
    model, batches = tiny.build(tiny.MIXTRAL), tiny.batches(count=2)
    path = f"{MOE}.switch_mlp.down_proj.weight"
    weight = np.array(tiny.parameters(model)[path])
    slopes = [gradients(model, tokens)[path] for (tokens,) in batches]
    taylor = scored("taylor", model, [CHANNELS], batches)[CHANNELS]
    fisher = scored("fisher", model, [CHANNELS], batches)[CHANNELS]
    assert taylor.shape == fisher.shape == (3, 10)
    for e in range(3):
        pairs = [(weight[e], slope[e]) for slope in slopes]
        for c in range(10):
            wanted = sum(reference.weight_times_gradient([pair], [c]) for pair in pairs)
            assert taylor[e, c] == pytest.approx(wanted, 1e-3, 1e-5)
            wanted = reference.squared_weight_times_gradient(pairs, [c])
            assert fisher[e, c] == pytest.approx(wanted, 2e-3, 1e-5)


# ---- planted units


@pytest.mark.parametrize("criterion", ["activation", "wanda", "taylor"])
def test_a_dead_unit_ranks_last(criterion):
    def kill(array):
        array[7] = 0
        return array

    model = changed(tiny.build(tiny.LLAMA), {f"{LLAMA_LAYER}.mlp.up_proj.weight": kill})
    scores = scored(criterion, model, [MLP])[MLP]
    assert scores[7] == 0 and (np.delete(scores, 7) > 0).all()


@pytest.mark.parametrize("criterion", ["wanda", "taylor"])
def test_a_unit_that_nothing_reads_is_worth_nothing(criterion):
    """Its weights are the largest, so that magnitude keeps it first of all."""

    def loud(array):
        array[7] *= 10
        return array

    def unread(array):
        array[:, 7] = 0
        return array

    mlp = f"{LLAMA_LAYER}.mlp"
    model = changed(
        tiny.build(tiny.LLAMA),
        {f"{mlp}.up_proj.weight": loud, f"{mlp}.gate_proj.weight": loud,
         f"{mlp}.down_proj.weight": unread},
    )  # fmt: skip
    scores = scored(criterion, model, [MLP])[MLP]
    assert scores[7] == pytest.approx(0, abs=1e-6 * scores.max()) and scores.argmin() == 7
    assert scored("magnitude", model, [MLP])[MLP].argmax() == 7


def test_an_expert_that_is_never_picked_has_channels_worth_nothing():
    batches = tiny.batches()
    model = changed(tiny.build(tiny.MIXTRAL), {f"{MOE}.gate.weight": np.zeros_like})
    owner = model.model.layers[1].block_sparse_moe.switch_mlp
    calls = recorded(model, owner, "down_proj", batches)
    picked = {int(e) for _, experts in calls for e in np.array(experts).ravel()}
    assert len(picked) == 2  # a router that cannot decide always picks the same
    for each in ("activation", "wanda", "taylor"):
        scores = scored(each, model, [CHANNELS], batches)[CHANNELS]
        for e in range(3):
            assert (scores[e] > 0).all() if e in picked else (scores[e] == 0).all()


# ---- invariance


@settings(max_examples=3, deadline=None, derandomize=True)
@given(st.permutations(range(20)))
def test_permuting_the_units_permutes_the_scores(order):
    mlp = f"{LLAMA_LAYER}.mlp"
    for each in ("magnitude", "activation", "wanda", "taylor"):
        before = scored(each, tiny.build(tiny.LLAMA), [MLP])[MLP]
        model = changed(
            tiny.build(tiny.LLAMA),
            {f"{mlp}.up_proj.weight": lambda a: a[order], f"{mlp}.gate_proj.weight":
             lambda a: a[order], f"{mlp}.down_proj.weight": lambda a: a[:, order]},
        )  # fmt: skip
        after = scored(each, model, [MLP])[MLP]
        np.testing.assert_allclose(after, before[list(order)], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("criterion", ["magnitude", "wanda"])
def test_scores_are_the_same_whatever_other_dimensions_are_scored_with_them(criterion):
    model = tiny.build(tiny.LLAMA)
    together = scored(criterion, model, [MLP, HEADS, "width"])
    for name, scores in together.items():
        np.testing.assert_allclose(scored(criterion, model, [name])[name], scores)


def test_random_scores_depend_on_the_seed_only():
    names = [MLP, HEADS, QUERY_HEADS]
    one = scored("random", tiny.build(tiny.LLAMA), names, seed=4)
    two = scored("random", tiny.build(tiny.LLAMA, seed=1), names, seed=4)
    other = scored("random", tiny.build(tiny.LLAMA), names, seed=5)
    assert one[QUERY_HEADS].shape == (2, 2)
    for name in names:
        assert (one[name] == two[name]).all() and (one[name] != other[name]).all()


@pytest.mark.parametrize("name", [*CRITERIA, "random+osscar"])
def test_scores_are_float64_and_finite_with_an_entry_for_each_unit(name):
    scores = scored(name, tiny.build(tiny.MIXTRAL), [HEADS, QUERY_HEADS, CHANNELS])
    shapes = {HEADS: (2,), QUERY_HEADS: (2, 2), CHANNELS: (3, 10)}
    assert {name: s.shape for name, s in scores.items()} == shapes
    assert all(s.dtype == np.float64 and np.isfinite(s).all() for s in scores.values())


# ---- combinations


def test_every_part_has_the_same_say_in_every_dimension_whatever_its_scale():
    model, names = tiny.build(tiny.LLAMA), [MLP.replace("1", "0"), MLP]
    before = scored("wanda+fluctuation", model, names)
    assert [before[name].mean() for name in names] == pytest.approx([2, 2])
    louder = changed(model, {f"{LLAMA_LAYER}.mlp.down_proj.weight": lambda a: 10 * a})
    after = scored("wanda+fluctuation", louder, names)
    for name in names:
        np.testing.assert_allclose(after[name], before[name], rtol=1e-4)


def test_a_part_that_knows_nothing_of_a_dimension_leaves_it_to_the_others():
    """All inputs of the layer are dead, so that only magnitude has a word."""
    path = f"{LLAMA_LAYER}.mlp.up_proj.weight"
    model = changed(tiny.build(tiny.LLAMA), {path: np.zeros_like})
    both, alone = scored("magnitude+wanda", model, [MLP]), scored("magnitude", model, [MLP])
    np.testing.assert_allclose(both[MLP], alone[MLP] / alone[MLP].mean())


@pytest.mark.parametrize("name, wanted", [
    ("magnitude", set()), ("random+magnitude", set()), ("wanda", {"data"}),
    ("magnitude+taylor", {"data", "gradients"}), ("combined", {"data", "gradients"}),
    ("osscar", {"data", "second"}), ("fisher+osscar", {"data", "gradients", "second"}),
    ("auto", {"data", "gradients", "second"}),
])  # fmt: skip
def test_a_combination_needs_what_its_parts_need(name, wanted):
    assert needs(name) == wanted


@pytest.mark.parametrize("name, part", [
    ("magnitud", "magnitud"), ("wanda+auto", "auto"), ("wanda+", "empty name"), ("", "empty name"),
])  # fmt: skip
def test_a_part_that_is_not_known_is_named_with_those_that_are(name, part):
    message = re.escape(f"--importance {name}: there is no {part}; choose from random, magnitude,")
    for asking in (criterion, needs):
        with pytest.raises(InputError, match=f"^{message}"):
            asking(name)


# ---- unit_sums


@st.composite
def coordinated_arrays(draw):
    """An array, and for each axis the units of its slots by dimension: some in no unit."""
    sizes = {"a": draw(st.integers(1, 3)), "b": draw(st.integers(1, 4))}
    rank = draw(st.integers(1, 3))
    shape = [draw(st.integers(1, 5)) for _ in range(rank)]
    nested = draw(st.booleans())
    outer_axis = draw(st.integers(0, rank - 1))
    coordinates = []
    for k, n in enumerate(shape):
        held = {}
        if k == outer_axis:
            held["a"] = np.array(draw(st.lists(st.integers(-1, sizes["a"] - 1),
                                               min_size=n, max_size=n)))  # fmt: skip
        if draw(st.booleans()):
            held["b"] = np.array(draw(st.lists(st.integers(-1, sizes["b"] - 1),
                                               min_size=n, max_size=n)))  # fmt: skip
        coordinates.append(held)
    values = draw(st.lists(st.integers(-9, 9), min_size=int(np.prod(shape)),
                           max_size=int(np.prod(shape))))  # fmt: skip
    return np.array(values, dtype=float).reshape(shape), coordinates, sizes, nested


@settings(max_examples=200, deadline=None, derandomize=True)
@given(coordinated_arrays())
def test_unit_sums_equal_a_loop(case):
    array, coordinates, sizes, nested = case
    dims = {
        "a": Dimension("a", "heads", sizes["a"], ()),
        "b": Dimension("b", "channels", sizes["b"], (), within="a" if nested else None),
    }
    named = NamedAxes(None, None, dims, {})
    wanted = reference.sums_by_unit(array, coordinates, "b", "a" if nested else None, sizes)
    assert (unit_sums(named, dims["b"], coordinates, array) == wanted).all()


# ---- refusals


def test_a_parameter_that_is_not_finite_is_named_by_magnitude_and_by_wanda():
    def spoil(array):
        array[3, 3] = np.nan
        return array

    path = f"{LLAMA_LAYER}.mlp.down_proj.weight"  # what it spoils is read by the head alone
    model = changed(tiny.build(tiny.LLAMA), {path: spoil})
    for each in ("magnitude", "wanda"):
        with pytest.raises(InputError, match=f"^{path}: holds NaN or infinity"):
            scored(each, model, [MLP])


@pytest.mark.parametrize("name", ["activation", "wanda", "taylor", "magnitude+wanda"])
def test_a_dimension_that_no_weights_read_is_refused(name):
    model = tiny.build(tiny.MIXTRAL)
    with pytest.raises(
        InputError,
        match=f"^{MOE}.experts: no weights read it directly.*--importance magnitude",
    ):
        scored(name, model, [f"{MOE}.experts"])
