"""Whole layers and their branches as dimensions of a plan: what can be dropped, and what then goes.

A residual branch f(x) of x + f(x) is dropped by letting x take the sum's place, a block (all
branches of one entry of a module list) by dropping each of its branches. A branch that mixes
positions is of kind attention, whatever it is made of; one that does not, of kind mlp.

Cuts of these kinds stand in a `PrunePlan` like any other: `model.layers` (kind layers),
`model.layers.attention`, `model.layers.mlp`, each with the entries that keep theirs.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from .axes import NamedAxes
from .errors import InputError
from .graph import Graph
from .options import LAYER_KINDS
from .plan import Cut, PrunePlan
from .residual import Entry, Residuals, Term, entry_of, spell


@dataclass(frozen=True)
class Branch:
    """A residual branch f(x). `stream` and `value` are the ids of x and of f(x).

    `frozen` says why it cannot be dropped, None if it can.
    """

    kind: str
    stream: int
    value: int
    frozen: str | None = None


@dataclass(frozen=True)
class LayerDimension:
    """What can be dropped of one kind from one module list; its units are the list's entries.

    `why` says, by index, why that one has to stay. `branches` and `parameters` give, by index, the
    branches dropped with it, and the parameters that nothing else reads. `ends` are the ids of
    the values with which a removable block begins and ends; None for others.
    """

    name: str
    kind: str
    list: str
    size: int
    why: Mapping[int, str]
    branches: Sequence[tuple[Branch, ...]]
    parameters: Sequence[tuple[str, ...]]
    ends: Sequence[tuple[int, int] | None]

    @property
    def removable(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.size) if i not in self.why)

    @property
    def free(self) -> bool:
        return bool(self.removable)

    @property
    def frozen(self) -> str | None:
        """Why none can be dropped, None if some can."""
        return None if self.free else self.why[0]


def layer_dimensions(named: NamedAxes) -> list[LayerDimension]:
    """What can be dropped, by module list: whole blocks, then attention, then mlp branches."""
    held = vars(named)
    if "_layer_dimensions" not in held:
        held["_layer_dimensions"] = _dimensions(named)
    return held["_layer_dimensions"]


def is_layer_cut(cut: Cut) -> bool:
    return cut.kind in LAYER_KINDS


def check_layer_cut(named: NamedAxes, cut: Cut) -> None:
    """Raise `InputError` unless the model has what the cut drops, and can spare it."""
    found = {d.name: d for d in layer_dimensions(named)}.get(cut.name)
    if found is None or found.kind != cut.kind:
        raise InputError(f"{cut.name}: the model has no such {cut.kind}; `inspect` lists them.")
    if found.size != cut.size:
        raise InputError(
            f"{cut.name}: the plan was made for {cut.size} entries, the model has {found.size}."
        )
    for index in dropped(cut):
        if index in found.why:
            what = spell((found.list, index)) + ("" if cut.kind == "layers" else f"'s {cut.kind}")
            raise InputError(f"{what} cannot be removed ({found.why[index]}).")


def without(dim: LayerDimension, indices: Iterable[int]) -> Cut:
    """The cut that drops the given entries."""
    gone = set(indices)
    return Cut(dim.name, dim.kind, dim.size, [i for i in range(dim.size) if i not in gone])


def dropped(cut: Cut) -> list[int]:
    """The entries that a cut drops."""
    return sorted(set(range(cut.size)) - set(cut.keep))


def bypass(named: NamedAxes, plan: PrunePlan) -> dict[int, int]:
    """For each sum that loses a term: the id of its value -> the id that takes its place."""
    zero = {branch.value for branch in _dropped_branches(named, plan)}
    places: dict[int, int] = {}
    for node in named.graph.nodes if zero else ():
        if node.op == "Add" and zero.intersection(node.inputs):
            rest = [value for value in node.inputs if value not in zero]
            if rest:
                places[node.outputs[0]] = rest[0]
            else:
                zero.add(node.outputs[0])
    return places


def dropped_parameters(named: NamedAxes, plan: PrunePlan) -> set[str]:
    """The parameters that are gone with the plan's layers and branches."""
    if not any(map(is_layer_cut, plan)):
        return set()
    lost = _needed(named.graph, {}) - _needed(named.graph, bypass(named, plan))
    kept = kept_layers(plan)

    def is_gone(path: str) -> bool:
        name, index = entry_of(path) or (None, None)
        return named.graph.parameters[path] in lost or name in kept and index not in kept[name]

    return set(filter(is_gone, named.graph.parameters))


