"""What is worth saying of calibration data: that it is little, or not like what is judged on."""

import math
from collections.abc import Mapping

import numpy as np

from .axes import NamedAxes
from .calibrate import Statistics
from .contractions import Contraction, consumers
from .dims import size_of
from .plan import PrunePlan

ROWS = 10  # of activations for each input that a weight is fitted to
NATS, SHARE = 0.5, 0.2  # what losses may differ by, per token or of the loss
LETTERS = 4.0  # bits a byte of most languages, letter by letter


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


def another_text(calibration: Mapping, evaluation: Mapping) -> list[str]:
    """Notes on texts that differ, or that the model does not know, by what the dense model loses.

    Both hold "nats_per_token" and "nats_per_byte", the latter None where it is not known: tokens
    of a foreign text may be as likely as others, but then they are short.
    """
    notes = []
    bits = (evaluation["nats_per_byte"] or 0) / math.log(2)
    if bits > LETTERS:
        notes.append(
            f"the dense model needs {bits:.1f} bits a byte for evaluation text, where counts of "
            "letters would do with 4: is it of the model's language?"
        )
    if _far(calibration, evaluation, "nats_per_token", NATS) or _far(
        calibration, evaluation, "nats_per_byte", math.inf
    ):
        notes.append(
            f"to the dense model calibration text has perplexity {_figures(calibration)}, "
            f"evaluation text {_figures(evaluation)}: calibrate on text like what the model will "
            "read"
        )
    return notes


def _far(calibration: Mapping, evaluation: Mapping, name: str, most: float) -> bool:
    found, wanted = calibration[name], evaluation[name]
    if found is None or wanted is None:
        return False
    return abs(found - wanted) > min(most, SHARE * wanted)


def _figures(loss: Mapping) -> str:
    perplexity = f"{math.exp(min(loss['nats_per_token'], 700)):,.3g}"
    if loss["nats_per_byte"] is None:
        return perplexity
    return f"{perplexity} ({loss['nats_per_byte']:.2f} nats/byte)"
