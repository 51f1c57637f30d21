"""Solve the numbers of a config for wanted parameter shapes: a best-first search over fields.

Each field's effect was found by probing (`probes.py`): affine near where it was tried. A move
solves one field for one wrong axis and builds the result; the build, not the line, is believed.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from fractions import Fraction
from heapq import heappop, heappush
from itertools import combinations, count
from math import gcd
from typing import NamedTuple

from .probes import Axis, Build, Effect, Path, Shapes, effects, get, moved, numbers, put

POINTS = 100  # configs expanded from one starting point,
STUCK = 8  # and of those with an axis that no unused field moves: they only serve the message
RATIOS = 3
HALF = Fraction(1, 2)


class Point(NamedTuple):
    config: dict
    shapes: Shapes  # predicted by the lines where the config does not build
    used: frozenset[Path] = frozenset()  # fields already set on the way here
    steps: tuple[float, ...] = ()  # how far each went, largest first


def search(build: Build, config: dict, target: Shapes) -> Iterator[tuple[dict, Shapes]]:
    """Configs met on the way from `config` to `target`, and their shapes; the goals among them.

    Takes the wrong axis that the fewest unused fields move, and tries each of these, so a solution
    is met once and not in every order of its fields. Smallest steps come first, because removing 1
    of 4 heads is a likelier reading than removing 4 of the 16 channels of each. If there is no goal
    on this way, every wrong axis is tried (the heads, and the width of each, both changed).
    """
    known, found = effects(build, config), False
    for choose in (narrowest, every):
        for here in walk(build, config, target, known, choose):
            found |= build(here) == target
            yield here, build(here)
        if found:
            return


def walk(build: Build, config: dict, target: Shapes, known, choose) -> Iterator[dict]:
    order, found, dead_ends, seen = count(), False, 0, []
    heap = [(0, (), next(order), Point(config, build(config)))]
    for _ in range(POINTS):
        if not heap:
            return
        stuck, _, _, point = heappop(heap)
        dead_ends += stuck > 0
        if stuck and (found or dead_ends > STUCK or choose is every):
            return
        for here in proven(build, point, config, target):
            found |= build(here) == target
            yield here
        for child in children(build, config, point, target, known, choose):
            stuck = sum(not movers(known, child, axis) for axis in wrong(child.shapes, target))
            if child.config not in seen:
                seen.append(child.config)
                heappush(heap, (stuck, child.steps, next(order), child))


def wrong(shapes: Shapes, target: Shapes) -> list[Axis]:
    return list(moved(shapes, target) or ())


def movers(known: Mapping[Path, Effect], point: Point, axis: Axis) -> list[Path]:
    return [name for name in known if name not in point.used and axis in known[name]]


def children(build: Build, original, point: Point, target, known, choose) -> Iterator[Point]:
    """One move further, by each field and wrong axis that `choose` names."""
    alike: dict[tuple, Axis] = {}  # one axis for all that ask the same of the same fields
    for axis in wrong(point.shapes, target):
        names = tuple(movers(known, point, axis))
        alike.setdefault((names, size(point.shapes, axis), size(target, axis)), axis)
    for name, pivot in choose({axis: names for (names, *_), axis in alike.items() if names}):
        edits = solve(build, point, target, known[name], pivot)
        if edits and not against(build(original), target, known[name], pivot, point, edits):
            config = put(point.config, edits)
            step = float(max(abs(value - get(point.config, leaf)) for leaf, value in edits.items()))
            yield Point(
                config,
                build(config) or predicted(point, known[name], edits),
                point.used | {name},
                tuple(sorted((*point.steps, step), reverse=True)),
            )


def against(base: Shapes, target: Shapes, effect: Effect, pivot: Axis, point: Point, edits) -> bool:
    """Whether a count would grow where its axis has shrunk, only to make up for another field."""
    leaf, slope = effect[pivot]
    step = edits[leaf] - get(point.config, leaf)
    return isinstance(edits[leaf], int) and step * slope * off(base, target, pivot) < 0


def narrowest(moving: dict[Axis, tuple[Path, ...]]) -> list[tuple[Path, Axis]]:
    """The fields of the one axis that has the fewest."""
    pivot = min(moving, key=lambda axis: len(moving[axis]), default=None)
    return [(name, pivot) for name in moving.get(pivot, ())]


def every(moving: dict[Axis, tuple[Path, ...]]) -> list[tuple[Path, Axis]]:
    return [(name, axis) for axis, names in moving.items() for name in names]


def predicted(point: Point, effect: Effect, edits: Mapping[Path, float]) -> Shapes:
    shapes = {path: list(shape) for path, shape in point.shapes.items()}
    for (path, axis), (leaf, slope) in effect.items():
        if leaf in edits:
            shapes[path][axis] += round(slope * Fraction(edits[leaf] - get(point.config, leaf)))
    return {path: tuple(shape) for path, shape in shapes.items()}


def solve(build: Build, point: Point, target: Shapes, effect: Effect, pivot: Axis) -> dict | None:
    """Values of a field's leaves that bring their wrong axes to `target`: {leaf: value}, or None.

    `pivot` decides for its own leaf, the first wrong axis for each other one. A field that rounds
    may want half an entry more or less than the line says, or a second line through the new point.
    """
    axes = {effect[pivot][0]: pivot}
    for axis in wrong(point.shapes, target):
        if axis in effect:
            axes.setdefault(effect[axis][0], axis)
    edits: dict[Path, int | float] = {}
    shapes, missed = point.shapes, axes
    for nudge in (0, HALF, -HALF, None, None):
        last = (put(point.config, edits), shapes)
        for leaf, axis in missed.items():
            edits[leaf] = on_line(point, last, target, leaf, axis, effect[axis][1], nudge)
        if any(value <= 0 for value in edits.values()):
            return None
        shapes = build(put(point.config, edits))
        if shapes is None:  # not valid alone; perhaps with another field, so go on by prediction
            return edits
        if moved(target, shapes) is None:
            return None
        missed = {leaf: axis for leaf, axis in missed.items() if off(shapes, target, axis)}
        if not missed:
            return edits
    return None


def on_line(point: Point, last, target: Shapes, leaf: Path, axis: Axis, slope, nudge):
    """The value of `leaf` at which `axis` has its target, `nudge` entries beside; None: secant."""
    start = get(point.config, leaf)
    if nudge is None:
        config, shapes = last
        run = Fraction(get(config, leaf)) - Fraction(start)
        slope = Fraction(size(shapes, axis) - size(point.shapes, axis)) / run if run else slope
    ask = size(target, axis) - size(point.shapes, axis) + (nudge or 0)
    exact = Fraction(start) + (ask / slope if slope else 0)
    return float(exact) if isinstance(start, float) else round(exact)


def size(shapes: Shapes, axis: Axis) -> int:
    return shapes[axis[0]][axis[1]]


def off(shapes: Shapes, target: Shapes, axis: Axis) -> int:
    return size(target, axis) - size(shapes, axis)


def proven(build: Build, point: Point, original: dict, target: Shapes) -> Iterator[dict]:
    """The configs of a point that build: its own, or else, at a goal, with a smaller count in it.

    A count that sets no shape may keep the goal from building: experts per token, groups. It is
    cut to a changed number, or to what divides it.
    """
    if build(point.config) is not None:
        yield point.config
    elif point.shapes == target:
        values = dict(numbers(point.config))
        changed = {value for leaf, value in values.items() if value != get(original, leaf)}
        for leaf, value in values.items():
            if isinstance(value, int) and value > 1 and value == get(original, leaf):
                whole = [new for new in changed if isinstance(new, int)]
                for less in sorted({f(value, new) for f in (min, gcd) for new in whole} - {value}):
                    yield from filter(build, [put(point.config, {leaf: less})])


def scaled(build: Build, config: dict, original: dict, target: Shapes) -> Iterator[dict]:
    """`config` with one or two counts scaled like an axis, where no shape tells.

    Without a head_dim in the config, a narrower model has the same shapes with as many heads, each
    narrower, as with fewer heads.
    """
    before = build(original)
    ratios = Counter(
        Fraction(size(target, axis), size(before, axis)) for axis in wrong(before, target)
    )
    for ratio, _ in ratios.most_common(RATIOS):
        counts = {
            leaf: int(value * ratio)
            for leaf, value in numbers(config)
            if isinstance(value, int)
            and value == get(original, leaf)
            and (value * ratio).denominator == 1
            and value * ratio >= 1
        }
        for some in (*combinations(counts, 1), *combinations(counts, 2)):
            other = put(config, {leaf: counts[leaf] for leaf in some})
            if build(other) == target:
                yield other
