"""A torch program as a function over MLX arrays: an interpreter over the table `ATEN`.

The function is pure: `imported(parameters, *inputs)`. So it traces like any MLX function, and the
graph knows the parameters by torch's own names. Sizes are read from the inputs, so one program
serves every size of the axes that torch.export left open.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import torch
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from ...errors import InputError
from . import exported
from .arrays import TO_MLX, to_mlx
from .aten import ATEN
from .images import ChannelsLast, plain, run

IN_TRAINING = ("_native_batch_norm_legit", "_native_batch_norm_legit_functional",
               "native_batch_norm")  # fmt: skip
# Checks that torch writes into a program; the sizes are checked where they come in.
CHECKS = ("_assert_async", "_assert_scalar", "_assert_tensor_metadata", "sym_constrain_range",
          "sym_constrain_range_for_size")  # fmt: skip
# Arguments that say where and how a tensor lies.
PLACEMENT = ("device", "layout", "memory_format", "non_blocking", "pin_memory", "generator", "copy")


@dataclass(frozen=True)
class Input:
    """One input of a program. `shape` holds numbers, and names where the size is open."""

    name: str
    shape: tuple[int | str, ...]
    dtype: mx.Dtype


@dataclass(frozen=True)
class Ref:
    """The value that an earlier step made."""

    name: str


@dataclass(frozen=True)
class Step:
    """One operator: its rule, its arguments (values by `Ref`), and the dtypes of its outputs."""

    name: str
    op: str
    rule: Callable
    args: tuple
    kwargs: Mapping
    dtypes: tuple[mx.Dtype | None, ...]


@dataclass(frozen=True)
class Imported:
    """A torch program over MLX: `imported(parameters, *inputs)` gives the list of its outputs.

    `parameters` maps torch's names to arrays in torch's layouts: the parameters and persistent
    buffers that the program reads. `inputs` and `outputs` are in call order; `example` are inputs
    of the exported sizes, and `sizes` the size there of each open axis.
    """

    parameters: dict[str, mx.array]
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    example: tuple[mx.array, ...]
    sizes: Mapping[str, int]
    limits: Mapping[str, int]
    _bound: Mapping[str, str] = field(repr=False)
    _constants: Mapping[str, mx.array] = field(repr=False)
    _steps: tuple[Step, ...] = field(repr=False)
    _results: tuple = field(repr=False)

    def __call__(self, parameters: Mapping[str, mx.array], *inputs: mx.array) -> list[mx.array]:
        """Raises `InputError` for inputs of other shapes than the program takes."""
        self._check(inputs)
        known = dict(self._constants)
        known |= {name: parameters[path] for name, path in self._bound.items()}
        for spec, array in zip(self.inputs, inputs, strict=True):
            known[spec.name] = array
        for step in self._steps:
            known[step.name] = _apply(step, known)
        return [plain(_value(r, known)) for r in self._results]

    def _check(self, inputs: Sequence[mx.array]) -> None:
        if len(inputs) != len(self.inputs):
            raise InputError(f"{len(inputs)} inputs given, the program takes {len(self.inputs)}.")
        sizes: dict[str, int] = {}
        for spec, array in zip(self.inputs, inputs, strict=True):
            rank = len(array.shape) == len(spec.shape)
            wanted = [
                sizes.setdefault(n, size) if isinstance(n, str) else n
                for n, size in zip(spec.shape, array.shape, strict=False)
            ]
            if not rank or wanted != list(array.shape):
                raise InputError(
                    f"{spec.name}: shape {array.shape}, but the program was exported for "
                    f"{spec.shape}; export it with that axis dynamic, or give that size."
                )
        for name, size in sizes.items():
            if size > self.limits.get(name, size):
                raise InputError(f"{name}: {size}, but the program takes {self.limits[name]}.")


def from_torch(
    source: torch.nn.Module | torch.export.ExportedProgram | str | Path,
    example_inputs: Sequence[torch.Tensor] | Mapping[str, torch.Tensor] | None = None,
    *,
    dynamic: exported.Dynamic = exported.BATCH,
) -> Imported:
    """A torch module, an exported program or a .pt2 file as an MLX function.

    A module needs `example_inputs`, tensors by position or by keyword; contents do not matter. It
    is exported in eval mode: batch norm uses its statistics, dropout does nothing. `dynamic` names
    the axes that may have any size, `{0: "batch", 1: "length"}` for all inputs or one such mapping
    for each; an exported program has its own.

        imported = from_torch(module, [torch.zeros(2, 3, 32, 32)])
        graph = mlx_compress.trace(imported, *imported.example, parameters=imported.parameters)

    Raises `InputError`, in one line, for operators that have no rule (all at once), for code that
    looks at values while it runs, and for files that are damaged or not exported programs.
    """
    axes = None
    if isinstance(source, torch.nn.Module):
        if example_inputs is None:
            raise InputError("from_torch of a module needs example_inputs to trace it with.")
        axes = dynamic
        source = exported.export(source, example_inputs, dynamic)
    elif not isinstance(source, torch.export.ExportedProgram):
        source = exported.load(source)
    return _read(source if _is_known(source) else exported.decompose(source), axes)


def _is_known(program: torch.export.ExportedProgram) -> bool:
    """Whether every operator has a rule and writes to nothing, so that none need be taken apart."""
    calls = _calls(program.graph.nodes)
    return all(_rule(n) is not None and not _writes(n) for n in calls)


def _writes(node) -> bool:
    return _is_operator(node) and node.target._schema.is_mutable and _name(node)[0] != "detach_"


def _read(program: torch.export.ExportedProgram, dynamic: exported.Dynamic | None) -> Imported:
    _check_pure(program)
    nodes = list(program.graph.nodes)
    used = {n.name for n in nodes if n.op == "placeholder" and n.users}
    _check_operators(nodes)
    bound, parameters, constants, shared = {}, {}, {}, {}
    for spec in program.graph_signature.input_specs:
        if spec.kind == InputKind.USER_INPUT or spec.arg.name not in used:
            continue
        array = _held(program, spec, shared)
        if spec.kind == InputKind.PARAMETER or spec.persistent:
            bound[spec.arg.name], parameters[spec.target] = spec.target, array
        else:
            constants[spec.arg.name] = array
    inputs, example, sizes, limits = _inputs(program, dynamic)
    outputs, results = _outputs(program)
    steps = tuple(map(_step, _calls(nodes)))
    return Imported(
        parameters, inputs, outputs, example, sizes, limits, bound, constants, steps, results
    )


def _held(program, spec, shared: dict) -> mx.array:
    """The contents of a parameter, buffer or constant; what shares memory is one array."""
    if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
        raise InputError(f"{spec.target}: a {spec.kind.name.lower()} input has no place in MLX.")
    tensor = program.state_dict.get(spec.target)
    tensor = program.constants[spec.target] if tensor is None else tensor
    key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
    if key not in shared or not tensor.numel():
        shared[key] = to_mlx(spec.target, tensor)
    return shared[key]


def _check_pure(program) -> None:
    for spec in program.graph_signature.output_specs:
        if spec.kind not in (OutputKind.USER_OUTPUT,):
            raise InputError(
                f"{spec.target}: the program writes to it ({spec.kind.name.lower()}), which a pure "
                "function cannot; export the module in eval mode, and return what changes."
            )


def _inputs(program, dynamic):
    """The user's inputs, arrays as in the example, the sizes of its open axes, and their limits."""
    nodes = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    specs = [
        s for s in program.graph_signature.input_specs
        if s.kind == InputKind.USER_INPUT and isinstance(s.arg, TensorArgument)
    ]  # fmt: skip
    tensors = [nodes[s.arg.name].meta["val"] for s in specs]
    ranks = [t.ndim for t in tensors]
    axes = exported.axes_of_inputs(len(specs), {} if dynamic is None else dynamic, ranks)
    symbols: dict[str, str] = {}
    inputs, example, sizes, limits = [], [], {}, {}
    for spec, tensor, named in zip(specs, tensors, axes, strict=True):
        shape = []
        for k, n in enumerate(tensor.shape):
            if not isinstance(n, int):
                expression = n.node.expr
                name = symbols.setdefault(str(expression), named.get(k, str(expression)))
                sizes[name] = n.node.hint
                limit = program.range_constraints.get(expression)
                if limit is not None and limit.upper < 1 << 31:
                    limits[name] = int(limit.upper)
                n = name
            shape.append(n)
        inputs.append(Input(spec.arg.name, tuple(shape), TO_MLX[tensor.dtype]))
    for spec in inputs:
        example.append(mx.zeros([sizes.get(n, n) for n in spec.shape], spec.dtype))
    return tuple(inputs), tuple(example), sizes, limits


