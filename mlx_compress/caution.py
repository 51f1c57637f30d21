"""What is worth saying of calibration data: that it is little, or not like what is judged on."""

import math

import numpy as np

from .axes import NamedAxes
from .calibrate import Statistics
from .contractions import Contraction, consumers
from .dims import size_of
from .plan import PrunePlan

ROWS = 10  # of activations for each input that a weight is fitted to
NATS, SHARE = 0.5, 0.2


def too_few(named: NamedAxes, plan: PrunePlan, statistics: Statistics, unit: str) -> str | None:
    """A note where a refitted weight saw fewer than `ROWS` rows (called `unit`) for each input.

    Of several the one that saw least for its size. Where experts are picked, their mean counts.
    """
    dims = [name for name in plan.cuts if name in named.dimensions]
    places = [p for found in consumers(named, dims).values() for p in found]
    seen = [
        (float(np.mean(statistics.moments[p.key].rows)), _inputs(p), p.weight[0])
        for p in places
        if p.weight and p.layout and p.key in statistics.moments
    ]
    rows, inputs, path = min(seen, key=lambda each: each[0] / each[1], default=(math.inf, 1, ""))
    if rows >= ROWS * inputs:
        return None
    return f"{rows:,.0f} {unit} for {inputs:,} inputs of {path}: give more --calibration-samples"


def _inputs(place: Contraction) -> int:
    return size_of(place.axis) * (math.prod(place.window.kernel) if place.window else 1)


def another_text(calibration: float, evaluation: float) -> str | None:
    """A note where the dense model's losses, in nats per token, are far apart."""
    if abs(calibration - evaluation) <= min(NATS, SHARE * evaluation):
        return None
    found = [f"{math.exp(min(nats, 700)):,.3g}" for nats in (calibration, evaluation)]
    return (
        f"to the dense model calibration text has perplexity {found[0]}, evaluation text "
        f"{found[1]}: calibrate on text like what the model will read"
    )
