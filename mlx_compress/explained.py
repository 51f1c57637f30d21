"""Which input tokens a teacher's next-token candidates rest on, asked once for each window.

A window has `attribution_views` views: a position, drawn by the seed, and there the teacher's
likeliest token, or in every second view the next likeliest. What blocks of the teacher these rest
on is asked of a few windows.

N windows, P views, B rows of a batch, T tokens of a window.
"""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from .attribution import attribution, block_shares, candidates
from .blocks import blocks_of
from .execute import run
from .graph import Graph, trace
from .heads import Head
from .options import DistillOptions
from .training_text import Text

RANKS = 2
# Of one view: positions and tokens [B], and the teacher's map [B, T - 1].
View = tuple[mx.array, mx.array, mx.array]


@dataclass
class Traced:
    """A language model, and its graph at the shape of each batch that it was asked about."""

    module: nn.Module
    _graphs: dict[tuple, Graph] = field(default_factory=dict)

    def graph(self, inputs_BT: mx.array, head: Head | None = None) -> Graph:
        """From tokens to logits; without its `head` to what that reads."""
        key = inputs_BT.shape, head is None
        if key not in self._graphs:
            with nullcontext() if head is None else head.taken_off():
                self._graphs[key] = trace(self.module, inputs_BT)
        return self._graphs[key]

    def tapped(
        self, inputs_BT: mx.array, taps: Iterable[int] = (), head: Head | None = None
    ) -> tuple[mx.array, dict[int, mx.array]]:
        """What the graph gives, and the values inside it at these ids."""
        graph = self.graph(inputs_BT, head)
        outputs, values = run(graph, [inputs_BT], self.weights, taps=taps)
        return outputs[0], values

    def attribution(self, inputs_BT, positions_B, tokens_B, *, steps: int = 1) -> mx.array:
        """What the logit of each row's token at its position rests on, [B, T - 1]."""
        return attribution(
            self.graph(inputs_BT), [inputs_BT], self.weights, candidates(positions_B, tokens_B),
            steps=steps,
        )  # fmt: skip

    def block_shares(self, inputs_BT, positions_B, tokens_B) -> mx.array:
        """How much that logit rests on each block, [B, L]."""
        graph = self.graph(inputs_BT)
        explain = candidates(positions_B, tokens_B)
        return block_shares(graph, [inputs_BT], self.weights, explain, blocks_of(graph))

    @property
    def weights(self) -> Mapping[str, mx.array]:
        return dict(tree_flatten(self.module.parameters()))


@dataclass
class Explainer:
    """Asks `teacher` about windows of a text, and remembers what it said in float16."""

    teacher: Traced
    options: DistillOptions
    _held: dict[tuple[str, int, int], tuple[int, np.ndarray]] = field(default_factory=dict)

    def view(self, text: Text, rows: np.ndarray, number: int) -> View:
        """One view of each of some windows."""
        positions_B = np.array([self._position(row, number, text) for row in rows], np.int32)
        keys = [(text.name, int(row), number) for row in rows]
        if any(key not in self._held for key in keys):
            inputs_BT = mx.array(text.tokens[rows, :-1])
            answers = self._ask(inputs_BT, mx.array(positions_B), number % RANKS)
            self._held |= dict(zip(keys, answers, strict=True))
        tokens, maps = zip(*(self._held[key] for key in keys), strict=True)
        return mx.array(positions_B), mx.array(tokens), mx.array(np.stack(maps)).astype(mx.float32)

    def token_weights(self, text: Text, rows: np.ndarray) -> mx.array:
        """How much all views of a window rest on each of its tokens, [B, T], 1 on average.

        Nothing can rest on the last token, which counts 1.
        """
        maps = sum(self.view(text, rows, n)[2] for n in range(self.options.attribution_views))
        shares = maps / maps.mean(axis=-1, keepdims=True)
        return mx.concatenate([shares, mx.ones((len(rows), 1))], axis=1)

    def block_shares(self, text: Text, count: int) -> mx.array:
        """How much views of the first `count` windows rest on each block of the teacher, [N, L]."""
        found, size = [], self.options.batch_size
        for start in range(0, min(count, len(text.tokens)), size):
            rows = np.arange(start, min(start + size, len(text.tokens)))
            for number in range(self.options.attribution_views):
                view = self.view(text, rows, number)[:2]
                found.append(self.teacher.block_shares(mx.array(text.tokens[rows, :-1]), *view))
                mx.eval(found[-1])
        return mx.concatenate(found)

    def _position(self, row: int, number: int, text: Text) -> int:
        """In the last three quarters, where there is something to rest on."""
        length = text.tokens.shape[1] - 1
        rng = np.random.default_rng([self.options.seed, int(row), number])
        return int(rng.integers(length // 4, length))

    def _ask(self, inputs_BT, positions_B, rank: int) -> list[tuple[int, np.ndarray]]:
        logits_BTV, _ = self.teacher.tapped(inputs_BT)
        logits_BV = logits_BTV[mx.arange(len(positions_B)), positions_B]
        tokens_B = mx.argsort(-logits_BV, axis=-1)[:, rank]
        steps = self.options.attribution_steps
        maps = self.teacher.attribution(inputs_BT, positions_B, tokens_B, steps=steps)
        return list(zip(tokens_B.tolist(), np.array(maps.astype(mx.float16)), strict=True))
