"""A gate on what may be lost, and what would pass it.

The loss is in nats per token on held-out text. An absolute drop is its increase; a relative one is
the increase over the dense model's loss.
"""

from collections.abc import Callable
from dataclasses import replace

from .options import Options

STEPS = 6  # halvings of the interval between what was asked for and nothing removed
NEAR = 0.01  # of the amount: closer than this is not looked for


def drop(dense: float, compressed: float, drop_type: str) -> float:
    """How much worse the compressed model is; negative where it is better."""
    return (compressed - dense) / (dense if drop_type == "relative" else 1.0)


def amount(options: Options) -> float:
    """What was asked to remove: of the units, or of the block parameters."""
    return options.pruning_ratio if options.params is None else 1 - options.params


def with_amount(options: Options, removed: float) -> Options:
    """The same request for another amount."""
    if options.params is None:
        return replace(options, pruning_ratio=removed)
    return replace(options, params=1 - removed)


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


def words(options: Options, removed: float | None) -> str:
    """What to ask for instead."""
    if removed is None:
        return "no amount is known that would pass; leave dimensions out, or allow more"
    if options.params is None:
        return f"--pruning-ratio {removed:.2f} would pass"
    return f"--target params={1 - removed:.2f} would pass"
