"""What a plan is made and judged by: samples, and what the dense model does on them.

Samples are read when first asked for. A quarter of them is held out, where there are enough:
statistics come from the others, and what was decided by them is judged on these. Statistics are
kept on disk between runs where a folder is given for them (`store.py`).
"""

import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import mlx.core as mx
import numpy as np

from .axes import Dimension, NamedAxes, named_axes
from .batch_norm import batch_norms, recalibrated
from .budget import Budget
from .calibrate import Statistics, calibrate
from .caution import another_text, too_few
from .choice import by_sequence, is_less
from .contractions import consumers
from .errors import InputError
from .graph import Graph
from .importance import Scores, Sources, criterion, needs
from .options import Options
from .plan import PrunePlan
from .prune import Cutter, pruner
from .refit import USUAL, Fitted, refit
from .samples import Samples
from .second import OnDisk
from .sequential import can_run, refit_in_sequence
from .store import Store, store_key, tidy
from .stream import Fetch, Progress, silent
from .tasks import NEXT_TOKEN

SPILLED = 2**30  # bytes of second moments; more lie on disk
HELD_OUT = 0.25
AS_IT_IS = "as it is"
UNMENDED = (
    "one batch of samples is not enough to fit the weights behind dropped layers anew; give more "
    "--calibration-samples, or a smaller --batch-size"
)


