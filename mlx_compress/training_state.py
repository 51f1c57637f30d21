"""The state of a training run on disk, so that one that was killed goes on where it was.

    OUT.training/
        state.json                 what the run is, how far it is, which files count
        step-150.safetensors       weights and optimiser at that step
        best-100.safetensors       the weights of the lowest held-out loss

New files are written beside the old ones, then state.json is replaced, then the old files go.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import mlx.core as mx

from .checkpoint import is_disk_full
from .errors import InputError, ResourceError
from .losses import TaidSchedule
from .report import write_report
from .workers import ALONE, Workers

STATE = "state.json"
Weights = dict[str, mx.array]


@dataclass
class Training:
    """A run after `step` steps: float32 `weights` by path, the optimiser's state, and its history.

    `losses` holds every step's, `curve` what was held out. `stale` counts evaluations since the
    best one.
    """

    weights: Weights
    optimizer: dict
    step: int = 0
    taid: TaidSchedule = field(default_factory=TaidSchedule)
    losses: list[float] = field(default_factory=list)
    curve: list[dict] = field(default_factory=list)
    best_step: int = 0
    best_nats: float = math.inf
    stale: int = 0

    def judged(self, point: dict, nats: float) -> "Training":
        """The run with a held-out measurement; `stale` is 0 where it is the best so far."""
        curve, better = [*self.curve, {"step": self.step, **point}], nats < self.best_nats
        if better:
            return replace(self, curve=curve, best_step=self.step, best_nats=nats, stale=0)
        return replace(self, curve=curve, stale=self.stale + 1)


class TrainingFolder:
    """Where a run is kept. `run` says in JSON's terms what it depends on, by the names of flags."""

    def __init__(self, folder: Path, run: Mapping[str, object]):
        self.folder = folder
        self.run = json.loads(json.dumps(dict(run)))

    def open(self, workers: Workers = ALONE) -> Training | None:
        """The kept state of this run, or None: the first process's, to all of them.

        Raises `InputError` for that of another run.
        """
        training = self._open() if workers.first else None
        if workers.count == 1:
            return training
        held = workers.tell(training and self._document(training))
        if held is None:
            return None
        kinds = {key: (shape, getattr(mx, dtype)) for key, (shape, dtype) in held["kinds"].items()}
        zeros = {key: mx.zeros(*kind) for key, kind in kinds.items()}
        return _training(held, workers.sum(self._arrays(training) if workers.first else zeros))

    def _open(self) -> Training | None:
        file = self.folder / STATE
        if not file.exists():
            return None
        try:
            held = json.loads(file.read_text(encoding="utf8"))
            self._check(held["run"])
            arrays = mx.load(str(self._step_file(held["step"])))
            mx.eval(arrays)
            if not self._best_file(held["best_step"]).exists():
                raise ValueError(f"the weights of step {held['best_step']} are missing")
            return _training(held, arrays)
        except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{file}: damaged ({error}); remove {self.folder}.") from error

    def kept_step(self) -> int | None:
        """The step that is on disk."""
        try:
            return json.loads((self.folder / STATE).read_text(encoding="utf8"))["step"]
        except (OSError, ValueError, KeyError):
            return None

    def save(self, training: Training, best: Weights | None = None) -> None:
        """Keep the state, and `best` weights where they are new; all or nothing.

        Raises `ResourceError` when the disk is full.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if best is not None:
                _write(self._best_file(training.best_step), best)
            _write(self._step_file(training.step), self._arrays(training))
            write_report(self._document(training), self.folder / STATE)
        except (OSError, RuntimeError) as error:
            if not is_disk_full(error):
                raise
            raise ResourceError(
                f"{self.folder}: the disk is full; free some space, and give the same command to "
                "go on from the last state that was kept."
            ) from error
        counts = {self._step_file(training.step), self._best_file(training.best_step)}
        for file in set(self.folder.glob("*.safetensors")) - counts:
            file.unlink()

    def _document(self, training: Training) -> dict:
        """All but the arrays, in JSON's terms, and the shapes and dtypes of these."""
        plain = {k: v for k, v in vars(training).items() if k not in ("weights", "optimizer")}
        plain |= {"taid": asdict(training.taid), "best_nats": _finite(training.best_nats)}
        kinds = {
            key: [array.shape, str(array.dtype).rpartition(".")[2]]
            for key, array in self._arrays(training).items()
        }
        return {"run": self.run, **plain, "kinds": kinds}

    def _arrays(self, training: Training) -> Weights:
        arrays = {f"weights|{path}": array for path, array in training.weights.items()}
        for name, value in training.optimizer.items():
            parts = value.items() if isinstance(value, dict) else [("", value)]
            arrays |= {f"optimizer|{name}|{part}": array for part, array in parts}
        return arrays

    def best(self, training: Training) -> Weights:
        """The weights of the lowest held-out loss."""
        return mx.load(str(self._best_file(training.best_step)))

    def _step_file(self, step: int) -> Path:
        return self.folder / f"step-{step}.safetensors"

    def _best_file(self, step: int) -> Path:
        return self.folder / f"best-{step}.safetensors"

    def _check(self, run: Mapping) -> None:
        require_same(self.folder, run, self.run)


def require_same(folder: Path, held: Mapping, own: Mapping) -> None:
    """Raise `InputError` that names what differs between the run that `folder` holds and this.

    Of several things the first in `own`: what follows from others should come behind them.
    """
    for name in (*own, *sorted(held.keys() - own.keys())):
        if held.get(name) != own.get(name):
            raise InputError(
                f"{folder}: holds a run with another {name} ({held.get(name)}, now "
                f"{own.get(name)}); give what it was started with to go on, or remove the folder "
                "to start anew."
            )


def _training(held: dict, arrays: Mapping[str, mx.array]) -> Training:
    weights, optimizer = {}, {}
    for key, array in arrays.items():
        kind, _, name = key.partition("|")
        if kind == "weights":
            weights[name] = array
            continue
        name, _, part = name.rpartition("|")
        if part:
            optimizer.setdefault(name, {})[part] = array
        else:
            optimizer[name] = array
    plain = {k: held[k] for k in ("step", "losses", "curve", "best_step", "stale")}
    best = math.inf if held["best_nats"] is None else held["best_nats"]
    return Training(weights, optimizer, taid=TaidSchedule(**held["taid"]), best_nats=best, **plain)


def _write(file: Path, arrays: Weights) -> None:
    partial = file.with_name(f".{file.stem}.partial.safetensors")
    try:
        mx.save_safetensors(str(partial), arrays)
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
