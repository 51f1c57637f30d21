"""Dimension variables: what an axis of an array is made of, and how two axes become one.

An axis is a row-major *product* of dimension variables: the rows of a query projection are
`[kv_heads, group, head_dim]`. A variable is a leaf, or stands for a product (after a reshape cut
it in two) or for a *sum* of consecutive segments, each an axis of its own (after a slice, a split
or a concatenation: fused q|k|v). Unifying two axes refines both until they agree.

A *wild* variable comes from a broadcast: the array is constant along it, so it couples nothing and
can take any size. A *frozen* one must keep its size and says why. Axes of size 1 have no variable.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate

Axis = list["Dim"]


class Misaligned(Exception):
    """Two axes cannot be cut at the same places; what is involved gets frozen."""


class Dim:
    """One variable. `link` makes it another's alias; `parts` a product; `segments` a sum."""

    __slots__ = ("size", "link", "parts", "segments", "wild", "frozen")

    def __init__(self, size: int, *, wild: bool = False, frozen: str | None = None):
        self.size = size
        self.link: Dim | None = None
        self.parts: Axis | None = None
        self.segments: list[Axis] | None = None
        self.wild = wild
        self.frozen = frozen

    def like(self, size: int) -> "Dim":
        """A new variable of another size that inherits what is known of this one."""
        return Dim(size, wild=self.wild, frozen=self.frozen)


def new_axis(size: int, *, wild: bool = False, frozen: str | None = None) -> Axis:
    return [Dim(size, wild=wild, frozen=frozen)] if size != 1 else []


def size_of(axis: Axis) -> int:
    return math.prod(dim.size for dim in axis)


def find(dim: Dim) -> Dim:
    while dim.link is not None:
        dim = dim.link
    return dim


def factors(axis: Axis) -> Axis:
    """The axis as a product of leaves and sums, none of size 1."""
    out: Axis = []
    for dim in axis:
        root = find(dim)
        if root.parts is not None:
            out += factors(root.parts)
        elif root.size != 1:
            out.append(root)
    return out


def leaves(axis: Axis) -> Iterator[Dim]:
    """Every leaf variable of the axis, with repetitions, in order."""
    for dim in factors(axis):
        if dim.segments is None:
            yield dim
        else:
            for segment in dim.segments:
                yield from leaves(segment)


def is_wild(axis: Axis) -> bool:
    """True where the array is constant along the axis (also for an axis of size 1)."""
    return all(dim.wild for dim in factors(axis))


def freeze(axis: Axis, why: str) -> None:
    """Fix the size of the axis. The first reason given stays."""
    for dim in leaves(axis):
        if not dim.wild and dim.frozen is None:
            dim.frozen = why


def split(dim: Dim, lead: int, tail: int) -> None:
    """Make `dim`, of size `lead * tail`, a product of two variables."""
    if dim.segments is None:
        dim.parts = [dim.like(lead), dim.like(tail)]
        return
    inner, heads = dim.like(tail), []
    for segment in dim.segments:
        if size_of(segment) % tail:
            raise Misaligned
    for segment in dim.segments:
        rows = size_of(segment) // tail
        unify(segment, [*new_axis(rows), inner])
        heads.append(take_leading(segment, rows))
    outer = dim.like(lead)
    outer.segments = heads
    dim.segments, dim.parts = None, [outer, inner]


def take_leading(axis: Axis, size: int) -> Axis:
    """The leading factors of `axis` whose sizes multiply to `size`."""
    lead: Axis = []
    for dim in factors(axis):
        if size_of(lead) == size:
            break
        lead.append(dim)
    if size_of(lead) != size:
        raise Misaligned
    return lead


def unify(left: Axis, right: Axis, matches: list | None = None) -> None:
    """Make two axes of one size the same product of variables.

    Pairs (wild axis, axis it stands along) are appended to `matches`. Where the two cannot be cut
    alike both are frozen.
    """
    matches = [] if matches is None else matches
    try:
        _unify(left, right, matches)
    except Misaligned:
        freeze(left, "cut in ways that do not fit together")
        freeze(right, "cut in ways that do not fit together")


