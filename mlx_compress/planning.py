"""From a wish to a plan: which criterion, what counts, which units.

By default every criterion is tried and judged on held-out samples, and counts are the same
everywhere; with `max_trials` they are searched.
"""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace

import numpy as np

from .allocate import Request, choose, choose_layers, stand_in
from .axes import Dimension, NamedAxes
from .budget import DENSE, parameters
from .calibration import Calibration
from .choice import LAYERS, UNITS, Verdict, is_less, judge
from .errors import InputError
from .importance import CRITERIA, criterion
from .influence import LAYER_CRITERIA
from .layers import LayerDimension, settled
from .options import KINDS, Options
from .plan import PrunePlan
from .prune import pruner
from .scoring import layer_scores, layer_sources, unit_scores
from .sites import plan_of, search_plan, sites_of

ROUNDED = 0.01  # more than was asked that a plan without a search may spend
STUDIES = "studies.log"  # beside the statistics: the trials of searches


def choose_plan(
    calibration: Calibration, named: NamedAxes, dims: list[Dimension],
    layers: list[LayerDimension], wanted: Request, others: Sequence[Request] = (),
    *, together: bool = False, holds: Callable[[PrunePlan], bool] = lambda plan: True,
) -> tuple[PrunePlan, dict[str, Verdict]]:  # fmt: skip
    """A plan by the options' criterion, and where that was chosen by evidence the verdicts: on
    units (`UNITS`), and on whole layers (`LAYERS`), which are judged with all units left.

    `wanted` are the counts to keep, `others` such that evidence may prefer. With `max_trials` the
    counts are searched: one for all layers if `together`, of plans that `holds(plan)` says can be
    saved.
    """
    options, verdicts = calibration.options, {}
    said = {k: v for k, v in asdict(options).items() if v is not None and k != "study"}
    auto = options.importance == "auto"
    narrower, shallower = PrunePlan({}), PrunePlan({})
    if dims and auto:
        verdicts[UNITS], wanted = best_request(calibration, named, dims, wanted, others)
        narrower = verdicts[UNITS].winner.plan
        said["chosen"] = verdicts[UNITS].winner.name
    elif dims:
        scores = unit_scores(calibration, named, dims)
        narrower = choose(named, dims, scores, wanted, options)
    if layers and auto:
        verdicts[LAYERS] = best_layers(calibration, layers)
        shallower = verdicts[LAYERS].winner.plan
        said["chosen_layers"] = verdicts[LAYERS].winner.name
    elif layers:
        scores = layer_scores(calibration, named, layers, options.importance)
        shallower = PrunePlan(choose_layers(named, layers, scores, options, calibration.budget))
    calibration.notes += wanted.notes
    plan = PrunePlan(narrower.cuts | shallower.cuts, said)
    if options.max_trials:
        # Either alone makes up a target; of a ratio each is one part.
        starts = [narrower, shallower] if options.budget else [plan]
        plan = _searched(calibration, named, dims, layers, starts, verdicts, together, holds, said)
    elif layers:
        plan = settled(named, plan)
    if calibration.budget is not None:
        calibration.notes.append(calibration.budget.told(options, plan))
    return plan, verdicts


def _searched(
    calibration, named, dims, layers, starts, verdicts, together, holds, said
) -> PrunePlan:
    """The plan that a search finds, beginning with `starts`; `said` is its recipe."""
    options, first = calibration.options, starts[0]
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
    spent = budget.along([DENSE, first, least])
    asked = options.budget[1] if options.budget else spent(first)
    plan, found = search_plan(
        calibration, named, dims, sites, spent,
        goal_of(asked, [spent(start) for start in starts if start.cuts]), options,
        starts=[{c.name: c.kept for c in start} for start in starts if start.cuts],
        holds=holds,
        storage=options.study or calibration.kept and str(calibration.kept / STUDIES),
        scored_by=[f"{about} by {name}" for about, name in names.items()],
    )  # fmt: skip
    words = {"start": "to begin with", "best": "at the best", "dense": "dense"}
    losses = (f"{found[key]:.4f} {told}" for key, told in words.items() if found[key] is not None)
    calibration.notes.append(
        f"search: {found['trials']} allocations tried; held-out loss {', '.join(losses)}"
    )
    return PrunePlan(plan.cuts, {**said, "search": found})