def _outputs(program) -> tuple[tuple[str, ...], tuple]:
    """The names of the outputs, from the structure that the module returns, and what they are."""
    (node,) = (n for n in program.graph.nodes if n.op == "output")
    values = list(node.args[0])
    spec = program.call_spec.out_spec
    paths, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(range(len(values)), spec))
    names = [_words(path) for path, _ in paths]
    kept = [
        (name, v) for name, v in zip(names, values, strict=True) if isinstance(v, torch.fx.Node)
    ]
    return tuple(n for n, _ in kept), tuple(Ref(v.name) for _, v in kept)


def _words(path) -> str:
    def word(key) -> str:
        return str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))))

    name = "_".join(map(word, path))
    return f"output{'_' if name else ''}{name}" if not name or name[0].isdigit() else name


# ---- operators


def _is_operator(node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload)


def _name(node) -> tuple[str, str]:
    """An operator's name without and with its overload."""
    if _is_operator(node):
        packet = node.target.overloadpacket.__name__
        return packet, f"{packet}.{node.target._overloadname}"
    name = getattr(node.target, "__name__", str(node.target))
    return name, name


def _calls(nodes) -> list:
    """The operators to run: no checks, and nothing that is not read; what writes may be read."""
    called = [n for n in nodes if n.op == "call_function" and _name(n)[0] not in CHECKS]
    return [n for n in called if n.users or _writes(n)]


