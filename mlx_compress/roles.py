"""What a dimension is, told by what the graph does with it.

| kind | the graph shows |
|---|---|
| `experts` | batched weights are picked along it by indices that the model computed |
| `heads` | a product of two activations (attention) runs separately for each of its units |
| `query_heads` | the same, with one side broadcast: the query heads that share a KV head |
| `head_dim` | it lies inside a head, or such a product adds up over it |
| `width` | a residual sum, over several blocks, carries it |
| `channels` | anything else that lies between a weight that makes it and one that reads it |
| `fixed` | it cannot change: an input, an output, positions, a constant |
"""

from collections import defaultdict
from dataclasses import dataclass

from .axis_rules import INPUT
from .dims import Axis, Dim, factors, is_wild, leaves, size_of
from .graph import Graph, Node, dynamic_values
from .inference import Inference


@dataclass
class Roles:
    """Sets of leaf variables by what happens to them."""

    inference: Inference
    experts: set[Dim]
    heads: set[Dim]
    query_heads: set[Dim]
    head_dims: set[Dim]
    residual: set[Dim]
    mixed: set[Dim]

    @classmethod
    def read(cls, graph: Graph, inference: Inference) -> "Roles":
        dynamic = dynamic_values(graph)
        heads, query_heads = _attention(graph, inference, dynamic)
        return cls(
            inference,
            experts={dim for axis, _ in inference.routed for dim in leaves(axis)},
            heads=heads,
            query_heads=query_heads - heads,
            head_dims=_added_up_in_heads(graph, inference, dynamic),
            residual=_residual(graph, inference, dynamic),
            mixed=_mixed(graph, inference),
        )

    def kind(self, dim: Dim, slots: list[tuple[str, int]]) -> str:
        if dim in self.experts:
            return "experts"
        if dim.frozen is not None:
            return "fixed"
        if dim in self.heads:
            return "heads"
        if dim in self.query_heads:
            return "query_heads"
        if dim in self.residual and len({_block(path) for path, _ in slots}) > 1:
            return "width"
        inside = dim in self.head_dims or self._inside_a_head(dim, slots)
        return "head_dim" if inside else "channels"

    def _inside_a_head(self, dim: Dim, slots) -> bool:
        for path, k in slots:
            axis = self.inference.axes[self.inference.graph.parameters[path]][k]
            order = [leaf for factor in _flat(axis) for leaf in factor]
            if dim in order and set(order[: order.index(dim)]) & (self.heads | self.query_heads):
                return True
        return False

    def nesting(self, dims, kinds, slots) -> dict[Dim, Dim]:
        """For query heads and for channels of experts: the dimension within which each is chosen.

        Units can be chosen anew for each unit of the outer dimension when no value ever holds the
        inner one without the outer one; or, for experts, when all products that read the inner
        dimension pick their expert by the same indices.
        """
        outers = [dim for dim in dims if kinds[dim] in ("heads", "experts")]
        held = _held_together(self.inference, outers)
        out = {}
        for dim in dims:
            if kinds[dim] not in ("query_heads", "channels"):
                continue
            for outer in outers:
                shares = all(self._in_parameter(outer, path) for path, _ in slots[dim])
                if shares and (held[dim, outer] or self._picked_alike(dim, outer)):
                    out[dim] = outer
                    break
        return out

    def _in_parameter(self, dim: Dim, path: str) -> bool:
        axes = self.inference.axes[self.inference.graph.parameters[path]]
        return any(dim in leaves(axis) for axis in axes)

    def _picked_alike(self, dim: Dim, outer: Dim) -> bool:
        indices = {value for axis, value in self.inference.routed if outer in leaves(axis)}
        return len(indices) == 1


def _flat(axis: Axis):
    """The products an axis consists of: one, or one for each segment of its leading sum."""
    dims = factors(axis)
    if dims and dims[0].segments is not None:
        for segment in dims[0].segments:
            for product in _flat(segment):
                yield product + [leaf for dim in dims[1:] for leaf in leaves([dim])]
    else:
        yield [leaf for dim in dims for leaf in leaves([dim])]


