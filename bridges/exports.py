"""Export a program: write, run what was written, compare with MLX, and only then let it stand.

One table of targets; each knows its file, how to write and run it, and the line that loads it.
"""

import contextlib
import importlib.metadata
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ..checkpoint import new_folder
from ..errors import InputError
from ..options import DTYPES, PALETTES, ExportOptions
from ..pairs import POOLING
from ..parity import TOLERANCE, Case, Parity, Runner, compare, require
from ..program import Program
from ..quantize import quantize_program
from ..sizes import sizes_of
from .decoder import caches

RECORD = "export.json"
MANY = 512  # the most of a size that Core ML is to leave open, where nothing else is said
ARITHMETIC = ("dynamic", "static")


@dataclass(frozen=True)
class Target:
    """`write(program, path, options, cases)` returns notes; `runner(path, options)` may be None.

    `load` is the line of code that opens the file. `spans(program, options)` are the sizes that
    it can be run at, None where these are open.
    `finish(path)` comes after the proof: what trades exactness for speed.
    """

    file: str
    write: Callable[[Program, Path, ExportOptions, Sequence[Case]], list[str]]
    runner: Callable[[Path, ExportOptions], Runner | None]
    load: str
    needs: tuple[str, ...] = ()
    quantize: tuple[str, ...] = ("int4", "int8")
    dtypes: tuple[str, ...] = ("float32",)
    spans: Callable[[Program, ExportOptions], Mapping | None] = lambda program, options: None
    tolerance: Callable[[Program, ExportOptions], float] = lambda _, options: (
        TOLERANCE[getattr(mx, options.dtype)]
    )
    finish: Callable[[Path], None] = lambda path: None


@dataclass(frozen=True)
class Export:
    """What came of an export; `parity` is empty where it cannot be run on this machine."""

    target: str
    folder: Path
    bytes: int
    seconds: float
    parity: tuple[Parity, ...]
    notes: tuple[str, ...]
    load: str


def export(
    program: Program,
    target: str,
    out: Path,
    options: ExportOptions,
    cases: Sequence[Case],
    *,
    beside: Callable[[Path], None] = lambda folder: None,
) -> Export:
    """Write the folder `out`: the model, `export.json`, and what `beside(folder)` adds.

    Raises `InputError` for an unknown target, a package that is missing or what the target cannot
    express, and `GateFailed` if the export differs from the program; nothing is written then.
    """
    kind = target_named(target, options)
    started = time.perf_counter()
    notes: list[str] = []
    if options.quantize in ("int4", "int8"):
        program, notes = quantize_program(
            program, bits=int(options.quantize[3:]), group_size=options.group_size
        )
    spans = kind.spans(program, options)
    if spans is not None:
        cases = [case for case in cases if _fits(program, case, spans)]
    with new_folder(out, flag="-o") as folder:
        path = folder / kind.file
        notes += kind.write(program, path, options, cases)
        found = _parity(program, kind, path, options, cases)
        kind.finish(path)
        seconds = time.perf_counter() - started
        size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        beside(folder)
        load = kind.load.format(path=Path(out) / kind.file)
        done = Export(target, Path(out), size, seconds, tuple(found), tuple(notes), load)
        _write_record(folder / RECORD, done, program, options)
    return done


def runner_of(target: str, folder: Path, options: ExportOptions) -> Runner | None:
    """What runs an export that lies in a folder; None where it cannot run on this machine."""
    kind = target_named(target, options)
    return kind.runner(folder / kind.file, options)


def target_named(target: str, options: ExportOptions) -> Target:
    """The row of the table. Raises `InputError` for what it does not know, or lacks."""
    if target not in TARGETS:
        raise InputError(f"--to {target}: unknown; choose from {', '.join(TARGETS)}.")
    kind = TARGETS[target]
    for package in kind.needs:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(package)
            continue
        raise InputError(
            f"--to {target}: needs {package}; pip install 'mlx-compress[{target}]'."
        )
    if options.quantize and options.quantize not in kind.quantize:
        raise InputError(
            f"--quantize {options.quantize}: not for {target}; choose from "
            f"{', '.join(kind.quantize)}."
        )
    if options.dtype not in kind.dtypes:
        raise InputError(f"--dtype {options.dtype}: {target} is written in float32.")
    return kind


def _fits(program: Program, case: Case, sizes: Mapping[str, int | tuple[int, int]]) -> bool:
    """Whether a case has the sizes that a target of fixed shapes is written for."""
    found = sizes_of(program.graph, [case.feeds[name].shape for name in program.inputs])
    asked = {**program.sizes, **sizes}
    spans = {n: (s, s) if isinstance(s, int) else s for n, s in asked.items()}
    return all(spans[name][0] <= size <= spans[name][1] for name, size in found.items())


def _parity(program, kind: Target, path: Path, options: ExportOptions, cases) -> list[Parity]:
    """Compared and required, but for what trades exactness: its error is there to be read."""
    runner = kind.runner(path, options)
    if runner is None:
        return []
    found = compare(program, runner, cases)
    if options.quantize not in (*ARITHMETIC, *PALETTES):
        require(found, kind.tolerance(program, options), path.name)
    return found


def _write_record(path: Path, done: Export, program: Program, options: ExportOptions) -> None:
    document = {
        "target": done.target,
        "inputs": program.inputs,
        "outputs": program.outputs,
        "sizes": dict(program.sizes),
        "options": {**vars(options), "sizes": dict(options.sizes)},
        "parity": [vars(p) for p in done.parity],
        "notes": done.notes,
        "metadata": dict(program.metadata),
    }
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf8")


