import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_compress.errors import InputError
from mlx_compress.plan import FORMAT, Cut, PrunePlan, diff


def cut(keep, *, name="mlp.channels", size=6, within=None):
    return Cut(name, "channels", size, keep, within, (("mlp.up", 0), ("mlp.down", 1)))


def plan(*cuts, **recipe):
    return PrunePlan({c.name: c for c in cuts}, recipe)


@st.composite
def cuts(draw, name):
    size = draw(st.integers(1, 9))
    units = st.lists(st.integers(0, size - 1), min_size=1, unique=True).map(sorted)
    keep = draw(units)
    if draw(st.booleans()):
        order = [draw(st.permutations(range(size))) for _ in range(draw(st.integers(1, 3)))]
        return cut([sorted(o[: len(keep)]) for o in order], name=name, size=size, within="experts")
    return cut(keep, name=name, size=size)


plans = st.builds(
    lambda some, recipe: PrunePlan({c.name: c for c in some}, recipe),
    st.lists(st.sampled_from("abcde"), unique=True).flatmap(lambda n: st.tuples(*map(cuts, n))),
    st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=3),
)
quick = settings(max_examples=60, deadline=None, derandomize=True)


@quick
@given(plans)
def test_a_plan_survives_the_way_through_json(original):
    again = PrunePlan.from_json(json.loads(json.dumps(original.to_json())))
    assert again == original and again.to_json() == original.to_json()


@quick
@given(plans)
def test_kept_counts_and_masks_agree_with_the_kept_indices(some):
    for c in some:
        rows = c.keep if c.within else [c.keep]
        mask = c.mask() if c.within else c.mask()[None]
        assert mask.shape == (len(rows), c.size)
        assert [row.nonzero()[0].tolist() for row in mask] == rows
        assert {c.kept} == {len(row) for row in rows} and some.kept(c.name, 99) == c.kept
    assert some.kept("elsewhere", 99) == 99


def test_a_plan_is_saved_and_loaded(tmp_path):
    original = plan(cut([0, 2]), cut([[1], [3]], name="e", within="experts"), ratio=0.5)
    original.save(tmp_path / "plan.json")
    assert PrunePlan.load(tmp_path / "plan.json") == original
    assert (tmp_path / "plan.json").read_text().endswith("}\n")


def test_the_document_says_what_is_kept_of_which_slots():
    assert plan(cut([0, 2]), ratio=0.5).to_json() == {
        "format": FORMAT,
        "recipe": {"ratio": 0.5},
        "dimensions": [
            {
                "name": "mlp.channels",
                "kind": "channels",
                "size": 6,
                "keep": [0, 2],
                "slots": (("mlp.up", 0), ("mlp.down", 1)),
            }
        ],
    }


# ---- differences


def test_equal_plans_do_not_differ():
    assert diff(plan(cut([0, 2]), seed=1), plan(cut([0, 2]), seed=2)) == {}


def test_the_difference_names_the_units_that_only_one_plan_keeps():
    left = plan(cut([0, 2]), cut([1], name="only.left", size=3))
    right = plan(cut([2, 5]))
    assert diff(left, right) == {
        "mlp.channels": {"left": [(0,)], "right": [(5,)]},
        "only.left": {"left": [], "right": [(0,), (2,)]},
    }
    assert diff(right, left)["only.left"] == {"left": [(0,), (2,)], "right": []}


def test_units_chosen_within_another_dimension_differ_by_row():
    left = plan(cut([[0, 1], [2, 3]], within="experts"))
    right = plan(cut([[0, 1], [2, 5]], within="experts"))
    assert diff(left, right) == {"mlp.channels": {"left": [(1, 3)], "right": [(1, 5)]}}


@quick
@given(plans, plans)
def test_a_difference_is_empty_only_for_plans_that_keep_the_same(left, right):
    same = {c.name: (c.keep, c.within) for c in left} == {c.name: (c.keep, c.within) for c in right}
    whole = all(c.kept == c.size for p in (left, right) for c in p)
    assert (not diff(left, right)) == same or whole