def _block(path: str) -> str:
    """The module list entry that a parameter lies in, or its module if it lies in none."""
    parts = path.split(".")
    numbers = [k for k, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1] if numbers else parts[:-1])


def _attention(graph: Graph, inference: Inference, dynamic: set[int]) -> tuple[set, set]:
    both, one = set(), set()
    for node in graph.nodes:
        if node.op != "Matmul" or not dynamic.issuperset(node.inputs):
            continue
        a, b = (inference.axes[i][:-2] for i in node.inputs)
        for p, q in zip(reversed(a), reversed(b), strict=False):
            for x, y in ((p, q), (q, p)):
                (both if not is_wild(y) and size_of(y) > 1 else one).update(leaves(x))
        broadcast = {
            d
            for p, q in zip(reversed(a), reversed(b), strict=False)
            for d in _beside_wild(p, q) | _beside_wild(q, p)
        }
        one |= broadcast
        both -= broadcast
    return both, one


def _added_up_in_heads(graph: Graph, inference: Inference, dynamic: set[int]) -> set[Dim]:
    """What products of activations add up over, where they run separately for more than a batch."""
    out: set[Dim] = set()
    for node in graph.nodes:
        if node.op == "Matmul" and dynamic.issuperset(node.inputs):
            *batch, _, inner = inference.axes[node.inputs[0]]
            if any(size_of(a) > 1 and {d.frozen for d in leaves(a)} != {INPUT} for a in batch):
                out.update(leaves(inner))
    return out


def _beside_wild(axis: Axis, other: Axis) -> set[Dim]:
    """Leaves of `axis` that stand beside wild factors of `other`."""
    out: set[Dim] = set()
    mine, theirs = factors(axis), factors(other)
    if [d.size for d in mine] == [d.size for d in theirs]:
        for x, y in zip(mine, theirs, strict=True):
            if is_wild([y]) and not is_wild([x]):
                out.update(leaves([x]))
    elif is_wild(other):
        out.update(leaves(axis))
    return out


def _residual(graph: Graph, inference: Inference, dynamic: set[int]) -> set[Dim]:
    """Dimensions of sums `x + f(x)` of activations: one operand was computed from the other."""
    ancestors: dict[int, frozenset[int]] = {}
    out: set[Dim] = set()
    for node in graph.nodes:
        seen = frozenset().union(*(ancestors.get(i, frozenset()) for i in node.inputs))
        if node.op == "Add" and dynamic.issuperset(node.inputs):
            a, b = node.inputs
            if a in ancestors.get(b, ()) or b in ancestors.get(a, ()):
                for axis in inference.axes[node.outputs[0]]:
                    out.update(leaves(axis))
        for value in node.outputs:
            ancestors[value] = seen | {value}
    return out


def _held_together(inference: Inference, outers: list[Dim]) -> dict[tuple[Dim, Dim], bool]:
    """Whether every value that holds a dimension also holds the outer one."""
    together: dict[tuple[Dim, Dim], bool] = defaultdict(lambda: True)
    for axes in inference.axes.values():
        held = {dim for axis in axes for dim in leaves(axis) if not dim.wild}
        for outer in outers:
            if outer not in held:
                for dim in held:
                    together[dim, outer] = False
    return together


# What is zero in every unit whose parameters are zero, by how the operands' zeros combine.
PASSES_ZEROS = {
    "Abs", "ArcSin", "ArcSinh", "ArcTan", "ArcTanh", "AsStrided", "AsType", "Broadcast", "Ceil",
    "Contiguous", "Copy", "Depends", "Erf", "ErfInv", "ExpandDims", "Expm1", "Flatten", "Floor",
    "Full", "Gather", "GatherAxis", "Log1p", "Negative", "Pad", "Reduce", "Reshape", "Round",
    "Scan", "Sign", "Sin", "Sinh", "Slice", "Split", "Sqrt", "Square", "Squeeze", "StopGradient",
    "Tan", "Tanh", "Transpose", "Unflatten", "View",
}  # fmt: skip
PRODUCTS = {"AddMM", "Convolution", "GatherMM", "LogicalAnd", "Matmul", "Multiply"}
SUMS = {"Add", "LogicalOr", "Maximum", "Minimum", "Select", "Subtract"}
JOINS = {"Concatenate", "SliceUpdate"}


