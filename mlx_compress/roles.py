"""What a dimension is, told by what the graph does with it.

| kind | the graph shows |
|---|---|
| `experts` | batched weights are picked along it by indices that the model computed |
| `heads` | a product of two activations (attention) runs separately for each of its units |
| `query_heads` | the same, with one side broadcast: the query heads that share a KV head |
| `head_dim` | it lies inside a head |
| `width` | a residual sum, over several blocks, carries it |
| `channels` | anything else that lies between a weight that makes it and one that reads it |
| `fixed` | it cannot change: an input, an output, positions, a constant |
"""

from collections import defaultdict
from dataclasses import dataclass

from .axis_rules import Inference
from .dims import Axis, Dim, factors, is_wild, leaves, size_of
from .graph import Graph

KINDS = ("channels", "heads", "query_heads", "head_dim", "experts", "width")


@dataclass
class Roles:
    """Sets of leaf variables by what happens to them."""

    inference: Inference
    experts: set[Dim]
    heads: set[Dim]
    query_heads: set[Dim]
    residual: set[Dim]
    mixed: set[Dim]

    @classmethod
    def read(cls, graph: Graph, inference: Inference) -> "Roles":
        dynamic = _depends_on_input(graph)
        heads, query_heads = _attention(graph, inference, dynamic)
        return cls(
            inference,
            experts={dim for axis, _ in inference.routed for dim in leaves(axis)},
            heads=heads,
            query_heads=query_heads - heads,
            residual=_residual(graph, inference),
            mixed={dim for axis in inference.reduced for dim in leaves(axis)},
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
        return "head_dim" if self._inside_a_head(dim, slots) else "channels"

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


def _depends_on_input(graph: Graph) -> set[int]:
    dynamic = set(graph.inputs)
    for node in graph.nodes:
        if dynamic.intersection(node.inputs):
            dynamic.update(node.outputs)
    return dynamic


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


def _residual(graph: Graph, inference: Inference) -> set[Dim]:
    """Dimensions of sums `x + f(x)`: one operand was computed from the other."""
    ancestors: dict[int, frozenset[int]] = {}
    sums: dict[int, int] = {}
    out: set[Dim] = set()
    for node in graph.nodes:
        seen = frozenset().union(*(ancestors.get(i, frozenset()) for i in node.inputs))
        if node.op == "Add":
            sums[node.outputs[0]] = len(sums)
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
