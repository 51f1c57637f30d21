"""Find what many primitives say together: norms, rotary positions, attention, activations, layers.

A pattern is an MLX function, spelled as people spell it. Tracing it gives its graph, and where that
graph occurs in a model's, one *composite* node takes its place. So there is no description of a
pattern to keep in step with MLX: when MLX decomposes an operation in another way, so does the
pattern. A candidate has the pattern's primitives, wired alike; then the pattern is traced again
with the candidate's own shapes and scalars, and every attribute and constant must agree.

    RMSNorm    (x[, weight])            (eps,)
    LayerNorm  (x[, weight[, bias]])    (eps,)
    RoPE       (x, cos, sin)            (dims, traditional)   cos and sin [length, dims/2]
    Attention  (q, k, v[, mask])        (scale, causal)       [B,H,L,D], [B,KV,T,D], [B,KV,T,Dv]
    GELU       (x)                      ("none" or "tanh",)
    SiLU       (x)                      ()
    Linear     (x, weight[, bias])      ()                    weight [out, in]
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

import mlx.core as mx
import mlx.nn as nn

from .execute import execute
from .graph import Graph, Node, dynamic_values, trace, with_outputs
from .simplify import simplify
from .sizes import instantiate

COMMUTATIVE = frozenset(("Add", "Multiply", "Maximum", "Minimum", "LogicalAnd", "LogicalOr"))
COMPARISONS = frozenset(("Greater", "GreaterEqual", "Less", "LessEqual"))
# What scalars are traced with before they are known; exact in every dtype, and unlikely.
SENTINELS = (13 / 32, 11 / 64, 29 / 16)
PRIMES = (101, 103, 107, 109, 113)  # sizes that no dimension of a model is likely to have


@dataclass(frozen=True)
class Pattern:
    """`spell(*arrays, **scalars)` and what it is called.

    `shapes` are examples for its inputs. `attributes(scalars, shapes)` gives the composite's.
    What the primitives in `cut` compute are its last inputs, in place of what they read.
    `sized(shapes)` gives further keywords for `spell`. The arrays at `static` must not depend on
    the model's inputs; those at `boolean` are masks.
    """

    name: str
    spell: Callable[..., mx.array]
    shapes: tuple[tuple[int, ...], ...]
    attributes: Callable[[dict, list], tuple] = lambda scalars, shapes: ()
    scalars: tuple[str, ...] = ()
    cut: tuple[str, ...] = ()
    sized: Callable[[tuple], dict] = lambda shapes: {}
    static: tuple[int, ...] = ()
    boolean: tuple[int, ...] = ()

    def graph(self, shapes, scalars: tuple[float, ...], dtype: mx.Dtype) -> Graph:
        """The pattern's graph at given shapes and scalars."""
        arrays = [
            mx.zeros(shape, mx.bool_ if k in self.boolean else dtype)
            for k, shape in enumerate(shapes[: len(shapes) - len(self.cut)])
        ]
        named = {**dict(zip(self.scalars, scalars, strict=True)), **self.sized(shapes)}
        graph = simplify(trace(partial(self.spell, **named), *arrays))
        cuts = [o for n in graph.nodes if n.op in self.cut for o in n.outputs]
        kept = [n for n in graph.nodes if n.op not in self.cut]
        return with_outputs(
            replace(graph, nodes=tuple(kept), inputs=(*graph.inputs, *cuts)), graph.outputs
        )


@lru_cache(maxsize=4096)
def _graph(pattern: Pattern, shapes, scalars, dtype) -> Graph:
    return pattern.graph(shapes, scalars, dtype)


def recognise(graph: Graph) -> Graph:
    """The simplified graph with composite nodes in place of the patterns it holds."""
    graph = simplify(graph)
    names = sorted({n for v in graph.values.values() for d in v.shape
                    for n in getattr(d, "names", ())})  # fmt: skip
    sizes = dict(zip(names, PRIMES, strict=False))
    for pattern in PATTERNS:
        graph = _Search(graph, instantiate(graph, sizes), pattern).replaced()
    return _with_causal(graph, sizes)


