"""Residual branches: the terms f(x) of sums x + f(x), found from the graph.

A sum of two activations is residual if one of them, or the stream that it continues, is what the
other one was computed from. Casts and clips of the stream (as some models do in half precision)
are seen through. Sums within a branch are not listed.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import mlx.core as mx

from .axes import NamedAxes, reads
from .dims import leaves
from .execute import window
from .graph import Node, dynamic_values

Entry = tuple[str, int]  # a module list and an index into it


@dataclass
class Term:
    """One term of a residual sum, with the module list entry whose parameters compute it.

    `stream`, `value` and `total` are the ids of x, f(x) and of the sum. `inner` holds the positions
    of the nodes that compute f(x), `starts` the values of the stream that these read, `joins` the
    positions of the additions between f(x) and the sum. `foreign` is a parameter of something
    else that f(x) needs, None if there is none.
    """

    stream: int
    value: int
    total: int
    inner: set[int]
    starts: set[int]
    joins: set[int]
    entry: Entry | None
    foreign: str | None


def entry_of(path: str) -> Entry | None:
    """The module list entry that a parameter lies in: its path up to the first number.

    >>> entry_of("model.layers.3.mlp.experts.0.weight")
    ('model.layers', 3)
    """
    parts = path.split(".")
    for k, part in enumerate(parts):
        if part.isdigit() and k:
            return ".".join(parts[:k]), int(part)
    return None


def spell(entry: Entry) -> str:
    return f"{entry[0]}.{entry[1]}"


class Residuals:
    """The residual terms of a graph, and questions about them."""

    def __init__(self, named: NamedAxes):
        self.named, self.graph = named, named.graph
        self.producer = {out: k for k, n in enumerate(self.graph.nodes) for out in n.outputs}
        self.readers = reads(self.graph)
        self.positions = {id(node): k for k, node in enumerate(self.graph.nodes)}
        self.path = {i: path for path, i in self.graph.parameters.items()}
        self.dynamic = dynamic_values(self.graph)
        self.behind: dict[int, int] = {}  # a sum, or a cast of the stream -> the stream before it
        found = self._sums()
        self.sums = {total for total, _, _ in found}
        self.terms = self._terms(found)

    def chain(self, value: int | None) -> Iterator[int]:
        """A value of the stream and those that it continues, latest first."""
        while value is not None:
            yield value
            value = self.behind.get(value)

    def uncast(self, value: int) -> int:
        """A value seen through casts and clips."""
        while (source := self._cast_of(value)) is not None:
            value = source
        return value

    def reader_positions(self, path: str) -> set[int]:
        """The positions of the nodes that read a parameter."""
        nodes = self.readers.get(self.graph.parameters[path], ())
        return {self.positions[id(node)] for node in nodes}

    def leak(self, term: Term, allowed: set[int]) -> str | None:
        """Who reads values of a term from elsewhere than the positions in `allowed`."""
        touched = {i for i, path in self.path.items() if entry_of(path) == term.entry}
        made: list[int] = []
        for k in sorted(term.inner):
            node = self.graph.nodes[k]
            if touched.intersection(node.inputs):
                touched.update(node.outputs)
                made += node.outputs
        for value in made:
            if value in self.graph.outputs:
                return "the model's output"
            for node in self.readers.get(value, ()):
                if self.positions[id(node)] not in allowed:
                    return self._where(node)
        return None

    def mixes_positions(self, term: Term) -> bool:
        """Whether an output position of a term depends on other positions of the stream.

        It does where a product of two activations, a scan, a mean, a slice (a recurrence is made
        of these) or a convolution wider than 1 runs along positions.
        """
        where, moving = _positions(self.named), set(term.starts)
        for k in sorted(term.inner):
            node = self.graph.nodes[k]
            if moving.intersection(node.inputs):
                moving.update(node.outputs)
                if self._mixes(node, where):
                    return True
        return False

    # ---- the sums

    def _terms(self, sums: list[tuple[int, int, int]]) -> list[Term]:
        found: list[Term] = []
        covered: set[int] = set()
        for total, stream, other in reversed(sums):
            if self.producer[total] in covered:
                continue
            chain = set(self.chain(stream))
            terms = [self._term(stream, value, total, chain) for value in self._split(other, chain)]
            terms = [term for term in terms if term.entry is not None]
            found += reversed(terms)
            covered = covered.union(*(term.inner for term in terms if term.foreign is None))
        return found[::-1]

    def _sums(self) -> list[tuple[int, int, int]]:
        """(sum, stream, other operand) of every x + f(x), as ids.

        Each operand of a sum has a bit. `ancestry` holds the bits of what a value was computed
        from, `streams` those of the stream that it continues, itself among them.
        """
        sums = [n for n in self.graph.nodes if self._adds_activations(n)]
        operands = dict.fromkeys(self.uncast(value) for node in sums for value in node.inputs)
        bit = {value: 1 << k for k, value in enumerate(operands)}
        ancestry: dict[int, int] = {}
        streams = {value: bit.get(value, 0) for value in self.graph.inputs}
        found = []
        for node in self.graph.nodes:
            if not self.dynamic.intersection(node.inputs):
                continue
            seen = 0
            for value in node.inputs:
                seen |= ancestry.get(value, 0) | bit.get(value, 0)
            if self._adds_activations(node):
                a, b = node.inputs
                a_leads = bool(streams[a] & ancestry.get(b, 0))
                if a_leads != bool(streams[b] & ancestry.get(a, 0)):
                    stream, other = (a, b) if a_leads else (b, a)
                    self.behind[node.outputs[0]] = stream
                    found.append((node.outputs[0], stream, other))
            for value in node.outputs:
                source = self._cast_of(value)
                if source is not None:
                    self.behind[value] = source
                ancestry[value] = seen
                streams[value] = bit.get(value, 0) | streams.get(self.behind.get(value), 0)
        return found

    def _adds_activations(self, node: Node) -> bool:
        return node.op == "Add" and self.dynamic.issuperset(node.inputs)

    def _cast_of(self, value: int) -> int | None:
        """What a value is a cast or a clip of."""
        if value not in self.producer:
            return None
        node = self.graph.nodes[self.producer[value]]
        moving = [i for i in node.inputs if i in self.dynamic]
        if node.op not in ("AsType", "Maximum", "Minimum") or len(moving) != 1:
            return None
        return moving[0]

    # ---- the terms of a sum

    def _split(self, value: int, chain: set[int]) -> list[int]:
        """The terms that are added up before they join the stream, if each has parameters."""
        node = self.graph.nodes[self.producer[value]] if value in self.producer else None
        if node is None or value in self.behind or not self._adds_activations(node):
            return [value]
        terms = [term for operand in node.inputs for term in self._split(operand, chain)]
        entries = {self._entry(self._closure(term, chain)[0]) for term in terms}
        return terms if len(entries) == 1 and None not in entries else [value]

    def _term(self, stream: int, value: int, total: int, chain: set[int]) -> Term:
        inner, starts = self._closure(value, chain)
        entry = self._entry(inner)
        others = [path for path in self._paths(inner) if entry_of(path) != entry]
        foreign = next(filter(entry_of, others), next(iter(others), None))
        return Term(stream, value, total, inner, starts, self._joins(value, total), entry, foreign)

    def _closure(self, value: int, chain: set[int]) -> tuple[set[int], set[int]]:
        """Positions of the nodes that compute a value from the stream, and where they leave it."""
        inner: set[int] = set()
        starts: set[int] = set()
        queue = [value]
        while queue:
            here = queue.pop()
            if here in chain:
                starts.add(here)
            elif here in self.producer and self.producer[here] not in inner:
                inner.add(self.producer[here])
                queue += self.graph.nodes[self.producer[here]].inputs
        return inner, starts

    def _entry(self, inner: set[int]) -> Entry | None:
        """The list entry whose parameters are read last."""
        for k in sorted(inner, reverse=True):
            for path in self._paths([k]):
                if entry_of(path):
                    return entry_of(path)
        return None

    def _paths(self, positions: Iterable[int]) -> list[str]:
        read = {i for k in positions for i in self.graph.nodes[k].inputs}
        return [self.path[i] for i in sorted(read) if i in self.path]

    def _joins(self, value: int, total: int) -> set[int]:
        joins: set[int] = set()
        while value != total:
            join = min(self.positions[id(n)] for n in self.readers[value] if n.op == "Add")
            joins.add(join)
            value = self.graph.nodes[join].outputs[0]
        return joins

    def _where(self, node: Node) -> str:
        """The list entry, downstream of a node, that is nearest to it."""
        queue = [node]
        for here in queue:
            static = [v for v in here.inputs if v not in self.dynamic]
            inner = set().union(*(self._closure(value, set())[0] for value in static))
            for path in self._paths([self.positions[id(here)], *inner]):
                if entry_of(path):
                    return spell(entry_of(path))
            later = (n for value in here.outputs for n in self.readers.get(value, ()))
            queue += [n for n in later if n not in queue]
        return "another part of the model"

    # ---- positions

    def _mixes(self, node: Node, where: set) -> bool:
        axes, x, out = self.named.inference.axes, node.inputs[0], node.outputs[0]

        def runs_along(value: int, k: int) -> bool:
            return bool(where.intersection(leaves(axes[value][k])))

        if node.op == "Convolution":
            return any(n > 1 for n in self.graph.values[node.inputs[1]].shape[1:-1])
        if node.op == "Matmul" and self.dynamic.issuperset(node.inputs):
            return not any(runs_along(out, k) for k in range(len(axes[out]) - 2))
        if node.op in ("Scan", "Split"):
            return runs_along(x, node.attributes[1])
        if node.op == "Reduce":
            return any(runs_along(x, k) for k in node.attributes[1])
        if node.op == "Slice":
            bounds = zip(self.graph.values[x].shape, *node.attributes, strict=True)
            cut = [len(range(n)[window(n, a, b, step)]) < n for n, a, b, step in bounds]
            return any(less and runs_along(x, k) for k, less in enumerate(cut))
        return False


def _positions(named: NamedAxes) -> set:
    """The variables of the inputs' position axes: not of the batch, nor of a vector's entries."""
    out = set()
    for value in named.graph.inputs:
        vectors = mx.issubdtype(named.graph.values[value].dtype, mx.floating)
        axes = named.inference.axes[value]
        for axis in axes[1:-1] if vectors else axes[1:]:
            out.update(leaves(axis))
    return out
