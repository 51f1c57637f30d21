"""Distillation of programs: a student learns a teacher's class scores, or its embeddings.

S samples, R rows (one of each sample, or two of a pair), C classes, E width of an embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import mlx.core as mx
import numpy as np

from .attribution import attribution, block_shares, misalignment
from .batch_norm import batch_norms
from .blocks import blocks_of
from .errors import InputError
from .execute import run
from .graph import Graph
from .inner import WEIGHED, Matching, Values, block_weights
from .losses import LOSSES
from .matching import HIDDEN_MEASURES
from .options import DIVERGENCES, EMBEDDING_LOSSES, DistillOptions, among
from .program import Program
from .samples import Samples
from .stream import Progress, silent
from .training import batch_rows
from .training_state import Weights


@dataclass
class Answers:
    """The float weights of `student`, and how far its answers on `train` are from the teacher's.

    A `training.Objective`. Class scores are compared by a divergence of their distributions,
    embeddings by "cosine" or "mse". The teacher is asked once for each sample, and only where what
    is inside it is matched again at each step. With the attribution "align" what pairs are alike
    by, or a class is scored by, is held to what it is to the teacher; with "weights" blocks that
    are matched count as much as that rests on them. Statistics of batch norms stay as they are.
    Held out are the task's own `loss` and `score`, and the `divergence`. Raises `InputError` for a
    loss that does not suit, and where teacher and student answer in other shapes.
    """

    student: Program
    teacher: Program
    train: Samples
    held_out: Samples
    options: DistillOptions
    progress: Progress = silent

    def __post_init__(self):
        self.options = replace(self.options, batch_size=self.train.size)
        kinds = EMBEDDING_LOSSES if self.train.task.embeds else DIVERGENCES
        among("--loss", (self.loss,), kinds)
        self.matching = None
        if self.options.looks_inside:
            self.matching = Matching(self.graph, self._teacher[0], self.options)
        self.told = asked(self.teacher, self.train, self.progress)
        self.told_held_out = asked(self.teacher, self.held_out)
        self._maps: dict[int, np.ndarray] = {}
        own = asked(self.student, self.held_out.split(1)[0]).shape[1:]
        theirs = self.told_held_out.shape[1:]
        if own != theirs:
            raise InputError(
                f"--teacher: answers in the shape {theirs}, the student in {own}; both need the "
                "same classes, or embeddings of one width."
            )
        if self.matching is not None and self.options.attribution == "weights":
            self.matching.weights = self._block_weights(len(self.matching.pairs))

    def _block_weights(self, count: int) -> mx.array:
        """How much the student's blocks count, [S]."""
        graph, weights = self._teacher
        blocks, found, size = blocks_of(graph), [], self.train.size
        for b in range(min(len(self.train.batches), -(-WEIGHED // size))):
            inputs = self.train.batches[b]
            explain = partial(_explain, self.train, inputs, self.told[b * size : (b + 1) * size])
            found.append(block_shares(graph, inputs, weights, explain, blocks))
            mx.eval(found[-1])
        return block_weights(mx.concatenate(found), count)

    def _explained(self, batch: Samples, places: np.ndarray, theirs: mx.array) -> mx.array:
        """What the teacher's answers to these samples rest on, [S, rows, T]; asked once for each,
        and remembered in float16."""
        if any(place not in self._maps for place in places):
            (graph, weights), inputs = self._teacher, batch.batches[0]
            explain = partial(_explain, batch, inputs, theirs)
            steps = self.options.attribution_steps
            found = attribution(graph, inputs, weights, explain, steps=steps)
            maps = np.array(_rows_of(batch, found).astype(mx.float16))
            self._maps |= dict(zip(places.tolist(), maps, strict=True))
        return mx.array(np.stack([self._maps[p] for p in places.tolist()])).astype(mx.float32)

    @property
    def loss(self) -> str:
        return self.options.loss or loss_of(self.train)

    @property
    def judged_by(self) -> str:
        return "loss" if self.options.hard_labels == 1 else "divergence"

    def start(self) -> Weights:
        frozen = {path for norm in batch_norms(self.graph) for path in (norm.mean, norm.variance)}
        held = self.student.fetch(list(self.graph.parameters))
        own = {
            path: array.astype(mx.float32) for path, array in held.items()
            if mx.issubdtype(array.dtype, mx.floating) and path not in frozen
        }  # fmt: skip
        return own if self.matching is None else own | self.matching.start()

    def gradients(self, weights: Weights, step: int, t: float) -> tuple[mx.array, Weights]:
        batches = batch_rows(self.options, step, len(self.train))
        loss, sums = mx.zeros(()), None
        for places in batches:
            batch, theirs = self.train.pick(places), self.told[mx.array(places)]
            due = self.options.attribution == "align" and not step % self.options.attribution_every
            maps = self._explained(batch, places, theirs) if due else None
            inner = self._inside(batch.batches[0])
            loss_of = partial(self._loss, batch, theirs, maps, inner, t)
            found, grads = mx.value_and_grad(loss_of)(weights)
            sums = grads if sums is None else {p: sums[p] + grad for p, grad in grads.items()}
            loss = loss + found
            mx.eval(loss, sums)
        return loss / len(batches), {path: grad / len(batches) for path, grad in sums.items()}

    def measured(self, weights: Weights) -> dict[str, float]:
        samples, held = self.held_out, weights | self._fixed
        losses, far, answers = [], [], []
        for b, inputs in enumerate(samples.batches):
            outputs, _ = run(self.graph, inputs, held)
            first, count = b * samples.size, min(samples.size, len(samples) - b * samples.size)
            own = _by_sample(samples, inputs, outputs)[:count]
            losses.append(np.array(samples.loss(b, outputs)))
            answers.append(samples.answers(b, outputs))
            far.append(np.array(self._divergence(own, self.told_held_out[first : first + count])))
        score = samples.score(np.concatenate(answers))
        found = {"loss": float(np.concatenate(losses).mean()), "score": score}
        return found | {"divergence": float(np.concatenate(far).mean())}

    @cached_property
    def graph(self) -> Graph:
        return self.student.at(self.train.sizes(self.student))

    @cached_property
    def _teacher(self) -> tuple[Graph, Weights]:
        graph = self.teacher.at(self.train.sizes(self.teacher))
        return graph, self.teacher.fetch(list(graph.parameters))

    def _inside(self, inputs: Sequence[mx.array]) -> Values:
        """The teacher's values that are matched."""
        if self.matching is None:
            return {}
        graph, weights = self._teacher
        return run(graph, inputs, weights, taps=self.matching.their_taps)[1]

    @cached_property
    def _fixed(self) -> Weights:
        """What is not trained."""
        trained = self.start()
        others = [path for path in self.graph.parameters if path not in trained]
        return dict(self.student.fetch(others))

    def _loss(
        self, batch: Samples, theirs: mx.array, maps, inner: Values, t: float, weights: Weights
    ) -> mx.array:
        inputs, held = batch.batches[0], weights | self._fixed
        taps = self.matching.own_taps if self.matching else ()
        outputs, own_inner = run(self.graph, inputs, held, taps=taps)
        total, hard = mx.zeros(()), self.options.hard_labels
        if hard < 1:
            own = _by_sample(batch, inputs, outputs)
            total = (1 - hard) * self._divergence(own, theirs, t).mean()
        if hard:
            total = total + hard * batch.loss(0, outputs).mean()
        if maps is not None:
            found = attribution(self.graph, inputs, held, partial(_explain, batch, inputs, theirs))
            apart = misalignment(_rows_of(batch, found), maps).mean()
            total = total + self.options.attribution_weight * apart
        if self.matching is not None:
            mask = batch.masks[0] if batch.masks else None
            total = total + self.matching.loss(own_inner, inner, mask, weights)
        return total

    def _divergence(self, own: mx.array, theirs: mx.array, t: float = 1.0) -> mx.array:
        if self.train.task.embeds:
            return HIDDEN_MEASURES[self.loss](own, theirs)
        schedule = {"t": t} if self.loss == "taid" else {}
        return LOSSES[self.loss](own, theirs, temperature=self.options.temperature, **schedule)


def loss_of(samples: Samples) -> str:
    """The loss where none is chosen."""
    return EMBEDDING_LOSSES[0] if samples.task.embeds else "forward-kl"


def asked(program: Program, samples: Samples, progress: Progress = silent) -> mx.array:
    """What a program answers, float32 [S, C], or [S, rows, E] for embeddings."""
    graph = program.at(samples.sizes(program))
    weights = program.fetch(list(graph.parameters))
    answers: list[mx.array] = []
    for b, inputs in enumerate(samples.batches, 1):
        outputs, _ = run(graph, inputs, weights)
        answers.append(_by_sample(samples, inputs, outputs))
        mx.eval(answers[-1])
        progress("ask the teacher", b, len(samples.batches))
    return mx.concatenate(answers)[: len(samples)]


def _by_sample(samples: Samples, inputs: Sequence[mx.array], outputs) -> mx.array:
    compared = samples.task.compared(inputs, outputs)
    return _rows_of(samples, compared) if samples.task.embeds else compared


def _rows_of(samples: Samples, array: mx.array) -> mx.array:
    """[S, rows of a sample, ...] of [rows x S, ...]."""
    return array.reshape(samples.task.rows, -1, *array.shape[1:]).swapaxes(0, 1)


def _explain(samples: Samples, inputs, theirs: mx.array, outputs) -> mx.array:
    """What is explained: how alike a pair is, or the score of the teacher's class."""
    if samples.task.embeds:
        return samples.task.read(inputs, outputs)
    return mx.take_along_axis(outputs[0], mx.argmax(theirs, axis=-1)[:, None], axis=-1)[:, 0]
