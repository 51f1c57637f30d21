"""Write a pruned checkpoint, all or nothing, and prove it.

The folder is built under a temporary name beside its place and renamed when all is done: config,
weights in shards, every other file of the parent, and `compression.json` with the plan, the recipe,
the metrics and the parent's hash. Weights are gathered shard by shard.
"""

import contextlib
import errno
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np

from .axes import NamedAxes
from .errors import CompressError, InputError, ResourceError
from .plan import PrunePlan
from .prune import check_plan, picks, prune_array
from .stream import Fetch, Progress, silent

SHARD_BYTES = 5 << 30  # as mlx-lm shards
RECORD = "compression.json"
TOLERANCE = {mx.float32: 1e-4, mx.float16: 2e-2, mx.bfloat16: 1e-1}
NOT_COPIED = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth", "*.py", ".*")


class NotLoadable(CompressError):
    """The written checkpoint does not load or computes something else; exit code 3."""

    exit_code = 3


@contextlib.contextmanager
def new_folder(path: str | Path, *, needs_bytes: int = 0) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well, and vanishes when not.

    Raises `InputError` if `path` exists, `ResourceError` if the disk is full or would be.
    """
    path = Path(path)
    check_free(path, needs_bytes)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield work
        work.chmod(0o755)
        work.rename(path)
    except (OSError, RuntimeError) as error:
        raise disk_error(path, error) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def check_free(path: str | Path, needs_bytes: int = 0) -> None:
    """Fail before the long part: the place is taken, cannot be made, or is too small."""
    path = Path(path)
    if path.exists():
        raise InputError(f"--mlx-path {path}: exists already; name a new folder or remove it.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--mlx-path {path}: cannot be made ({error.strerror}).") from error
    free = shutil.disk_usage(path.parent).free
    if needs_bytes > free:
        raise ResourceError(
            f"--mlx-path {path}: needs {needs_bytes / 1e6:.0f} MB, {free / 1e6:.0f} MB are free."
        )


def disk_error(path: Path, error: Exception) -> Exception:
    """What a failed write becomes: `ResourceError` for a full disk, else the error itself."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    if full or "No space left" in str(error) or "Unable to write" in str(error):
        return ResourceError(f"{path}: the disk is full; nothing was written.")
    return error


def write_weights(
    folder: Path, named: NamedAxes, plan: PrunePlan, fetch: Fetch, dtypes: Mapping[str, mx.Dtype],
    *, rename: Mapping[str, str] | None = None, progress: Progress = silent,
) -> int:  # fmt: skip
    """Write the pruned parameters as mlx-lm shards them; returns their bytes.

    `dtypes` holds the dtype of each parameter on disk. `rename` gives paths their new names
    (renumbered layers); a parameter missing from it is dropped.
    """
    check_plan(named, plan)
    names = {p: p for p in named.graph.parameters} if rename is None else dict(rename)
    shards = _shards(named, plan, names, dtypes)
    index, total = {}, 0
    for number, paths in enumerate(shards, start=1):
        part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = f"model{part}.safetensors"
        arrays = fetch(paths)
        shard = {names[p]: prune_array(arrays.pop(p), picks(named, plan, p)) for p in paths}
        mx.save_safetensors(str(folder / file), shard, metadata={"format": "mlx"})
        total += sum(array.nbytes for array in shard.values())
        index |= dict.fromkeys(shard, file)
        del arrays, shard
        progress("save", number, len(shards))
    document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
    _write_json(folder / "model.safetensors.index.json", document)
    return total


def pruned_bytes(named: NamedAxes, plan: PrunePlan, dtypes: Mapping[str, mx.Dtype]) -> int:
    """The bytes of the weights after pruning."""
    counts = {cut.name: cut.kept for cut in plan}
    return sum(
        int(np.prod(named.sizes_after(path, counts))) * dtypes[path].size
        for path in named.graph.parameters
    )


def write_config(folder: Path, config: Mapping) -> None:
    _write_json(folder / "config.json", dict(sorted(config.items())))


def copy_rest(parent: Path, folder: Path) -> None:
    """Copy the tokenizer, the generation config and whatever else is not weights or code."""
    for file in sorted(parent.iterdir()):
        if file.is_file() and not any(file.match(pattern) for pattern in NOT_COPIED):
            if not (folder / file.name).exists() and file.suffix != ".txt" or _is_vocabulary(file):
                shutil.copyfile(file, folder / file.name)


def _is_vocabulary(file: Path) -> bool:
    return file.name in ("merges.txt", "vocab.txt")


def parent_record(parent: Path) -> dict:
    """The parent's name and the SHA-256 of its config and weights."""
    files = [parent / "config.json", *sorted(parent.glob("model*.safetensors"))]
    digests = {}
    for file in files:
        with file.open("rb") as stream:
            digests[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"name": parent.resolve().name, "sha256": digests}


def write_record(folder: Path, record: Mapping) -> None:
    """Write `compression.json`."""
    _write_json(folder / RECORD, record)


def prove(folder: Path, tokens: mx.array, expected: mx.array, dtype: mx.Dtype) -> float:
    """Load the folder with stock mlx-lm in a fresh process and compare logits.

    `tokens` [B, T]; `expected` [B, T, V] are the pruned graph's logits, in `dtype`. Returns the
    largest difference over the largest logit. Raises `NotLoadable` when the folder does not load
    or the difference exceeds the dtype's tolerance.
    """
    with tempfile.TemporaryDirectory() as scratch:
        given, got = Path(scratch, "tokens.npy"), Path(scratch, "logits.npy")
        np.save(given, np.array(tokens))
        command = [sys.executable, "-P", "-m", "mlx_compress.bridges.verify"]
        done = subprocess.run([*command, folder, given, got], capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
            raise NotLoadable(f"stock mlx-lm does not load the result: {reason}")
        logits = np.load(got)
    want = np.array(expected.astype(mx.float32))
    if logits.shape != want.shape:
        raise NotLoadable(f"stock mlx-lm gives logits of shape {logits.shape}, not {want.shape}.")
    error = float(np.abs(logits - want).max() / max(np.abs(want).max(), 1e-30))
    if not error <= TOLERANCE.get(dtype, TOLERANCE[mx.float32]):
        raise NotLoadable(f"stock mlx-lm's logits differ from the pruned graph's by {error:.1e}.")
    return error


def _shards(named, plan, names, dtypes) -> list[list[str]]:
    counts = {cut.name: cut.kept for cut in plan}
    shards: list[list[str]] = [[]]
    held = 0
    for path in names:
        size = int(np.prod(named.sizes_after(path, counts))) * dtypes[path].size
        if shards[-1] and held + size > SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1].append(path)
        held += size
    return shards


def _write_json(path: Path, document: Mapping) -> None:
    path.write_text(json.dumps(document, indent=4) + "\n", encoding="utf8")
