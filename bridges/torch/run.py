"""Run what torch has, on NumPy arrays: the other side of a comparison with MLX."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from ...errors import InputError
from . import exported
from .hf import open_hf

Runner = Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]


def load_torch(path: str | Path) -> Runner:
    """A .pt2 file, which takes its inputs in the order of the feeds."""
    program = exported.load(path)
    named = program.module()
    names = list(program.call_spec.in_spec.child(1).context or [])

    def run(feeds):
        tensors = {name: _tensor(array) for name, array in feeds.items()}
        with torch.no_grad(), exported.one_line(str(path), "see the shapes it takes", who="torch"):
            out = named(**tensors) if names else named(*tensors.values())
        return _arrays(out)

    return run


def source_runner(path: Path, outputs: Sequence[str], *, trust_remote_code: bool = False) -> Runner:
    """What was imported: a .pt2 file, or a Hugging Face folder."""
    if path.suffix == ".pt2":
        return load_torch(path)
    model, _ = open_hf(path, trust_remote_code)

    def run(feeds):
        with torch.no_grad(), exported.quiet():
            out = model(**{name: _tensor(array) for name, array in feeds.items()})
        return [_array(out[name]) for name in outputs]

    return run


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def _array(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def _arrays(out) -> list[np.ndarray]:
    leaves = torch.utils._pytree.tree_leaves(out)
    if not all(isinstance(leaf, torch.Tensor) for leaf in leaves):
        raise InputError("the torch program returns something else than tensors.")
    return [_array(leaf) for leaf in leaves]
