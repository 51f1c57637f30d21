"""A MIL program from a graph: inputs, weights one at a time, and a rule for each node."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ...errors import InputError
from ...execute import require_supported
from ...graph import Graph
from ...sizes import Size
from ...stream import Fetch
from .compressed import weight
from .ops import OPS
from .package import feature_name
from .quantised import Packed
from .quiet import Function, Program, mb, types
from .scope import Scope, building, scope
from .spans import name_of
from .state import update_state
from .values import NUMPY, cast, constant, is_float, kind, to_numpy

REFUSALS = (AssertionError, IndexError, NotImplementedError, TypeError, ValueError)
RULES = {**OPS, "StateUpdate": update_state}
MIL_TYPES = {"fp16": types.fp16, "fp32": types.fp32, "int32": types.int32, "bool": types.bool}


@dataclass(frozen=True)
class Feature:
    """An input of the model: its name, its shape in sizes that may be open, its MIL type."""

    name: str
    shape: tuple
    type: str

    @property
    def numpy(self):
        return NUMPY[self.type]


def features(graph: Graph, names: Iterable[str], floats: str) -> dict[int, Feature]:
    """The inputs that are there: by value id, those that are not empty."""
    out = {}
    for number, name in zip(graph.inputs, names, strict=True):
        value = graph.values[number]
        if 0 not in value.shape:
            held = kind(value.dtype)
            of_type = {"fp32": floats, "bool": "int32"}.get(held, held)
            out[number] = Feature(feature_name(name), value.shape, of_type)
    return out


@dataclass(frozen=True)
class Plan:
    """A prepared graph, its inputs by value id, the names of its outputs, the shapes of states."""

    graph: Graph
    inputs: Mapping[int, Feature]
    outputs: Sequence[str]
    packed: Mapping[int, Packed]
    states: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def build(
    plan: Plan, fetch: Fetch, *, symbols: Mapping, floats: str, target
) -> tuple[Program, list[str]]:
    """The MIL program of a plan, and notes; `symbols` are MIL's for the open sizes."""
    require_supported(plan.graph, RULES)
    with Function(_specs(plan, symbols), opset_version=target) as function:
        known = {i: function.inputs[f.name] for i, f in plan.inputs.items()}
        sizes = _open_sizes({known[i]: f for i, f in plan.inputs.items()})
        states = {name: function.inputs[name] for name in plan.states}
        with building(Scope(floats, target.value, sizes, states)) as about:
            add_weights(known, plan, fetch, floats)
            run(plan.graph, known)
            function.set_outputs(_outputs(plan, known, floats))
    program = Program()
    program.add_function("main", function)
    return program, about.notes


def _specs(plan: Plan, symbols: Mapping) -> dict:
    def dims(feature: Feature) -> list:
        return [
            symbols[name_of(n, feature.name)] if isinstance(n, Size) else n for n in feature.shape
        ]

    return {
        **{f.name: mb.TensorSpec(dims(f), MIL_TYPES[f.type]) for f in plan.inputs.values()},
        **{name: mb.StateTensorSpec(shape, types.fp16) for name, shape in plan.states.items()},
    }


def _open_sizes(arrays: Mapping) -> dict:
    """By name, each open size as a [1] var: the axis of an input that has it."""
    sizes = {}
    for var, feature in arrays.items():
        for axis, n in enumerate(feature.shape):
            if isinstance(n, Size) and name_of(n, feature.name) not in sizes:
                shape = mb.shape(x=var)
                size = mb.slice_by_index(x=shape, begin=[axis], end=[axis + 1])
                sizes[name_of(n, feature.name)] = size
    return sizes


def add_weights(known: dict, plan: Plan, fetch: Fetch, floats: str) -> None:
    graph = plan.graph
    read = {i for node in graph.nodes for i in node.inputs} | set(graph.outputs)
    for number, array in graph.constants.items():
        if number in read:
            known[number] = constant(to_numpy(array), kind(array.dtype))
    for path, number in graph.parameters.items():
        if number in read and number not in known:
            array = to_numpy(fetch([path])[path])
            held = kind(graph.values[number].dtype)
            known[number] = constant(array, floats if held == "fp32" else held)
    for number, packed in plan.packed.items():
        if number in read:
            known[number] = weight(packed, fetch, floats)


def run(graph: Graph, known: dict) -> None:
    """Apply the rules, in order; `known` gets the var of each value."""
    shapes = scope().shapes
    for number, var in known.items():
        shapes[var.name] = graph.values[number].shape
    for node in graph.nodes:
        outs = [graph.values[i] for i in node.outputs]
        try:
            made = RULES[node.op]([known[i] for i in node.inputs], node.attributes, outs)
        except REFUSALS as refused:
            if isinstance(refused, InputError):
                raise
            words = " ".join(str(refused).split()) or type(refused).__name__
            raise InputError(f"{node.op} cannot be said in Core ML: {words}") from refused
        made = made if isinstance(made, list) else [made]
        for number, var in zip(node.outputs, made, strict=True):
            known[number] = var
            shapes[var.name] = graph.values[number].shape


def _outputs(plan: Plan, known: dict, floats: str) -> list:
    """The outputs by their names, in types that Core ML gives out."""
    taken = {f.name for f in plan.inputs.values()}
    outs = []
    for number, name in zip(plan.graph.outputs, plan.outputs, strict=True):
        if number not in known:
            raise InputError(f"output {name}: has no entries, which Core ML cannot hold.")
        var = known[number]
        var = cast(var, floats if is_float(var) else "int32")
        if var.op is None or var.val is not None or var.name in taken:
            var = mb.identity(x=var)
        var.name = feature_name(name)
        taken.add(var.name)
        outs.append(var)
    return outs
