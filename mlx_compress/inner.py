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

import math
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
WEIGHED = 16  # windows or samples by whose attributions blocks are weighed
Values = Mapping[int, mx.array]  # of a graph, by id
Ids = tuple[int, int]  # of a value of the student, and of the teacher's


@dataclass(frozen=True)
class Pair:
    """What is compared of two blocks: what they hand on, and their attention maps."""

    states: tuple[Ids, ...]
    maps: tuple[Ids, ...]


@dataclass
class Matching:
    """How the values inside a student's graph are compared with those in a teacher's.

    `weights` [S] are those of the blocks, 1 on average. Values of shapes that cannot be compared
    are left out. Raises `InputError` where nothing is left.
    """

    own: Graph
    theirs: Graph
    options: DistillOptions
    weights: mx.array | None = None
    pairs: list[Pair] = field(init=False)

    def __post_init__(self):
        own, theirs = blocks_of(self.own), blocks_of(self.theirs)
        if not own or not theirs:
            raise InputError("--hidden-weight, --attention-weight: no blocks were found to match.")
        ends = [group[-1] for group in groups(len(own), len(theirs))]
        self.pairs = [self._pair(a, theirs[end]) for a, end in zip(own, ends, strict=True)]
        hidden, attention = self.options.hidden_weight, self.options.attention_weight
        if hidden and not any(pair.states for pair in self.pairs):
            raise _nothing("--hidden-weight", "outputs")
        if attention and not any(pair.maps for pair in self.pairs):
            raise _nothing("--attention-weight", "attention maps")

    def _pair(self, a: Block, b: Block) -> Pair:
        def alike(ids: Ids, axes: slice) -> bool:
            own, theirs = self.own.values[ids[0]].shape, self.theirs.values[ids[1]].shape
            return own[axes] == theirs[axes]

        states = [(a.end, b.end)] if self.options.hidden_weight else []
        maps = []
        if self.options.attention_weight and len(a.maps) == len(b.maps):
            maps = list(zip(a.maps, b.maps, strict=True))
        return Pair(
            tuple(ids for ids in states if alike(ids, slice(-1))),
            tuple(ids for ids in maps if alike(ids, slice(-2, None))),
        )

    def start(self) -> Weights:
        """What is learnt along, as it is before the first step: a projection by block."""
        found = {}
        keys = mx.random.split(mx.random.key(self.options.seed), len(self.pairs))
        for s, pair in enumerate(self.pairs):
            for i, j in pair.states:
                width, wider = self.own.values[i].shape[-1], self.theirs.values[j].shape[-1]
                if width != wider:
                    drawn = mx.random.normal((width, wider), key=keys[s]) * width**-0.5
                    found[f"{PROJECTION}{s}"] = drawn
        return found

    @property
    def own_taps(self) -> tuple[int, ...]:
        return tuple(i for pair in self.pairs for i, _ in (*pair.states, *pair.maps))

    @property
    def their_taps(self) -> tuple[int, ...]:
        return tuple(j for pair in self.pairs for _, j in (*pair.states, *pair.maps))

    def loss(
        self, own: Values, theirs: Values, mask: mx.array | None, projections: Weights
    ) -> mx.array:
        """The weighted mean over blocks, a scalar, of the values of one batch.

        `mask` [B, T] says which tokens count; values without tokens count whole.
        """
        total = mx.zeros(())
        for s, pair in enumerate(self.pairs):
            found = mx.zeros(())
            for i, j in pair.states:
                apart = hidden_loss(
                    own[i], theirs[j], _counts(mask, own[i].shape[:-1]), measure="cosine",
                    projection_DE=projections.get(f"{PROJECTION}{s}"),
                )  # fmt: skip
                found = found + self.options.hidden_weight * apart
            for i, j in pair.maps:
                maps = _heads(own[i])
                queries = _counts(mask, (maps.shape[0], maps.shape[2]))
                apart = attention_loss(maps, _heads(theirs[j]), queries)
                found = found + self.options.attention_weight * apart / len(pair.maps)
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


def inside_bytes(graph: Graph, options: DistillOptions) -> int:
    """What is held of the teacher's values, in float32, at the shape of `graph`."""
    blocks = blocks_of(graph)
    ids = [block.end for block in blocks if options.hidden_weight]
    ids += [i for block in blocks if options.attention_weight for i in block.maps]
    return sum(4 * math.prod(graph.values[i].shape) for i in ids)


def only_projections(weights: Weights) -> Weights:
    return {path: array for path, array in weights.items() if path.startswith(PROJECTION)}


def without_projections(weights: Weights) -> Weights:
    return {path: array for path, array in weights.items() if not path.startswith(PROJECTION)}


def _nothing(flag: str, what: str) -> InputError:
    return InputError(
        f"{flag}: no block of the student has {what} of the shape of those of the teacher's "
        "block; leave it out."
    )


def _counts(mask: mx.array | None, shape: tuple[int, ...]) -> mx.array:
    """A mask for a value of `shape` [..., B, T]; ones where it has no such axes."""
    if mask is not None and shape[-2:] == mask.shape:
        return mx.broadcast_to(mask, shape)
    return mx.ones(shape)


def _heads(maps: mx.array) -> mx.array:
    """[B, H, T, S], where heads may stand in groups."""
    return maps.reshape(len(maps), -1, *maps.shape[-2:])