@dataclass
class _Binding:
    arrays: dict[int, int] = field(default_factory=dict)  # an input of the pattern -> a value
    scalars: dict[int, float] = field(default_factory=dict)
    nodes: dict[int, int] = field(default_factory=dict)  # a value of the pattern -> a value

    def copy(self) -> "_Binding":
        return _Binding(dict(self.arrays), dict(self.scalars), dict(self.nodes))


class _Search:
    """Look for one pattern in a graph; `concrete` is the graph at sizes that do not coincide."""

    def __init__(self, graph: Graph, concrete: Graph, pattern: Pattern):
        self.graph, self.concrete, self.pattern = graph, concrete, pattern
        self.producer = {o: n for n in concrete.nodes for o in n.outputs}

    def replaced(self) -> Graph:
        found = {}
        dtypes = {v.dtype for v in self.concrete.values.values()}
        for dtype in sorted(dtypes & {mx.float32, mx.float16, mx.bfloat16}, key=str):
            example = _graph(self.pattern, self.pattern.shapes, self._sentinels(), dtype)
            root = next(n for n in example.nodes if example.outputs[0] in n.outputs)
            for node in self.concrete.nodes:
                if node.op == root.op and node.outputs[0] not in found:
                    composite = self._composite(example, node, dtype)
                    if composite:
                        found[node.outputs[0]] = composite
        nodes = tuple(found.get(n.outputs[0], n) for n in self.graph.nodes)
        return with_outputs(replace(self.graph, nodes=nodes), self.graph.outputs)

    def _sentinels(self) -> tuple[float, ...]:
        return SENTINELS[: len(self.pattern.scalars)]

    def _composite(self, example: Graph, node: Node, dtype: mx.Dtype) -> Node | None:
        for loose in self._match(example, node.outputs[0], self._sentinels(), exact=False):
            shapes = tuple(self.concrete.values[loose.arrays[i]].shape for i in example.inputs)
            scalars = tuple(loose.scalars[k] for k in range(len(self.pattern.scalars)))
            if self._reads_inputs(loose, example):
                continue
            try:
                there = _graph(self.pattern, shapes, scalars, dtype)
            except ValueError:  # the function does not take such shapes
                continue
            for bound in self._match(there, node.outputs[0], (), exact=True):
                inputs = tuple(bound.arrays[i] for i in there.inputs)
                if inputs == tuple(loose.arrays[i] for i in example.inputs):
                    named = dict(zip(self.pattern.scalars, scalars, strict=True))
                    attributes = self.pattern.attributes(named, list(shapes))
                    return Node(self.pattern.name, inputs, node.outputs, attributes)
        return None

    def _reads_inputs(self, bound: _Binding, example: Graph) -> bool:
        dynamic = dynamic_values(self.concrete) if self.pattern.static else ()
        return any(bound.arrays[example.inputs[k]] in dynamic for k in self.pattern.static)

    def _match(self, pattern: Graph, value: int, sentinels, *, exact: bool) -> Iterator[_Binding]:
        matcher = _Matcher(pattern, self.concrete, self.producer, sentinels, exact)
        yield from matcher.unify(pattern.outputs[0], value, _Binding())


