"""Write a program as a Core ML package.

    export_coreml(program, "model.mlpackage", shapes={"batch": 1, "length": (1, 512), "past": 64})

Shapes. A named size is fixed (an int), a range `(low, high)`, or a list of sizes to choose from:
the k-th of every list go together. A size that is not given is the program's example. A past of 0
has no inputs. Names of inputs and outputs are the program's, with underscores for dots.

State. With `stateful`, keys and values stay in the model, in states `key_cache` and `value_cache`
(several where layers differ) with room for `context` tokens: that many, or the largest past of
`shapes`, or 2048. A step takes 1 to 512 tokens unless `shapes` say otherwise. As in Apple's own
samples the inputs are `input_ids` [batch, length] and `causal_mask` [1, 1, length, past + length],
and the mask's shape says where the tokens go; its contents are not read, for the model makes its
own masks. States are float16 whatever the program is.
"""

import shutil
import tempfile
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ...errors import InputError
from ...program import Program
from ...quantize import quantize_program
from ...sizes import size_named
from .build import Plan, build, features
from .package import describe, feature_name, palettize, write_package
from .prepare import prepare
from .quiet import ct
from .run import UNITS
from .scope import IOS18
from .spans import Span, Spans
from .state import TOTAL, by_total, with_states

CONTEXT, STEP = 2048, 512  # tokens
FLOATS = {"float16": "fp16", "float32": "fp32"}
QUANTIZE = {
    "int4": ("int", 4), "int8": ("int", 8),
    **{f"palette{bits}": ("palette", bits) for bits in (2, 4, 6, 8)},
}  # fmt: skip
ROLES = {
    "input_ids": "Token ids",
    "causal_mask": "Its shape alone is read: new tokens by all tokens so far",
    "past_key_values": "Keys or values of the tokens so far",
    "present": "Keys or values with those of the new tokens",
    "logits": "Scores of each next token",
    "key_cache": "Keys of all layers, kept in the model",
    "value_cache": "Values of all layers, kept in the model",
}


@dataclass(frozen=True)
class Package:
    """What was written; `notes` says what could not be as it was asked for."""

    path: Path
    bytes: int
    notes: tuple[str, ...] = ()


def export_coreml(
    program: Program,
    path: str | Path,
    *,
    dtype: str = "float16",
    shapes: Mapping[str, Span] | None = None,
    stateful: bool = False,
    context: int | None = None,
    quantize: str | None = None,
    group_size: int = 64,
    minimum_deployment_target: str = "iOS18",
    compute_units: str = "ALL",
    metadata: Mapping[str, str] | None = None,
) -> Package:
    """Write `program` to `path`, a folder `*.mlpackage` that must not exist yet.

    Weights that MLX has quantised stay so. `quantize` packs the others: int4 and int8 in MLX's
    groups of `group_size`, palette2, 4, 6 and 8 as tables of so many bits. `metadata` may hold
    author, license, short_description and version; other entries are kept as they are, beside the
    program's own. Raises `InputError` for what Core ML cannot hold: a primitive with no rule, an
    array of more than five axes, sizes that do not fit; nothing is left behind then.
    """
    path = checked_path(path)
    target = _choice("minimum_deployment_target", minimum_deployment_target, _targets())
    floats = _choice("dtype", dtype, FLOATS)
    _choice("compute_units", compute_units, dict.fromkeys(UNITS, True))
    how, bits = _choice("quantize", quantize, QUANTIZE) if quantize else (None, 0)
    if target.value < IOS18 and (stateful or quantize):
        raise InputError(
            f"{minimum_deployment_target}: states and packed weights need iOS18 or macOS15."
        )
    notes: list[str] = []
    if how == "int":
        program, notes = quantize_program(program, bits=bits, group_size=group_size)
    if stateful:
        shapes, context = _of_states(shapes or {}, context)
    spans = _spans(program, shapes or {}, context if stateful else None)
    plan = _plan(program, spans, floats, context if stateful else None)
    with _temporary(path) as folder:
        built, more = build(
            plan, program.fetch, symbols=spans.symbols, floats=floats, target=target
        )
        package = folder / path.name
        write_package(
            built, package, inputs=spans.tensor_types(plan.inputs.values()), target=target
        )
        if how == "palette":
            palettize(package, bits)
        record = {"dtype": dtype, "quantize": quantize or "", "compute_units": compute_units}
        describe(package, {**record, **program.metadata, **(metadata or {})}, _words(plan))
        package.rename(path)
    return Package(path, folder_bytes(path), (*notes, *more))


