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

from .probes import (
    Axis,
    Build,
    Effect,
    Path,
    Shapes,
    effects,
    families,
    get,
    moved,
    numbers,
    probe,
    put,
)

POINTS = 100  # configs expanded from one starting point,
STUCK = 8  # and of those with an axis that no unused field moves: they only serve the message
ASKS = 3  # different values that one number is tried at, where its axes ask for several
RATIOS = 3
HALF = Fraction(1, 2)


class Task(NamedTuple):
    build: Build
    start: dict  # the config to begin at
    target: Shapes
    known: Mapping[Path, Effect]  # what each field moves there


class Point(NamedTuple):
    config: dict
    shapes: Shapes  # predicted by the lines where the config does not build
    used: frozenset[Path] = frozenset()  # fields already set on the way here
    steps: tuple[float, ...] = ()  # how far each went, largest first


def search(build: Build, config: dict, target: Shapes) -> Iterator[tuple[dict, Shapes]]:
    """Configs met on the way from `config` to `target`, and their shapes; the goals among them.

    Takes the wrong axes that the fewest unused fields move, and tries each of these, so a solution
    is met once and not in every order of its fields. Smallest steps come first, because removing 1
    of 4 heads is a likelier reading than removing 4 of the 16 channels of each. If there is no goal
    on this way, every wrong axis is tried (the heads, and the width of each, both changed).
    """
    task, found = Task(build, config, target, effects(build, config)), False
    for choose in (narrowest, every):
        for here in walk(task, choose):
            found |= build(here) == target
            yield here, build(here)
        if found:
            return


def walk(task: Task, choose) -> Iterator[dict]:
    order, found, dead_ends, seen = count(), False, 0, []
    heap = [(0, (), next(order), Point(task.start, task.build(task.start)))]
    for _ in range(POINTS):
        if not heap:
            return
        stuck, _, _, point = heappop(heap)
        dead_ends += stuck > 0
        if stuck and (found or dead_ends > STUCK or choose is every):
            return
        for here in proven(task, point):
            found |= task.build(here) == task.target
            yield here
        for child in children(task, point, choose):
            if child.config not in seen:
                seen.append(child.config)
                stuck = sum(not movers(task, child, a) for a in wrong(child.shapes, task.target))
                heappush(heap, (stuck, child.steps, next(order), child))


def wrong(shapes: Shapes, target: Shapes) -> list[Axis]:
    return list(moved(shapes, target) or ())


def movers(task: Task, point: Point, axis: Axis) -> tuple[Path, ...]:
    return tuple(n for n in task.known if n not in point.used and axis in task.known[n])


def children(task: Task, point: Point, choose) -> Iterator[Point]:
    """One move further: one field solved for wrong axes that the same fields move."""
    groups: dict[tuple[Path, ...], list[Axis]] = {}
    for axis in wrong(point.shapes, task.target):
        groups.setdefault(movers(task, point, axis), []).append(axis)
    groups.pop((), None)
    for name, axes in choose(groups):
        for peers in asks(task, point, name, axes):
            effect = here_and_now(task, point, name, peers[0])
            edits = solve(task, point, effect, peers)
            if edits:
                config = put(point.config, edits)
                step = max(abs(value - get(point.config, leaf)) for leaf, value in edits.items())
                yield Point(
                    config,
                    task.build(config) or predicted(point, effect, edits),
                    point.used | {name},
                    tuple(sorted((*point.steps, float(step)), reverse=True)),
                )


def narrowest(groups: dict[tuple[Path, ...], list[Axis]]) -> list[tuple[Path, list[Axis]]]:
    """The axes with the fewest fields, once for each of these."""
    names = min(groups, key=len, default=())
    return [(name, groups[names]) for name in names]


def every(groups: dict[tuple[Path, ...], list[Axis]]) -> list[tuple[Path, list[Axis]]]:
    return [(name, axes) for names, axes in groups.items() for name in names]


def asks(task: Task, point: Point, name: Path, axes: list[Axis]) -> list[list[Axis]]:
    """`axes` to solve together: those that agree for one number; for a list of numbers all, and
    then those of its other leaves that have no right axis.
    """
    effect = task.known[name]
    if len({leaf for leaf, _ in effect.values()}) > 1:
        missed = wrong(point.shapes, task.target)
        right = {effect[axis][0] for axis in effect.keys() - set(missed)}
        return [axes + [a for a in missed if a in effect and effect[a][0] not in right]]
    agree: dict[tuple[int, int], list[Axis]] = {}
    for axis in axes:
        agree.setdefault((size(point.shapes, axis), size(task.target, axis)), []).append(axis)
    return sorted(agree.values(), key=len, reverse=True)[:ASKS]


