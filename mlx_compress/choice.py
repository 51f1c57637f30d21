"""Which criterion? The one whose plan loses least on text that it was not made from.

All criteria read the same statistics, so trying all of them costs little more than one. Each plan,
refitted where it cuts units, is judged window by window on held-out calibration text; the
differences are paired, so a few windows tell close candidates apart. What cannot be told apart goes
to the cheaper: to the best of those that only read statistics, before one that solves systems.
"""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np

from .axes import NamedAxes
from .edit import edit_graph
from .evaluate import bootstrap_interval
from .importance import needs
from .plan import PrunePlan
from .prune import Cutter, pruned_fetch
from .stream import Progress, silent, stream_forward
from .tasks import NEXT_TOKEN

BASELINE = "random"
UNITS, LAYERS = "criteria", "layer_criteria"  # what a verdict is on, and its key in a report


@dataclass(frozen=True)
class Candidate:
    """A plan and its loss on each held-out sample; `seconds` of making it, and whether it is
    `dear`, in that it solves systems of equations."""

    name: str
    plan: PrunePlan
    losses: np.ndarray
    seconds: float
    dear: bool = False

    @property
    def mean(self) -> float:
        return float(self.losses.mean())


@dataclass(frozen=True)
class Verdict:
    """The winner, and for each candidate how much worse than the best it is, with the interval of
    `bootstrap_interval`."""

    winner: Candidate
    candidates: list[Candidate]
    behind: dict[str, dict[str, float]]
    unit: str = NEXT_TOKEN.unit

    def document(self) -> list[dict]:
        """For the report: the loss, and the paired difference to the best with its ends."""
        return [
            {
                "criterion": c.name,
                "loss": c.mean,
                "unit": self.unit,
                "behind_best": self.behind[c.name],
                "seconds": c.seconds,
                "chosen": c is self.winner,
            }
            for c in self.candidates
        ]


def judge(
    names: Collection[str],
    planned: Callable[[str], PrunePlan],
    losses: Callable[[PrunePlan], np.ndarray],
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> Verdict:
    """Plan by every criterion, `planned(name)`, and compare; `losses(plan)` gives those of the
    pruned model."""
    candidates = []
    for k, name in enumerate(names):
        started = time.perf_counter()
        plan = planned(name)
        seconds = time.perf_counter() - started
        same = (c.losses for c in candidates if c.plan.cuts == plan.cuts)
        lost = next(same, None)
        lost = losses(plan) if lost is None else lost
        candidates.append(Candidate(name, plan, lost, seconds, "second" in needs(name)))
        progress("criteria", k + 1, len(names))
    return decide(candidates, seed=seed)


def decide(candidates: list[Candidate], *, seed: int = 0) -> Verdict:
    """The candidate with the lowest loss, or one that cannot be told from it (95 %, paired) and is
    not dear.

    One that only its noise saves is passed over: whose mean is above that of a candidate which was
    told apart. `random` is there to be compared with, and never wins.
    """
    eligible = [c for c in candidates if c.name != BASELINE]
    best = min(eligible, key=lambda c: c.mean)
    each = np.ones(len(best.losses))
    behind = {
        c.name: bootstrap_interval(c.losses - best.losses, each, seed=seed) for c in candidates
    }
    worse = min((c.mean for c in eligible if behind[c.name]["low"] > 0), default=np.inf)
    level = [c for c in eligible if behind[c.name]["low"] <= 0 and c.mean <= worse]
    cheap = [c for c in level if not c.dear]
    winner = min(cheap, key=lambda c: c.mean, default=best)
    return Verdict(winner, candidates, behind)


def is_less(losses: np.ndarray, than: np.ndarray, *, seed: int = 0) -> bool:
    """Whether the mean of `losses` is lower for certain (95 %, paired by sample)."""
    return bootstrap_interval(than - losses, np.ones(len(losses)), seed=seed)["low"] > 0


def by_sequence(
    named: NamedAxes, plan: PrunePlan, cut: Cutter, fetch, batches,
    figure: Callable[[int, list], np.ndarray],
) -> np.ndarray:  # fmt: skip
    """A figure of each sequence of `batches` after pruning, such as its loss or the answer:
    `figure(batch index, outputs)` [B]."""
    out: list[np.ndarray] = []
    stream_forward(
        edit_graph(named, plan), batches, pruned_fetch(fetch, cut),
        on_outputs=lambda b, outputs: out.append(figure(b, outputs)),
    )  # fmt: skip
    return np.concatenate(out)
