"""Make a program's graph ready for MIL: patterns found, sizes fixed, constants folded, no empties.

MIL has no arrays of size 0, so an empty past goes, and what is joined to it stays alone.
"""

import itertools
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction

import mlx.core as mx

from ...execute import OPS as MLX_OPS
from ...execute import apply_node
from ...graph import Graph, Node, Value, with_outputs
from ...patterns import recognise
from ...sizes import Size, size_named
from .quantised import Packed, merge_quantised

FOLDED_BYTES = 1 << 20  # a larger constant is cheaper to compute than to ship


def prepare(graph: Graph, sizes: Mapping[str, int | Size]) -> tuple[Graph, dict[int, Packed]]:
    """The graph at the given sizes, as composites and few primitives; and its quantised weights.

    Sizes that are not given stay open.
    """
    graph, packed = merge_quantised(_folded(recognise(graph)))
    return _without_empties(_folded(fix(graph, sizes))), packed


def fix(graph: Graph, sizes: Mapping[str, int | Size]) -> Graph:
    """The graph with these sizes given, as numbers or by other sizes; the rest stays open."""
    return replace(
        graph,
        values={i: Value(_fixed(v.shape, sizes), v.dtype) for i, v in graph.values.items()},
        nodes=tuple(replace(n, attributes=_fixed(n.attributes, sizes)) for n in graph.nodes),
    )


def _fixed(entry, sizes: Mapping[str, int | Size]):
    if isinstance(entry, tuple | list):
        return type(entry)(_fixed(part, sizes) for part in entry)
    if not isinstance(entry, Size):
        return entry
    total: dict[tuple[str, ...], Fraction] = {}
    for names, coefficient in entry.items:
        product = {(): coefficient}
        for name in names:
            product = _times(product, _terms(sizes.get(name, size_named(name))))
        for left, c in product.items():
            total[left] = total.get(left, 0) + c
    form = Size(tuple(sorted((names, c) for names, c in total.items() if c)))
    return form if form.names else form.at({})


def _terms(size: int | Size) -> dict[tuple[str, ...], Fraction]:
    return size.terms if isinstance(size, Size) else {(): Fraction(size)}


def _times(left: dict, right: dict) -> dict:
    out: dict[tuple[str, ...], Fraction] = {}
    for (a, c), (b, d) in itertools.product(left.items(), right.items()):
        names = tuple(sorted((*a, *b)))
        out[names] = out.get(names, 0) + c * d
    return out


def is_open(entry) -> bool:
    """Whether a `Size` is left anywhere in it."""
    if isinstance(entry, tuple | list):
        return any(map(is_open, entry))
    return isinstance(entry, Size)


def _folded(graph: Graph) -> Graph:
    """What no input and no parameter has a part in is computed now, by MLX itself."""
    constants, nodes = dict(graph.constants), []
    for node in graph.nodes:
        outs = [graph.values[i] for i in node.outputs]
        known = node.op in MLX_OPS and all(i in constants for i in node.inputs)
        if known and not is_open([node.attributes, [v.shape for v in outs]]) and _small(outs):
            arrays = apply_node(graph, node, [constants[i] for i in node.inputs])
            mx.eval(arrays)
            constants.update(zip(node.outputs, arrays, strict=True))
        else:
            nodes.append(node)
    folded = replace(graph, nodes=tuple(nodes), constants=constants)
    return with_outputs(folded, graph.outputs)


def _small(outs: list[Value]) -> bool:
    sizes = [v.dtype.size for v in outs]
    for k, value in enumerate(outs):
        for n in value.shape:
            sizes[k] *= n
    return 0 < sum(sizes) <= FOLDED_BYTES


def _without_empties(graph: Graph) -> Graph:
    empty = {i for i, v in graph.values.items() if 0 in v.shape}
    same: dict[int, int] = {}
    nodes = []
    for node in graph.nodes:
        node = replace(node, inputs=tuple(same.get(i, i) for i in node.inputs))
        if node.op == "Concatenate":
            node = replace(node, inputs=tuple(i for i in node.inputs if i not in empty))
        if node.op == "Depends" or (node.op == "Concatenate" and len(node.inputs) == 1):
            same.update(zip(node.outputs, node.inputs, strict=False))
        elif not empty.issuperset(node.outputs):
            nodes.append(_whole(node, empty))
    outputs = tuple(same.get(i, i) for i in graph.outputs)
    return with_outputs(replace(graph, nodes=tuple(nodes)), outputs)


def _whole(node: Node, empty: set[int]) -> Node:
    """What an empty array updates is left as it was."""
    if node.op in ("Scatter", "SliceUpdate") and empty.intersection(node.inputs[1:]):
        return Node("Copy", node.inputs[:1], node.outputs)
    return node