class _Matcher:
    def __init__(self, pattern: Graph, graph: Graph, producer, sentinels, exact: bool):
        self.pattern, self.graph, self.producer, self.exact = pattern, graph, producer, exact
        self.made = {o: n for n in pattern.nodes for o in n.outputs}
        self.holes = {
            i: k for i, a in pattern.constants.items() for k, s in enumerate(sentinels)
            if a.size == 1 and a.item() == s
        }  # fmt: skip

    def unify(self, ours: int, theirs: int, bound: _Binding) -> Iterator[_Binding]:
        """All ways in which the pattern's value `ours` is the graph's value `theirs`."""
        known = bound.arrays.get(ours, bound.nodes.get(ours))
        if known is not None:
            if known == theirs:
                yield bound
        elif ours in self.pattern.inputs:
            bound = bound.copy()
            bound.arrays[ours] = theirs
            yield bound
        elif ours in self.pattern.constants:
            yield from self._constant(ours, theirs, bound)
        elif self._alike(self.made[ours], self.producer.get(theirs), ours, theirs):
            yield from self._inputs(ours, theirs, bound)

    def _constant(self, ours: int, theirs: int, bound: _Binding) -> Iterator[_Binding]:
        array = self.graph.constants.get(theirs)
        if array is None:
            return
        if ours in self.holes:
            if array.size == 1:
                bound = bound.copy()
                held = bound.scalars.setdefault(self.holes[ours], array.item())
                if held == array.item():
                    yield bound
        elif not self.exact or _equal(array, self.pattern.constants[ours]):
            yield bound

    def _alike(self, mine: Node, other: Node | None, ours: int, theirs: int) -> bool:
        if other is None or mine.op != other.op or len(mine.inputs) != len(other.inputs):
            return False
        if mine.outputs.index(ours) != other.outputs.index(theirs):
            return False
        if not self.exact:
            return True
        shape = self.pattern.values[ours].shape == self.graph.values[theirs].shape
        return shape and self._same_attributes(mine, other)

    def _same_attributes(self, mine: Node, other: Node) -> bool:
        if mine.op in ("Reshape", "Broadcast", "Full"):  # said by the shapes
            return True
        return _plain(mine.attributes) == _plain(other.attributes)

    def _inputs(self, ours: int, theirs: int, bound: _Binding) -> Iterator[_Binding]:
        mine, other = self.made[ours].inputs, self.producer[theirs].inputs
        orders = [other]
        if self.made[ours].op in COMMUTATIVE and other[0] != other[1]:
            orders.append(other[::-1])
        for order in orders:
            bindings: list[_Binding] = [bound]
            for a, b in zip(mine, order, strict=True):
                bindings = [new for old in bindings for new in self.unify(a, b, old)]
            for found in bindings:
                found = found.copy()
                found.nodes[ours] = theirs
                yield found


def _plain(entry):
    return [_plain(part) for part in entry] if isinstance(entry, tuple | list) else entry


def _equal(a: mx.array, b: mx.array) -> bool:
    return a.shape == b.shape and mx.array_equal(a, b).item()


# ---- causal masks


def _with_causal(graph: Graph, sizes: Mapping[str, int]) -> Graph:
    """Attention whose mask hides the keys to come, and nothing else, says so instead."""
    concrete = instantiate(graph, sizes)
    known: dict[tuple, bool] = {}

    def plain(node: Node) -> Node:
        if node.op != "Attention" or len(node.inputs) != 4:
            return node
        *arrays, mask = node.inputs
        key = (mask, concrete.values[arrays[0]].shape[2], concrete.values[arrays[1]].shape[2])
        if key not in known:
            known[key] = _is_causal(concrete, *key)
        scale, _ = node.attributes
        return replace(node, inputs=tuple(arrays), attributes=(scale, True)) if known[key] else node

    nodes = tuple(map(plain, graph.nodes))
    return with_outputs(replace(graph, nodes=nodes), graph.outputs)


def _is_causal(graph: Graph, mask: int, queries: int, keys: int) -> bool:
    """Whether a mask that is made of positions alone shows each query the keys up to its own.

    One comparison can say no more than that; a window needs a second one, which may not show at
    the sizes at hand.
    """
    made = with_outputs(graph, (mask,))
    leaves = {i for n in made.nodes for i in n.inputs} - {o for n in made.nodes for o in n.outputs}
    compared = sum(node.op in COMPARISONS for node in made.nodes)
    if compared != 1 or not leaves <= graph.constants.keys():
        return False
    (shown,), _ = execute(made, made.nodes, dict(graph.constants), outputs=(mask,))
    if shown.dtype != mx.bool_:
        shown = shown == 0
    seen = mx.arange(keys - queries, keys)[:, None] >= mx.arange(keys)
    return shown.shape[-2:] == seen.shape and mx.all(shown == seen).item()


