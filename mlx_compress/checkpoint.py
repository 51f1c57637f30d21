"""Write a pruned checkpoint, all or nothing, and prove it.

The folder is built under a temporary name beside its place and renamed when all is done: config,
weights in shards, every other file of the parent, and `compression.json` with the plan, the recipe,
the metrics and the parent's hash. Weights are gathered shard by shard.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
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
from .layers import renamed_paths
from .parity import TOLERANCE, error_of
from .plan import PrunePlan
from .prune import check_plan
from .stream import Fetch, Progress, silent

SHARD_BYTES = 5 << 30  # as mlx-lm shards
RECORD = "compression.json"
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack",
           "*.npz", "*.onnx")  # fmt: skip
# What describes the parent's weights, and would mislead or break a loader of the child's.
OF_THE_PARENT = ("*.index.json", "hf_quant_config.json", RECORD, "report.json")
NOT_COPIED = (*WEIGHTS, *OF_THE_PARENT, "*.py", ".*")


class NotLoadable(CompressError):
    """The written checkpoint does not load or computes something else; exit code 3."""

    exit_code = 3


@contextlib.contextmanager
def new_folder(
    path: str | Path, *, needs_bytes: int = 0, flag: str = "--mlx-path"
) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well, and vanishes when not.

    Folders above it that are missing are made, and vanish likewise. Raises `InputError` if `path`
    exists, naming the option `flag`, and `ResourceError` if the disk is full or would be.
    """
    path = Path(path)
    check_free(path, needs_bytes, flag=flag)
    above = [folder for folder in path.parents if not folder.exists()]
    work = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        yield work
        work.chmod(0o755)
        check_free(path, flag=flag)
        work.rename(path)
    except BaseException as error:
        if work:
            shutil.rmtree(work, ignore_errors=True)
        for folder in above:
            with contextlib.suppress(OSError):
                folder.rmdir()
        if is_disk_full(error):
            raise ResourceError(f"{path}: the disk is full; nothing was written.") from error
        if work is None and isinstance(error, OSError):
            raise InputError(f"{flag} {path}: cannot be made ({error.strerror}).") from error
        raise


def check_free(path: str | Path, needs_bytes: int = 0, *, flag: str = "--mlx-path") -> None:
    """Fail before the long part: the place is taken, cannot be made, or is too small."""
    path = Path(path)
    if os.path.lexists(path):
        raise InputError(f"{flag} {path}: exists already; name a new folder or remove it.")
    above = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        reason = "cannot be written to" if above.is_dir() else "is not a folder"
        raise InputError(f"{flag} {path}: cannot be made, {above} {reason}; name another.")
    free = shutil.disk_usage(above).free
    if needs_bytes > free:
        raise ResourceError(
            f"{flag} {path}: needs {needs_bytes / 1e6:.0f} MB, {free / 1e6:.0f} MB are free; "
            "name a folder on a larger disk."
        )


def is_disk_full(error: BaseException) -> bool:
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    return full or isinstance(error, RuntimeError) and "Unable to write" in str(error)


def write_weights(
    folder: Path, named: NamedAxes, plan: PrunePlan, fetch: Fetch, dtypes: Mapping[str, mx.Dtype],
    *, progress: Progress = silent,
) -> int:  # fmt: skip
    """Write the pruned parameters as mlx-lm shards them; returns their bytes.

    `fetch` gives them under their old paths (`prune.pruned_fetch`); `dtypes` holds the dtype of
    each on disk. Where the plan drops layers their parameters are left out, and the layers behind
    them are renumbered.
    """
    check_plan(named, plan)
    names = renamed_paths(named, plan)
    shards = _shards(named, plan, names, dtypes)
    index, total = {}, 0
    for number, paths in enumerate(shards, start=1):
        part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = f"model{part}.safetensors"
        arrays = dict(fetch(paths))
        shard = {names[p]: arrays.pop(p) for p in paths}
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
    counts = plan.counts()
    return sum(
        math.prod(named.sizes_after(path, counts)) * dtypes[path].size
        for path in renamed_paths(named, plan)
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
    files = [parent / "config.json", parent / "graph.json"]
    files = [f for f in files if f.exists()] + sorted(parent.glob("model*.safetensors"))
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
    error, _ = error_of(logits, want)
    if not error <= TOLERANCE.get(dtype, TOLERANCE[mx.float32]):
        raise NotLoadable(f"stock mlx-lm's logits differ from the pruned graph's by {error:.1e}.")
    return error


def _shards(named, plan, names, dtypes) -> list[list[str]]:
    counts = plan.counts()
    shards: list[list[str]] = [[]]
    held = 0
    for path in names:
        size = math.prod(named.sizes_after(path, counts)) * dtypes[path].size
        if shards[-1] and held + size > SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1].append(path)
        held += size
    return shards


def _write_json(path: Path, document: Mapping) -> None:
    path.write_text(json.dumps(document, indent=4) + "\n", encoding="utf8")
