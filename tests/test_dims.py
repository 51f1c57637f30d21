import itertools
import math
import random

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_compress.axes import _coordinates
from mlx_compress.axis_rules import RULES
from mlx_compress.dims import (
    Misaligned,
    blend,
    cut_axis,
    factors,
    freeze,
    is_wild,
    leaves,
    new_axis,
    size_of,
    split,
    sum_axis,
    unify,
)
from mlx_compress.graph import trace
from mlx_compress.inference import Inference

quick = settings(max_examples=150, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32)
SIZES = (2, 3, 4, 6, 8, 12)


def coordinates(axis):
    """Per leaf, the unit of each slot, as plain data."""
    return {dim: units.tolist() for dim, units in _coordinates(axis).items()}


def reasons(axis):
    return [dim.frozen for dim in leaves(axis)]


def test_an_axis_of_size_one_has_no_variable():
    assert new_axis(1) == [] and size_of([]) == 1


def test_unifying_with_a_product_cuts_a_variable_in_two():
    whole, heads, inner = new_axis(12), new_axis(3), new_axis(4)
    unify(whole, heads + inner)
    assert factors(whole) == factors(heads + inner)
    assert coordinates(whole)[factors(heads)[0]] == [0] * 4 + [1] * 4 + [2] * 4
    assert coordinates(whole)[factors(inner)[0]] == [0, 1, 2, 3] * 3


def test_a_cut_reaches_every_axis_that_was_unified():
    a, b, c = new_axis(12), new_axis(12), new_axis(12)
    unify(a, b)
    unify(b, c)
    split(factors(c)[0], 2, 6)
    assert [dim.size for dim in factors(a)] == [2, 6]
    assert factors(a) == factors(b) == factors(c)


def test_consecutive_segments_make_a_sum():
    whole = new_axis(10)
    first, rest = cut_axis(whole, [4, 6])
    middle, last = cut_axis(rest, [1, 5])
    assert coordinates(whole)[factors(first)[0]] == [0, 1, 2, 3] + [-1] * 6
    assert coordinates(whole)[factors(last)[0]] == [-1] * 5 + [0, 1, 2, 3, 4]
    assert middle == []


def test_equal_segments_of_a_sum_can_be_one_dimension():
    gate_up, hidden = new_axis(10), new_axis(5)
    for segment in cut_axis(gate_up, [5, 5]):
        unify(segment, hidden)
    assert list(leaves(gate_up)) == [factors(hidden)[0]] * 2
    assert coordinates(gate_up) == {factors(hidden)[0]: [0, 1, 2, 3, 4] * 2}


def test_sums_cut_at_different_places_meet_in_the_common_refinement():
    left, right = new_axis(10), new_axis(10)
    cut_axis(left, [4, 6])
    cut_axis(right, [7, 3])
    unify(left, right)
    assert [dim.size for dim in leaves(left)] == [4, 3, 3]
    assert coordinates(left) == coordinates(right)


def test_a_sum_that_is_split_splits_each_of_its_segments():
    qkv = new_axis(24)
    q, k, v = cut_axis(qkv, [12, 6, 6])
    split(factors(qkv)[0], 12, 2)
    inner = [factors(part)[-1] for part in (q, k, v)]
    assert [dim.size for dim in inner] == [2, 2, 2] and inner[0] is inner[1] is inner[2]


def test_axes_that_cannot_be_cut_alike_are_frozen():
    left, right = new_axis(2) + new_axis(3), new_axis(3) + new_axis(2)
    unify(left, right)
    assert reasons(left) == reasons(right) == ["cut in ways that do not fit together"] * 2


def test_segments_that_cannot_be_cut_alike_are_frozen_and_their_neighbours_are_not():
    left, right = new_axis(2) + new_axis(3), new_axis(3) + new_axis(2)
    first, second = new_axis(5), new_axis(5)
    unify(sum_axis([left, first]), sum_axis([right, second]))
    assert reasons(left) == reasons(right) == ["cut in ways that do not fit together"] * 2
    assert factors(first) == factors(second) and reasons(first) == [None]


def test_a_cut_inside_a_product_must_fall_between_its_rows():
    with pytest.raises(Misaligned):
        cut_axis(new_axis(4) + new_axis(3), [5, 7])


def test_frozenness_spreads_to_what_is_unified_and_what_is_cut():
    a, b = new_axis(12), new_axis(12)
    freeze(a, "the first reason")
    freeze(a, "the second reason")
    unify(a, b)
    split(factors(b)[0], 3, 4)
    assert reasons(b) == ["the first reason"] * 2


def test_a_wild_axis_couples_nothing_and_tells_what_it_stands_along():
    wild, a, b, matches = new_axis(6, wild=True), new_axis(6), new_axis(6), []
    unify(wild, a, matches)
    unify(b, wild, matches)
    assert factors(a) != factors(b) and is_wild(wild) and not is_wild(a)
    assert matches == [(wild, a), (wild, b)]


def test_what_a_wild_axis_is_cut_into_is_wild():
    product, total = new_axis(6, wild=True), new_axis(6, wild=True)
    split(factors(product)[0], 2, 3)
    cut_axis(total, [2, 4])
    assert all(dim.wild for dim in leaves(product + total)) and len(factors(product)) == 2