def here_and_now(task: Task, point: Point, name: Path, axis: Axis) -> Effect:
    """A field's effect; found anew where another field has moved the axis (heads times width)."""
    touched = any(axis in task.known[other] for other in point.used)
    if not touched or task.build(point.config) is None:
        return task.known[name]
    return probe(task.build, point.config, families(point.config)[name])


def predicted(point: Point, effect: Effect, edits: Mapping[Path, float]) -> Shapes:
    shapes = {path: list(shape) for path, shape in point.shapes.items()}
    for (path, axis), (leaf, slope) in effect.items():
        if leaf in edits:
            shapes[path][axis] += round(slope * Fraction(edits[leaf] - get(point.config, leaf)))
    return {path: tuple(shape) for path, shape in shapes.items()}


def solve(task: Task, point: Point, effect: Effect, axes: list[Axis]) -> dict | None:
    """Values of a field's leaves that bring `axes` to the target: {leaf: value}, or None.

    A leaf with several axes follows the first. A field that rounds may want half an entry more or
    less than the line says, or a second line through the new point.
    """
    missed = {leaf: axis for axis in reversed(axes) if axis in effect for leaf in [effect[axis][0]]}
    edits: dict[Path, int | float] = {}
    shapes = point.shapes
    for nudge in (0, HALF, -HALF, None, None) if missed else ():
        last = (put(point.config, edits), shapes)
        for leaf, axis in missed.items():
            edits[leaf] = on_line(task, point, last, leaf, axis, effect[axis][1], nudge)
        if any(value <= 0 or against(task, point, effect, axes, edits) for value in edits.values()):
            return None
        shapes = task.build(put(point.config, edits))
        if shapes is None:  # not valid alone; perhaps with another field, so go on by prediction
            return edits
        if moved(task.target, shapes) is None:
            return None
        missed = {leaf: axis for leaf, axis in missed.items() if off(shapes, task.target, axis)}
        if not missed:
            return edits
    return None


def on_line(task: Task, point: Point, last, leaf: Path, axis: Axis, slope: Fraction, nudge):
    """The value of `leaf` at which `axis` has its target, `nudge` entries beside; None: secant."""
    start = get(point.config, leaf)
    if nudge is None:
        config, shapes = last
        run = Fraction(get(config, leaf)) - Fraction(start)
        slope = Fraction(size(shapes, axis) - size(point.shapes, axis)) / run if run else slope
    ask = off(point.shapes, task.target, axis) + (nudge or 0)
    exact = Fraction(start) + (ask / slope if slope else 0)
    return float(exact) if isinstance(start, float) else round(exact)


def against(task: Task, point: Point, effect: Effect, axes: list[Axis], edits) -> bool:
    """Whether a count would grow where its axis has shrunk, only to make up for another field."""
    leaf, slope = effect[axes[0]]
    step = edits.get(leaf, 0) - get(point.config, leaf)
    shrunk = off(task.build(task.start), task.target, axes[0])
    return isinstance(edits.get(leaf), int) and step * slope * shrunk < 0


def size(shapes: Shapes, axis: Axis) -> int:
    return shapes[axis[0]][axis[1]]


def off(shapes: Shapes, target: Shapes, axis: Axis) -> int:
    return size(target, axis) - size(shapes, axis)


def proven(task: Task, point: Point) -> Iterator[dict]:
    """The configs of a point that build: its own, or else, at a goal, with a smaller count in it.

    A count that sets no shape may keep the goal from building: experts per token, groups. It is
    cut to a changed number, or to what divides it.
    """
    if task.build(point.config) is not None:
        yield point.config
    elif point.shapes == task.target:
        counts = {leaf: v for leaf, v in numbers(point.config) if isinstance(v, int)}
        kept = {leaf: v for leaf, v in counts.items() if v == get(task.start, leaf)}
        changed = {v for leaf, v in counts.items() if leaf not in kept}
        for leaf, value in kept.items():
            smaller = {f(value, new) for f in (min, gcd) for new in changed} - {value}
            for less in sorted(smaller, reverse=True):
                config = put(point.config, {leaf: less})
                yield from [config] if task.build(config) else []


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
