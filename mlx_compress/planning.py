"""From a wish to a plan: which criterion, what counts, which units.

By default every criterion is tried and judged on held-out samples, and counts are the same
everywhere; with `max_trials` they are searched.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, replace

from .allocate import Request, choose, choose_layers
from .axes import Dimension, NamedAxes
from .budget import DENSE, parameters
from .calibration import Calibration
from .choice import Verdict, judge
from .errors import InputError
from .layers import LayerDimension, settled
from .plan import PrunePlan
from .scoring import layer_scores, unit_scores
from .sites import plan_of, search_plan, sites_of

ROUNDED = 0.01  # more than was asked that a plan without a search may spend
STUDIES = "studies.log"  # beside the statistics: the trials of searches


def choose_plan(
    calibration: Calibration, named: NamedAxes, dims: list[Dimension],
    layers: list[LayerDimension], wanted: Request,
    *, together: bool = False, holds: Callable[[PrunePlan], bool] = lambda plan: True,
) -> tuple[PrunePlan, Verdict | None]:  # fmt: skip
    """A plan by the options' criterion, and the verdict where that was chosen by evidence.

    With `max_trials` the counts are searched: one for all layers if `together`, of plans that
    `holds(plan)` says can be saved.
    """
    options, verdict = calibration.options, None
    said = {k: v for k, v in asdict(options).items() if v is not None and k != "study"}
    plan = PrunePlan({}, said)
    if dims and options.importance == "auto":
        verdict = best_plan(calibration, dims, wanted)
        plan = PrunePlan(verdict.winner.plan.cuts, {**plan.recipe, "chosen": verdict.winner.name})
    elif dims:
        scores = unit_scores(calibration, named, dims)
        plan = choose(named, dims, scores, wanted, options, plan.recipe)
    shallower = PrunePlan({})
    if layers:
        scores = layer_scores(calibration, named, layers)
        shallower = PrunePlan(choose_layers(named, layers, scores, options, calibration.budget))
    if options.max_trials:
        plan = _searched(
            calibration, named, dims, layers, [plan, shallower], verdict, together, holds
        )
    elif layers:
        plan = settled(named, PrunePlan(plan.cuts | shallower.cuts, plan.recipe))
    if calibration.budget is not None:
        calibration.notes.append(calibration.budget.told(options, plan))
    return plan, verdict


def _searched(calibration, named, dims, layers, starts, verdict, together, holds) -> PrunePlan:
    """The plan that a search finds, beginning with plans for units and for layers alone."""
    options, narrower = calibration.options, starts[0]
    if calibration.read is None:
        raise InputError("--max-trials judges on held-out samples: give --data.")
    scores = layer_scores(calibration, named, layers) if layers else {}
    if dims and verdict:
        scores = scores | calibration.scores(dims, verdict.winner.name)
    elif dims:
        scores = scores | unit_scores(calibration, named, dims)
    sites = sites_of(dims, layers, scores, together=together, round_to=options.round_to)
    least = plan_of(named, sites, {site.name: site.nearest(0) for site in sites})
    budget = calibration.budget or parameters(named)
    spent = budget.along([DENSE, narrower, least])
    asked = options.budget[1] if options.budget else spent(narrower)
    plan, found = search_plan(
        calibration, named, dims, sites, spent,
        goal_of(asked, [spent(start) for start in starts if start.cuts]), options,
        starts=[{c.name: c.kept for c in start} for start in starts if start.cuts],
        holds=holds,
        storage=options.study or calibration.kept and str(calibration.kept / STUDIES),
    )  # fmt: skip
    words = {"start": "to begin with", "best": "at the best", "dense": "dense"}
    losses = (f"{found[key]:.4f} {told}" for key, told in words.items() if found[key] is not None)
    calibration.notes.append(
        f"search: {found['trials']} allocations tried; held-out loss {', '.join(losses)}"
    )
    return PrunePlan(plan.cuts, {**narrower.recipe, "search": found})


def goal_of(asked: float, started: Iterable[float]) -> float:
    """What a search may spend: what was asked, or what a start spends that was rounded up a little.

    >>> goal_of(0.75, [0.7502, 0.83])
    0.7502
    """
    return max([asked, *(spent for spent in started if spent <= asked * (1 + ROUNDED))])


def best_plan(calibration: Calibration, dims: list[Dimension], wanted: Request) -> Verdict:
    """The plan of the criterion that loses least on held-out samples."""
    verdict = judge(
        calibration.sources(dims), dims, wanted, calibration.options,
        lambda plan: calibration.lost(plan, dims), progress=calibration.progress,
    )  # fmt: skip
    return replace(verdict, unit=calibration.unit)
