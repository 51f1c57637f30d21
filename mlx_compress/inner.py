"""A student held to its teacher inside: what its blocks hand on, and where attention looks.

A student's block is compared with the teacher's that lies as deep: of S and of L blocks, block s
with the one that ends behind (s + 1) L / S of them, rounded up, so the last with the last. What
blocks hand on is compared by its direction (1 - cosine), since a few entries of a decoder's
residual stream are hundreds of times the others; widths that differ get a matrix that is learnt
along, and left behind.

Romero et al., 2014 (FitNets), https://arxiv.org/abs/1412.6550;
Jiao et al., 2019 (TinyBERT), https://arxiv.org/abs/1909.10351

B rows of a batch, T tokens, D and E widths of student and teacher, S blocks of the student.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import mlx.core as mx

from .blocks import Block, blocks_of
from .errors import InputError
from .graph import Graph
from .matching import attention_loss, hidden_loss
from .options import DistillOptions
from .training_state import Weights

PROJECTION = " projection "  # before a block's number, beside parameters' paths without spaces
Values = Mapping[int, mx.array]  # of a graph, by id


@dataclass
class Matching:
    """How the values inside a student's graph are compared with those in a teacher's.

    `weights` [S] are those of the blocks, 1 on average. `projections` are what is learnt along.
    Raises `InputError` for graphs in which there is nothing to compare.
    """

    own: Graph
    theirs: Graph
    options: DistillOptions
    weights: mx.array | None = None
    pairs: list[tuple[Block, Block]] = field(init=False)
    projections: Weights = field(init=False)

    def __post_init__(self):
        own, theirs = blocks_of(self.own), blocks_of(self.theirs)
        if not own or not theirs:
            raise InputError("--hidden-weight, --attention-weight: no blocks were found to match.")
        ends = [group[-1] for group in groups(len(own), len(theirs))]
        self.pairs = [(block, theirs[end]) for block, end in zip(own, ends, strict=True)]
        if self.options.attention_weight and not any(a.maps and b.maps for a, b in self.pairs):
            raise InputError("--attention-weight: no block of both models has attention maps.")
        self.projections = {}
        for s, (a, b) in enumerate(self.pairs if self.options.hidden_weight else ()):
            width, wider = self.own.values[a.end].shape[-1], self.theirs.values[b.end].shape[-1]
            if width != wider:
                key = mx.random.split(mx.random.key(self.options.seed), len(self.pairs))[s]
                drawn = mx.random.normal((width, wider), key=key) * width**-0.5
                self.projections[f"{PROJECTION}{s}"] = drawn

    @property
    def own_taps(self) -> tuple[int, ...]:
        return tuple(i for a, _ in self.pairs for i in (a.end, *a.maps))

    @property
    def their_taps(self) -> tuple[int, ...]:
        return tuple(i for _, b in self.pairs for i in (b.end, *b.maps))

    def loss(self, own: Values, theirs: Values, mask: mx.array, projections: Weights) -> mx.array:
        """The weighted mean over blocks, a scalar, of the values of one batch.

        `mask` [B, T] says which tokens count; values without tokens count whole.
        """
        total = mx.zeros(())
        for s, (a, b) in enumerate(self.pairs):
            found = mx.zeros(())
            if self.options.hidden_weight:
                found = self.options.hidden_weight * hidden_loss(
                    own[a.end], theirs[b.end], _over(mask, own[a.end]), measure="cosine",
                    projection_DE=projections.get(f"{PROJECTION}{s}"),
                )  # fmt: skip
            if self.options.attention_weight and a.maps:
                maps = [attention_loss(_heads(own[i]), _heads(theirs[j]), mask)
                        for i, j in zip(a.maps, b.maps, strict=False)]  # fmt: skip
                found = found + self.options.attention_weight * sum(maps) / max(1, len(maps))
            total = total + (found if self.weights is None else self.weights[s] * found)
        return total / len(self.pairs)


def groups(own: int, theirs: int) -> list[range]:
    """The teacher's blocks that each of the student's stands for; it is matched with the last.

    >>> groups(2, 5)
    [range(0, 3), range(3, 5)]
    """
    ends = [-(-(s + 1) * theirs // own) for s in range(own)]
    return [range(min(start, end - 1), end) for start, end in zip([0, *ends], ends, strict=False)]


def block_weights(shares_BL: mx.array, count: int) -> mx.array:
    """Weights [S] of a student's blocks by what the teacher's answers rest on, 1 on average.

    `shares_BL` are those of the teacher's blocks, as of `attribution.block_shares`.
    """
    shares = shares_BL.mean(axis=0)
    sums = mx.stack([shares[mx.array(list(each))].sum() for each in groups(count, len(shares))])
    return sums / sums.mean()


def only_projections(weights: Weights) -> Weights:
    return {path: array for path, array in weights.items() if path.startswith(PROJECTION)}


def without_projections(weights: Weights) -> Weights:
    return {path: array for path, array in weights.items() if not path.startswith(PROJECTION)}


def _over(mask: mx.array, value: mx.array) -> mx.array:
    """A mask for all but the last axis of a value."""
    return mask if mask.shape == value.shape[:-1] else mx.ones(value.shape[:-1])


def _heads(maps: mx.array) -> mx.array:
    """[B, H, T, S], where heads may stand in groups."""
    return maps.reshape(len(maps), -1, *maps.shape[-2:])

