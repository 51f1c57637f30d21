"""The bridge to torch: modules and .pt2 files come in, graphs go out."""

from .imported import Imported, from_torch

__all__ = ["Imported", "from_torch"]
