"""Find the config from which a stock model has given parameter shapes, by building and comparing.

`probes.py` finds what each number does, `renumber.py` drops layers, `solve.py` solves the numbers.
Shapes do not tell everything, so the caller says which of the configs found computes the right
thing.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import islice

from .errors import InputError
from .probes import (
    Axis,
    Build,
    Effect,
    Path,
    Shapes,
    effects,
    get,
    list_lengths,
    memoised,
    moved,
    numbers,
    put,
    spell,
)
from .renumber import renumbered, without_layers
from .solve import off, scaled, search, wrong

Slot = tuple[str, int, int]  # parameter path, axis, entries per unit


class Inexpressible(InputError):
    """No config found gives a model of the wanted shapes.

    `conflicts` maps each parameter that differs in the nearest model to (wanted shape, nearest
    shape or None). It is empty where models of the right shapes were found, but `accept` took none.
    `reason` is the part of the message that says what is in the way.
    """

    def __init__(self, message: str, conflicts: dict | None = None, reason: str | None = None):
        super().__init__(message)
        self.conflicts = conflicts or {}
        self.reason = reason or message


def always(config: dict) -> bool:
    return True


def fit_config(
    config: dict,
    shapes_of: Callable[[dict], Shapes | None],
    target: Shapes,
    *,
    optional: Sequence[Path] = (),
    layers: Mapping[str, Sequence[int]] | None = None,
    accept: Callable[[dict], bool] = always,
) -> dict:
    """The config, near `config`, from which `shapes_of` gives exactly `target`.

    `shapes_of` builds the model and returns {parameter path: shape}; it may raise for a config that
    is not valid. `optional` lists the declared fields that `config` leaves out or sets to None.
    `layers` maps each list of modules that lost whole layers to the indices kept; `target` has
    them renumbered. Shapes do not tell everything (3 heads of 16, or 4 of 12?): each config found,
    smallest steps first, is offered to `accept`, and the first one taken is returned.

    Raises Inexpressible if there is none, InputError if `target` has other parameters or ranks.
    """
    build = memoised(shapes_of)
    if build(config) is None:
        raise InputError("The config to start from builds no model.")
    check(without_layers(build(config), layers or {}), target)
    found: list[dict] = []
    nearest = None
    for start in renumbered(build, config, layers or {}, target, optional):
        for candidate, shapes in fitted(build, start, target, optional):
            if nearest is None or misses(shapes, target) < misses(nearest[1], target):
                nearest = (start, shapes)
            if shapes == target and candidate not in found:
                found.append(candidate)
                if accept(copy.deepcopy(candidate)):
                    return candidate
        if not found:  # the other ways to number the layers have the same shapes
            raise refusal(build, *nearest, target)
    reason = f"with {changes(config, found[0])} it computes something else"
    raise Inexpressible(
        f"{len(found)} configs give the wanted shapes, but none computes what was asked for; "
        f"the first one sets {changes(config, found[0])}.",
        reason=reason,
    )


def check(expected: Shapes, target: Shapes) -> None:
    for path in sorted(expected.keys() ^ target.keys()):
        where = "the model, not in the target" if path in expected else "the target, not the model"
        raise InputError(f"{path}: in {where}; name the dropped layers in `layers`.")
    for path, shape in target.items():
        if len(shape) != len(expected[path]):
            raise InputError(f"{path}: target {shape} has another rank than {expected[path]}.")


def fitted(build: Build, config: dict, target: Shapes, optional) -> Iterator[tuple[dict, Shapes]]:
    """Every config met on the way from `config` to `target`, and its shapes."""
    if (build(config) or {}).keys() != target.keys():
        yield config, build(config) or {}
        return
    for start, pins in starts(build, config, target, optional):
        goals = []
        for candidate, shapes in search(build, start, target):
            if shapes == target:
                candidate = without_pins(build, candidate, config, pins)
                goals.append(candidate)
            yield candidate, shapes
        for goal in goals:
            yield from ((other, target) for other in scaled(build, goal, config, target))


def starts(build: Build, config: dict, target: Shapes, optional) -> Iterator[tuple[dict, dict]]:
    """Ways to write `config` down that build the same model, and the fields each makes explicit.

    As it is; with one number as a list with an entry per layer, where the layers want different
    values; and both again with every optional field that matters made explicit.
    """
    yield config, {}
    lists = per_layer_values(build, config, target)
    if lists:
        yield put(config, lists), {}
    pins: dict[Path, object] = {}
    for path in optional:
        pinned = pin(build, put(config, pins), path)
        pins |= {} if pinned is None else {path: pinned}
    if pins:
        yield put(config, pins), pins
    if pins and lists:
        yield put(config, pins | lists), pins


def pin(build: Build, config: dict, path: Path):
    """The value of an absent field that leaves every shape as it is, or None if there is none.

    Two values that build give a line through each axis they move. Where no number builds, a list
    of it with an entry per layer is tried.
    """
    base = build(config)
    for form in (lambda v: v, *(lambda v, n=n: [v] * n for n in lengths(base))):
        trials = ((value, build(put(config, {path: form(value)}))) for value in (8, 16, 4, 2))
        built = list(islice(((v, moved(base, shapes)) for v, shapes in trials if shapes), 2))
        if len(built) == 2:
            value = standing_still(*built)
            pinned = value and form(value)
            return pinned if pinned and build(put(config, {path: pinned})) == base else None
    return None


def standing_still(one: tuple[int, dict | None], two: tuple[int, dict | None]) -> int | None:
    """Where the line through two (value, growth of each axis) crosses no growth."""
    (v, a), (w, b) = one, two
    for axis in sorted(a.keys() | b.keys()) if a is not None and b is not None else ():
        slope = Fraction(a.get(axis, 0) - b.get(axis, 0), v - w)
        still = v - a.get(axis, 0) / slope if slope else Fraction(0)
        if still > 0 and still.denominator == 1:
            return int(still)
    return None


def without_pins(build: Build, config: dict, original: dict, pins: Mapping[Path, object]) -> dict:
    """`config` without the explicit fields that its shapes can spare."""
    for path in pins:
        spared = put(config, {path: None})
        if path[-1] not in get(original, path[:-1]):
            del get(spared, path[:-1])[path[-1]]
        config = spared if build(spared) == build(config) else config
    return config


def per_layer_values(build: Build, config: dict, target: Shapes) -> dict[Path, list]:
    """The numbers that the layers want to differ, each as a list, where the model takes one."""
    base, lists = build(config), {}
    for effect in effects(build, config).values():
        leaf = next(iter(effect.values()))[0]
        alone = all(isinstance(key, str) for key in leaf)
        if alone and len(asked(config, base, target, effect, leaf)) > 1:
            for listed in ([get(config, leaf)] * n for n in lengths(base)):
                if build(put(config, {leaf: listed})) == base:
                    lists[leaf] = listed
    return lists


def asked(config: dict, base: Shapes, target: Shapes, effect: Effect, leaf: Path) -> set[Fraction]:
    """The values of `leaf` that the axes it moves ask for."""
    return {
        get(config, leaf) + off(base, target, axis) / slope
        for axis, (mover, slope) in effect.items()
        if mover == leaf
    }


def lengths(shapes: Shapes) -> list[int]:
    return sorted(set(list_lengths(shapes).values()))


def misses(shapes: Shapes, target: Shapes) -> int:
    return sum(shapes.get(path) != target.get(path) for path in shapes.keys() | target.keys())


def refusal(build: Build, config: dict, shapes: Shapes, target: Shapes) -> Inexpressible:
    """The error that says how `shapes`, the nearest found from `config`, differ from `target`."""
    differ = [path for path in target | shapes if target.get(path) != shapes.get(path)]
    conflicts = {path: (target.get(path), shapes.get(path)) for path in differ}
    asked, has = (shape or "absent" for shape in conflicts[differ[0]])
    if shapes.keys() != target.keys():
        reason = "no reading of what it says per layer drops just these layers"
    else:
        known = effects(build, config)
        reasons = (clash(build, config, target, known, axis) for axis in wrong(shapes, target))
        reason = next(filter(None, reasons), "no number in it sets that alone")
    more = f" ({len(differ) - 1} more parameters differ)" if differ[1:] else ""
    return Inexpressible(
        f"No config gives these shapes: {differ[0]} is asked to be {asked}, the nearest config "
        f"makes it {has}{more}; {reason}. Prune what shares a field alike, or export the graph.",
        conflicts,
        reason,
    )


def clash(
    build: Build, config: dict, target: Shapes, known: Mapping[Path, Effect], axis: Axis
) -> str | None:
    """The number of the config of which `axis` and another axis ask for different values."""
    for effect in known.values():
        leaf = effect[axis][0] if axis in effect else None
        values = asked(config, build(config), target, effect, leaf)
        if len(values) > 1 and all(v > 0 and v.denominator == 1 for v in values):
            listed = [str(value) for value in sorted(values)]
            many = ["...", listed[-1]] if len(listed) > 4 else listed[3:]
            return f"{spell(leaf)} would have to be {', '.join(listed[:3] + many)} at once"
    return None


def changes(before: dict, after: dict) -> str:
    changed = [(path, v) for path, v in numbers(after) if get(before, path) != v]
    return ", ".join(f"{spell(path)}={value}" for path, value in changed) or "no number"


def expressible(
    config: dict,
    shapes_of: Callable[[dict], Shapes | None],
    slots: Sequence[Slot],
    units: int,
    keep: int,
    *,
    optional: Sequence[Path] = (),
) -> bool:
    """Whether some config gives the model in which `keep` of a dimension's `units` are left.

    `slots` lists where the dimension is: (parameter path, axis, entries per unit). Slots on one
    axis add up. Name together what one field sets, such as the MLP widths of all layers. Several
    questions about one model share their builds through `memoised(shapes_of)`.
    """
    target = {path: list(shape) for path, shape in shapes_of(copy.deepcopy(config)).items()}
    for path, axis, entries in slots:
        target[path][axis] -= (units - keep) * entries
    shapes = {path: tuple(shape) for path, shape in target.items()}
    try:
        fit_config(config, shapes_of, shapes, optional=optional)
    except Inexpressible:
        return False
    return True


def nearest_expressible(
    config: dict,
    shapes_of: Callable[[dict], Shapes | None],
    slots: Sequence[Slot],
    units: int,
    keep: int,
    *,
    optional: Sequence[Path] = (),
) -> int:
    """The number of units to keep instead of `keep`: near it, and `expressible`.

    Tries `keep`, then the nearest multiple below `units` of each power of two and of each divisor
    of `units`, small ones first. `units` where nothing else will do: this dimension can not be
    pruned alone.
    """
    build = memoised(shapes_of)
    grains = {2**i for i in range(units.bit_length())} | {
        g for g in range(1, units + 1) if units % g == 0
    }
    grains -= {g for g in grains if g >= units}
    steps = {g: max(1, min(round(keep / g), (units - 1) // g)) for g in sorted(grains)}
    for near in dict.fromkeys(g * count for g, count in steps.items()):
        if expressible(config, build, slots, units, near, optional=optional):
            return near
    return units
