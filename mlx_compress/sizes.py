"""Symbolic sizes: one graph for every batch, length and past, found by differencing traces.

A function is traced at each corner of a small grid of sizes. The graphs are the same but for some
numbers, and each of these is a multilinear form of the sizes: `past+length`, `2*batch*length`.
A graph that holds such forms (`Size`) in its shapes and attributes is *symbolic*; `instantiate`
makes it a concrete one again. What is a scalar constant at each corner, but not the same one,
becomes the output of a node `Size`, and constant positions that of an `Arange`.

Two points along each size fit every function, so one more trace off the grid must agree as well.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from numbers import Number

import mlx.core as mx

from .errors import InputError
from .graph import Graph, Node, Value

Grid = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Size:
    """A multilinear form: `items` pairs a tuple of names with the coefficient of their product."""

    items: tuple[tuple[tuple[str, ...], Fraction], ...]

    @property
    def terms(self) -> dict[tuple[str, ...], Fraction]:
        return dict(self.items)

    @property
    def names(self) -> set[str]:
        return {name for names, _ in self.items for name in names}

    def at(self, sizes: Mapping[str, int]):
        """The number at given sizes, which may be any integers that add and multiply.

        A form with fractions is taken to be whole at every size that is asked for.
        """
        common = math.lcm(*(c.denominator for _, c in self.items))
        total = sum(
            int(c * common) * math.prod(sizes[name] for name in names) for names, c in self.items
        )
        return total if common == 1 else total // common

    def __str__(self) -> str:
        return "+".join(map(_term, self.items)).replace("+-", "-") or "0"

    __repr__ = __str__


def _term(item: tuple[tuple[str, ...], Fraction]) -> str:
    names, coefficient = item
    factors = [] if names and abs(coefficient) == 1 else [str(abs(coefficient))]
    return ("-" if coefficient < 0 else "") + "*".join([*factors, *names])


def size_named(name: str) -> Size:
    return Size((((name,), Fraction(1)),))


def resolve(entry, sizes: Mapping[str, int]):
    """`entry` with every `Size` in it, at any depth of tuples and lists, as its number."""
    if isinstance(entry, Size):
        return entry.at(sizes)
    if isinstance(entry, tuple | list):
        return type(entry)(resolve(part, sizes) for part in entry)
    return entry


def is_symbolic(graph: Graph) -> bool:
    return any(isinstance(n, Size) for value in graph.values.values() for n in value.shape)


def instantiate(graph: Graph, sizes: Mapping[str, int]) -> Graph:
    """The concrete graph at given sizes."""
    return replace(
        graph,
        values={i: Value(resolve(v.shape, sizes), v.dtype) for i, v in graph.values.items()},
        nodes=tuple(replace(n, attributes=resolve(n.attributes, sizes)) for n in graph.nodes),
    )


def sizes_of(graph: Graph, shapes: Sequence[tuple[int, ...]]) -> dict[str, int]:
    """The named sizes that make the graph's inputs have these shapes.

    Raises `InputError` for shapes that no sizes give, naming the input.
    """
    found: dict[str, int] = {}
    for k, (number, shape) in enumerate(zip(graph.inputs, shapes, strict=True)):
        want = graph.values[number].shape
        if len(want) == len(shape):
            for form, n in zip(want, shape, strict=True):
                if isinstance(form, Size) and len(form.items) == 1 and len(form.names) == 1:
                    found.setdefault(*form.names, n)
        if len(want) != len(shape) or _mismatch(want, shape, found):
            raise InputError(f"input {k}: shape {tuple(shape)}, but {_words(want)} is expected.")
    return found


def _mismatch(want, shape, found) -> bool:
    return any(
        form.names <= found.keys() and form.at(found) != n if isinstance(form, Size) else form != n
        for form, n in zip(want, shape, strict=True)
    )


def _words(shape) -> str:
    return f"({', '.join(map(str, shape))})"


def solve(at: Callable[..., Graph], grids: Iterable[Grid]) -> Graph:
    """The symbolic graph of `at(**sizes)`, from the corners of the first grid that fits.

    Code may take other branches at other sizes (few tokens, many tokens), so several grids can be
    given. Raises `InputError`, saying what stands in the way, if the graphs of none are alike.
    """
    reasons = []
    for grid in grids:
        try:
            return _solve(at, grid)
        except _Unlike as unlike:
            reasons.append(str(unlike))
    raise InputError(f"sizes cannot be left open: {'; '.join(dict.fromkeys(reasons))}.")


class _Unlike(Exception):
    """Why the graphs of a grid cannot be one."""


def _solve(at: Callable[..., Graph], grid: Grid) -> Graph:
    corners = list(itertools.product(*grid.values()))
    graphs = {corner: at(**dict(zip(grid, corner, strict=True))) for corner in corners}
    first = graphs[corners[0]]
    _require_alike(first, graphs.values())
    fit = _Fit(tuple(grid), tuple(grid.values()))
    values = {
        i: Value(fit({c: g.values[i].shape for c, g in graphs.items()}), value.dtype)
        for i, value in first.values.items()
    }
    nodes = tuple(
        replace(node, attributes=fit({c: g.nodes[k].attributes for c, g in graphs.items()}))
        for k, node in enumerate(first.nodes)
    )
    moving, constants = [], {}
    for i, array in first.constants.items():
        node = _moving({c: g.constants[i] for c, g in graphs.items()}, i, fit)
        moving += [node] if node else []
        constants |= {} if node else {i: array}
    solved = replace(first, values=values, nodes=(*moving, *nodes), constants=constants)
    _check_beyond(at, grid, solved, len(moving))
    return solved


def _require_alike(first: Graph, graphs: Iterable[Graph]) -> None:
    def skeleton(graph: Graph):
        nodes = [(n.op, n.inputs, n.outputs) for n in graph.nodes]
        ranks = {i: (len(v.shape), v.dtype) for i, v in graph.values.items()}
        return nodes, ranks, graph.inputs, graph.outputs, graph.constants.keys()

    want = skeleton(first)
    for graph in graphs:
        if skeleton(graph) != want:
            raise _Unlike("the code takes another way at other sizes")


class _Fit:
    """Fit a nested entry, known at every corner of a grid, by forms of the sizes."""

    def __init__(self, names: tuple[str, ...], ranges: tuple[tuple[int, int], ...]):
        self.names, self.ranges = names, ranges

    def __call__(self, entries: Mapping[tuple[int, ...], object]):
        first = next(iter(entries.values()))
        if isinstance(first, tuple | list):
            if any(len(e) != len(first) for e in entries.values()):
                raise _Unlike("attributes have other lengths at other sizes")
            return type(first)(
                self({c: e[k] for c, e in entries.items()}) for k in range(len(first))
            )
        if all(e == first for e in entries.values()):
            return first
        if any(isinstance(e, bool) or not isinstance(e, Number) for e in entries.values()):
            raise _Unlike(f"{first!r} is another at other sizes")
        terms = self._form({c: Fraction(e).limit_denominator(1024) for c, e in entries.items()})
        return Size(tuple(sorted((names, c) for names, c in terms.items() if c)))

    def _form(self, entries: dict, k: int = 0) -> dict[tuple[str, ...], Fraction]:
        if k == len(self.names):
            return {(): next(iter(entries.values()))}
        low, high = self.ranges[k]
        at_low, at_high = (
            self._form({c: e for c, e in entries.items() if c[k] == n}, k + 1) for n in (low, high)
        )
        terms: dict[tuple[str, ...], Fraction] = {}
        for names in at_low.keys() | at_high.keys():
            below, above = at_low.get(names, 0), at_high.get(names, 0)
            slope = Fraction(above - below) / (high - low)
            terms[names] = below - slope * low
            terms[(self.names[k], *names)] = slope
        return {names: c for names, c in terms.items() if c}


def _moving(arrays: Mapping[tuple[int, ...], mx.array], number: int, fit: _Fit) -> Node | None:
    """The node that makes a constant which depends on the sizes; None for one that does not."""
    first = next(iter(arrays.values()))
    if all(a.shape == first.shape and mx.array_equal(a, first, equal_nan=True).item()
           for a in arrays.values()):  # fmt: skip
        return None
    if all(a.size == 1 for a in arrays.values()):
        return Node("Size", (), (number,), (fit({c: a.item() for c, a in arrays.items()}),))
    if all(_is_progression(a) for a in arrays.values()):
        bounds = {c: (a[0].item(), a[0].item() + a.size) for c, a in arrays.items()}
        return Node("Arange", (), (number,), (*fit(bounds), 1))
    raise _Unlike(f"a constant array of shape {first.shape} depends on them")


def _is_progression(array: mx.array) -> bool:
    """Whether it counts up by one."""
    return array.ndim == 1 and mx.all(array[1:] - array[:-1] == 1).item()


def _check_beyond(at, grid: Grid, solved: Graph, moving: int) -> None:
    """Compare with a trace off the grid, along each size farther than the corners."""
    sizes = {name: high + (high - low) + 1 for name, (low, high) in grid.items()}
    there, want = instantiate(solved, sizes), at(**sizes)
    _require_alike(replace(there, nodes=there.nodes[moving:], constants=want.constants), [want])
    same = all(
        _same(node.attributes, other.attributes)
        for node, other in zip(there.nodes[moving:], want.nodes, strict=True)
    ) and all(there.values[i].shape == value.shape for i, value in want.values.items())
    made = all(
        want.constants[node.outputs[0]].reshape(-1)[0].item() == node.attributes[0]
        for node in there.nodes[:moving]
    )
    if not same or not made:
        raise _Unlike("numbers in it are no sums of products of the sizes")


def _same(left, right) -> bool:
    if isinstance(left, tuple | list):
        return len(left) == len(right) and all(map(_same, left, right))
    return left == right