def test_two_wild_factors_that_stand_along_one_variable_cut_it():
    wild, whole, matches = new_axis(2, wild=True) + new_axis(3, wild=True), new_axis(6), []
    unify(wild, whole, matches)
    first, second = factors(whole)
    assert matches == [([wild[0]], [first]), ([wild[1]], [second])]


def test_blending_takes_from_each_axis_what_is_not_wild():
    a, b = new_axis(2), new_axis(3)
    left, right = a + new_axis(3, wild=True), new_axis(2, wild=True) + b
    assert blend(left, right) == blend(right, left) == a + b
    assert blend(new_axis(6, wild=True), a + b) == blend(a + b, new_axis(6, wild=True)) == a + b


def test_a_wild_factor_within_a_product_couples_only_the_others():
    heads, mask, group, other = new_axis(2), new_axis(3, wild=True), new_axis(3), new_axis(2)
    matches = []
    unify(heads + mask, other + group, matches)
    assert factors(heads) == factors(other) and not is_wild(group)
    assert matches == [(mask, group)]


# ---- random structures


def build(seed, steps=12):
    """Axes made by random steps: every axis that was ever made, with its size at that time."""
    rng = random.Random(seed)
    made = [(axis, size_of(axis)) for axis in (new_axis(rng.choice(SIZES)) for _ in range(4))]
    for _ in range(steps):
        try:
            new = grow(rng, made)
        except Misaligned:
            new = []
        made += [(axis, size_of(axis)) for axis in new if size_of(axis) <= 48]
    return made


