"""What calibration measured, kept between runs: a folder for each model and text.

    statistics/
        3f1c...             a key: what the sums depend on
            manifest.json   which sums are there, over how many batches
            *.npy           the sums, a file for each kind and place
            lock            who reads or writes

What counts is what the manifest names. New files are written beside the old ones, then the manifest
is replaced, then the old files go: a process that is killed leaves what it last committed.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import uuid
import weakref
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from .errors import ResourceError
from .second import OnDisk

FORMAT = 1
LIMIT = 20 * 2**30  # bytes
VARIABLE = "MLX_COMPRESS_CACHE"
MANIFEST, LOCK = "manifest.json", "lock"


def default_folder() -> Path:
    """Where statistics are kept unless told otherwise; MLX_COMPRESS_CACHE names another cache."""
    own, shared = os.environ.get(VARIABLE), os.environ.get("XDG_CACHE_HOME")
    caches = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    cache = Path(own).expanduser() if own else Path(shared or caches, "mlx-compress")
    return cache / "statistics"


def store_key(*parts: str | bytes | np.ndarray) -> str:
    """A name for what these parts say: SHA-256 over their types, lengths, shapes and bytes."""
    digest = hashlib.sha256()
    for part in parts:
        kind, data = type(part).__name__, part
        if isinstance(part, np.ndarray):
            kind, data = f"{part.dtype.str}{part.shape}", part.tobytes()
        elif isinstance(part, str):
            data = part.encode()
        digest.update(f"{kind} {len(data)} ".encode() + data)
    return digest.hexdigest()


class Store:
    """The sums of one key, by kind and place.

    After `open`, `kept[kind]` maps a place's key to its array, and `done[kind]` says over how many
    batches these sums go. `notes` say why something was not used.
    """

    def __init__(self, folder: str | Path, key: str):
        self.folder = Path(folder, key)
        self.notes: list[str] = []
        self.done: dict[str, int] = {}
        self.kept: dict[str, OnDisk] = {}
        self._kinds: tuple[str, ...] = ()
        self._batches = 0
        self._places: dict[str, list[str]] = {}
        self._checksums: dict[str, int] = {}
        self._lock: _Lock | None = None

    def open(self, kinds: Mapping[str, Collection], batches: int) -> bool:
        """Find what is there of `kinds`, each with its places' keys; False: do without a store.

        Where all `batches` are done, other processes may read too; else only this one may come in.
        Damaged or foreign content counts as nothing, and is noted.
        """
        self._kinds, self._batches = tuple(kinds), batches
        self._places = {kind: [str(key) for key in keys] for kind, keys in kinds.items()}
        try:
            self._lock = self._lock or _Lock(self.folder)
            for mode in (fcntl.LOCK_SH, fcntl.LOCK_EX):
                if self._lock.take(mode) and (self._read(kinds) or mode == fcntl.LOCK_EX):
                    return True
            reason = "in use elsewhere"
        except OSError as error:
            reason = error.strerror or error
        self.notes.append(f"{self.folder}: {reason}; the statistics of this run are not kept.")
        self._lock = None
        return False

    def commit(self, done: int) -> None:
        """Make what was put into `kept` what is there, as the sums over `done` batches.

        Raises `ResourceError` when it cannot be written.
        """
        for kind in self._kinds:
            self.done[kind] = max(done, self.done.get(kind, 0))
        try:
            new = self.folder / f"{MANIFEST}.new"
            new.write_text(self._manifest(), encoding="utf8")
            new.replace(self.folder / MANIFEST)
        except OSError as error:
            raise ResourceError(
                f"{self.folder}: cannot be written ({error.strerror}); point {VARIABLE} to a "
                "larger disk."
            ) from error
        named = {file for held in self.kept.values() for file in held.files.values()}
        for file in set(self.folder.glob("*.npy")) - named:
            file.unlink()
        if self.complete:
            self._lock.take(fcntl.LOCK_SH)

    @property
    def complete(self) -> bool:
        return all(self.done.get(kind) == self._batches for kind in self._kinds)

    def _read(self, kinds: Mapping[str, Collection]) -> bool:
        """Whether all is there; `tidy` takes the reading for a use."""
        self._empty()
        if not (self.folder / MANIFEST).exists():
            return False
        try:
            content = _content((self.folder / MANIFEST).read_text(encoding="utf8"))
            if content["batches"] != self._batches:
                raise ValueError("other batches")
            for kind, files in content["files"].items():
                if kind in kinds and content["places"][kind] != self._places[kind]:
                    raise ValueError("other places")
                self._adopt(kind, files, kinds.get(kind))
            self.done, self._places = content["done"], {**content["places"], **self._places}
            os.utime(self.folder / MANIFEST)
        except (OSError, ValueError, KeyError, TypeError):
            note = f"{self.folder}: damaged, or of another version; collected anew."
            self.notes += [note] if note not in self.notes else []
            self._empty()
        return self.complete

    def _empty(self) -> None:
        self.done, self._checksums = {}, {}
        self.kept = {kind: self._mapping() for kind in self._kinds}

    def _mapping(self) -> OnDisk:
        return OnDisk(self.folder, owner=self._lock, variable=VARIABLE)

    def _adopt(self, kind: str, files: Mapping, keys: Collection | None) -> None:
        """Take over a kind's files; one that nobody asks for unread, under its keys as text."""
        held = self.kept.setdefault(kind, self._mapping())
        known = {str(key): key for key in keys or ()}
        for text, (name, checksum) in files.items():
            file = self.folder / Path(name).name
            if keys is not None and _crc(file) != checksum:
                raise ValueError(f"{file}: damaged")
            held.files[text if keys is None else known[text]] = file
            self._checksums[name] = checksum

    def _manifest(self) -> str:
        files: dict[str, dict] = {}
        for kind, held in self.kept.items():
            files[kind] = {}
            for key, file in held.files.items():
                if file.name not in self._checksums:
                    self._checksums[file.name] = _crc(file)
                files[kind][str(key)] = [file.name, self._checksums[file.name]]
        content = {"batches": self._batches, "done": self.done, "places": self._places}
        content["files"] = files
        return json.dumps({"format": FORMAT, "crc32": _crc(content), "content": content})