def _is_scalar_function(node) -> bool:
    """Arithmetic on sizes: Python's own operators, and torch's for symbolic numbers."""
    module = getattr(node.target, "__module__", "")
    return module in ("_operator", "math") or _name(node)[0] in SCALARS


SCALARS = {
    "sym_max": max, "sym_min": min, "sym_float": float, "sym_not": operator.not_,
    "sym_ite": lambda condition, yes, no: yes if condition else no,
}  # fmt: skip


def _rule(node) -> Callable | None:
    if _is_scalar_function(node):
        return SCALARS.get(_name(node)[0], node.target)
    return ATEN.get(_key(node))


def _key(node) -> str:
    """Where the table has the operator: with its overload, if that is an entry of its own."""
    short, full = _name(node)
    return full if full in ATEN else short


def _check_operators(nodes) -> None:
    """Raise `InputError` naming every operator that stands in the way, at once."""
    calls = _calls(nodes)
    names = {_name(n) for n in calls}
    data = sorted({_name(n)[0] for n in calls if _looks_at_data(n)})
    if data:
        raise InputError(
            f"torch program: {', '.join(data)} depends on the data, so it has no fixed graph; use "
            "torch.where, or export a module without it."
        )
    training = sorted({short for short, full in names if short in IN_TRAINING and full not in ATEN})
    if training:
        raise InputError(
            f"torch program: {', '.join(training)} is batch norm in training mode; call eval() on "
            "the module before torch.export."
        )
    missing = {f"aten.{_name(n)[1]}" for n in calls if _rule(n) is None}
    missing |= {
        f"aten.{_name(n.args[0])[1]} (its output {n.args[1]})"
        for n in calls
        if n.target is operator.getitem and n.args[1] and _name(n.args[0])[0] in FIRST_ONLY
    }
    missing |= {
        f"aten.{_name(n)[1]} of a view"
        for n in calls
        if _name(n)[0] == "as_strided" and not n.args[0].meta["val"].is_contiguous()
    }
    if missing:
        raise InputError(f"torch program: no rule for {', '.join(sorted(missing))}.")


def _looks_at_data(node) -> bool:
    """Whether an operator makes a size or a number that only the data tell, or takes a branch."""
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return True
    made = pytree.tree_leaves(node.meta.get("val"))
    read = [a for a in node.all_input_nodes if free_unbacked_symbols(a.meta.get("val"))]
    return not read and any(free_unbacked_symbols(value) for value in made)


# What these give beside their first output (places, statistics) is not computed.
FIRST_ONLY = frozenset((
    "_fused_rms_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
    "_scaled_dot_product_attention_math", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu", "adaptive_max_pool2d", "adaptive_max_pool3d",
    "_scaled_dot_product_fused_attention_overrideable", "max_pool2d_with_indices",
    "max_pool3d_with_indices", "native_dropout", "native_group_norm", "native_layer_norm",
))  # fmt: skip


def _step(node) -> Step:
    kwargs = {k: _argument(v) for k, v in node.kwargs.items() if k not in PLACEMENT}
    args = tuple(_argument(a) for a in node.args)
    values = node.meta.get("val")
    values = values if isinstance(values, list | tuple) else [values]
    dtypes = tuple(TO_MLX.get(v.dtype) if isinstance(v, torch.Tensor) else None for v in values)
    return Step(node.name, _key(node), _rule(node), args, kwargs, dtypes)


def _argument(value):
    if isinstance(value, torch.fx.Node):
        return Ref(value.name)
    if isinstance(value, list | tuple):
        return [_argument(v) for v in value]
    if isinstance(value, torch.dtype):
        return TO_MLX[value]
    return None if isinstance(value, torch.device | torch.layout | torch.memory_format) else value


# ---- running a step


def _value(argument, known: Mapping):
    if isinstance(argument, Ref):
        return known[argument.name]
    return [_value(a, known) for a in argument] if isinstance(argument, list) else argument


def _apply(step: Step, known: Mapping):
    args = [_value(a, known) for a in step.args]
    kwargs = {k: _value(v, known) for k, v in step.kwargs.items()}
    result = args[0][args[1]] if step.op == "getitem" else run(step.op, step.rule, args, kwargs)
    if isinstance(result, list):
        return [_cast(r, d) for r, d in zip(result, step.dtypes, strict=False)]
    return _cast(result, step.dtypes[0])


def _cast(result, dtype: mx.Dtype | None):
    if isinstance(result, ChannelsLast):
        return ChannelsLast(_cast(result.array, dtype))
    if dtype is None or not isinstance(result, mx.array) or result.dtype == dtype:
        return result
    return result.astype(dtype)
