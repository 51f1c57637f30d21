"""Searching allocations: the table, the knapsack, the changes; and the study that holds trials."""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_compress.errors import InputError
from mlx_compress.search import Search, Site, Trial
from mlx_compress.study import run_search

SIZES = (16, 32, 16, 64)
WEIGHTS = (5.0, 0.1, 1.0, 0.3)


def sites(sizes=SIZES):
    return [Site(f"s{k}", size, lambda count: {}) for k, size in enumerate(sizes)]


def added_up(counts, weights=WEIGHTS, sizes=SIZES):
    parts = zip(weights, counts.values(), sizes, strict=True)
    return sum(w * (1 - n / size) ** 2 for w, n, size in parts)


def share(counts, sizes=SIZES):
    return sum(counts.values()) / sum(sizes)


def problem(goal=0.5, **options):
    uniform = {site.name: site.nearest(site.size * goal) for site in sites()}
    return Search(sites(), share, goal, [uniform], **options)


def losses(search, loss):
    return {tuple(sorted(c.items())): loss(c) for c in search.table}


def test_the_knapsack_is_best_of_all_counts_where_losses_add_up():
    sizes, weights = (8, 8, 8), (4.0, 1.0, 0.2)
    small = Search([Site(f"s{k}", n, lambda count: {}) for k, n in enumerate(sizes)],
                   lambda c: share(c, sizes), 0.5)  # fmt: skip

    def loss(counts):  # straight between the levels of the table, as the knapsack takes it to be
        return sum(w * (8 - n) for w, n in zip(weights, counts.values(), strict=True))

    found = small.knapsack(losses(small, loss))
    options = itertools.product(range(1, 9), repeat=3)
    within = [c for c in options if sum(c) <= 12]
    best = min(loss(dict(enumerate(c))) for c in within)
    assert loss(found) == pytest.approx(best) and share(found, sizes) <= 0.5


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.01, 10), min_size=4, max_size=4), st.floats(0.2, 0.9))
def test_every_trial_after_the_table_is_within_the_budget_and_new(weights, goal):
    search = problem(goal, trials=6)
    done = run_search(search, lambda counts: added_up(counts, weights))
    after = done[len(search.table) :]
    assert all(share(t.counts) <= goal + 1e-9 for t in after[1:])
    assert len({tuple(t.counts.items()) for t in done}) == len(done)


def test_changes_find_what_the_table_of_single_cuts_cannot_see():
    def together(counts):  # cutting both costs more than cutting each
        gone = {name: 1 - counts[name] / SIZES[k] for k, name in enumerate(counts)}
        return added_up(counts) + 8 * gone["s1"] * gone["s3"]

    search = problem(trials=24)
    done = run_search(search, together)
    uniform, knapsack = (t.loss for t in done[len(search.table) :][:2])
    assert search.best(done).loss < 0.9 * min(knapsack, uniform)


def test_a_trial_beyond_the_budget_is_never_the_best():
    search = problem()
    trials = [Trial(search.dense, 0.0, 1.0), Trial({"s0": 1}, 3.0, 0.5), Trial({"s0": 2}, 2.0, 0.4)]
    assert search.best(trials) is trials[2] and search.best(trials[:1]) is None


def test_counts_are_multiples_of_the_step_and_leave_the_least():
    site = Site("s", 40, lambda count: {}, least=8, step=8)
    assert [site.nearest(n) for n in (0, 11, 13, 39, 40, 99)] == [8, 8, 16, 40, 40, 40]
    assert site.levels() == [32, 16, 8]


def test_a_search_that_stops_goes_on_as_if_it_had_not(tmp_path):
    whole = run_search(problem(trials=8), added_up)
    file, calls = tmp_path / "study.log", []

    def stopping(counts):
        calls.append(counts)
        if len(calls) % 5 == 0:
            raise KeyboardInterrupt
        return added_up(counts)

    for _ in range(100):
        try:
            resumed = run_search(problem(trials=8), stopping, storage=file)
            break
        except KeyboardInterrupt:
            continue
    assert resumed == whole and len(calls) > len(whole)


KILLED = """
import os, signal, sys
import mlx_compress
from test_search import added_up, problem
from mlx_compress.study import run_search
count = 0
def loss(counts):
    global count
    count += 1
    if count == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return added_up(counts)
run_search(problem(trials=8), loss, storage=sys.argv[1])
"""


