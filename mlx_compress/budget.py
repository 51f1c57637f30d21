"""What a plan spends of what was asked for: parameters, multiply-accumulates, megabytes, time.

`options.BUDGETS` lists them. Fractions are of the dense model's, so that it spends 1.
"""

import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .axes import OUTPUT, NamedAxes, named_axes
from .checkpoint import pruned_bytes
from .cost import cost
from .dims import leaves
from .edit import edit_graph
from .errors import InputError
from .graph import Graph
from .latency import interpolated, milliseconds
from .layers import dropped_parameters, is_layer_cut
from .options import FRACTIONS, Options
from .plan import PrunePlan
from .program import Program
from .stream import Fetch

TOLERANCE = 0.02  # of what was asked for: a larger miss is said, or refused
SHORT = 16  # tokens, where their number does not matter
DENSE = PrunePlan({})
Spent = Callable[[PrunePlan], float]


@dataclass(frozen=True)
class Budget:
    """One of `options.BUDGETS`, for one model.

    `measure(plans)` is what each spends, in the unit of the option. `along(plans)`, given a few
    plans from the dense one to the least, tells what any plan in between spends: exactly, or by
    what was measured of these. `shape` says what a forward pass reads, where that matters.
    """

    name: str
    measure: Callable[[Sequence[PrunePlan]], list[float]]
    along: Callable[[Iterable[PrunePlan]], Spent]
    shape: str = ""

    def dense(self) -> float:
        """What the dense model spends."""
        return 1.0 if self.name in FRACTIONS else self.measure([DENSE])[0]

    def told(self, options: Options, plan: PrunePlan) -> str:
        """A note: what the plan spends, beside what was asked for."""
        dense, reached = self.measure([DENSE, plan])
        asked = options.budget[1]
        whole = "" if self.name in FRACTIONS else f" {dense:.4g}"
        where = f" for {self.shape}" if self.shape else ""
        miss = reached / asked - 1
        off = f": {abs(miss):.1%} {'above' if miss > 0 else 'below'}" * (abs(miss) > TOLERANCE)
        found = f"{self.name}: {reached:.4g} of the dense model's{whole}{where}"
        return f"{found}, {asked:g} asked for{off}"


def exact(name: str, spent: Spent, shape: str = "") -> Budget:
    """A budget that needs no measuring; what a plan spends is computed once for its counts."""
    known: dict[tuple, float] = {}

    def once(plan: PrunePlan) -> float:
        key = _key(plan)
        if key not in known:
            known[key] = spent(plan)
        return known[key]

    return Budget(name, lambda plans: list(map(once, plans)), lambda plans: once, shape)


def _key(plan: PrunePlan) -> tuple:
    return tuple((c.name, tuple(c.keep) if is_layer_cut(c) else c.kept) for c in plan)


def parameters(named: NamedAxes) -> Budget:
    """The fraction of block parameters."""
    whole = block_parameters(named)

    def spent(plan: PrunePlan) -> float:
        gone = dropped_parameters(named, plan)
        return block_parameters(named, plan.counts(), gone) / whole

    return exact("params", spent)


def macs(named: NamedAxes, shape: str = "") -> Budget:
    """The fraction of the multiply-accumulates of a forward pass, the head's included."""
    whole = cost(named.graph).macs
    return exact("macs", lambda plan: cost(_edited("macs", named, plan)).macs / whole, shape)


def disk_mb(named: NamedAxes, fetch: Fetch) -> Budget:
    """Megabytes (10^6 bytes) of all weights, in the dtypes that they have on disk."""
    dtypes = {path: array.dtype for path, array in fetch(list(named.graph.parameters)).items()}
    return exact("disk_mb", lambda plan: pruned_bytes(named, plan, dtypes) / 1e6)