def goal_of(asked: float, started: Iterable[float]) -> float:
    """What a search may spend: what was asked, or what a start spends that was rounded up a little.

    >>> goal_of(0.75, [0.7502, 0.83])
    0.7502
    """
    return max([asked, *(spent for spent in started if spent <= asked * (1 + ROUNDED))])


def one_kind_whole(options: Options, ask: Callable[[Options], Request]) -> list[Request]:
    """Requests that leave one kind of unit whole and meet the options' target by the others.

    Only where the plan is chosen by evidence. `ask(options)` makes a request; what it refuses is
    left out.
    """
    kinds = [kind for kind in options.dims if kind in KINDS]
    found = []
    if options.importance != "auto" or options.budget is None:
        return found
    for whole in kinds if len(kinds) > 1 else ():
        with contextlib.suppress(InputError):
            found.append(ask(replace(options, dims=tuple(k for k in kinds if k != whole))))
    return found


def best_request(
    calibration: Calibration, named: NamedAxes, dims: list[Dimension], wanted: Request,
    others: Sequence[Request],
) -> tuple[Verdict, Request]:  # fmt: skip
    """The plan that loses least on held-out samples, by criterion, and the counts that it keeps.

    `wanted` is departed from where one of `others` is better for certain (95 %, paired), by the
    criterion that is best for `wanted`; its criteria are judged anew. Such as spend more than was
    asked, or than `wanted` does, are not compared with it, nor are those that come to the same.
    """
    verdict = best_plan(calibration, dims, wanted)
    if not others:
        return verdict, wanted
    first, scores = verdict.winner, calibration.scores(dims, verdict.winner.name)
    budget = calibration.budget or parameters(named)
    spends, *each = budget.measure([stand_in(named, r.counts) for r in (wanted, *others)])
    limit = max(calibration.options.budget[1], spends) * (1 + ROUNDED)
    lowest, better = first.mean, None
    for other in (r for r, spent in zip(others, each, strict=True) if spent <= limit):
        cut = _asked(dims, other)
        plan = choose(calibration.named, cut, scores, other, calibration.options)
        if plan.cuts == first.plan.cuts:
            continue
        losses = calibration.lost(plan, dims)
        less = is_less(losses, first.losses, seed=calibration.options.seed)
        if less and losses.mean() < lowest:
            lowest, better = float(losses.mean()), other
    if better is None:
        return verdict, wanted
    whole = {d.kind for d in dims} - {d.kind for d in _asked(dims, better)}
    calibration.notes.append(
        f"{', '.join(sorted(whole))}: all kept, as held-out loss is {lowest:.4g} so and "
        f"{first.mean:.4g} otherwise"
    )
    return best_plan(calibration, dims, better), better


def _asked(dims: Iterable[Dimension], wanted: Request) -> list[Dimension]:
    return [d for d in dims if d.name in wanted.counts]


def best_plan(calibration: Calibration, dims: list[Dimension], wanted: Request) -> Verdict:
    """The plan of the criterion that loses least on held-out samples."""
    sources, options, cut = calibration.sources(dims), calibration.options, _asked(dims, wanted)

    def planned(name: str) -> PrunePlan:
        scores = criterion(name)(sources)
        return choose(sources.named, cut, scores, wanted, options, {"importance": name})

    return _judged(calibration, tuple(CRITERIA), planned, lambda plan: calibration.lost(plan, dims))


def best_layers(calibration: Calibration, dims: list[LayerDimension]) -> Verdict:
    """The plan of the criterion by whose order of layers the least is lost on held-out samples.

    They are compared before anything mends what is lost. Where layers differ in size each plan is
    as near to a target as its order comes.
    """
    options, named, held_out = calibration.options, calibration.named, calibration.held_out
    sources = layer_sources(calibration, dims, gradients=True)

    def planned(name: str) -> PrunePlan:
        scores, here = LAYER_CRITERIA[name](sources), list(sources.dims)
        return PrunePlan(choose_layers(named, here, scores, options, calibration.budget))

    def losses(plan: PrunePlan) -> np.ndarray:
        return calibration.losses(plan, pruner(named, plan), held_out)

    return _judged(calibration, tuple(LAYER_CRITERIA), planned, losses)


def _judged(calibration: Calibration, names, planned, losses) -> Verdict:
    verdict = judge(
        names, planned, losses, seed=calibration.options.seed, progress=calibration.progress
    )
    return replace(verdict, unit=calibration.unit)