def grow(rng, made):
    """One step on a random axis; returns the axes that it makes."""
    axis, total = rng.choice(made)
    match rng.choice(["product", "sum", "cut", "split", "unify", "unify", "freeze", "new"]):
        case "product":
            return [axis + rng.choice(made)[0]]
        case "sum":
            return [sum_axis([axis, rng.choice(made)[0]])]
        case "cut" if total > 1:
            where = rng.randrange(1, total)
            return cut_axis(axis, [where, total - where])
        case "split" if total > 1:
            dim = rng.choice(factors(axis))
            lead = rng.choice([n for n in range(1, dim.size + 1) if dim.size % n == 0])
            if 1 < lead < dim.size:
                split(dim, lead, dim.size // lead)
        case "unify":
            unify(axis, rng.choice([other for other, n in made if n == total]))
        case "freeze" if rng.random() < 0.1:
            freeze(axis, "it is so")
        case "new":
            return [new_axis(rng.choice(SIZES))]
    return []


def pair(seed, made):
    """Two of the axes, of one size."""
    rng = random.Random(seed)
    axis, total = rng.choice(made)
    return axis, rng.choice([other for other, n in made if n == total])


def groups(made):
    """What the axes say about free slots, in a form that two copies of a structure share."""
    numbers = {}
    said = [coordinates(axis) for axis, _ in made]
    return [
        {
            numbers.setdefault(dim, len(numbers)): units
            for dim, units in entry.items()
            if dim.frozen is None
        }
        for entry in said
    ]


def survivors(axis, kept):
    """Which slots of an axis are left, built up from its factors; `kept` holds masks of leaves."""
    mask = np.ones(1, dtype=bool)
    for dim in factors(axis):
        if dim.segments is None:
            part = kept[dim]
        else:
            part = np.concatenate([survivors(segment, kept) for segment in dim.segments])
        mask = np.kron(mask, part)
    return mask


def stands_twice(axis):
    """Whether a dimension is multiplied by itself (`named_axes` freezes these)."""
    held = [dim for factor in factors(axis) for dim in set(leaves([factor]))]
    inner = [segment for factor in factors(axis) for segment in factor.segments or ()]
    return len(held) > len(set(held)) or any(map(stands_twice, inner))


def random_masks(axes, seed):
    """For each leaf, which units are left: all of a frozen one, one at least of the others."""
    rng = np.random.default_rng(seed)
    masks = {}
    for dim in dict.fromkeys(dim for axis in axes for dim in leaves(axis)):
        count = dim.size if dim.frozen else rng.integers(1, dim.size + 1)
        masks[dim] = rng.permutation(dim.size) < count
    return masks


@quick
@given(seeds)
def test_no_step_changes_the_size_of_any_axis(seed):
    for axis, before in build(seed):
        assert size_of(axis) == before
        assert math.prod(dim.size for dim in factors(axis)) == before
        for dim in factors(axis):
            if dim.segments is not None:
                assert sum(map(size_of, dim.segments)) == dim.size


@quick
@given(seeds)
def test_coordinates_tell_the_slots_that_each_unit_occupies(seed):
    made = build(seed)
    masks = random_masks([axis for axis, _ in made], seed)
    for axis, total in made:
        if not stands_twice(axis):
            alive = np.ones(total, dtype=bool)
            for dim, units in _coordinates(axis).items():
                assert units.shape == (total,) and set(range(dim.size)) <= set(units.tolist())
                alive &= (units < 0) | masks[dim][units]
            assert alive.tolist() == survivors(axis, masks).tolist()


@quick
@given(seeds, seeds)
def test_unified_axes_have_the_same_coordinates_and_unifying_again_changes_nothing(seed, which):
    made = build(seed)
    left, right = pair(which, made)
    unify(left, right)
    assert coordinates(left) == coordinates(right) or all([*reasons(left), *reasons(right)])
    before = groups(made)
    unify(left, right)
    unify(right, left)
    assert groups(made) == before


@quick
@given(seeds, seeds)
def test_it_does_not_matter_which_of_two_axes_is_unified_with_the_other(seed, which):
    one, two = build(seed), build(seed)
    unify(*pair(which, one))
    unify(*reversed(pair(which, two)))
    assert groups(one) == groups(two)


# ---- against arrays: taking whole groups away commutes with every operation


SHAPES = {"a": (4, 6), "b": (24,), "c": (2, 3, 4), "d": (8, 3), "e": (4, 2), "f": (3, 4)}


def moving(seed):
    """A function of parameters that moves slots about and adds them up."""

    def function(parameters):
        rng = random.Random(seed)
        arrays = list(parameters.values())
        for _ in range(9):
            arrays += move(rng, arrays)
        return arrays[len(parameters) :]

    return function


def move(rng, arrays):
    x = rng.choice(arrays)
    axis = rng.randrange(x.ndim)
    match rng.choice(["reshape", "transpose", "slice", "split", "join", "add", "add"]):
        case "reshape":
            return [x.reshape(factorised(rng, x.size))]
        case "transpose":
            return [x.transpose(rng.sample(range(x.ndim), x.ndim))]
        case "slice":
            start = rng.randrange(x.shape[axis])
            where = [slice(None)] * x.ndim
            where[axis] = slice(start, rng.randint(start + 1, x.shape[axis]))
            return [x[tuple(where)]]
        case "split":
            return mx.split(x, [rng.randrange(x.shape[axis])], axis=axis)[1:]
        case "join" if x.size < 100:
            lead = x.shape[0]
            other = rng.choice([y for y in arrays if y.size % lead == 0 and y.size < 100])
            return [mx.concatenate([x.reshape(lead, -1), other.reshape(lead, -1)], axis=1)]
        case "add":
            return [x + rng.choice([y for y in arrays if y.size == x.size]).reshape(x.shape)]
    return []


def factorised(rng, total):
    shape = []
    while total > 1:
        shape.append(rng.choice([n for n in range(2, total + 1) if total % n == 0]))
        total //= shape[-1]
    return shape or [1]


def operate(node, x, alive, sizes):
    """The primitive on arrays that have lost slots; `alive` tells which of the first one's."""
    match node.op:
        case "Add":
            return [x[0] + x[1]]
        case "Concatenate":
            return [np.concatenate(x, axis=node.attributes[0])]
        case "Transpose":
            return [x[0].transpose(node.attributes[0])]
        case "Slice":
            bounds = zip(*node.attributes[:2], strict=True)
            return [x[0][np.ix_(*[between(m, *b) for m, b in zip(alive, bounds, strict=True)])]]
        case "Split":
            points, axis = node.attributes
            ends = [0, *points, len(alive[axis])]
            parts = [between(alive[axis], *b) for b in itertools.pairwise(ends)]
            return [x[0].take(np.flatnonzero(part), axis=axis) for part in parts]
        case "Reshape" | "Flatten" | "Unflatten" | "ExpandDims" | "Squeeze":
            return [x[0].reshape(sizes)]
    raise AssertionError(node.op)


def between(alive, start, stop):
    """Of the slots that are left, those that lay between two old positions."""
    places = np.flatnonzero(alive)
    return (start <= places) & (places < stop)


@quick
@given(seeds)
def test_removing_whole_units_commutes_with_every_operation(seed):
    rng = np.random.default_rng(seed)
    parameters = {name: mx.zeros(shape) for name, shape in SHAPES.items()}
    graph = trace(moving(seed), parameters=parameters)
    inference = Inference(graph)
    for value in graph.parameters.values():
        inference.axes[value] = inference.fresh(value)
    for position, node in enumerate(graph.nodes):
        inference.follow(position, node, RULES)
    masks = random_masks([axis for axes in inference.axes.values() for axis in axes], seed)
    full = {i: rng.integers(0, 2**40, graph.values[i].shape) for i in graph.parameters.values()}
    alive = {i: [survivors(axis, masks) for axis in axes] for i, axes in inference.axes.items()}
    for node in graph.nodes:
        whole = [full[i] for i in node.inputs]
        left = [full[i][np.ix_(*alive[i])] for i in node.inputs]
        untouched = [np.ones(n, dtype=bool) for n in whole[0].shape]
        shape = graph.values[node.outputs[0]].shape
        sizes = [mask.sum() for mask in alive[node.outputs[0]]]
        full.update(zip(node.outputs, operate(node, whole, untouched, shape), strict=True))
        pruned = operate(node, left, alive[node.inputs[0]], sizes)
        for i, array in zip(node.outputs, pruned, strict=True):
            np.testing.assert_array_equal(array, full[i][np.ix_(*alive[i])])
