"""The bridge to torch: modules and .pt2 files come in, graphs go out."""

from .imported import Imported, from_torch
from .module import save_torch, to_torch

__all__ = ["Imported", "from_torch", "save_torch", "to_torch"]
