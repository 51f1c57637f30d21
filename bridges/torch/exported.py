"""From a torch module or a .pt2 file to an exported program in few, known operators.

Of a file nothing is executed: torch.export.load would unpickle whatever it finds, so its entries
are read first, and a file that holds anything but plain tensors and the graph is refused.
"""

import contextlib
import io
import json
import logging
import textwrap
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from ...errors import InputError

Dynamic = Mapping[int, str] | Sequence[Mapping[int, str]]
BATCH = {0: "batch"}
# Operators that torch would take apart although `aten` has a rule for the whole.
KEPT = ("linear", "matmul", "rms_norm", "scaled_dot_product_attention", "hardswish", "hardsigmoid",
        "mish", "softplus", "silu", "log_sigmoid", "adaptive_avg_pool1d", "avg_pool1d")  # fmt: skip
# By what torch.export says: what stands in the way, and what to do.
REMEDIES = {
    "Could not guard on data-dependent": "the control flow depends on the data; compute it with "
    "torch.where, or export a module without that branch",
    "data dependent": "it looks at the data (item, nonzero, a loop over values); use torch.where",
    "data-dependent": "it looks at the data (item, nonzero, a loop over values); use torch.where",
    "specializ": "its code fixes a size that was to be dynamic; leave that axis out of `dynamic`",
    "Constraints violated": "its code fixes a size that was to be dynamic; leave that axis out of "
    "`dynamic`, or give a larger example",
}


def export(
    module: torch.nn.Module, example: Sequence | Mapping, dynamic: Dynamic
) -> torch.export.ExportedProgram:
    """Export a module in eval mode; its training mode is put back afterwards.

    `example` holds the inputs, by position or by keyword, all tensors. `dynamic` names the axes of
    any size: for all inputs alike, or one mapping for each. An axis that is named is shown to
    torch with a size of at least 2, since it takes a size of 1 for a constant.

    Raises `InputError` in one line when torch.export fails.
    """
    named = isinstance(example, Mapping)
    tensors = list(example.values() if named else example)
    axes = axes_of_inputs(len(tensors), dynamic, [t.ndim for t in tensors])
    tensors = [_at_least_two(t, a) for t, a in zip(tensors, axes, strict=True)]
    shapes = [dict.fromkeys(a, torch.export.Dim.DYNAMIC) for a in axes]
    args = () if named else tuple(tensors)
    kwargs = dict(zip(example, tensors, strict=True)) if named else {}
    with _eval_mode(module), quiet(), one_line(type(module).__name__), torch.no_grad():
        return torch.export.export(
            module, args, kwargs,
            dynamic_shapes=dict(zip(kwargs, shapes, strict=True)) if named else _nested(
                module, shapes
            ),
        )  # fmt: skip


def _nested(module: torch.nn.Module, shapes: list[dict]):
    """torch wants one entry for each parameter of `forward`; those of *args lie in one tuple."""
    import inspect

    parameters = inspect.signature(module.forward).parameters.values()
    plain = sum(p.kind != p.VAR_POSITIONAL for p in parameters)
    starred = any(p.kind == p.VAR_POSITIONAL for p in parameters)
    return (*shapes[:plain], tuple(shapes[plain:])) if starred else tuple(shapes)


def axes_of_inputs(count: int, dynamic: Dynamic, ranks: Sequence[int]) -> list[dict[int, str]]:
    """For each input, its dynamic axes by name. Raises `InputError` for another number of them."""
    if isinstance(dynamic, Mapping):
        return [{k: n for k, n in dynamic.items() if k < rank} for rank in ranks]
    if len(dynamic) != count:
        raise InputError(f"dynamic: axes of {len(dynamic)} inputs given, there are {count}.")
    return [dict(axes) for axes in dynamic]


def decompose(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same program in core ATen operators, and in whole layers where those say more."""
    kept = {op for op in torch.export.default_decompositions() if _short_name(op) in KEPT}
    table = torch.export.default_decompositions()
    for op in kept:
        table.pop(op)
    with quiet(), one_line("the exported program"):
        return program.run_decompositions(table)


def _short_name(op) -> str:
    return op.name().partition("::")[2].partition(".")[0]


def load(path: str | Path) -> torch.export.ExportedProgram:
    """Open a .pt2 file of torch.export.save.

    Raises `InputError` when it is missing, damaged, another kind of file, or holds objects that
    loading would have to execute.
    """
    path = Path(path)
    _check_archive(path)
    with quiet(), one_line(str(path), "it is damaged, or was written by another torch"):
        return torch.export.load(path)


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            if damaged:
                raise InputError(f"{path}: {damaged} is damaged; export it anew.")
            entries = {info.filename: archive.read(info) for info in _small(archive)}
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file.") from error
    except (OSError, zipfile.BadZipFile, EOFError, ValueError) as error:
        raise InputError(f"{path}: not a .pt2 of torch.export, or damaged ({error}).") from error
    if not any("/models/" in name for name in entries):
        raise InputError(f"{path}: holds no exported program; write it with torch.export.save.")
    for name, content in entries.items():
        if not _is_data(name.partition("/")[2], content):
            raise InputError(f"{path}: {name} could run code when it is loaded, so it is refused.")


def _small(archive: zipfile.ZipFile) -> Iterator[zipfile.ZipInfo]:
    """Every entry but the raw bytes of tensors."""
    for info in archive.infolist():
        file = info.filename.rpartition("/")[2]
        if not file.startswith(("weight_", "tensor_")) or file.endswith((".json", ".pt")):
            yield info


def _is_data(name: str, content: bytes) -> bool:
    """Whether an entry of the archive is something that is only read."""
    folder, _, file = name.rpartition("/")
    if folder == "data/sample_inputs":
        return not content or _loads_as_weights(content)
    if folder in ("data/weights", "data/constants"):
        return file.endswith("_config.json") and not any(
            entry.get("use_pickle") for entry in json.loads(content)["config"].values()
        )
    if folder == "models":
        return file.endswith(".json")
    marks = ("archive_format", "archive_version", "byteorder", "version")
    return folder in (".data", "extra") or not folder and file in marks


def _loads_as_weights(content: bytes) -> bool:
    try:
        torch.load(io.BytesIO(content), weights_only=True)
    except Exception:  # whatever the restricted unpickler meets in a hostile file
        return False
    return True


def _at_least_two(tensor: torch.Tensor, axes: Mapping[int, str]) -> torch.Tensor:
    for axis in axes:
        if tensor.shape[axis] == 1:
            tensor = torch.cat([tensor, tensor], dim=axis)
    return tensor


@contextlib.contextmanager
def _eval_mode(module: torch.nn.Module) -> Iterator[None]:
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """torch warns of its own deprecations and logs what is raised as well."""
    held = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(held)


@contextlib.contextmanager
def one_line(
    name: str, remedy: str = "see its documentation", *, who: str = "torch.export"
) -> Iterator[None]:
    """Turn whatever torch.export or transformers raise into one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # torch has a class of its own for each way to fail
        text = " ".join(str(error).split()) or type(error).__name__
        remedy = next((r for sign, r in REMEDIES.items() if sign in text), remedy)
        reason = textwrap.shorten(text, 200, placeholder=" ...").rstrip(".")
        raise InputError(f"{name}: {who} cannot read it: {reason}; {remedy}.") from error