def test_a_killed_process_leaves_its_trial_to_the_next(tmp_path):
    file = tmp_path / "study.log"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, file], cwd=os.path.dirname(__file__), capture_output=True
    )
    assert done.returncode == -9, done.stderr
    assert run_search(problem(trials=8), added_up, storage=file) == run_search(
        problem(trials=8), added_up
    )


def test_what_a_living_process_tries_is_not_tried_twice(tmp_path):
    search = problem(trials=2)
    first = search.table[1]
    assert search.next([], [search.table[0], first]) == search.table[2]


def test_questions_in_one_file_do_not_mix(tmp_path):
    file = tmp_path / "study.log"
    left = run_search(problem(trials=3), added_up, storage=file, name="left")
    right = run_search(problem(trials=3), lambda c: -added_up(c), storage=file, name="right")
    assert [t.loss for t in right[:3]] == [-t.loss for t in left[:3]]


def test_a_storage_that_cannot_be_opened_is_refused_in_one_line():
    with pytest.raises(InputError, match="--study nosuch://x: cannot be opened"):
        run_search(problem(), added_up, storage="nosuch://x")


def test_the_search_ends_when_there_is_nothing_left_to_try():
    tiny = [Site("a", 2, lambda count: {}), Site("b", 2, lambda count: {})]
    search = Search(tiny, lambda c: sum(c.values()) / 4, 0.75, trials=50)
    done = run_search(search, lambda c: float(np.sum(list(c.values()))))
    assert len(done) <= 4


def shallow(goal, trials=24):
    """Many channels, two heads and six layers of a model: what they keep is multiplied."""
    parts = [Site("channels", 704, lambda n: {}), Site("heads", 2, lambda n: {}),
             Site("layers", 6, lambda n: {}, depth=True)]  # fmt: skip

    def spent(counts):
        return (0.73 * counts["channels"] / 704 + 0.27 * counts["heads"] / 2) * counts["layers"] / 6

    def loss(counts):
        gone = {site.name: 1 - counts[site.name] / site.size for site in parts}
        return gone["channels"] ** 2 + 0.5 * gone["heads"] + 2 * gone["layers"]

    search = Search(parts, spent, goal, trials=trials)
    return search, run_search(search, loss)


def test_each_number_of_layers_is_begun_with_and_judged_again():
    search, done = shallow(0.6)
    assert {5, 4, 3} <= {t.counts["layers"] for t in done[: len(search.table)]}
    begun = done[len(search.table) :][:4]
    assert {t.counts["layers"] for t in begun} == {6, 5, 4}  # three of six do by themselves
    finals = search.finalists(done)
    for depth in (6, 5, 4):
        best = search.best([t for t in done if t.counts["layers"] == depth])
        assert best.counts in finals and 0.57 < best.spent <= search.goal
    assert search.best(done).counts in finals


@pytest.mark.parametrize("layers", [12, 64, 80])
def test_many_layers_are_begun_with_at_the_counts_of_the_table(layers):
    parts = [Site("channels", 64, lambda n: {}), Site("layers", layers, lambda n: {}, depth=True)]
    search = Search(parts, lambda c: c["channels"] / 64 * c["layers"] / layers, 0.6, trials=1)
    done = run_search(search, lambda c: (1 - c["channels"] / 64) ** 2 + 1 - c["layers"] / layers)
    assert len(done) <= len(search.table) + 2
    losses = {tuple(sorted(t.counts.items())): t.loss for t in done}
    begun = list(search._of_each_depth(losses))
    levels = [n for n in search.levels["layers"] if n / layers > 0.6]
    assert [counts["layers"] for counts in begun] == [layers, *levels]
    assert all(0.5 < search.spending(counts) <= 0.6 for counts in begun)
    alone = [c["layers"] for c in search.finalists(done) if c["layers"] / layers <= 0.6]
    assert len(alone) <= 1


def test_steps_get_smaller_where_nothing_new_is_found_until_the_budget_is_spent():
    search, done = shallow(0.65)
    assert len(done) >= len(search.table) + search.trials
    assert search.goal - search.best(done).spent < 0.73 / 704 * 4
