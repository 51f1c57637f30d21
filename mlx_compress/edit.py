"""Rewrite a graph for a prune plan: the same primitives, with the sizes that are left.

The pruned graph needs no model class, so it exists for every plan, also for one that no config can
express. It is read backwards from the outputs. The size of most axes follows from the plan alone;
a *wild* axis (from a broadcast) takes the size that its reader needs, so a mask that is shared by
layers which keep different numbers of heads is emitted once for each.
"""

import math
from collections.abc import Iterator, Mapping

import mlx.core as mx

from .axes import NamedAxes
from .dims import Axis, Dim, factors, find, is_wild, size_of
from .errors import InputError
from .execute import window
from .graph import SHAPE_ONLY, Graph, Node, Value
from .layers import bypass as layer_bypass
from .plan import PrunePlan
from .prune import check_plan

Wild = dict[Dim, int]


def edit_graph(
    named: NamedAxes, plan: PrunePlan, *, bypass: Mapping[int, int] | None = None
) -> Graph:
    """The graph after pruning; it takes `prune_parameters`' arrays under the same paths.

    `bypass` maps the id of a value to the one that takes its place; without it, the plan's dropped
    layers are bypassed. Parameters that only the bypassed part used are gone.

    Raises `InputError` for a plan of another model, or when a primitive's attributes cannot follow
    (a ranking over a pruned dimension).
    """
    check_plan(named, plan)
    places = layer_bypass(named, plan) if bypass is None else bypass
    return _Editor(named, plan, dict(places)).edit()