def latency_ms(named: NamedAxes, inputs: Sequence[mx.array], shape: str = "") -> Budget:
    """Milliseconds of a forward pass on this machine, with random weights.

    A few plans are timed side by side; others are placed between them by the work that they leave.
    """
    work = macs(named)
    tables: dict[tuple, Spent] = {}

    def measure(plans: Sequence[PrunePlan]) -> list[float]:
        return milliseconds([_edited("latency_ms", named, plan) for plan in plans], inputs)

    def along(plans: Iterable[PrunePlan]) -> Spent:
        plans = list({_key(plan): plan for plan in plans}.values())
        key = tuple(map(_key, plans))
        if key not in tables:
            time_of = interpolated(work.measure(plans), measure(plans))
            tables[key] = lambda plan: time_of(work.measure([plan])[0])
        return tables[key]

    return Budget("latency_ms", measure, along, shape)


def _edited(name: str, named: NamedAxes, plan: PrunePlan) -> Graph:
    try:
        return edit_graph(named, plan)
    except InputError as error:
        raise InputError(
            f"--target {name}: cannot be told ({str(error).rstrip('.')}); choose other --dims, or "
            "--target params or disk_mb."
        ) from error


def language_budget(model, options: Options) -> Budget | None:
    """What the options ask for, of a `bridges.mlx_lm.LanguageModel`; None where there is no target.

    A forward pass reads `max_seq_length` tokens, in the dtypes on disk.
    """
    if options.budget is None:
        return None
    name = options.budget[0]
    length = options.max_seq_length if name in ("macs", "latency_ms") else SHORT
    dtype = None if name == "latency_ms" else mx.float32
    named = named_axes(model.trace(mx.zeros((1, length), mx.int32), dtype=dtype))
    vocabulary = named.graph.values[named.graph.outputs[0]].shape[-1]
    tokens = np.random.default_rng(options.seed).integers(0, vocabulary, (1, length))
    inputs = [mx.array(tokens.astype(np.int32))]
    return _asked(name, named, model.fetch, inputs, f"1 x {length} tokens")


def program_budget(program: Program, options: Options) -> Budget | None:
    """What the options ask for, of a program; None where there is no target.

    A forward pass reads a batch of one, where the batch is open; other sizes are the examples.
    """
    if options.budget is None:
        return None
    sizes = {**program.sizes, **({"batch": 1} if "batch" in program.sizes else {})}
    feeds = program.feeds(sizes, options.seed)
    inputs = [mx.array(feeds[name]) for name in program.inputs]
    shape = " and ".join(" x ".join(map(str, array.shape)) for array in inputs)
    return _asked(options.budget[0], named_axes(program.at(sizes)), program.fetch, inputs, shape)


def _asked(name: str, named: NamedAxes, fetch: Fetch, inputs, shape: str) -> Budget:
    made = {
        "params": lambda: parameters(named),
        "macs": lambda: macs(named, shape),
        "disk_mb": lambda: disk_mb(named, fetch),
        "latency_ms": lambda: latency_ms(named, inputs, shape),
    }
    return made[name]()


def block_parameters(
    named: NamedAxes, counts: Mapping[str, int] | None = None, gone: Container[str] = ()
) -> int:
    """Parameters outside the embeddings and the head, with `counts` units kept, without `gone`.

    Embeddings are the matrices from which rows are taken (other than by the choice of experts),
    the head has the model's output as an axis.
    """
    outside = _embeddings_and_head(named)
    return sum(
        math.prod(named.sizes_after(path, counts or {}))
        for path in named.graph.parameters
        if path not in outside and path not in gone
    )


def _embeddings_and_head(named: NamedAxes) -> set[str]:
    graph, axes = named.graph, named.inference.axes
    experts = {dim for axis, _ in named.inference.routed for dim in leaves(axis)}
    tables = {
        node.inputs[0]
        for node in graph.nodes
        if node.op == "Gather" and tuple(node.attributes[0]) == (0,)
        if len(axes[node.inputs[0]]) > 1 and not experts & set(leaves(axes[node.inputs[0]][0]))
    }
    return {
        path
        for path, value in graph.parameters.items()
        if value in tables
        or any(dim.frozen == OUTPUT for axis in named.axes_of(path) for dim in leaves(axis))
    }
