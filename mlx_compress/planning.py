"""From a wish to a plan: which criterion, what counts, which units.

By default every criterion is tried and judged on held-out samples, and counts are the same
everywhere; with `max_trials` they are searched.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, replace

import numpy as np

from .allocate import Request, choose, choose_layers
from .axes import Dimension, NamedAxes
from .budget import DENSE, parameters
from .calibration import Calibration
from .choice import LAYERS, UNITS, Verdict, judge
from .errors import InputError
from .importance import CRITERIA, criterion
from .influence import LAYER_CRITERIA
from .layers import LayerDimension, settled
from .plan import PrunePlan
from .prune import pruner
from .scoring import layer_scores, layer_sources, unit_scores
from .sites import plan_of, search_plan, sites_of

ROUNDED = 0.01  # more than was asked that a plan without a search may spend
STUDIES = "studies.log"  # beside the statistics: the trials of searches


def choose_plan(
    calibration: Calibration, named: NamedAxes, dims: list[Dimension],
    layers: list[LayerDimension], wanted: Request,
    *, together: bool = False, holds: Callable[[PrunePlan], bool] = lambda plan: True,
) -> tuple[PrunePlan, dict[str, Verdict]]:  # fmt: skip
    """A plan by the options' criterion, and where that was chosen by evidence the verdicts: on
    units (`UNITS`), and on whole layers (`LAYERS`), which are judged with all units left.

    With `max_trials` the counts are searched: one for all layers if `together`, of plans that
    `holds(plan)` says can be saved.
    """
    options, verdicts = calibration.options, {}
    said = {k: v for k, v in asdict(options).items() if v is not None and k != "study"}
    auto = options.importance == "auto"
    plan, shallower = PrunePlan({}, said), PrunePlan({})
    if dims and auto:
        verdicts[UNITS] = best_plan(calibration, dims, wanted)
        winner = verdicts[UNITS].winner
        plan = PrunePlan(winner.plan.cuts, {**plan.recipe, "chosen": winner.name})
    elif dims:
        scores = unit_scores(calibration, named, dims)
        plan = choose(named, dims, scores, wanted, options, plan.recipe)
    if layers and auto:
        verdicts[LAYERS] = best_layers(calibration, layers)
        shallower = verdicts[LAYERS].winner.plan
        plan.recipe["chosen_layers"] = verdicts[LAYERS].winner.name
    elif layers:
        scores = layer_scores(calibration, named, layers, options.importance)
        shallower = PrunePlan(choose_layers(named, layers, scores, options, calibration.budget))
    if options.max_trials:
        plan = _searched(
            calibration, named, dims, layers, [plan, shallower], verdicts, together, holds
        )
    elif layers:
        plan = settled(named, PrunePlan(plan.cuts | shallower.cuts, plan.recipe))
    if calibration.budget is not None:
        calibration.notes.append(calibration.budget.told(options, plan))
    return plan, verdicts


def _searched(calibration, named, dims, layers, starts, verdicts, together, holds) -> PrunePlan:
    """The plan that a search finds, beginning with plans for units and for layers alone."""
    options, narrower = calibration.options, starts[0]
    if calibration.read is None:
        raise InputError("--max-trials judges on held-out samples: give --data.")
    names = {about: verdict.winner.name for about, verdict in verdicts.items()}
    scores = {}
    if layers:
        name = names.get(LAYERS, options.importance)
        scores = layer_scores(calibration, named, layers, name)
    if UNITS in names:
        scores = scores | calibration.scores(dims, names[UNITS])
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
    sources, options = calibration.sources(dims), calibration.options

    def planned(name: str) -> PrunePlan:
        scores = criterion(name)(sources)
        return choose(sources.named, dims, scores, wanted, options, {"importance": name})

    return _judged(calibration, tuple(CRITERIA), planned, lambda plan: calibration.lost(plan, dims))


def best_layers(calibration: Calibration, dims: list[LayerDimension]) -> Verdict:
    """The plan of the criterion by whose order of layers the least is lost on held-out samples."""
    options, named = calibration.options, calibration.named
    sources = layer_sources(calibration, dims, gradients=True)

    def planned(name: str) -> PrunePlan:
        scores, here = LAYER_CRITERIA[name](sources), list(sources.dims)
        return PrunePlan(choose_layers(named, here, scores, options, calibration.budget))

    def losses(plan: PrunePlan) -> np.ndarray:
        return calibration.losses(plan, pruner(named, plan), calibration.held_out)

    return _judged(calibration, tuple(LAYER_CRITERIA), planned, losses)


def _judged(calibration: Calibration, names, planned, losses) -> Verdict:
    verdict = judge(
        names, planned, losses, seed=calibration.options.seed, progress=calibration.progress
    )
    return replace(verdict, unit=calibration.unit)
