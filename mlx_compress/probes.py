"""Which numbers of a config set which parameter axes: change one, build, compare.

A *leaf* is one number somewhere in the nested config, addressed by its path. A *family* is the
leaves that differ only by a list index (a width per layer); they are probed together. No field is
known by name: what a number does is what the build shows.
"""

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction

Path = tuple[str | int, ...]
Shapes = dict[str, tuple[int, ...]]
Axis = tuple[str, int]  # parameter path, axis
Effect = dict[Axis, tuple[Path, Fraction]]  # axis -> the leaf that moves it, entries per unit
Build = Callable[[dict], Shapes | None]

# Doubling keeps what must divide, and shows through most rounding; where it does not build (a
# count that must divide another), the others. One that builds and moves nothing settles it:
# hidden // heads * heads moves at heads + 1, and that is no use.
INT_STEPS = (lambda v: 2 * v, lambda v: v + 1, lambda v: v - 1, lambda v: v // 2)
FLOAT_STEPS = (lambda v: 2.0 * v, lambda v: v / 2.0)
TABLE = 16  # a dict of more numbers than this, and nothing else, is a table: one family


def memoised(shapes_of: Callable[[dict], Shapes | None]) -> Build:
    """`shapes_of` that builds each config once, and answers None where the build fails.

    Builds from a copy, because models write into the nested parts of their config. Give the result
    to several calls of `fit_config` or `expressible` on one model: they then share the builds.
    """
    known: dict[str, Shapes | None] = {}

    def build(config: dict) -> Shapes | None:
        key = json.dumps(config, sort_keys=True, default=repr)
        if key not in known:
            try:
                known[key] = shapes_of(copy.deepcopy(config))
            except Exception:  # any error of a model's constructor means: not a valid config
                known[key] = None
        return known[key]

    return build


def get(config, path: Path):
    """The value at `path`, or None where there is none."""
    for key in path:
        if isinstance(config, dict):
            config = config.get(key)
        elif isinstance(config, list) and isinstance(key, int) and key < len(config):
            config = config[key]
        else:
            return None
    return config


def put(config: dict, edits: Mapping[Path, object]) -> dict:
    """A copy of `config` with `edits` in place."""
    config = copy.deepcopy(config)
    for path, value in edits.items():
        node = config
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = copy.deepcopy(value)
    return config


def spell(path: Path) -> str:
    return ".".join(map(str, path))


def is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def numbers(node, path: Path = ()) -> Iterator[tuple[Path, int | float]]:
    """Every number below a JSON value, with its path."""
    if is_number(node):
        yield path, node
    elif isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from numbers(value, (*path, key))


def families(config: dict) -> dict[Path, list[Path]]:
    """The numbers of `config`, by their path with `*` for the list index."""
    found: dict[Path, list[Path]] = {}
    for path, _ in numbers(config):
        name = tuple("*" if isinstance(key, int) else key for key in path)
        if is_table(get(config, path[:-1])):
            name = (*name[:-1], "*")
        found.setdefault(name, []).append(path)
    return found


def is_table(node) -> bool:
    return isinstance(node, dict) and len(node) > TABLE and all(map(is_number, node.values()))


def moved(before: Shapes, after: Shapes | None) -> dict[Axis, int] | None:
    """By how much each changed axis grew; None where parameters, not only sizes, differ."""
    if after is None or before.keys() != after.keys():
        return None
    changed = [path for path in before if before[path] != after[path]]
    if any(len(before[path]) != len(after[path]) for path in changed):
        return None
    return {
        (path, axis): new - old
        for path in changed
        for axis, (old, new) in enumerate(zip(before[path], after[path], strict=True))
        if old != new
    }


def effects(build: Build, config: dict) -> dict[Path, Effect]:
    """What each family of numbers of `config` moves, near its present value.

    Families that move nothing, or that add or drop parameters, are left out. `build` must build
    `config`. About one build per number.
    """
    found = {name: probe(build, config, leaves) for name, leaves in families(config).items()}
    return {name: effect for name, effect in found.items() if effect}


def probe(build: Build, config: dict, leaves: Sequence[Path]) -> Effect:
    """The axes that the leaves of one family move, at the first step that builds."""
    values = {leaf: get(config, leaf) for leaf in leaves}
    steps = FLOAT_STEPS if any(isinstance(v, float) for v in values.values()) else INT_STEPS
    for step in steps:
        tried = {leaf: step(v) for leaf, v in values.items() if 0 < step(v) != v}
        shapes = build(put(config, tried)) if tried else None
        if shapes is not None:
            return attribute(build, config, tried) if moved(build(config), shapes) else {}
    return {}


def attribute(build: Build, config: dict, tried: Mapping[Path, int | float]) -> Effect:
    """Which leaf moves which axis, in log2(leaves) builds.

    Leaf number k (from 1) steps in build number b where bit b of k is set, so that the builds that
    move an axis spell the number of its leaf. An axis with several leaves spells nonsense; the
    build that proves every candidate finds that out.
    """
    leaves = list(tried)
    codes: dict[Axis, int] = {}
    sizes: dict[Axis, set[int]] = {}
    for bit in range(len(leaves).bit_length()):
        some = {leaf: tried[leaf] for k, leaf in enumerate(leaves, 1) if k >> bit & 1}
        change = moved(build(config), build(put(config, some)))
        if change is None:
            return {}
        for axis, size in change.items():
            codes[axis] = codes.get(axis, 0) | 1 << bit
            sizes.setdefault(axis, set()).add(size)
    return {
        axis: per_unit(config, leaves[code - 1], tried, *sizes[axis])
        for axis, code in codes.items()
        if code <= len(leaves) and len(sizes[axis]) == 1
    }


def per_unit(config, leaf: Path, tried, size: int) -> tuple[Path, Fraction]:
    return leaf, size / (Fraction(tried[leaf]) - Fraction(get(config, leaf)))


def list_lengths(shapes: Shapes) -> dict[str, int]:
    """Length of each list of modules: {"model.layers": 2} for model.layers.0.w, model.layers.1.w.

    Counts to the last index that has a parameter.
    """
    found: dict[str, int] = {}
    for path in shapes:
        keys = path.split(".")
        for i, key in enumerate(keys):
            if key.isdigit():
                name = ".".join(keys[:i])
                found[name] = max(found.get(name, 0), int(key) + 1)
    return found
