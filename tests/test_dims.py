import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_compress.axes import _coordinates
from mlx_compress.axis_rules import Inference
from mlx_compress.dims import (
    Misaligned,
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

quick = settings(max_examples=150, deadline=None, derandomize=True)
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


def test_a_wild_factor_within_a_product_couples_only_the_others():
    heads, mask, group, other = new_axis(2), new_axis(3, wild=True), new_axis(3), new_axis(2)
    matches = []
    unify(heads + mask, other + group, matches)
    assert factors(heads) == factors(other) and not is_wild(group)
    assert matches == [(mask, group)]


# ---- random structures


def divisors(size):
    return [n for n in range(2, size) if size % n == 0]


def build(draw, count):
    """Axes made by random steps; returns every axis that was ever made, with its size then."""
    made = [(axis, size_of(axis)) for axis in map(new_axis, draw(st.lists(size, min_size=2)))]
    for _ in range(count):
        grow(draw, made)
    return made


size = st.sampled_from(SIZES)


def grow(draw, made):
    axis, _ = draw(st.sampled_from(made))
    step = draw(st.sampled_from(["product", "sum", "cut", "split", "unify", "new"]))
    new = []
    try:
        if step == "product" and size_of(axis) <= 12:
            new = [axis + draw(st.sampled_from(made))[0]]
        elif step == "sum" and size_of(axis) <= 24:
            new = [sum_axis([axis, draw(st.sampled_from(made))[0]])]
        elif step == "cut" and size_of(axis) > 1:
            where = draw(st.integers(1, size_of(axis) - 1))
            new = cut_axis(axis, [where, size_of(axis) - where])
        elif step == "split" and divisors(factors(axis)[0].size if axis else 1):
            dim = factors(axis)[0]
            lead = draw(st.sampled_from(divisors(dim.size)))
            split(dim, lead, dim.size // lead)
        elif step == "unify":
            alike = [other for other, n in made if n == size_of(axis)]
            unify(axis, draw(st.sampled_from(alike)))
        else:
            new = [new_axis(draw(size))]
    except Misaligned:
        return
    made += [(axis, size_of(axis)) for axis in new if size_of(axis) <= 48]


@quick
@given(st.data())
def test_no_step_changes_the_size_of_any_axis(data):
    for axis, before in build(data.draw, 12):
        assert size_of(axis) == before
        assert math.prod(dim.size for dim in factors(axis)) == before
        for dim in factors(axis):
            if dim.segments is not None:
                assert sum(map(size_of, dim.segments)) == dim.size


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


@quick
@given(st.data())
def test_coordinates_tell_the_slots_that_a_unit_occupies(data):
    for axis, total in build(data.draw, 12):
        if stands_twice(axis):
            continue
        masks = {d: np.array(data.draw(st.tuples(*[st.booleans()] * d.size))) for d in leaves(axis)}
        alive = np.ones(total, dtype=bool)
        for dim, units in _coordinates(axis).items():
            alive &= (units < 0) | masks[dim][units]
        assert alive.tolist() == survivors(axis, masks).tolist()


@quick
@given(st.data())
def test_unified_axes_have_the_same_coordinates_and_unifying_again_changes_nothing(data):
    made = build(data.draw, 10)
    axis, n = data.draw(st.sampled_from(made))
    other = data.draw(st.sampled_from([b for b, m in made if m == n]))
    unify(axis, other)
    before = [coordinates(axis) for axis, _ in made]
    assert coordinates(axis) == coordinates(other) or all([*reasons(axis), *reasons(other)])
    unify(axis, other)
    unify(other, axis)
    assert [coordinates(axis) for axis, _ in made] == before