@dataclass
class Calibration:
    """A dense model and samples for it.

    `trace(inputs)` gives its graph at their shapes, `read()` the samples, None where there are
    none. `identity()` names the model by its contents. `kept` is the folder of statistics. `budget`
    measures what the options' target is about. `bytes_per_token` is known once text was read.
    """

    trace: Callable[[list[mx.array]], Graph]
    fetch: Fetch
    read: Callable[[], Samples] | None
    options: Options
    notes: list[str]
    progress: Progress = silent
    identity: Callable[[], list[str]] = list
    kept: Path | None = None
    budget: Budget | None = None
    bytes_per_token: float | None = None
    _collected: dict = field(default_factory=dict, repr=False)
    _named: dict = field(default_factory=dict, repr=False)
    _fit: tuple[PrunePlan, tuple[Cutter, dict]] | None = field(
        default=None, init=False, repr=False
    )

    @cached_property
    def _all(self) -> Samples:
        found = self.read()
        whole = found.split(len(found) // found.size)[0]
        return whole if whole.batches else found

    @cached_property
    def _count(self) -> int:
        """How many batches are not held out."""
        batches = len(self._all.batches)
        return batches - max(1, round(batches * HELD_OUT)) if batches > 1 else batches

    @cached_property
    def samples(self) -> Samples:
        """What statistics are collected on."""
        return self._all.split(self._count)[0]

    @cached_property
    def held_out(self) -> Samples:
        """What is judged on. Raises `InputError` where there is not enough for both."""
        if len(self._all.batches) < 2:
            raise InputError(
                f"{self._all.path}: what is chosen is judged on held-out samples, and one batch of "
                "them is not enough; give more --calibration-samples, or a smaller --batch-size."
            )
        return self._all.split(self._count)[1]

    @property
    def batches(self) -> list[list[mx.array]]:
        return self.samples.batches

    @property
    def named(self) -> NamedAxes:
        """The axes of the graph at the shape of a batch."""
        return self.at(self.samples)

    def at(self, samples: Samples) -> NamedAxes:
        """The axes of the graph at the shape of a batch of these samples."""
        shapes = tuple(array.shape for array in samples.batches[0])
        if shapes not in self._named:
            self._named[shapes] = named_axes(self.trace(samples.batches[0]))
        return self._named[shapes]

    @cached_property
    def dense_loss(self) -> float:
        """The dense model's mean loss on what is held out, or on all where that is one batch."""
        plan = PrunePlan({})
        judged = self.held_out if len(self._all.batches) > 1 else self.samples
        return float(self.losses(plan, pruner(self.named, plan), judged).mean())

    def unlike(self, evaluation: Mapping) -> list[str]:
        """Notes on text that is evaluated on, given the dense model's losses there (`caution`)."""
        if not self._named:  # nothing was calibrated
            return []
        nats, size = self.dense_loss, self.bytes_per_token
        mine = {"nats_per_token": nats, "nats_per_byte": nats / size if size else None}
        return another_text(mine, evaluation)

    def loss(self, b: int, outputs: list[mx.array]) -> mx.array:
        return self.samples.loss(b, outputs).sum()

    def statistics(self, dims: list[Dimension]) -> Statistics:
        """What is measured at the places that read `dims`; collected once."""
        key = tuple(d.name for d in dims)
        if key not in self._collected:
            self._collected[key] = self._collect(key)
        return self._collected[key]

    def _collect(self, dims: tuple[str, ...]) -> Statistics:
        asked = needs(self.options.importance)
        full = self.options.refit or "second" in asked
        store, stages = self._store(dims), set()

        def told(stage: str, done: int, total: int) -> None:
            stages.add(stage)
            self.progress(stage, done, total)

        found = calibrate(
            self.named, self.batches, self.fetch, dims=dims,
            loss=self.loss if "gradients" in asked else None,
            second=self._second(dims, store) if full else None, masks=self.samples.masks,
            store=store, progress=told,
        )  # fmt: skip
        if store is not None:
            self._tell(store, "made and kept in" if stages else "read from")
            tidy(self.kept, keep=store.folder.name)
        return found

    def _tell(self, store: Store, how: str) -> None:
        """Say what became of the store."""
        if store.complete:
            size = sum(file.stat().st_size for file in store.folder.iterdir())
            self.notes.append(f"statistics {how} {self.kept}: {size / 1e6:,.3g} MB")
        self.notes += [note for note in store.notes if note not in self.notes]

    def key(self, *parts: str) -> str:
        """A name for this model, these samples, and `parts`."""
        arrays = [np.array(array) for batch in self._all.batches for array in batch]
        return store_key(*self.identity(), *parts, *arrays, np.asarray(self._all.targets))

    def _store(self, dims: tuple[str, ...]) -> Store | None:
        return None if self.kept is None else Store(self.kept, self.key(*dims))

    def _second(self, dims: tuple[str, ...], store: Store | None) -> MutableMapping:
        """In memory where they are small; a store keeps its own."""
        places = {p.second_key: p for each in consumers(self.named, dims).values() for p in each}
        small = sum(p.second_bytes for p in places.values()) < SPILLED
        return {} if small or store is not None else OnDisk()

    def sources(self, dims: list[Dimension]) -> Sources:
        """What criteria score by."""
        seed = self.options.seed
        return Sources(
            self.named, tuple(dims), self.fetch, self.statistics(dims), seed=seed
        )

    def scores(self, dims: list[Dimension], name: str) -> Scores:
        """Scores of unit dimensions by a criterion, calibrated if it needs that."""
        return criterion(name)(self.sources(dims))

    def closed_form(self, plan: PrunePlan, dims: list[Dimension], *, quick: bool = False) -> Cutter:
        """How a plan cuts, refitted by the statistics at hand if the options say so."""
        if not self.options.refit or not any(d.name in plan.cuts for d in dims):
            return pruner(self.named, plan)
        how = {"lambdas": USUAL} if quick else {"hold": True}
        return refit(self.named, plan, self.statistics(dims), **how)

    @property
    def unit(self) -> str:
        """That of `losses`."""
        return self.samples.task.error_unit or self.samples.task.unit

    def losses(self, plan: PrunePlan, cut: Cutter, samples: Samples) -> np.ndarray:
        """What plans are compared by, of each of `samples` after a plan: its loss, or where the
        task has them its errors."""
        if samples.task.errors is not None:
            return samples.task.errors(self._answers(plan, cut, samples), samples.targets)
        return by_sequence(
            self.at(samples), plan, cut, self.fetch, samples.batches,
            lambda b, outputs: np.array(samples.loss(b, outputs)),
        )  # fmt: skip

    def _answers(self, plan: PrunePlan, cut: Cutter, samples: Samples) -> np.ndarray:
        return by_sequence(
            self.at(samples), plan, cut, self.fetch, samples.batches, samples.answers
        )

    def lost(
        self, plan: PrunePlan, dims: list[Dimension], samples: Samples | None = None
    ) -> np.ndarray:
        """The loss of each sample, held out unless others are given, after a plan and its refit."""
        cut = self.closed_form(plan, dims, quick=True)
        return self.losses(plan, cut, self.held_out if samples is None else samples)

    def scored(self, plan: PrunePlan, dims: list[Dimension], samples: Samples) -> float:
        """The task's own measure on `samples` after a plan and its refit."""
        cut = self.closed_form(plan, dims, quick=True)
        return samples.score(self._answers(plan, cut, samples))

    def fitted(self, plan: PrunePlan, dims: list[Dimension]) -> tuple[Cutter, dict]:
        """The cutter to save with, and what to record of it: how it was fitted, and why so."""
        if self._fit is None or self._fit[0].cuts != plan.cuts:
            self._fit = plan, self._fitted(plan, dims)
        return self._fit[1]

    def fittest(self, plans: Sequence[PrunePlan], dims: list[Dimension]) -> PrunePlan:
        """The plan that loses least on held-out samples once it is `fitted`."""
        if len(plans) == 1:
            return plans[0]
        lowest = math.inf
        for plan in plans:
            cut, record = self._fitted(plan, dims)
            judged = record.get("held_out", {}).get(record.get("method"))
            loss = self.losses(plan, cut, self.held_out).mean() if judged is None else judged
            if loss < lowest:
                lowest, self._fit = loss, (plan, (cut, record))
        return self._fit[0]

    def _fitted(self, plan: PrunePlan, dims: list[Dimension]) -> tuple[Cutter, dict]:
        """Of the closed form and the sequential refit that follows it, the one with the lowest
        held-out loss, or the plain cut where that is better for certain. Where only layers are
        dropped there is nothing for the closed form to do."""
        if not self.options.refit:
            return self._recalibrated(plan)
        closed, units = self.closed_form(plan, dims), any(d.name in plan.cuts for d in dims)
        if units:
            unit = "tokens" if self.samples.task is NEXT_TOKEN else "rows"
            few = too_few(self.named, plan, self.statistics(dims), unit)
            self.notes += [few] if few and few not in self.notes else []
        if len(self._all.batches) < 2:
            self.notes += [UNMENDED] if plan.cuts and not units else []
            return closed, {"method": "closed form"} if units else {}
        cuts: dict[str, Cutter] = {AS_IT_IS: Fitted(pruner(self.named, plan))}
        cuts |= {"closed form": closed} if units else {}
        if plan.cuts and can_run(self.named, plan):
            found = refit_in_sequence(
                self.named, plan, self.batches, self.fetch, held_out=self.held_out.batches,
                masks=self._all.masks, start=closed, progress=self.progress,
            )  # fmt: skip
            cuts |= {"sequential": found} if units or found.fitted else {}
        if len(cuts) == 1:
            return closed, {}
        best, judged = self._best(plan, cuts)
        if units and best == "sequential":
            closed.forget(cuts[best].fitted)
        return cuts[best], {"method": best, "held_out": judged}

    def _best(self, plan: PrunePlan, cuts: Mapping[str, Cutter]) -> tuple[str, dict[str, float]]:
        """The name of a cut, and the mean held-out losses of all.

        The fitted one that loses least, as fitting is known to help; the plain one only where that
        is told to be better (95 %, paired).
        """
        losses = {name: self.losses(plan, cut, self.held_out) for name, cut in cuts.items()}
        judged = {name: float(each.mean()) for name, each in losses.items()}
        best = min((name for name in cuts if name != AS_IT_IS), key=judged.get)
        if is_less(losses[AS_IT_IS], losses[best], seed=self.options.seed):
            best = AS_IT_IS
        return best, judged

    def _recalibrated(self, plan: PrunePlan) -> tuple[Cutter, dict]:
        """No weight is fitted; batch norms are measured anew where that is better."""
        plain = pruner(self.named, plan)
        if not batch_norms(self.named.graph) or len(self._all.batches) < 2:
            return plain, {}
        anew = recalibrated(self.named, plan, self.batches, self.fetch, progress=self.progress)
        cuts = {AS_IT_IS: Fitted(plain), "batch norms anew": anew}
        best, judged = self._best(plan, cuts)
        return cuts[best], {"method": best, "held_out": judged}


def fit(planned) -> None:
    """Fit the kept weights of a plan anew, where there are samples to do it with. Only once.

    `planned` has a plan, the `dims` it cuts and the `calibration` it stands on; its `cut` and
    `refit` are set.
    """
    calibration = planned.calibration
    if planned.cut is None and planned.plan.cuts and calibration and calibration.read is not None:
        planned.cut, planned.refit = calibration.fitted(planned.plan, planned.dims)