def _unify(left: Axis, right: Axis, matches: list) -> None:
    if size_of(left) != size_of(right):
        raise Misaligned
    while True:
        left, right = factors(left), factors(right)
        if not left or not right:
            return
        a, b = left[0], right[0]
        if a is b:
            left, right = left[1:], right[1:]
            continue
        along_right, along_left = _stands(left, right, matches), _stands(right, left, matches)
        if along_right or along_left:
            left, right = left[along_left or 1 :], right[along_right or 1 :]
        elif a.size == b.size:
            _merge(a, b, matches)
            left, right = left[1:], right[1:]
        elif a.size > b.size and a.size % b.size == 0:
            split(a, b.size, a.size // b.size)
        elif b.size > a.size and b.size % a.size == 0:
            split(b, a.size, b.size // a.size)
        else:
            raise Misaligned


def _stands(wild: Axis, dims: Axis, matches: list) -> int:
    """How many leading factors of `dims` the first of `wild` stands along; 0 if it is not wild."""
    if not is_wild(wild[:1]):
        return 0
    count = next((n for n in range(1, len(dims) + 1) if size_of(dims[:n]) >= wild[0].size), 0)
    if size_of(dims[:count]) != wild[0].size:
        return 0
    matches.append((wild[:1], dims[:count]))
    return count


def _merge(a: Dim, b: Dim, matches: list) -> None:
    """Make two variables of one size one."""
    if a.segments is None and b.segments is None:
        why = a.frozen or b.frozen
        a.link = b
        b.frozen = why
        return
    if a.segments is None or b.segments is None:
        leaf, whole = (a, b) if a.segments is None else (b, a)
        sizes = [size_of(segment) for segment in whole.segments]
        leaf.segments = [[leaf.like(size)] if size != 1 else [] for size in sizes]
    cuts = sorted({*_cuts(a.segments), *_cuts(b.segments)})
    a.segments, b.segments = _recut(a.segments, cuts), _recut(b.segments, cuts)
    pairs = list(zip(a.segments, b.segments, strict=True))
    a.segments, a.link = None, b
    for x, y in pairs:
        unify(x, y, matches)


def blend(left: Axis, right: Axis) -> Axis:
    """Of two axes already unified, in each place the factors that are not wild."""
    out: Axis = []
    left, right = factors(left), factors(right)
    while left and right:
        ours, theirs = [left.pop(0)], [right.pop(0)]
        while size_of(ours) != size_of(theirs):
            if size_of(ours) < size_of(theirs):
                ours.append(left.pop(0))
            else:
                theirs.append(right.pop(0))
        out += theirs if is_wild(ours) else ours
    return out


def _cuts(segments: Sequence[Axis]) -> list[int]:
    return list(accumulate(size_of(segment) for segment in segments))


def _recut(segments: Sequence[Axis], cuts: Sequence[int]) -> list[Axis]:
    out, start = [], 0
    for segment in segments:
        end = start + size_of(segment)
        inner = [cut - start for cut in cuts if start < cut < end]
        bounds = [0, *inner, end - start]
        out += cut_axis(segment, [q - p for p, q in zip(bounds, bounds[1:], strict=False)])
        start = end
    return out


def cut_axis(axis: Axis, sizes: Sequence[int]) -> list[Axis]:
    """Cut an axis into consecutive segments of the given sizes; it becomes their sum."""
    dims = factors(axis)
    if len(sizes) == 1:
        return [dims]
    lead, rest = dims[0], dims[1:]
    inner = size_of(rest)
    if rest:
        if any(size % inner for size in sizes):
            raise Misaligned
        return [part + rest for part in cut_axis([lead], [size // inner for size in sizes])]
    if lead.segments is None:
        lead.segments = [[lead.like(size)] if size != 1 else [] for size in sizes]
        return lead.segments
    wanted = list(accumulate(sizes))
    lead.segments = _recut(lead.segments, sorted({*_cuts(lead.segments), *wanted}))
    return _gather_segments(lead.segments, wanted)


def _gather_segments(segments: Sequence[Axis], ends: Sequence[int]) -> list[Axis]:
    """Group consecutive segments so that the groups end at `ends`."""
    out, group, position, ends = [], [], 0, list(ends)
    for segment in segments:
        group.append(segment)
        position += size_of(segment)
        if position == ends[len(out)]:
            out.append(group[0] if len(group) == 1 else sum_axis(group))
            group = []
    return out


def sum_axis(segments: Sequence[Axis]) -> Axis:
    """An axis made of consecutive segments."""
    whole = Dim(sum(size_of(segment) for segment in segments))
    whole.segments = [list(segment) for segment in segments]
    return [whole]
