"""What a stock config can express, asked before the work begins.

A request for counts is tried as it stands. Where no config gives those shapes, each family of
dimensions that the nearest config gets wrong is tried alone and moved to the nearest count that
works, or left whole; what was changed is said. The models built from candidate configs are traced
and compared with the edited graph, as equal shapes alone do not mean the same computation (3 heads
of 16, or 4 of 12?).
"""

import math
from collections.abc import Iterable
from functools import cache

import mlx.core as mx

from .allocate import Counts, Request, family, request, stand_in
from .axes import Dimension, NamedAxes
from .budget import Budget
from .edit import edit_graph
from .errors import InputError
from .fields import Inexpressible, fit_config, nearest_expressible
from .graph import SHAPE_ONLY, Graph, signature
from .layers import kept_layers, renamed_paths
from .options import Options
from .plan import PrunePlan
from .prune import check_plan

SAME = 1e-4  # how far constants may differ that are computed in another order
KEEP_LONGEST = ("channels", "experts", "heads", "width", "query_heads", "head_dim")


def fitted_config(model, named: NamedAxes, plan: PrunePlan) -> dict:
    """The config of the pruned model: same shapes, same computation.

    `model` offers `config`, `shapes_of`, `optional_fields` and `trace_config` (a `LanguageModel`).
    Raises `fields.Inexpressible` when stock mlx-lm has none for this plan, `InputError` when the
    plan is of another model.
    """
    check_plan(named, plan)
    counts = plan.counts()
    target = {
        new: named.sizes_after(path, counts) for path, new in renamed_paths(named, plan).items()
    }
    tokens = mx.zeros(named.graph.values[named.graph.inputs[0]].shape, mx.int32)

    @cache
    def edited() -> Graph | None:
        try:
            return edit_graph(named, plan)
        except InputError:  # a ranking over a pruned dimension: only shapes can be compared
            return None

    def accept(config: dict) -> bool:
        try:
            graph = model.trace_config(config, tokens)
        except (ValueError, TypeError, IndexError, ZeroDivisionError):
            return False
        wanted = edited()
        return wanted is None or computes_alike(graph, wanted)

    return fit_config(
        model.config, model.shapes_of, target,
        optional=model.optional_fields(), layers=kept_layers(plan), accept=accept,
    )  # fmt: skip


def computes_alike(left: Graph, right: Graph) -> bool:
    """Whether two graphs are one computation: primitives, shapes and scalar constants.

    The constants tell what shapes do not: a scale by the square root of the width, or a mean.
    """
    one, two = _scalars(left), _scalars(right)
    return (
        signature(left) == signature(right)
        and len(one) == len(two)
        and all(
            a is None or b is None or math.isclose(a, b, rel_tol=SAME, abs_tol=1e-30)
            for a, b in zip(one, two, strict=True)
        )
    )


def _scalars(graph: Graph) -> list[float | None]:
    """For each operand of each primitive, the number that it is, or None."""
    known = {i: a.item() for i, a in graph.constants.items() if a.size == 1}
    out = []
    for node in graph.nodes:
        if node.op in SHAPE_ONLY or node.op == "AsType":
            known |= {o: known[node.inputs[0]] for o in node.outputs if node.inputs[0] in known}
        else:
            out += [known.get(i) for i in node.inputs]
    return out


