"""The config of a model from which whole layers were dropped.

What a config says per layer comes in several forms: a list or string with one entry per layer, a
list of layer indices (from 0 or from 1), the number of layers, the number of first or last layers
that are special. Which number is which is not known by name: try, build, compare paths.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, islice

from .probes import Build, Path, Shapes, get, list_lengths, numbers, put

Edits = dict[Path, object]
TRIALS = 120  # combinations of edits looked at in each round


def without_layers(shapes: Shapes, layers: Mapping[str, Sequence[int]]) -> Shapes:
    """`shapes` with only the kept indices of each list, renumbered from 0.

    >>> without_layers({"h.0.w": (2,), "h.1.w": (3,)}, {"h": [1]})
    {'h.0.w': (3,)}
    """
    kept = {}
    for path, shape in shapes.items():
        keys = path.split(".")
        renamed = list(keys)
        for name, indices in layers.items():
            depth = name.count(".") + 1
            index = keys[depth] if depth < len(keys) else ""
            if keys[:depth] == name.split(".") and index.isdigit():
                now_at = {str(before): str(now) for now, before in enumerate(sorted(indices))}
                renamed[depth] = now_at.get(index, "")
        if "" not in renamed:
            kept[".".join(renamed)] = shape
    return kept


def renumbered(
    build: Build,
    config: dict,
    layers: Mapping[str, Sequence[int]],
    target: Shapes,
    optional: Sequence[Path] = (),
) -> Iterator[dict]:
    """Configs of the model that keeps only `layers`, likeliest first.

    Every one has the parameters of `target`, with axes of the size they have in `config`'s model
    or in `target`. After the first come those that differ from it in one number or list that
    shapes do not tell. Yields the nearest one alone if none has the right parameters.
    """
    before = build(config)
    lengths = list_lengths(before)
    dropped = {
        name: (lengths.get(name, 0), sorted(keep))
        for name, keep in layers.items()
        if len(keep) < lengths.get(name, 0)
    }
    if not dropped:
        yield config
        return
    expected = without_layers(before, layers)
    filtered = per_layer(config, dropped)
    choices = [
        edits
        for edits in choose(config, dropped, optional)
        if not any(path[:i] in filtered for path in edits for i in range(len(path)))
    ]
    best = descend(build, put(config, filtered), choices, expected, target)
    best = put(best, stale(build, config, best, dropped))
    yield best
    if distance(build(best), expected, target) == 0:
        for edits in choices:
            other = put(best, edits)
            if other != best and distance(build(other), expected, target) == 0:
                yield other


def stale(build: Build, config: dict, best: dict, dropped) -> Edits:
    """What shapes do not ask for, but what can not stay.

    The number of layers, where the model counts a list instead: the one number equal to it. And a
    list of indices of which the last is behind the last layer.
    """
    edits: Edits = {}
    for length, keep in dropped.values():
        counts = [p for p, value in numbers(config) if isinstance(value, int) and value == length]
        if len(counts) == 1 and get(best, counts[0]) == length:
            edits[counts[0]] = len(keep)
        for path, value in sequences(best):
            for first in (0, 1):
                other = indices(value, length, keep, first)
                behind = other is not None and value[-1] >= len(keep) + first
                if behind and value == get(config, path):
                    edits.setdefault(path, other)
    return {p: value for p, value in edits.items() if build(put(best, {p: value})) == build(best)}


def descend(build: Build, config: dict, choices: list[Edits], expected: Shapes, target: Shapes):
    """Apply the choice, or the pair, that brings the parameters nearest, until none does."""
    here, size = distance(build(config), expected, target), 1
    while here > 0 and size <= 2:
        nearest, edited = here, config
        for some in islice(combinations(choices, size), TRIALS):
            trial = put(config, {path: v for edits in some for path, v in edits.items()})
            away = distance(build(trial), expected, target)
            if away < nearest:
                nearest, edited = away, trial
            if away == 0:
                break
        size = 1 if nearest < here else size + 1
        here, config = nearest, edited
    return config


def distance(shapes: Shapes | None, expected: Shapes, target: Shapes) -> float:
    """How many parameters are missing, too many, or of a size that nothing asked for."""
    if shapes is None:
        return float("inf")
    both = shapes.keys() & expected.keys()
    wrong = sum(not may_be(shapes[path], expected[path], target.get(path)) for path in both)
    return wrong + len(shapes.keys() ^ expected.keys())


def may_be(shape, expected, target) -> bool:
    if target is None or not len(shape) == len(expected) == len(target):
        return shape == expected
    return all(size in sizes for size, *sizes in zip(shape, expected, target, strict=True))


def per_layer(config: dict, dropped) -> Edits:
    """Every list that is as long as a list of layers, without the dropped entries."""
    edits: Edits = {}
    for path, value in sequences(config):
        inside = any(path[:i] in edits for i in range(len(path)))
        for length, keep in dropped.values():
            if isinstance(value, list) and len(value) == length and not inside:
                edits.setdefault(path, [value[i] for i in keep])
    return edits


def choose(config: dict, dropped, optional: Sequence[Path]) -> Iterator[Edits]:
    """What else may have to change, likeliest first; each is an edit of its own."""
    for length, keep in dropped.values():
        lists = {path: list(listed(value, length, keep)) for path, value in sequences(config)}
        counts = {
            path: value
            for path, value in numbers(config)
            if isinstance(value, int) and not lists.get(path[:-1])
        }
        yield from ({path: len(keep)} for path, value in counts.items() if value == length)
        yield from ({path: other} for path, others in lists.items() for other in others)
        for path, value in counts.items():
            yield from ({path: other} for other in counted(value, length, keep))
        yield from ({path: len(keep)} for path in optional)


def listed(value, length: int, keep: list[int]) -> Iterator:
    """Other readings of a list or string: one entry per layer, or indices from 0 or from 1."""
    if isinstance(value, str):
        if len(value) == length:
            yield "".join(value[i] for i in keep)
        return
    if len(value) == length:
        yield value
    for first in (0, 1):
        other = indices(value, length, keep, first)
        if other is not None:
            yield other


def indices(value, length: int, keep: list[int], first: int) -> list[int] | None:
    """A rising list of layer indices, counted from `first`, after the drop; None if it is none."""
    whole = isinstance(value, list) and all(type(v) is int for v in value)
    if not whole or not value or sorted(set(value)) != value:
        return None
    if value[0] < first or value[-1] >= length + first:
        return None
    return [keep.index(v - first) + first for v in value if v - first in keep]


def counted(value: int, length: int, keep: list[int]) -> Iterator[int]:
    """Other readings of a count: of the first layers, of the last ones, of more than these."""
    if 0 < value < length:
        yield from {sum(i < value for i in keep), sum(i >= length - value for i in keep)} - {value}
    elif value > length:
        yield value - length + len(keep)


def sequences(node, path: Path = ()) -> Iterator[tuple[Path, list | str]]:
    """Every list and string below a JSON value, outer ones first."""
    if isinstance(node, list | str) and path:
        yield path, node
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from sequences(value, (*path, key))