# ---- bad plans


@pytest.mark.parametrize(
    "keep, within, shown",
    [
        ([], None, r"\[\]"),
        ([0, 6], None, r"\[0, 6\]"),
        ([-1, 2], None, r"\[-1, 2\]"),
        ([2, 1], None, r"\[2, 1\]"),
        ([1, 1], None, r"\[1, 1\]"),
        ([0.5], None, r"\[0.5\]"),
        ([False, True], None, r"\[False, True\]"),
        (["0"], None, r"\['0'\]"),
        ([*range(20)], None, r"\[0, 1, ... 19\]"),
        ([], "experts", r"\[\]"),
        ([[]], "experts", r"\[\]"),
        ([[0], [6]], "experts", r"\[6\]"),
    ],
)
def test_kept_indices_must_be_sorted_distinct_units_of_the_dimension(keep, within, shown):
    text = f"mlp.channels: kept indices {shown} must be non-empty, sorted, distinct .* below 6"
    with pytest.raises(InputError, match=text):
        cut(keep, within=within)


def test_equally_many_units_must_be_kept_within_each_unit():
    with pytest.raises(InputError, match="mlp.channels: keeps different counts within experts"):
        cut([[0, 1], [2]], within="experts")


OTHERS = [[], "plan", None, {}, {"format": FORMAT + 1, "dimensions": []}]


@pytest.mark.parametrize("document", OTHERS)
def test_a_document_of_another_format_is_refused(document):
    with pytest.raises(InputError, match=f"not a prune plan of format {FORMAT}"):
        PrunePlan.from_json(document)


GOOD = {"name": "a", "kind": "channels", "size": 4, "keep": [0], "slots": [["a", 0]]}
DAMAGED = {
    "dimensions": {"format": FORMAT},
    "TypeError": {"format": FORMAT, "dimensions": None},
    "'int' object": {"format": FORMAT, "dimensions": [1]},
    "missing": {"format": FORMAT, "dimensions": [{"name": "a"}]},
    "not iterable": {"format": FORMAT, "dimensions": [{**GOOD, "keep": 1}]},
    "<": {"format": FORMAT, "dimensions": [{**GOOD, "size": "4"}]},
    "unpack": {"format": FORMAT, "dimensions": [{**GOOD, "slots": [["a"]]}]},
    "unhashable": {"format": FORMAT, "dimensions": [{**GOOD, "name": ["a"]}]},
    "dictionary": {"format": FORMAT, "dimensions": [], "recipe": [1]},
    "names a dimension twice": {"format": FORMAT, "dimensions": [GOOD, GOOD]},
}


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_document_is_refused(text):
    with pytest.raises(InputError, match=f"the prune plan is damaged: .*{text}"):
        PrunePlan.from_json(DAMAGED[text])


def test_a_bad_cut_in_a_document_is_refused_in_its_own_words():
    with pytest.raises(InputError, match=r"^a: kept indices \[9\]"):
        PrunePlan.from_json({"format": FORMAT, "dimensions": [{**GOOD, "keep": [9]}]})


@pytest.mark.parametrize(
    "content, text",
    [
        (None, "plan.json: no such plan"),
        (b'{"format": 1, "dimen', r"plan.json: not JSON \("),
        (b"\xff\xfe\x00", r"plan.json: not JSON \("),
        (b"[]", "plan.json: not a prune plan"),
        (b'{"format": 1}', "plan.json: the prune plan is damaged"),
    ],
)
def test_a_bad_file_is_refused_by_its_name(tmp_path, content, text):
    if content is not None:
        (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(InputError, match=text):
        PrunePlan.load(tmp_path / "plan.json")


def test_a_folder_is_not_a_plan(tmp_path):
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory\)"):
        PrunePlan.load(tmp_path)
