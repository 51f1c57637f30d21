"""What is asked of a program's outputs: a loss to differentiate, and the task's own measure.

Shape suffixes: S samples, C classes, R rows (2 S: all first sentences, then all second ones),
T tokens, E width of an embedding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import numpy as np

TINY = 1e-24  # beside a squared norm: far below one that carries anything, and no division by 0


@dataclass(frozen=True)
class Task:
    """How outputs become a loss and a figure; a sample takes `rows` rows of a batch.

    `read(inputs, outputs)` gives what a sample is judged by, float32 [S, ...], differentiable;
    `loss(read, targets)` [S] in `unit`; `answer(read)` [S], of which `score(answers, targets)`
    makes the figure called `measure`. `compared(inputs, outputs)` is what a student shares with a
    teacher, a row for each row of the batch: class scores, or where the task `embeds` embeddings.
    Plans are compared by the loss, unless that can fall while the figure does: then by
    `errors(answers, targets)` [S], in `error_unit`.
    """

    measure: str
    unit: str
    read: Callable[[Sequence[mx.array], Sequence[mx.array]], mx.array]
    loss: Callable[[mx.array, mx.array], mx.array]
    answer: Callable[[mx.array], mx.array]
    score: Callable[[np.ndarray, np.ndarray], float]
    compared: Callable[[Sequence[mx.array], Sequence[mx.array]], mx.array]
    embeds: bool = False
    rows: int = 1
    errors: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    error_unit: str = ""
    higher_is_better: bool = True


def cross_entropy(logits_SC: mx.array, labels_S: mx.array) -> mx.array:
    """In nats [S]."""
    chosen_S1 = mx.take_along_axis(logits_SC, labels_S[:, None], axis=-1)
    return mx.logsumexp(logits_SC, axis=-1) - chosen_S1.squeeze(-1)


def top_1(classes_S: np.ndarray, labels_S: np.ndarray) -> float:
    """The fraction of samples whose label has the largest logit."""
    return float((classes_S == labels_S).mean())


def first_output(inputs: Sequence[mx.array], outputs: Sequence[mx.array]) -> mx.array:
    return outputs[0].astype(mx.float32)


CLASSIFICATION = Task(
    measure="top-1",
    unit="nats",
    read=first_output,
    compared=first_output,
    loss=cross_entropy,
    answer=partial(mx.argmax, axis=-1),
    score=top_1,
)


def next_token_loss(logits_STV: mx.array, tokens_ST: mx.array) -> mx.array:
    """Per sequence [S], the mean over tokens of the cross-entropy of each next token, in nats."""
    logits, targets = logits_STV[:, :-1].astype(mx.float32), tokens_ST[:, 1:, None]
    picked = mx.take_along_axis(logits, targets, axis=-1)[..., 0]
    return (mx.logsumexp(logits, axis=-1) - picked).mean(axis=-1)


NEXT_TOKEN = Task(
    measure="next token",
    unit="nats/token",
    read=lambda inputs, outputs: outputs[0],
    compared=first_output,
    loss=next_token_loss,
    answer=partial(mx.argmax, axis=-1),
    score=lambda chosen_ST, tokens_ST: float((chosen_ST[:, :-1] == tokens_ST[:, 1:]).mean()),
)


def similarity(mask: int, pooling: str) -> Task:
    """Cosines of sentence pairs against scores of 0 to 1.

    Embeddings are the first output, [R, E], or [R, T, E] and then pooled: "mean" over the tokens
    of the attention mask, which is the input of number `mask`, or "cls", the first token.
    """
    def embeddings(inputs: Sequence[mx.array], outputs: Sequence[mx.array]) -> mx.array:
        return pooled(outputs[0], inputs[mask], pooling)

    return Task(
        measure="Spearman",
        unit="squared error",
        read=lambda inputs, outputs: cosines(embeddings(inputs, outputs)),
        compared=embeddings,
        embeds=True,
        loss=squared_difference,
        answer=lambda cosines_S: cosines_S,
        score=spearman,
        rows=2,
        errors=rank_errors,
        error_unit="1 - Spearman",
    )


def pooled(states: mx.array, mask_RT: mx.array, pooling: str = "mean") -> mx.array:
    """Embeddings float32 [R, E] of states [R, T, E], or of what is pooled already."""
    states = states.astype(mx.float32)
    if states.ndim == 2:
        return states
    if pooling == "cls":
        return states[:, 0]
    weights_RT1 = mask_RT.astype(mx.float32)[..., None]
    return (states * weights_RT1).sum(axis=1) / mx.maximum(weights_RT1.sum(axis=1), 1)


def cosines(embeddings_RE: mx.array) -> mx.array:
    """Of each first sentence's embedding and its second one's, [S]."""
    first_SE, second_SE = mx.split(embeddings_RE, 2)
    norms = [mx.rsqrt((e * e).sum(axis=-1) + TINY) for e in (first_SE, second_SE)]
    return (first_SE * second_SE).sum(axis=-1) * norms[0] * norms[1]


def squared_difference(cosines_S: mx.array, scores_S: mx.array) -> mx.array:
    return mx.square(cosines_S - scores_S)


def spearman(left: np.ndarray, right: np.ndarray) -> float:
    """The correlation of ranks; ties share their mean rank. 0 where one side is all the same."""
    return float(_standard_ranks(left, right).prod(axis=0).mean())


def rank_errors(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Half the squared difference of standardised ranks, [S], of which the mean is 1 - `spearman`.

    Where one side is all the same, 1.
    """
    ranks = _standard_ranks(left, right)
    return (ranks[0] - ranks[1]) ** 2 / 2 if ranks.any() else np.ones(len(left))


def _standard_ranks(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Ranks of mean 0 and variance 1, [2, S]; all 0 where one side is all the same."""
    ranks = np.stack([_ranks(left), _ranks(right)])
    ranks -= ranks.mean(axis=1, keepdims=True)
    spread = np.sqrt((ranks**2).mean(axis=1, keepdims=True))
    return ranks / spread if spread.all() else np.zeros_like(ranks)


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]