def tidy(folder: str | Path, *, limit_bytes: int = LIMIT, keep: str | None = None) -> list[str]:
    """Delete the keys used least recently until the others fit; returns their names.

    `keep`, and keys that a process reads or writes, stay.
    """
    found = sorted(_keys(Path(folder)))
    total, gone = sum(size for _, size, _ in found), []
    for _, size, place in found:
        if total <= limit_bytes or place.name == keep:
            continue
        with contextlib.suppress(OSError):
            if _Lock(place).take(fcntl.LOCK_EX):
                aside = place.rename(place.with_name(f".{uuid.uuid4().hex}"))
                shutil.rmtree(aside, ignore_errors=True)
                total, gone = total - size, [*gone, place.name]
    return gone


def _keys(folder: Path) -> list[tuple[float, int, Path]]:
    """When each key was last used, its bytes, its folder."""
    found = []
    for lock in folder.glob(f"*/{LOCK}"):
        with contextlib.suppress(OSError):  # another process may tidy at the same time
            stats = {file.name: file.stat() for file in lock.parent.iterdir()}
            used = stats.get(MANIFEST, stats[LOCK]).st_mtime
            found.append((used, sum(stat.st_size for stat in stats.values()), lock.parent))
    return found


class _Lock:
    """A lock on a key, for this object's life; the kernel frees what a dead process held."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / LOCK
        self.handle = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644)
        weakref.finalize(self, os.close, self.handle)

    def take(self, mode: int) -> bool:
        """Turn to `fcntl.LOCK_SH` or `LOCK_EX`; False, and no lock, where another is in the way."""
        try:
            fcntl.flock(self.handle, mode | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        # `tidy` may have removed the folder between opening the file and locking it.
        return os.path.samestat(os.fstat(self.handle), os.stat(self.file))


def _content(text: str) -> dict:
    document = json.loads(text)
    if document["format"] != FORMAT or document["crc32"] != _crc(document["content"]):
        raise ValueError("another version, or damaged")
    return document["content"]


def _crc(content: dict | Path) -> int:
    """CRC-32 of a JSON document or of a file."""
    if isinstance(content, dict):
        return zlib.crc32(json.dumps(content).encode())
    total = 0
    with content.open("rb") as stream:
        while block := stream.read(2**22):
            total = zlib.crc32(block, total)
    return total
