"""A gate on what may be lost, and what would pass it.

It is about one figure, on samples that nothing was made from: nats per token for text, for others
the task's own measure (top-1, Spearman's correlation). An absolute drop is how much worse it gets;
a relative one is that over the dense model's figure.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from .allocate import choose, request
from .choice import UNITS
from .errors import GateFailed
from .layers import is_layer_cut
from .options import DistillOptions, Options
from .samples import Samples
from .tasks import NEXT_TOKEN, TINY

STEPS = 6  # halvings of the interval between what was asked for and nothing removed
NEAR = 0.01  # of the amount: closer than this is not looked for


@dataclass(frozen=True)
class Figure:
    """Where a report has it, what it is called, and whether more of it is better."""

    key: str
    name: str
    higher_is_better: bool

    def drop(self, dense: float, compressed: float, drop_type: str) -> float:
        """How much worse the compressed model is; negative where it is better."""
        worse = dense - compressed if self.higher_is_better else compressed - dense
        return worse / (max(abs(dense), TINY) if drop_type == "relative" else 1.0)


LOSS = Figure("nats_per_token", "the loss", higher_is_better=False)


def figure_of(samples: Samples) -> Figure:
    """What a model is judged by on these samples."""
    if samples.task is NEXT_TOKEN:
        return LOSS
    return Figure("score", samples.measure, samples.higher_is_better)


def amount(options: Options, whole: float = 1.0) -> float:
    """The fraction that was asked to be removed: of the units, or of what a target is about.

    `whole` is what the dense model spends of the target (`Budget.dense`).
    """
    return options.pruning_ratio if options.budget is None else 1 - options.budget[1] / whole


def with_amount(options: Options, removed: float, whole: float = 1.0) -> Options:
    """The same request for another amount."""
    if options.budget is None:
        return replace(options, pruning_ratio=removed)
    return replace(options, **{options.budget[0]: (1 - removed) * whole})


def most_that_passes(drop_at: Callable[[float], float], asked: float, limit: float) -> float | None:
    """The largest amount below `asked` whose drop is within the limit, by bisection.

    None when not even a small fraction of what was asked for passes. `drop_at` is taken to grow
    with the amount.
    """
    low, high, best = 0.0, asked, None
    for _ in range(STEPS):
        middle = (low + high) / 2
        if high - low < NEAR * asked:
            break
        if drop_at(middle) <= limit:
            low = best = middle
        else:
            high = middle
    return best


def words(options: Options, removed: float | None, whole: float = 1.0) -> str:
    """What to ask for instead, rounded to what passes too."""
    removed = math.floor(100 * (removed or 0) + 1e-9) / 100
    if not removed:
        return "no amount is known that would pass; leave dimensions out, or allow more"
    if options.budget is None:
        return f"--pruning-ratio {removed:.2f} would pass"
    return f"--target {options.budget[0]}={_rounded_up((1 - removed) * whole)} would pass"


def _rounded_up(number: float) -> str:
    """Three digits that stand for as much or more."""
    digits = 2 - math.floor(math.log10(number))
    return f"{math.ceil(number * 10**digits - 1e-6) / 10**digits:.10g}"


def rejected(out: Path) -> Path:
    """Where a model that the gate rejects is kept."""
    return out.with_name(f"{out.name}.rejected")


class Rejected(GateFailed):
    """A model that loses more than was allowed; `folder` holds it and its report."""

    def __init__(self, text: str, folder: Path):
        super().__init__(text)
        self.folder = folder


def pass_gate(planned, report: Mapping, samples: Samples, out: Path) -> None:
    """Set a model that loses too much aside, and say what would pass. Raises `Rejected`.

    `planned` is what was saved to `out`, with the calibration that it stands on; `report` has the
    figures of both models on `samples`.
    """
    options, figure = planned.calibration.options, figure_of(samples)

    def remedy() -> str:
        budget, dense = planned.calibration.budget, report["dense"][figure.key]
        whole = 1.0 if budget is None else budget.dense()
        return words(options, _what_passes(planned, figure, dense, samples, whole), whole)

    require_drop(report, figure, options, out, remedy)


def require_drop(
    report: Mapping, figure: Figure, options: Options | DistillOptions, out: Path,
    remedy: Callable[[], str],
) -> None:  # fmt: skip
    """Set a model that loses too much aside. Raises `Rejected`, with the remedy."""
    if options.max_drop is None:
        return
    figures = (report[name][figure.key] for name in ("dense", "compressed"))
    found = figure.drop(*figures, options.drop_type)
    if found <= options.max_drop:
        return
    aside = rejected(out)
    out.rename(aside)
    way = "falls" if figure.higher_is_better else "rises"
    raise Rejected(
        f"{figure.name} {way} by {found:.3g} ({options.drop_type}), --max-drop "
        f"{options.max_drop:g} is allowed; kept aside as {aside}; {remedy()}.",
        aside,
    )


def _what_passes(
    planned, figure: Figure, dense: float, samples: Samples, whole: float
) -> float | None:
    """The largest amount that passes, by the same criterion, from the statistics at hand."""
    calibration, dims = planned.calibration, planned.dims
    kinds = {cut.kind for cut in planned.plan}
    cut = [d for d in dims if d.kind in kinds]
    options, named = calibration.options, calibration.named
    verdict = planned.verdicts.get(UNITS)
    name = verdict.winner.name if verdict else options.importance
    asked = options.pruning_ratio is not None or options.budget is not None
    given = not cut or not asked or name == "auto"
    if given or any(is_layer_cut(cut) for cut in planned.plan):
        return None
    scores = calibration.scores(dims, name)

    def drop_at(removed: float) -> float:
        here = with_amount(options, removed, whole)
        wanted = request(named, cut, here, calibration.budget)
        plan = choose(named, cut, scores, wanted, here)
        if figure is LOSS:
            found = float(calibration.lost(plan, dims, samples).mean())
        else:
            found = calibration.scored(plan, dims, samples)
        return figure.drop(dense, found, options.drop_type)

    return most_that_passes(drop_at, amount(options, whole), options.max_drop)
