"""Where the blocks of a model begin and end in its graph, and the attention maps that they compute.

A block is what one entry of a module list adds to the residual stream (`residual.py`).
"""

from dataclasses import dataclass

from .axes import named_axes
from .graph import Graph
from .residual import Residuals, Term


@dataclass(frozen=True)
class Block:
    """Ids of values: the residual stream where the block begins and where it ends, both [B, T, D]
    in a model of tokens, and the maps of its attention, [B, H, T, S] or with H in two parts."""

    start: int
    end: int
    maps: tuple[int, ...]


def blocks_of(graph: Graph) -> list[Block]:
    """The blocks of a graph, in its order."""
    residuals = Residuals(named_axes(graph))
    entries: dict[tuple[str, int], list[Term]] = {}
    for term in residuals.terms:
        entries.setdefault(term.entry, []).append(term)
    return [
        Block(terms[0].stream, terms[-1].total, _maps(residuals, terms))
        for terms in entries.values()
    ]


def _maps(residuals: Residuals, terms: list[Term]) -> tuple[int, ...]:
    """Softmaxes over positions: those in a branch that mixes them, of more than [B, T, n].

    Terms may share them, as those of a projection and its adapter do.
    """
    graph = residuals.graph
    inner = set().union(*(term.inner for term in terms if residuals.mixes_positions(term)))
    nodes = [graph.nodes[k] for k in sorted(inner)]
    softmaxes = [node.outputs[0] for node in nodes if node.op == "Softmax"]
    return tuple(value for value in softmaxes if len(graph.values[value].shape) >= 4)