# ---- the patterns


def _rms(x, w=None, *, eps):
    return mx.fast.rms_norm(x, w, eps)


def _rms_by_hand(x, *w, eps):
    y = x * mx.rsqrt(mx.mean(mx.square(x), axis=-1, keepdims=True) + eps)
    return w[0] * y if w else y


def _layer_norm(x, *wb, eps):
    return mx.fast.layer_norm(x, *wb, *[None] * (2 - len(wb)), eps)


def _rope(x, *, dims, traditional):
    return mx.fast.rope(x, dims, traditional=traditional, base=10.0, scale=1.0, offset=3)


def _attention(q, k, v, *mask, scale, causal=False):
    mask = "causal" if causal else mask[0] if mask else None
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)


def _gelus() -> Iterator[Callable]:
    """The ways to halve, times the ways to write the argument of erf."""
    halve = (lambda x, e: x * e / 2, lambda x, e: 0.5 * x * e, lambda x, e: x * (0.5 * e))
    scale = (lambda x: x / math.sqrt(2), lambda x: x * math.sqrt(0.5))
    for outer, inner in itertools.product(halve, scale):
        yield lambda x, outer=outer, inner=inner: outer(x, 1 + mx.erf(inner(x)))


def _gelu_tanh(x):
    return 0.5 * x * (1 + mx.tanh((2 / mx.pi) ** 0.5 * (x + 0.044715 * x * x * x)))


def _linear(x, w, b=None):
    return x @ w.T if b is None else mx.addmm(b, x, w.T)


def _eps(scalars, shapes) -> tuple:
    return (scalars["eps"],)


B, H, KV, L, T, D, DV = 2, 6, 3, 5, 7, 8, 4
X, W = (2, 5, 12), (12,)
QUERIES = (B, H, L, D)


def _attentions() -> Iterator[Pattern]:
    masks = [((L, T), "some"), ((B, H, L, T), "all")]
    for kv, causal in itertools.product((KV, H), (False, True)):
        keys = ((B, kv, T, D), (B, kv, T, DV))
        common = {
            "scalars": ("scale",),
            "attributes": lambda scalars, shapes, causal=causal: (scalars["scale"], causal),
        }
        spell = partial(_attention, causal=causal)
        yield Pattern("Attention", spell, (QUERIES, *keys), **common)
        for (mask, _), boolean in itertools.product(masks, ((3,), ())):
            if not causal:
                yield Pattern("Attention", spell, (QUERIES, *keys, mask), boolean=boolean, **common)


def _ropes() -> Iterator[Pattern]:
    for traditional, dims in itertools.product((False, True), (D, D // 2)):
        yield Pattern(
            "RoPE",
            partial(_rope, traditional=traditional),
            (QUERIES, *[(L, dims // 2)] * 2),
            lambda scalars, shapes, how=traditional: (2 * shapes[1][-1], how),
            cut=("Cos", "Sin"),
            sized=lambda shapes: {"dims": 2 * shapes[1][-1]},
        )


PATTERNS = (
    *_attentions(),
    *_ropes(),
    *(Pattern("LayerNorm", _layer_norm, (X, *[W] * n), _eps, ("eps",)) for n in (2, 1, 0)),
    *(
        Pattern("RMSNorm", spell, shapes, _eps, ("eps",))
        for spell in (_rms, _rms_by_hand)
        for shapes in ((X, W), (X,))
    ),
    *(
        Pattern("GELU", spell, (X,), lambda scalars, shapes, how=how: (how,))
        for spell, how in (
            *((spell, "none") for spell in _gelus()),
            (nn.gelu_approx, "tanh"), (_gelu_tanh, "tanh"),
        )
    ),
    Pattern("SiLU", nn.silu, (X,)),
    *(
        Pattern("Linear", _linear, (x, (9, 12), *bias), static=(1, 2)[: 1 + len(bias)])
        for x in (X, (5, 12))
        for bias in (((9,),), ())
    ),
)  # fmt: skip
