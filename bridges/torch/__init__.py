"""The bridge to torch: modules, .pt2 files and Hugging Face folders come in, graphs go out."""

from .hf import from_hf
from .imported import Imported, from_torch
from .module import save_torch, to_torch
from .run import load_torch, source_runner

__all__ = [
    "Imported", "from_hf", "from_torch", "load_torch", "save_torch", "source_runner", "to_torch",
]  # fmt: skip