def renamed_paths(named: NamedAxes, plan: PrunePlan) -> dict[str, str]:
    """Old path -> new path of every parameter that stays: entries of a list count on from 0."""
    gone, kept = dropped_parameters(named, plan), kept_layers(plan)
    return {path: _renumber(path, kept) for path in named.graph.parameters if path not in gone}


def kept_layers(plan: PrunePlan) -> dict[str, list[int]]:
    """For each module list that loses whole entries, the indices that stay."""
    return {cut.name: list(cut.keep) for cut in plan if cut.kind == "layers"}


def settled(named: NamedAxes, plan: PrunePlan) -> PrunePlan:
    """The same plan, where an entry that loses every branch is dropped as a whole.

    A config that has no word for an empty block may have one for fewer blocks.
    """
    gone = {branch.value for branch in _dropped_branches(named, plan)}
    cuts = dict(plan.cuts)
    for blocks in (d for d in layer_dimensions(named) if d.kind == "layers"):
        values = [{branch.value for branch in each} for each in blocks.branches]
        empty = [i for i in blocks.removable if values[i] <= gone]
        if not 0 < len(empty) < blocks.size:
            continue
        cuts[blocks.name] = without(blocks, empty)
        for kind in ("attention", "mlp"):
            cut = cuts.pop(f"{blocks.name}.{kind}", None)
            if cut is not None and set(dropped(cut)) - set(empty):
                cuts[cut.name] = replace(cut, keep=sorted({*cut.keep, *empty}))
    return PrunePlan(cuts, plan.recipe)


def _renumber(path: str, kept: Mapping[str, Sequence[int]]) -> str:
    name, index = entry_of(path) or (None, None)
    if name not in kept:
        return path
    return spell((name, kept[name].index(index))) + path[len(spell((name, index))) :]


def _dropped_branches(named: NamedAxes, plan: PrunePlan) -> Iterator[Branch]:
    for cut in filter(is_layer_cut, plan):
        check_layer_cut(named, cut)
        dim = next(d for d in layer_dimensions(named) if d.name == cut.name)
        for index in dropped(cut):
            yield from dim.branches[index]


def _needed(graph: Graph, places: Mapping[int, int]) -> set[int]:
    """The values that the outputs are computed from."""

    def resolve(value: int) -> int:
        while value in places:
            value = places[value]
        return value

    needed = set(map(resolve, graph.outputs))
    for node in reversed(graph.nodes):
        if needed.intersection(node.outputs):
            needed.update(map(resolve, node.inputs))
    return needed


# ---- finding them


def _dimensions(named: NamedAxes) -> list[LayerDimension]:
    residuals = Residuals(named)
    sizes: dict[str, int] = {}
    for name, index in filter(None, map(entry_of, named.graph.parameters)):
        sizes[name] = max(sizes.get(name, 0), index + 1)
    by_entry: dict[Entry, list[Term]] = {}
    for term in residuals.terms:
        by_entry.setdefault(term.entry, []).append(term)
    out = []
    for name in dict.fromkeys(name for name, _ in by_entry):
        entries = [(name, i) for i in range(sizes[name])]
        out += _of_list(residuals, name, entries, by_entry)
    return out