def _mixed(graph: Graph, inference: Inference) -> set[Dim]:
    """Dimensions where removing a unit may differ from zeroing it.

    A mean, a norm or a softmax runs over them; or a product of two activations adds up units that
    are not zero although their parameters are (`exp(x) @ exp(y)`); or zero is divided by zero.
    """
    mixed = {dim for axis in inference.reduced for dim in leaves(axis)}
    held = {
        value: {dim for axis in axes for dim in leaves(axis) if not dim.wild}
        for value, axes in inference.axes.items()
    }
    zero = {value: held[value] for value in graph.parameters.values()}
    scalars = {value: a.item() for value, a in graph.constants.items() if a.size == 1}
    for node in graph.nodes:
        x = [zero.get(value, set()) for value in node.inputs]
        if node.op in ("Broadcast", "Full", "AsType") and node.inputs[0] in scalars:
            scalars[node.outputs[0]] = scalars[node.inputs[0]]
        if node.op in ("AddMM", "Convolution", "GatherMM", "Matmul"):
            mixed |= set(leaves(inference.axes[node.inputs[0]][-1])) - x[0] - x[1]
        mixed |= _infinite(node, x, scalars)
        out = _zeros(node, x, [held[value] for value in node.inputs], scalars)
        zero.update((value, out & held[value]) for value in node.outputs)
    return _along(mixed, inference)


def _along(dims: set[Dim], inference: Inference) -> set[Dim]:
    """These, and those that the wild ones among them stand along: they have one size."""
    pairs = [
        ({dim for dim in leaves(ours) if dim.wild}, set(leaves(theirs)))
        for matches in inference.matches.values()
        for ours, theirs in matches
    ]
    while more := [theirs - dims for wild, theirs in pairs if wild & dims and theirs - dims]:
        dims = dims.union(*more)
    return dims


def _zeros(node: Node, x: list[set[Dim]], held: list[set[Dim]], scalars) -> set[Dim]:
    """The dimensions along which an output is zero in the units where parameters are."""
    if node.op in PASSES_ZEROS or node.op == "Power" and scalars.get(node.inputs[1], 0) > 0:
        return x[0]
    if node.op in JOINS:
        every = set().union(*x)
        return every.difference(*(has - zero for zero, has in zip(x, held, strict=True)))
    if node.op in PRODUCTS:
        return (x[0] | x[1]) & (x[2] if node.op == "AddMM" else x[0] | x[1])
    if node.op in SUMS:
        signs = {"Maximum": -1, "Minimum": 1}.get(node.op, 0)
        operands = zip(x, node.inputs, strict=True)
        rest = [zero for zero, value in operands if not _harmless(scalars.get(value), signs)]
        return set.intersection(*rest[node.op == "Select" :]) if rest else set()
    return x[0] - x[1] if node.op == "Divide" else set()


def _harmless(scalar: float | None, sign: int) -> bool:
    """Whether a constant leaves zeros alone: 0, or one that a maximum or minimum never picks."""
    return scalar is not None and (scalar == 0 or scalar * sign > 0)


def _infinite(node: Node, x: list[set[Dim]], scalars) -> set[Dim]:
    """Dimensions whose zeros would not stay finite."""
    if node.op == "Divide":
        return x[1]
    reciprocal = node.op == "Sqrt" and node.attributes[0]
    negative = node.op == "Power" and scalars.get(node.inputs[1], -1) < 0
    return x[0] if reciprocal or negative or node.op == "Log" else set()
