"""Every architecture that mlx-lm has and the zoo builds, pruned and opened again by stock mlx-lm."""

from pathlib import Path

import mlx.core as mx
import pytest

import zoo
from zoo_checks import NONE, OK, TOLERANCE, cells, check, read_table

KINDS = ("channels", "heads", "experts")
PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
PROVEN = ("llama", "qwen3_moe")  # also in a fresh process, which takes seconds

