"""Search how much to keep where, so that a budget is met and held-out loss is least.

A *site* is what gets a count of its own: one dimension, all dimensions of a family that a config
sets by one number, or the layers of a list (so width is weighed against depth). Three steps, the
next trial being a function of those that are done, so that a search can stop, resume, and be
shared:

1. a table: each site alone cut to a few counts, all else dense;
2. the allocations to start from: uniform, those given, and the one that is best if what sites
   lose adds up (a knapsack, solved by Lagrange's multiplier);
3. the best so far, changed: one site gives, others take, in steps that get smaller.

Where layers can go, the second step has a knapsack for each number of them in the table, and
`finalists` the best trial of each.

The table and knapsack are those of ZipLM and SPDY (Frantar and Alistarh, 2022,
https://arxiv.org/abs/2201.13096), the coarse-to-fine changes those of evolutionary searches such
as EvoPress (Sieberling et al., 2024, https://arxiv.org/abs/2410.14649).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from .plan import Cut

LEVELS = (0.75, 0.5, 0.25, 0.125)  # of a site's size, in the table
FINEST = 32  # a change is at least this fraction of a site, while there are such changes
SIZES = 6  # of steps: an eighth of a site, then half as much each time
SLACK = 1e-6  # of the budget
Counts = Mapping[str, int]


@dataclass(frozen=True)
class Site:
    """`size` units, of which at least `least` stay, in multiples of `step`.

    `cuts(count)` gives the cuts of a plan that keeps so many. `depth`: the units are layers, or
    branches of layers.
    """

    name: str
    size: int
    cuts: Callable[[int], dict[str, Cut]]
    least: int = 1
    step: int = 1
    depth: bool = False

    def nearest(self, wanted: float) -> int:
        """The count nearest to `wanted` that is allowed."""
        if wanted >= self.size:
            return self.size
        count = round(wanted / self.step) * self.step
        low = -(-self.least // self.step) * self.step
        return min(max(count, low), self.size)

    def levels(self) -> list[int]:
        counts = {self.nearest(self.size * level) for level in LEVELS}
        counts |= {self.nearest(self.size - 1)} if self.depth else set()
        return sorted(counts - {self.size}, reverse=True)


@dataclass(frozen=True)
class Trial:
    """Counts by site, the held-out loss, and what they spend of the budget."""

    counts: dict[str, int]
    loss: float
    spent: float


@dataclass
class Search:
    """The problem: `spent(counts)` must not exceed `goal`; `starts` are allocations to begin with.

    `trials` are those after the table, starts included, which are tried in any case. Only counts of
    which `holds(counts)` is true are tried.
    """

    sites: Sequence[Site]
    spent: Callable[[Counts], float]
    goal: float
    starts: Sequence[Counts] = ()
    trials: int = 32
    seed: int = 0
    holds: Callable[[Counts], bool] = lambda counts: True
    _spent: dict = field(default_factory=dict, repr=False)

    @property
    def dense(self) -> dict[str, int]:
        return {site.name: site.size for site in self.sites}

    @cached_property
    def table(self) -> list[dict[str, int]]:
        """Nothing cut, then each site alone at each level."""
        single = [self.dense | {name: n} for name, each in self.levels.items() for n in each]
        return [self.dense, *single]

    @cached_property
    def levels(self) -> dict[str, list[int]]:
        """Of each site the counts that can be tried alone, the largest first."""
        return {site.name: [n for n in site.levels() if self.holds(self.dense | {site.name: n})]
                for site in self.sites}  # fmt: skip

    def next(self, done: Sequence[Trial], claimed: Iterable[Counts] = ()) -> dict | None:
        """The counts to try next; None when nothing is left. `claimed` are tried elsewhere."""
        known = {_key(t.counts) for t in done} | {_key(c) for c in claimed}
        for counts in self.table:
            if _key(counts) not in known:
                return counts
        losses = {_key(t.counts): t.loss for t in done}
        if any(_key(counts) not in losses for counts in self.table):
            return None
        spent = len(done) - len(self.table)
        more = self._of_each_depth(losses) if spent < self.trials else ()
        for counts in (*self.starts, self.knapsack(losses), *more):
            if counts is not None and _key(counts) not in known and self.holds(counts):
                return dict(counts)
        best = self.best(done)
        if spent >= self.trials or best is None:
            return None
        return self._changed(best.counts, known, spent / self.trials, len(done))

    def best(self, done: Sequence[Trial]) -> Trial | None:
        """The trial within the budget that loses least; None if there is none."""
        within = [t for t in done if t.spent <= self.goal * (1 + SLACK)]
        return min(within, key=lambda t: t.loss, default=None)

    def finalists(self, done: Sequence[Trial]) -> list[dict[str, int]]:
        """The starts, the knapsack's allocation, and the best trial with each number of layers, as
        far as they are within the budget.

        What is lost with a layer is mended by the weights behind it, which trials do not show. Of
        the numbers that do by themselves only the largest counts.
        """
        losses = {_key(t.counts): t.loss for t in done}
        found = [dict(c) for c in (*self.starts, self.knapsack(losses)) if c and self.holds(c)]
        for site in self._deep:
            for n in sorted({t.counts[site.name] for t in done}, reverse=True):
                best = self.best([t for t in done if t.counts[site.name] == n])
                found += [best.counts] if best else []
                if self.spending(self.dense | {site.name: n}) <= self.goal:
                    break
        within = (c for c in found if self.spending(c) <= self.goal * (1 + SLACK))
        return list({_key(counts): counts for counts in within}.values())

    def spending(self, counts: Counts) -> float:
        if _key(counts) not in self._spent:
            self._spent[_key(counts)] = self.spent(counts)
        return self._spent[_key(counts)]

    # ---- the knapsack

    @property
    def _deep(self) -> list[Site]:
        return [site for site in self.sites if site.depth]

    def _of_each_depth(self, losses: Mapping[tuple, float]) -> Iterable[dict[str, int] | None]:
        """The knapsack's allocation for each number of layers that does not do by itself."""
        for site in self._deep:
            for n in (site.size, *self.levels[site.name]):
                if self.spending(self.dense | {site.name: n}) > self.goal:
                    yield self.knapsack(losses, {site.name: n})

    def knapsack(
        self, losses: Mapping[tuple, float], fixed: Counts | None = None
    ) -> dict[str, int] | None:
        """The counts that lose least if losses and savings of single sites add up.

        `losses` holds those of the table, `fixed` the counts of sites that are not up for choice.
        None when no counts are within the budget.
        """
        choices = {site.name: self._choices(site, losses) for site in self.sites}
        for name, n in (fixed or {}).items():
            at_n = choices[name][0] == n
            choices[name] = tuple(each[at_n] for each in choices[name])

        def at(price: float) -> dict[str, int]:
            return {
                name: int(counts[np.argmin(lost - price * saved)])
                for name, (counts, lost, saved) in choices.items()
            }

        low, high = 0.0, 1e-12
        while self.spending(at(high)) > self.goal:
            low, high = high, high * 8
            if high > 1e12:
                return None
        for _ in range(40):
            middle = (low + high) / 2
            if self.spending(at(middle)) > self.goal:
                low = middle
            else:
                high = middle
        return self._filled(at(high), choices)

    def _choices(self, site: Site, losses) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Counts of a site, what each loses more than dense, and what it saves of the budget."""
        dense = losses[_key(self.dense)]
        measured = [site.size, *self.levels[site.name]]
        lost = [losses[_key(self.dense | {site.name: n})] - dense for n in measured]
        lost = np.maximum.accumulate(np.maximum(lost, 0))  # less kept never loses less
        grain = 1 if site.depth else max(1, site.size // FINEST)
        counts = np.array(sorted({site.nearest(n) for n in range(measured[-1], site.size, grain)}
                                 | {site.size}))  # fmt: skip
        whole = self.spending(self.dense)
        known = [whole - self.spending(self.dense | {site.name: n}) for n in measured]
        order = slice(None, None, -1)
        return (
            counts,
            np.interp(counts, measured[order], lost[order]),
            np.interp(counts, measured[order], known[order]),
        )

    def _filled(self, counts: dict[str, int], choices) -> dict[str, int]:
        """Give back what the budget still allows, where the table says it helps most."""
        for _ in range(4 * len(self.sites)):
            offers = []
            for name, (levels, lost, _) in choices.items():
                k = int(np.searchsorted(levels, counts[name]))
                if k + 1 < len(levels):
                    offers.append((lost[k] - lost[k + 1], name, int(levels[k + 1])))
            for _, name, count in sorted(offers, reverse=True):
                more = counts | {name: count}
                if self.spending(more) <= self.goal:
                    counts = more
                    break
            else:
                break
        return counts

    # ---- changes

    def _changed(self, counts: Counts, known: set, progress: float, number: int) -> dict | None:
        """One site gives a step, others take what that frees; steps get smaller with progress, and
        where nothing new is found, which takes what the budget still has, too."""
        rng = np.random.default_rng((self.seed, number))

        def is_new(new: Counts) -> bool:
            return _key(new) not in known and self.spending(new) <= self.goal and self.holds(new)

        for halvings in range(int(3 * min(progress, 0.99)), SIZES):
            share = 8 * 2**halvings
            for _ in range(64):
                giver, *takers = (self.sites[k] for k in rng.permutation(len(self.sites)))
                less = giver.nearest(counts[giver.name] - _step(giver, share))
                new = self._taken({**counts, giver.name: less}, takers, share)
                if is_new(new):
                    return new
            new = self._taken(counts, self.sites, share)
            if is_new(new):
                return new
        return None

    def _taken(self, counts: Counts, takers: Iterable[Site], share: int) -> dict[str, int]:
        """Each of `takers` has a step more, as far as the budget allows."""
        new = dict(counts)
        for taker in takers:
            more = new | {taker.name: taker.nearest(new[taker.name] + _step(taker, share))}
            if self.spending(more) <= self.goal:
                new = more
        return new


def _step(site: Site, share: int) -> int:
    return max(site.step, round(site.size / share))


def _key(counts: Counts) -> tuple:
    return tuple(sorted(counts.items()))