def copy_tokenizer(source: Path) -> Callable[[Path], None]:
    """Copies the tokenizer's files, and how sentences are pooled, where the source has them."""

    def copy(folder: Path) -> None:
        for name in TOKENIZER_FILES:
            if (source / name).is_file() and not (folder / name).exists():
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(source / name, folder / name)

    return copy


TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "chat_template.jinja", "generation_config.json", "vocab.json", "merges.txt", "vocab.txt",
    str(POOLING),
)  # fmt: skip


# ---- the targets


def _write_onnx(program, path, options, cases) -> list[str]:
    from .onnx.export import export_onnx
    from .onnx.quantize import quantize_onnx
    from .onnx.scripts import add_scripts

    add_scripts(path, program, options.kv_cache)
    how = {"dtype": options.dtype, "cache": options.kv_cache}
    if options.quantize not in ARITHMETIC:
        written = export_onnx(program, path, accuracy_level=0, **how)
        return [*written.notes, *([ROUNDED] if _has_blocks(program) else [])]
    with tempfile.TemporaryDirectory(dir=path.parent) as work:
        whole = Path(work, path.name)
        notes = list(export_onnx(program, whole, **how).notes)
        feeds = [case.feeds for case in cases] if options.quantize == "static" else None
        done = quantize_onnx(whole, path, calibration=feeds)
    return [*notes, f"{done.layers} of {done.layers_before} products have int8 weights"]


ROUNDED = (
    "compared with exact activations; the file multiplies the packed weights with activations "
    "rounded to int8 (accuracy_level 4), which is several times faster"
)


def _has_blocks(program: Program) -> bool:
    return any(node.op == "QuantizedMatmul" for node in program.graph.nodes)


def _finish_onnx(path: Path) -> None:
    """Packed weights were compared exactly; see `ROUNDED`."""
    from .onnx.quantize import set_accuracy_level

    set_accuracy_level(path, 4)


def _run_onnx(path, options):
    from .onnx.buffers import in_buffers
    from .onnx.runner import load

    run = load(path).run
    return in_buffers(run) if options.kv_cache == "buffer" else run


def _onnx_spans(program: Program, options: ExportOptions) -> dict | None:
    """Buffers hold one sequence."""
    if options.kv_cache == "grow":
        return None
    return {"batch": 1, "length": (1, MANY), "past": (0, MANY)}


def _write_coreml(program, path, options, cases) -> list[str]:
    from .coreml.export import export_coreml

    written = export_coreml(
        program, path, dtype=options.dtype, shapes=_shapes(program, options),
        stateful=_keeps_cache(program, options),
        quantize=options.quantize if options.quantize in PALETTES else None,
        minimum_deployment_target=options.minimum_deployment_target,
        compute_units=options.compute_units,
    )  # fmt: skip
    return list(written.notes)


def _keeps_cache(program: Program, options: ExportOptions) -> bool:
    cached = any(caches(program))
    return cached and (not options.sizes if options.stateful is None else options.stateful)


def _shapes(program: Program, options: ExportOptions) -> dict:
    """Any batch where nothing else is said, as in the other targets."""
    if options.sizes or _keeps_cache(program, options):
        return dict(options.sizes)
    return {name: (1, MANY) for name in program.sizes if name != "past"}


def _coreml_spans(program: Program, options: ExportOptions) -> dict:
    """A cache that is kept starts empty, and takes steps of any length up to what is usual."""
    shapes = _shapes(program, options)
    if _keeps_cache(program, options):
        return {"length": (1, MANY), **shapes, "past": 0}
    return shapes


def _run_coreml(path, options):
    from .coreml.run import comparer

    return comparer(path, compute_units=options.compute_units)


def _write_torch(program, path, options, cases) -> list[str]:
    from .torch import save_torch

    save_torch(program, path, seed=options.seed)
    return []


def _run_torch(path, options):
    from .torch import load_torch

    return load_torch(path)


def _write_mlxfn(program, path, options, cases) -> list[str]:
    from .mlxfn import export_mlxfn

    if not all(isinstance(size, int) for size in options.sizes.values()):
        raise InputError("--sizes: an mlxfn has no ranges; give a number for each.")
    export_mlxfn(program, path, sizes=[options.sizes])
    return []


def _run_mlxfn(path, options):
    from .mlxfn import load_mlxfn

    return load_mlxfn(path)


TARGETS = {
    "onnx": Target(
        "model.onnx", _write_onnx, _run_onnx,
        'session = onnxruntime.InferenceSession("{path}")',
        needs=("onnx", "onnxruntime"), quantize=("int4", "int8", *ARITHMETIC), dtypes=DTYPES,
        spans=_onnx_spans, finish=_finish_onnx,
    ),
    "coreml": Target(
        "model.mlpackage", _write_coreml, _run_coreml,
        'model = coremltools.models.MLModel("{path}")',
        needs=("coremltools",), quantize=("int4", "int8", *PALETTES), dtypes=DTYPES,
        spans=_coreml_spans,
        tolerance=lambda program, options: TOLERANCE[  # Core ML keeps states in float16
            mx.float16 if _keeps_cache(program, options) else getattr(mx, options.dtype)
        ],
    ),
    "torch": Target(
        "model.pt2", _write_torch, _run_torch, 'module = torch.export.load("{path}").module()',
        needs=("torch",),
    ),
    "mlxfn": Target(
        "model.mlxfn", _write_mlxfn, _run_mlxfn, 'function = mx.import_function("{path}")',
        spans=lambda program, options: options.sizes,
    ),
}  # fmt: skip