def _of_list(residuals: Residuals, name, entries, by_entry) -> Iterator[LayerDimension]:
    terms = [by_entry.get(entry, []) for entry in entries]
    branches = [[_branch(residuals, term, each) for term in each] for each in terms]
    blocks = [_block(residuals, entry, by_entry) for entry in entries]
    for kind in LAYER_KINDS:
        chosen = [
            [k for k, branch in enumerate(each) if kind in ("layers", branch.kind)]
            for each in branches
        ]
        if not any(chosen):
            continue
        of_kind = [tuple(each[k] for k in ks) for each, ks in zip(branches, chosen, strict=True)]
        own = [
            _own_parameters(residuals, entry, each, ks)
            for entry, each, ks in zip(entries, terms, chosen, strict=True)
        ]
        reasons = [
            why if kind == "layers" else _why_not(kind, found, paths)
            for (why, _), found, paths in zip(blocks, of_kind, own, strict=True)
        ]
        yield LayerDimension(
            name=name if kind == "layers" else f"{name}.{kind}",
            kind=kind,
            list=name,
            size=len(entries),
            why={i: why for i, why in enumerate(reasons) if why},
            branches=of_kind,
            parameters=own,
            ends=[ends if kind == "layers" else None for _, ends in blocks],
        )


def _branch(residuals: Residuals, term: Term, beside: list[Term]) -> Branch:
    frozen = None
    if term.foreign:
        frozen = f"it reads {term.foreign}, which is not part of {spell(term.entry)}"
    else:
        reader = residuals.leak(term, set().union(*(t.inner | t.joins for t in beside)))
        frozen = f"its values are read by {reader}" if reader else None
    kind = "attention" if residuals.mixes_positions(term) else "mlp"
    return Branch(kind, term.stream, term.value, frozen)


def _own_parameters(residuals: Residuals, entry: Entry, terms: list[Term], chosen) -> tuple:
    """The parameters of an entry that only the chosen terms read."""
    inner = set().union(*(terms[k].inner for k in chosen))
    inner = inner.difference(*(t.inner for k, t in enumerate(terms) if k not in chosen))
    paths = (path for path in residuals.graph.parameters if entry_of(path) == entry)
    readers = {path: residuals.reader_positions(path) for path in paths}
    return tuple(path for path, at in readers.items() if at and at <= inner)


def _why_not(kind: str, branches: tuple[Branch, ...], own: tuple[str, ...]) -> str | None:
    if not branches:
        return f"it has no {kind} branch"
    reasons = [branch.frozen for branch in branches if branch.frozen]
    return next(iter(reasons), None if own else "it has no parameters of its own")


def _block(residuals: Residuals, entry: Entry, by_entry):
    """(why the block has to stay, or None; the values with which it begins and ends, or None)."""
    terms = by_entry.get(entry)
    why = _block_why_not(residuals, entry, by_entry) if terms else "it has no residual branch"
    return why, None if why else (terms[0].stream, terms[-1].total)


def _block_why_not(residuals: Residuals, entry: Entry, by_entry) -> str | None:
    terms = by_entry[entry]
    for term in terms:
        frozen = _branch(residuals, term, terms).frozen
        if frozen:
            return frozen
    first, last = terms[0].stream, terms[-1].total
    before, chain = set(residuals.chain(first)), list(residuals.chain(last))
    if first not in chain:
        return "its branches are not added to one stream"
    inside = [value for value in chain if value not in before]
    if any(v in residuals.sums and v not in {t.total for t in terms} for v in inside):
        return "it is used more than once"
    near = {residuals.uncast(first), chain[-1]}  # where it begins, and where the stream does
    inside += [value for value in before if residuals.uncast(value) in near]
    if any(not term.starts <= set(inside) for term in terms):
        return "it reads the residual stream as it was before another block"
    inner = set().union(*(term.inner for term in terms))
    for path in residuals.graph.parameters:
        if entry_of(path) == entry and not residuals.reader_positions(path) <= inner:
            return f"{path} is used outside its residual branches"
    return _gap(residuals, entry, by_entry)


def _gap(residuals: Residuals, entry: Entry, by_entry) -> str | None:
    """Where a block does not begin at the last one's end, or end at the next one's beginning."""
    name, index = entry
    for one, two in ((index - 1, index), (index, index + 1)):
        before, after = by_entry.get((name, one)), by_entry.get((name, two))
        if before and after:
            if residuals.uncast(before[-1].total) != residuals.uncast(after[0].stream):
                return f"the stream is changed between {name}.{one} and {name}.{two}"
    return None
