"""What a search may give counts to, and the plan that counts make.

Where a config sets a width by one number for all layers, they are one site, so that the result
stays loadable; else each dimension is one. Layers of a list are a site of their own: how many stay.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict

import numpy as np

from .allocate import family
from .axes import Dimension, NamedAxes
from .calibration import Calibration
from .errors import InputError
from .importance import Scores
from .layers import LayerDimension, settled, without
from .options import OF_THE_MEASURING, Options
from .plan import Cut, PrunePlan
from .search import Counts, Search, Site
from .study import run_search


def sites_of(
    dims: Sequence[Dimension], layers: Sequence[LayerDimension], scores: Scores,
    *, together: bool, round_to: int = 1,
) -> list[Site]:  # fmt: skip
    """Sites for unit and layer dimensions, what goes first being what scores least."""
    groups: dict[object, list[Dimension]] = {}
    for d in dims:
        groups.setdefault(family(d) if together else d.name, []).append(d)
    out = []
    for same in groups.values():
        name = family(same[0])[0] if together else same[0].name
        step = round_to if same[0].size > round_to else 1
        out.append(Site(name, same[0].size, _unit_cuts(same, scores), step, step))
    for d in layers:
        out.append(Site(d.name, d.size, _layer_cuts(d, scores[d.name]),
                        max(1, d.size - len(d.removable)), depth=True))  # fmt: skip
    return out


def _unit_cuts(dims: Sequence[Dimension], scores: Scores) -> Callable[[int], dict[str, Cut]]:
    orders = {d.name: np.argsort(-scores[d.name], axis=-1, kind="stable") for d in dims}

    def cuts(count: int) -> dict[str, Cut]:
        return {
            d.name: Cut(d.name, d.kind, d.size,
                        np.sort(orders[d.name][..., :count], axis=-1).tolist(), d.within, d.slots)
            for d in dims
            if count < d.size
        }  # fmt: skip

    return cuts


def _layer_cuts(dim: LayerDimension, score: np.ndarray) -> Callable[[int], dict[str, Cut]]:
    order = sorted(dim.removable, key=lambda i: score[i])

    def cuts(count: int) -> dict[str, Cut]:
        return {dim.name: without(dim, order[: dim.size - count])} if count < dim.size else {}

    return cuts


def plan_of(named: NamedAxes, sites: Iterable[Site], counts: Counts) -> PrunePlan:
    """The plan that keeps these counts."""
    cuts = {name: cut for site in sites for name, cut in site.cuts(counts[site.name]).items()}
    return settled(named, PrunePlan(cuts))


def counts_of(sites: Iterable[Site], kept: Mapping[str, int]) -> dict[str, int]:
    """The counts by site of an allocation that names dimensions."""
    first = {site.name: next(iter(site.cuts(site.least)), site.name) for site in sites}
    return {site.name: kept.get(first[site.name], site.size) for site in sites}


def search_plan(
    calibration: Calibration,
    named: NamedAxes,
    dims: Sequence[Dimension],
    sites: Sequence[Site],
    spent: Callable[[PrunePlan], float],
    goal: float,
    options: Options,
    *,
    starts: Sequence[Mapping[str, int]] = (),
    holds: Callable[[PrunePlan], bool] = lambda plan: True,
    storage: str | None = None,
    scored_by: Sequence[str] = (),
) -> tuple[PrunePlan, dict]:
    """The plan within a budget that loses least on held-out samples, and what to record of it.

    Trials are refitted in closed form. The best of them and the other `Search.finalists` are then
    fitted as they would be saved, and judged again. `starts` are counts by dimension; `holds(plan)`
    says whether it can be saved; `scored_by` are the criteria behind the order in which the sites
    lose units, where the options do not tell. Raises `InputError` where no plan that can be is
    within the budget.
    """
    dims = list(dims)
    calibration.statistics(dims)

    def plan_at(counts: Counts) -> PrunePlan:
        return plan_of(named, sites, counts)

    search = Search(
        sites, lambda counts: spent(plan_at(counts)), goal,
        [counts_of(sites, start) for start in starts], options.max_trials, options.seed,
        lambda counts: holds(plan_at(counts)),
    )  # fmt: skip
    _require_any(search)
    asked = {k: v for k, v in asdict(options).items() if k not in OF_THE_MEASURING}
    name = calibration.key(repr(asked), *(site.name for site in sites), repr(goal),
                           calibration.unit, *scored_by)  # fmt: skip
    done = run_search(
        search, lambda counts: float(calibration.lost(plan_at(counts), dims).mean()),
        storage=storage, name=name, progress=calibration.progress,
    )  # fmt: skip
    best = search.best(done)
    if best is None:
        raise InputError(
            f"none of {len(done)} allocations that the model's config can hold is within the "
            "budget; ask for less, or give more --max-trials."
        )
    finals = [counts for counts in search.finalists(done) if counts != best.counts]
    plan = calibration.fittest([plan_at(counts) for counts in (best.counts, *finals)], dims)
    started = (t.loss for t in done if t.counts in search.starts and t.spent <= goal)
    record = {
        "trials": len(done),
        "dense": next(trial.loss for trial in done if trial.counts == search.dense),
        "start": next(started, None),
        "best": best.loss,
        "counts": plan.counts(),
    }
    return plan, record


def _require_any(search: Search) -> None:
    """Raise `InputError` where no counts are within the budget, or none can be saved."""
    least = search.spending({site.name: site.nearest(0) for site in search.sites})
    if least > search.goal:
        raise InputError(
            f"the least that can be reached is {least:.3f}, {search.goal:.3f} was asked for; ask "
            "for that, or give more --dims."
        )
    if not any(search.levels.values()):
        raise InputError(
            "no config of the model can hold what a search would try; give --carrier NAME, or "
            "leave out --global-pruning."
        )