class _Editor:
    def __init__(self, named: NamedAxes, plan: PrunePlan, bypass: dict[int, int]):
        self.named, self.plan, self.bypass = named, plan, bypass
        self.graph, self.axes = named.graph, named.inference.axes
        self.producer = {out: k for k, n in enumerate(self.graph.nodes) for out in n.outputs}
        self.demands: dict[int, list[Wild]] = {}
        self.emitted: dict[tuple, int] = {}
        self.values: dict[int, Value] = {}
        self.constants: dict[int, mx.array] = {}

    def edit(self) -> Graph:
        for value in self.graph.outputs:
            self._demand(value, {})
        order = list(reversed(range(len(self.graph.nodes))))
        for k in order:
            for wild in self._versions(self.graph.nodes[k]):
                for value in self.graph.nodes[k].inputs:
                    self._demand(value, self._wild_of_input(k, value, wild))
        inputs = tuple(self._emit_leaf(value) for value in self.graph.inputs)
        parameters = {
            path: self._emit_leaf(value)
            for path, value in self.graph.parameters.items()
            if value in self.demands or not self.bypass
        }
        for value, array in self.graph.constants.items():
            if value in self.demands:
                self.constants[self._emit_leaf(value)] = array
        nodes = [node for k in reversed(order) for node in self._emit(k)]
        outputs = tuple(self._new_id(value, {}) for value in self.graph.outputs)
        return Graph(tuple(nodes), self.values, inputs, outputs, parameters, self.constants)

    # ---- sizes

    def _size(self, axis: Axis, wild: Wild) -> int:
        return math.prod(self._dim_size(find(dim), wild) for dim in axis)

    def _dim_size(self, dim: Dim, wild: Wild) -> int:
        if dim in wild:
            return wild[dim]
        if dim.parts is not None:
            return self._size(dim.parts, wild)
        if dim.segments is not None:
            return sum(self._size(segment, wild) for segment in dim.segments)
        return self.plan.kept(self.named.names.get(dim, ""), dim.size)

    def _shape(self, value: int, wild: Wild) -> tuple[int, ...]:
        old = self.graph.values[value].shape
        return tuple(
            self._size(axis, wild) if size_of(axis) == n else n
            for axis, n in zip(self.axes[value], old, strict=True)
        )

    def _offset(self, axis: Axis, position: int, wild: Wild) -> int:
        """Where the boundary at `position` of an axis lies after pruning."""
        size = self._size(axis, wild)
        if position == 0 or size == size_of(axis):
            return position
        if position == size_of(axis):
            return size
        lead, *rest = factors(axis)
        inner = size_of(rest)
        return self._lead_offset(lead, position // inner, wild) * self._size(rest, wild)

    def _lead_offset(self, dim: Dim, position: int, wild: Wild) -> int:
        if dim.segments is None:
            if self._dim_size(dim, wild) != dim.size and 0 < position < dim.size:
                raise InputError("a pruned dimension is cut by position; it cannot be edited.")
            return position
        before = 0
        for segment in dim.segments:
            size = size_of(segment)
            if position < size:
                return before + self._offset(segment, position, wild)
            before, position = before + self._size(segment, wild), position - size
        return before

    # ---- who needs what

    def _resolve(self, value: int) -> int:
        while value in self.bypass:
            value = self.bypass[value]
        return value

    def _wilds(self, value: int) -> set[Dim]:
        return {dim for axis in self.axes[value] for dim in _wild_within(axis)}

    def _demand(self, value: int, wild: Wild) -> None:
        value = self._resolve(value)
        wanted = {dim: wild[dim] for dim in self._wilds(value) if dim in wild}
        versions = self.demands.setdefault(value, [])
        if wanted not in versions:
            versions.append(wanted)

    def _versions(self, node: Node) -> list[Wild]:
        out: list[Wild] = []
        for value in node.outputs:
            out += [wild for wild in self.demands.get(value, ()) if wild not in out]
        return out

    def _wild_of_input(self, position: int, value: int, wild: Wild) -> Wild:
        sizes = dict(wild)
        for (ours,), theirs in self.named.inference.matches.get(position, ()):
            if find(ours) not in wild:
                sizes[find(ours)] = self._size(theirs, wild)
        return sizes

    # ---- the new graph

    def _key(self, value: int, wild: Wild) -> tuple:
        value = self._resolve(value)
        return value, frozenset((d, n) for d, n in wild.items() if d in self._wilds(value))

    def _new_id(self, value: int, wild: Wild) -> int:
        return self.emitted[self._key(value, wild)]

    def _emit_leaf(self, value: int) -> int:
        known = self.emitted.get(self._key(value, {}))
        return self._emit_value(value, {}) if known is None else known

    def _emit_value(self, value: int, wild: Wild) -> int:
        number = len(self.values)
        self.emitted[self._key(value, wild)] = number
        self.values[number] = Value(self._shape(value, wild), self.graph.values[value].dtype)
        return number

    def _emit(self, position: int) -> Iterator[Node]:
        node = self.graph.nodes[position]
        for wild in self._versions(node):
            wilds = [self._wild_of_input(position, value, wild) for value in node.inputs]
            inputs = [self._new_id(v, w) for v, w in zip(node.inputs, wilds, strict=True)]
            inputs = self._rescale_mean(node, inputs)
            outputs = tuple(self._emit_value(value, wild) for value in node.outputs)
            attributes = self._attributes(node, wilds[0] if wilds else {}, wild, outputs)
            yield Node(node.op, tuple(inputs), outputs, attributes)

    def _attributes(self, node: Node, wild_in: Wild, wild: Wild, outputs) -> tuple:
        rewrite = REWRITES.get(node.op)
        return rewrite(self, node, wild_in, wild, outputs) if rewrite else node.attributes

    def _rescale_mean(self, node: Node, inputs: list[int]) -> list[int]:
        """A mean is sum * (1 / n), or sum / n: where n shrinks, the constant follows."""
        for k in {"Multiply": (0, 1), "Divide": (0,)}.get(node.op, ()):
            count = self._reduced_count(node.inputs[k])
            scale = self._scalar(node.inputs[1 - k]) if count else None
            if not scale:
                continue
            old, new = count
            if node.op == "Multiply" and math.isclose(scale * old, 1, rel_tol=1e-2):
                inputs[1 - k] = self._emit_constant(1 / new, node.inputs[1 - k])
            less = int(scale == old - 1)  # the variance of a sample
            if node.op == "Divide" and math.isclose(scale, old - less, rel_tol=1e-2):
                inputs[1 - k] = self._emit_constant(new - less, node.inputs[1 - k])
        return inputs

    def _emit_constant(self, scalar: float, like: int) -> int:
        number = len(self.values)
        self.values[number] = Value((), self.graph.values[like].dtype)
        self.constants[number] = mx.array(scalar, self.values[number].dtype)
        return number

    def _reduced_count(self, value: int) -> tuple[int, int] | None:
        """For the sum of a pruned axis: how many entries it adds, before and after."""
        _, node = self._source(value)
        if node is None or node.op != "Reduce" or node.attributes[0] != 2:
            return None
        axes = [self.axes[node.inputs[0]][k] for k in node.attributes[1]]
        old = math.prod(map(size_of, axes))
        new = math.prod(self._size(axis, {}) for axis in axes)
        return (old, new) if new != old else None

    def _source(self, value: int) -> tuple[int, Node | None]:
        """A value seen through changes of shape, and the node that computes it, if any."""
        while value in self.producer:
            node = self.graph.nodes[self.producer[value]]
            if node.op not in SHAPE_ONLY:
                return value, node
            value = node.inputs[0]
        return value, None

    def _scalar(self, value: int) -> float | None:
        """What a constant of one element holds, or one computed like MLX's n - ddof."""
        value, node = self._source(value)
        if node is None:
            array = self.graph.constants.get(value)
            return array.item() if array is not None and array.size == 1 else None
        if node.op not in ("Subtract", "Maximum"):
            return None
        a, b = (self._scalar(i) for i in node.inputs)
        if a is None or b is None:
            return None
        return max(a, b) if node.op == "Maximum" else a - b


def _wild_within(axis: Axis) -> Iterator[Dim]:
    """The wild variables of an axis, and those that they were cut into."""
    for dim in map(find, axis):
        if dim.wild:
            yield dim
        yield from _wild_within(dim.parts or [d for s in dim.segments or () for d in s])


def _new_shape(editor, node, wild_in, wild, outputs):
    return (editor.values[outputs[0]].shape,)


def _unflatten(editor, node, wild_in, wild, outputs):
    axis, shape = node.attributes
    return axis, editor.values[outputs[0]].shape[axis : axis + len(shape)]


def _window(editor, axis, start, end, stride, wild):
    if editor._size(axis, wild) == size_of(axis):
        return start, end
    kept = range(size_of(axis))[window(size_of(axis), start, end, stride)]
    if stride != 1:
        return kept.start, editor._size(axis, wild)
    return editor._offset(axis, kept.start, wild), editor._offset(axis, kept.stop, wild)


def _slice(editor, node, wild_in, wild, outputs):
    axes = editor.axes[node.inputs[0]]
    before = editor.graph.values[node.outputs[0]].shape
    after = editor.values[outputs[0]].shape
    windows = [
        (0, new, 1)  # constant along the axis: any slots will do
        if is_wild(axis) and new != old
        else (*_window(editor, axis, *where, wild_in), where[2])
        for axis, old, new, *where in zip(axes, before, after, *node.attributes, strict=True)
    ]
    return tuple(zip(*windows, strict=True)) or node.attributes


def _slice_update(editor, node, wild_in, wild, outputs):
    code, start, end, stride = node.attributes
    axes = editor.axes[node.outputs[0]]
    bounds = [_window(editor, *p, wild) for p in zip(axes, start, end, stride, strict=True)]
    return code, tuple(b for b, _ in bounds), tuple(e for _, e in bounds), stride


def _split(editor, node, wild_in, wild, outputs):
    points, axis = node.attributes
    whole = editor.axes[node.inputs[0]][axis]
    return tuple(editor._offset(whole, point, wild_in) for point in points), axis


def _gather(editor, node, wild_in, wild, outputs):
    axes, sizes = node.attributes
    old = editor.graph.values[node.inputs[0]].shape
    new = editor._shape(node.inputs[0], wild_in)
    return axes, tuple(n if s == o else s for s, o, n in zip(sizes, old, new, strict=True))


def _convolution(editor, node, wild_in, wild, outputs):
    *others, _, flip = node.attributes
    channels = editor._shape(node.inputs[0], wild_in)[-1]
    return (*others, channels // editor._shape(node.inputs[1], {})[-1], flip)


def _pad(editor, node, wild_in, wild, outputs):
    axes, low, high = node.attributes
    out = [editor.axes[node.outputs[0]][k] for k in axes]
    new_low = [editor._offset(axis, n, wild) for axis, n in zip(out, low, strict=True)]
    new_high = [
        editor._size(axis, wild) - editor._offset(axis, size_of(axis) - n, wild)
        for axis, n in zip(out, high, strict=True)
    ]
    return axes, tuple(new_low), tuple(new_high)


def _as_strided(editor, node, wild_in, wild, outputs):
    shape, strides, offset = node.attributes
    old, new = shape[-1], editor.values[outputs[0]].shape[-1]
    outer = tuple(stride // old * new for stride in strides[:-1])
    return (*shape[:-1], new), (*outer, strides[-1]), offset // old * new


def _ranking(editor, node, wild_in, wild, outputs):
    axis = editor.axes[node.inputs[0]][node.attributes[-1]]
    if editor._size(axis, wild_in) != size_of(axis):
        raise InputError(f"{node.op} ranks a pruned dimension; the graph cannot be edited.")
    return node.attributes


REWRITES = {
    **dict.fromkeys(("Reshape", "Broadcast", "Full"), _new_shape),
    **dict.fromkeys(("ArgSort", "ArgPartition", "Partition", "Sort"), _ranking),
    "AsStrided": _as_strided,
    "Convolution": _convolution,
    "Gather": _gather,
    "Pad": _pad,
    "Slice": _slice,
    "SliceUpdate": _slice_update,
    "Split": _split,
    "Unflatten": _unflatten,
}
