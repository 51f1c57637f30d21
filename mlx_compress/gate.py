"""A gate on what may be lost, and what would pass it.

The loss is that of the task, on samples that nothing was made from (nats per token, for text). An
absolute drop is its increase; a relative one is the increase over the dense model's loss.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from .allocate import choose, request
from .errors import GateFailed
from .layers import is_layer_cut
from .options import Options
from .samples import Samples

STEPS = 6  # halvings of the interval between what was asked for and nothing removed
NEAR = 0.01  # of the amount: closer than this is not looked for


def drop(dense: float, compressed: float, drop_type: str) -> float:
    """How much worse the compressed model is; negative where it is better."""
    return (compressed - dense) / (dense if drop_type == "relative" else 1.0)


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


def pass_gate(planned, dense: float, compressed: float, samples: Samples, out: Path) -> None:
    """Set a model that loses too much aside, and say what would pass. Raises `Rejected`.

    `planned` is what was saved to `out`, with the calibration that it stands on; the losses are
    those of both models on `samples`.
    """
    options = planned.calibration.options

    def remedy() -> str:
        budget = planned.calibration.budget
        whole = 1.0 if budget is None else budget.dense()
        return words(options, _what_passes(planned, dense, samples, whole), whole)

    require_drop(dense, compressed, options.max_drop, options.drop_type, out, remedy)


def require_drop(
    dense: float, compressed: float, max_drop: float | None, drop_type: str, out: Path,
    remedy: Callable[[], str],
) -> None:  # fmt: skip
    """Set a model that loses too much aside. Raises `Rejected`, with the remedy."""
    found = drop(dense, compressed, drop_type)
    if max_drop is None or found <= max_drop:
        return
    aside = rejected(out)
    out.rename(aside)
    raise Rejected(
        f"the loss rises by {found:.3g} ({drop_type}), --max-drop {max_drop:g} is allowed; "
        f"kept aside as {aside}; {remedy()}.",
        aside,
    )


def _what_passes(planned, dense: float, samples: Samples, whole: float) -> float | None:
    """The largest amount that passes, by the same criterion, from the statistics at hand."""
    calibration, dims = planned.calibration, planned.dims
    options, named = calibration.options, calibration.named
    name = planned.verdict.winner.name if planned.verdict else options.importance
    asked = options.pruning_ratio is not None or options.budget is not None
    given = not dims or not asked or name == "auto"
    if given or any(is_layer_cut(cut) for cut in planned.plan):
        return None
    scores = calibration.scores(dims, name)

    def drop_at(removed: float) -> float:
        here = with_amount(options, removed, whole)
        wanted = request(named, dims, here, calibration.budget)
        plan = choose(named, dims, scores, wanted, here)
        losses = calibration.lost(plan, dims, samples)
        return drop(dense, losses.mean(), options.drop_type)

    return most_that_passes(drop_at, amount(options, whole), options.max_drop)