def _words(plan: Plan) -> dict[str, str]:
    """What each input, output and state is, by name."""
    axes = {f.name: ", ".join(map(str, f.shape)) for f in plan.inputs.values()}
    for number, name in zip(plan.graph.outputs, plan.outputs, strict=True):
        axes[feature_name(name)] = ", ".join(map(str, plan.graph.values[number].shape))
    axes |= {name: ", ".join(map(str, shape)) for name, shape in plan.states.items()}
    return {
        name: f"{next((w for start, w in ROLES.items() if name.startswith(start)), '')} [{sizes}]"
        .strip() for name, sizes in axes.items()
    }  # fmt: skip


def _of_states(shapes: Mapping[str, Span], context: int | None) -> tuple[dict[str, Span], int]:
    """Sizes for a package with states: steps of one token and of many, unless they are given."""
    past = shapes.get("past", CONTEXT)
    context = context or (past if isinstance(past, int) else max(past)) or CONTEXT
    steps = {"batch": 1, "length": (1, min(STEP, context))}
    return {**steps, **{n: s for n, s in shapes.items() if n != "past"}}, context


def _spans(program: Program, asked: Mapping[str, Span], context: int | None) -> Spans:
    unknown = sorted(asked.keys() - program.sizes.keys())
    if unknown:
        known = ", ".join(program.sizes) or "none"
        raise InputError(f"size {unknown[0]!r} is not known; the program's sizes are {known}.")
    spans = {**program.sizes, **asked}
    if context is not None:
        length = spans["length"]
        low, high = (length, length) if isinstance(length, int) else (min(length), max(length))
        if high > context:
            raise InputError(f"length {high} is more than the context of {context} tokens.")
        del spans["past"]
        spans[TOTAL] = (low, context)
    return Spans(spans)


def _plan(program: Program, spans: Spans, floats: str, context: int | None) -> Plan:
    if context is None:
        graph, packed = prepare(program.graph, spans.fixed)
        return Plan(graph, features(graph, program.inputs, floats), program.outputs, packed)
    length = spans.fixed.get("length", size_named("length"))
    graph, packed = prepare(program.graph, spans.fixed)
    graph = by_total(graph, length)
    graph, names, states = with_states(graph, program, length, context)
    outputs = program.outputs[: len(graph.outputs)]
    return Plan(graph, features(graph, names, floats), outputs, packed, states)


def checked_path(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix != ".mlpackage":
        raise InputError(f"{path}: a Core ML package is named *.mlpackage.")
    if path.exists():
        raise InputError(f"{path}: exists already; remove it or choose another name.")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent}: no such folder; make it first.")
    return path


def folder_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _choice(what: str, chosen: str, known: Mapping):
    if chosen not in known:
        raise InputError(f"{what} {chosen!r} is not known; choose of {', '.join(known)}.")
    return known[chosen]


def _targets() -> dict:
    oldest = ct.target.iOS16.value
    named = ct.target.__members__.items()
    return {n: t for n, t in named if n.startswith(("iOS", "macOS")) and t.value >= oldest}


@contextmanager
def _temporary(path: Path):
    """A folder beside `path`, so that a rename puts what was made in place at once."""
    folder = Path(tempfile.mkdtemp(prefix=f".{path.stem}.", dir=path.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
