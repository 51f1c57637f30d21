"""What of its input a model's answer rests on: gradient times input, token by token.

For a scalar z that a model computes from the embeddings e_1 .. e_T of its tokens,

    a_i = | dz/de_i * e_i |_2,        normalised to |a|_2 = 1

With `steps` above 1 the gradient is averaged over the path from 0 to e (integrated gradients).
Everything is differentiable once more, so that a student's attribution can be held to a teacher's
(AD-KD): the graph is made of primitives that have second derivatives.

Wu et al., 2023 (AD-KD), https://arxiv.org/abs/2305.10010;
Sundararajan et al., 2017, https://arxiv.org/abs/1703.01365

Of blocks it is what each adds to the residual stream, h_l - h_(l-1), times the gradient by the
stream behind it: to first order what z would lose without the block.

B rows of a batch, T tokens, D width of an embedding, L blocks, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence

import mlx.core as mx

from .blocks import Block
from .errors import InputError
from .execute import run
from .graph import SHAPE_ONLY, Graph

TINY = 1e-20


def attribution(
    graph: Graph,
    inputs: Sequence[mx.array],
    weights: Mapping[str, mx.array],
    explain: Callable[[list[mx.array]], mx.array],
    *,
    steps: int = 1,
) -> mx.array:
    """float32 [B, T]: the share of each token in what `explain(outputs)` [B] says of its row.

    Each row's scalar must depend on that row alone. Raises `InputError` for a graph that looks no
    token up in a table.
    """
    value = embedded(graph)
    _, taps = run(graph, inputs, weights, taps=(value,))
    embeddings = taps[value]

    def total(moved: mx.array, share: float) -> mx.array:
        outputs, _ = run(graph, inputs, weights, replace={value: lambda e: share * e + moved})
        return explain(outputs).astype(mx.float32).sum()

    slope, still = mx.grad(total), mx.zeros(embeddings.shape)
    slopes = sum(slope(still, (k + 1) / steps) for k in range(steps)) / steps
    squares = mx.square(slopes * embeddings).sum(axis=-1)
    return mx.sqrt(squares + TINY) * mx.rsqrt(squares.sum(axis=-1, keepdims=True) + TINY)


def block_shares(
    graph: Graph, inputs: Sequence[mx.array], weights: Mapping[str, mx.array],
    explain: Callable[[list[mx.array]], mx.array], blocks: Sequence[Block],
) -> mx.array:  # fmt: skip
    """float32 [B, L]: the share of each block in what `explain(outputs)` [B] says of its row."""
    ends = {block.end for block in blocks}
    _, taps = run(graph, inputs, weights, taps=ends | {block.start for block in blocks})

    def total(moved: dict[int, mx.array]) -> mx.array:
        replace = {i: lambda h, i=i: h + moved[i] for i in ends}
        outputs, _ = run(graph, inputs, weights, replace=replace)
        return explain(outputs).astype(mx.float32).sum()

    slopes = mx.grad(total)({i: mx.zeros(taps[i].shape) for i in ends})
    added = [slopes[b.end] * (taps[b.end] - taps[b.start]) for b in blocks]
    lost = mx.stack([mx.abs(each.reshape(len(each), -1).sum(axis=1)) for each in added], axis=1)
    return lost / (lost.sum(axis=1, keepdims=True) + TINY)


def embedded(graph: Graph) -> int:
    """The id of what the first input's tokens are looked up to, [B, T, D]."""
    tables, tokens = set(graph.parameters.values()), {graph.inputs[0]}
    for node in graph.nodes:
        if node.op == "AsType" or node.op in SHAPE_ONLY:
            for same in (tables, tokens):
                same.update(node.outputs if node.inputs[0] in same else ())
        if node.op == "Gather" and node.inputs[0] in tables and node.inputs[1] in tokens:
            return _shaped(graph, node.outputs[0], graph.values[graph.inputs[0]].shape)
    raise InputError("attribution: the model looks no token up in a table; leave it out.")


def _shaped(graph: Graph, value: int, tokens: tuple[int, ...]) -> int:
    """The first value in [B, T, D] that a gather's output is reshaped to."""
    while len(graph.values[value].shape) != len(tokens) + 1:
        value = next(
            node.outputs[0] for node in graph.nodes
            if value in node.inputs and node.op in SHAPE_ONLY
        )  # fmt: skip
    return value


def candidates(positions_B: mx.array, tokens_B: mx.array) -> Callable[[list[mx.array]], mx.array]:
    """What to explain of next-token logits [B, T, V]: that of one token at one position a row."""

    def explain(outputs: list[mx.array]) -> mx.array:
        rows = mx.arange(len(positions_B))
        return outputs[0][rows, positions_B, tokens_B]

    return explain


def misalignment(student_BT: mx.array, teacher_BT: mx.array) -> mx.array:
    """The squared distance of two normalised attributions, [B]: 0 to 2."""
    return mx.square(student_BT - teacher_BT).sum(axis=-1)
