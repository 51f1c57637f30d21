"""What `export` and `import` do and print."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from . import program_recipe
from .archive import is_program, save_program
from .bridges.cases import parity_cases
from .bridges.exports import Export, copy_tokenizer, export, target_named
from .bridges.mlx_lm import load_tokenizer, locate
from .bridges.programs import FORWARD, compare_with_torch, open_program
from .checkpoint import RECORD, check_free, new_folder
from .errors import InputError
from .jobs import err, out, table
from .options import ExportOptions
from .parity import TOLERANCE, Parity, require
from .program import Program

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def export_model(
    model: str, places: Mapping[str, Path], options: ExportOptions,
    *, data: Path | None = None, cached: bool = True, trust: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> list[Export]:  # fmt: skip
    """Export to every target, each into a new folder of its own, and tell of it.

    `metadata` (author, license ...) goes into the files, with how the model was compressed.
    """
    check_places(places, options)
    program = open_program(model, cached=cached, sizes=options.example, trust_remote_code=trust)
    _check_sizes(program, options)
    source = Path(model) if Path(model).suffix == ".pt2" else locate(model)
    about = {**program.metadata, **_compression(source), **(metadata or {})}
    program = replace(program, metadata=about)
    has_tokenizer = any((source / name).is_file() for name in TOKENIZERS)
    tokenizer = load_tokenizer(source, trust_remote_code=trust) if has_tokenizer else None
    samples = program_recipe.real_case(source, program, data)
    cases = parity_cases(
        program, tokenizer, None if samples else data, sizes=options.example, seed=options.seed
    )
    cases += [samples] if samples else []
    done = []
    for target, place in places.items():
        with err.status(f"exporting to {target}"):
            done.append(
                export(program, target, place, options, cases, beside=copy_tokenizer(source))
            )
        tell_export(done[-1])
    return done


def _compression(source: Path) -> dict[str, str]:
    """How a pruned folder was made, from its record."""
    try:
        record = json.loads((source / RECORD).read_text(encoding="utf8"))
    except (OSError, ValueError):
        return {}
    told = {k: record[k] for k in ("kept_block_parameters", "parent") if k in record}
    return {"compression": json.dumps(told | {"recipe": record.get("plan", {}).get("recipe", {})})}


def check_places(places: Mapping[str, Path], options: ExportOptions) -> None:
    """Fail before the long part: a target that cannot be written, a folder that is taken."""
    for target, place in places.items():
        target_named(target, options)
        check_free(place, flag="-o")


def _check_sizes(program: Program, options: ExportOptions) -> None:
    known = program.sizes or dict.fromkeys(FORWARD)
    unknown = [name for name in options.sizes if name not in known]
    if unknown:
        raise InputError(
            f"--sizes {unknown[0]}: the model has no size of this name; choose from "
            f"{', '.join(known)}."
        )


def import_model(source: str, mlx_path: Path, *, trust: bool) -> None:
    """Bring a torch program or a Hugging Face folder in, as a program folder."""
    check_free(mlx_path)
    path = Path(source).expanduser()
    if path.suffix != ".pt2" and not path.is_dir():
        raise InputError(f"--torch {source}: is neither a .pt2 file nor a folder.")
    if path.is_dir() and is_program(path):
        raise InputError(f"--torch {source}: is a saved program already.")
    program = open_program(path, trust_remote_code=trust)
    found = compare_with_torch(program, path, trust_remote_code=trust)
    require(found, TOLERANCE[mx.float32], str(mlx_path))
    with new_folder(mlx_path) as folder:
        save_program(program, folder, {"source": path.name, "parity": [vars(p) for p in found]})
        copy_tokenizer(path)(folder)
    out.print(parity_table(found))
    see = f"compress inspect --model {mlx_path}"
    err.print(f"Saved to {mlx_path}. See what can be pruned: {see}", soft_wrap=True)


def tell_export(done: Export) -> None:
    """Size, parity, and the line that loads it."""
    if done.parity:
        out.print(parity_table(done.parity))
    else:
        err.print(f"note: {done.target} does not run on this machine; parity was not measured.")
    for note in done.notes:
        err.print(f"note: {note}", soft_wrap=True)
    out.print(f"{done.folder}: {done.bytes / 1e6:.1f} MB in {done.seconds:.1f} s", soft_wrap=True)
    out.print(done.load, soft_wrap=True, highlight=False, markup=False)


def parity_table(found: Iterable[Parity]):
    """Largest and mean error of each case."""
    rows = table("compared with MLX on", "max error", "mean error")
    for parity in found:
        rows.add_row(parity.case, f"{parity.max_error:.1e}", f"{parity.mean_error:.1e}")
    return rows