def snap(
    model, named: NamedAxes, dims: list[Dimension], wanted: Request, options: Options,
    budget: Budget | None = None,
) -> tuple[list[Dimension], Request]:  # fmt: skip
    """The dimensions that can be pruned, with counts that some stock config expresses.

    The families that the nearest config gets wrong are moved or left whole, until the rest fits.
    Raises `InputError` when nothing of the request can be expressed.
    """
    asked, notes = _families(dims), []
    moved: dict[tuple, int] = {}  # families whose count had to change; their size: left whole
    fine: set[tuple] = set()  # families that a config expresses by themselves
    while conflict := _conflict(model, named, dims, wanted.counts):
        families = _families(dims)
        fresh = [key for key in _suspects(families, conflict) if key not in fine | moved.keys()]
        for key in fresh:
            alone = conflict if len(families) == 1 else None
            count = _alone(model, named, families[key], wanted.counts, notes, alone)
            moved |= {key: count} if count else {}
            fine |= set() if count else {key}
        if not fresh:
            worst = max(families, key=lambda key: KEEP_LONGEST.index(families[key][0].kind))
            moved[worst] = worst[1]
            notes.append(f"{worst[0]}: no stock config can shrink it with the others; left whole")
        dims = [d for d in dims if moved.get(family(d)) != d.size]
        if not dims:
            raise InputError(_refusal(model, options, asked, conflict))
        if options.budget is not None and len(_families(dims)) < len(families):
            wanted, fine = request(named, dims, options, budget), set()
        counts = {d.name: moved.get(family(d), wanted.counts[d.name]) for d in dims}
        wanted = Request(counts, _about(dims, wanted.notes))
    return dims, Request(wanted.counts, [*wanted.notes, *notes])


def _conflict(
    model, named: NamedAxes, dims: Iterable[Dimension], counts: Counts
) -> Inexpressible | None:
    """Why no config expresses these counts, or None if one does."""
    try:
        fitted_config(model, named, stand_in(named, {d.name: counts[d.name] for d in dims}))
    except Inexpressible as conflict:
        return conflict
    return None


def _suspects(families: dict[tuple, list[Dimension]], conflict: Inexpressible) -> list[tuple]:
    """The families on axes that the nearest config gets wrong, or else all."""
    wrong = {
        (path, axis)
        for path, (asked, has) in conflict.conflicts.items()
        for axis, (a, b) in enumerate(zip(asked or (), has or (), strict=False))
        if a != b
    }
    blamed = [key for key, group in families.items() if any(wrong & {*d.slots} for d in group)]
    return blamed or list(families)


def _alone(model, named, group: list[Dimension], counts: Counts, notes, conflict) -> int | None:
    """The count that a family must take, or None if it is fine as it is; says so in `notes`."""
    name, size = family(group[0])
    conflict = conflict or _conflict(model, named, group, counts)
    if conflict is None:
        return None
    asked = counts[group[0].name]
    near = _nearest(model, named, group, asked)
    if near == size:
        notes.append(f"{name}: no stock config can shrink it, {conflict.reason}; left whole")
    else:
        notes.append(f"{name}: {near} of {size} kept, the config cannot express {asked}")
    return near


def _about(dims: Iterable[Dimension], notes: Iterable[str]) -> list[str]:
    """The notes that are not about other dimensions."""
    names = {family(d)[0] for d in dims}
    return [n for n in notes if n.startswith("--") or n.partition(": ")[0] in names]


def _refusal(model, options: Options, families: Iterable[tuple], conflict: Inexpressible) -> str:
    names = ", ".join(dict.fromkeys(name for name, _ in families))
    return (
        f"no config of {model.config.get('model_type')!r} in stock mlx-lm can express smaller "
        f"{names}: {conflict.reason}; choose other dimensions with --dims (now "
        f"{','.join(options.dims)})."
    )


def _families(dims: Iterable[Dimension]) -> dict[tuple, list[Dimension]]:
    out: dict[tuple, list[Dimension]] = {}
    for d in dims:
        out.setdefault(family(d), []).append(d)
    return out


def _nearest(model, named: NamedAxes, group: list[Dimension], count: int) -> int:
    slots = []
    for d in group:
        less = {d.name: d.size - 1}
        for path, axis in dict.fromkeys(d.slots):
            full = named.graph.shapes()[path][axis]
            slots.append((path, axis, full - named.sizes_after(path, less)[axis]))
    size = group[0].size
    near = nearest_expressible(
        model.config, model.shapes_of, slots, size, count, optional=model.optional_fields()
    )
    if near < size and _conflict(model, named, group, {d.name: near for d in group}):
        return size
    return near
