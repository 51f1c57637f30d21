"""Whether something else computes what MLX computes: on random and on real inputs.

The error of an output is its difference over the largest entry of the reference; equal infinities
do not differ.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .errors import GateFailed
from .program import Program

Feeds = Mapping[str, np.ndarray]
Runner = Callable[[Feeds], "list[np.ndarray]"]
TOLERANCE = {mx.float32: 1e-4, mx.float16: 2e-2, mx.bfloat16: 1e-1}


@dataclass(frozen=True)
class Case:
    """Inputs to compare on, and what to call them."""

    name: str
    feeds: Feeds


@dataclass(frozen=True)
class Parity:
    """The largest and the mean error over all outputs of one case."""

    case: str
    max_error: float
    mean_error: float


def random_cases(
    program: Program, sizes: Mapping[str, int] | None = None, *, seed: int = 0
) -> list[Case]:
    """Random inputs at `sizes`, or the program's examples; at one of everything; and at more.

    A past may be empty; other sizes are at least 1.
    """
    here = {**program.sizes, **(sizes or {})}
    here = {name: here[name] for name in program.sizes}
    least = {name: 0 if name == "past" else 1 for name in here}
    more = {name: 2 * size + 3 for name, size in here.items()}
    several = {tuple(s.items()): s for s in (here, least, more)}
    return [
        Case(_words(sizes), program.feeds(sizes, seed=seed + k))
        for k, sizes in enumerate(several.values())
    ]


def _words(sizes: Mapping[str, int]) -> str:
    return "random " + (", ".join(f"{name} {n}" for name, n in sizes.items()) or "inputs")


def compare(program: Program, runner: Runner, cases: Iterable[Case]) -> list[Parity]:
    """Run the program and the export, which may leave out the last outputs, on every case."""
    out = []
    for case in cases:
        want = [np.array(array.astype(_numpy(array))) for array in program.run(case.feeds)]
        got = runner(case.feeds)
        assert 0 < len(got) <= len(want)
        pairs = zip(got, want[: len(got)], strict=True)
        errors = [error_of(np.asarray(array), reference) for array, reference in pairs]
        out.append(Parity(case.name, *(float(max(part)) for part in zip(*errors, strict=True))))
    return out


def _numpy(array: mx.array) -> mx.Dtype:
    return mx.float32 if mx.issubdtype(array.dtype, mx.floating) else array.dtype


def error_of(got: np.ndarray, want: np.ndarray) -> tuple[float, float]:
    """Largest and mean difference over the largest finite entry; infinite for other shapes."""
    if got.shape != want.shape:
        return float("inf"), float("inf")
    if not want.size:
        return 0.0, 0.0
    got, want = got.astype(np.float64), want.astype(np.float64)
    with np.errstate(invalid="ignore"):
        apart = np.where(got == want, 0, np.abs(got - want))
    size = np.abs(want[np.isfinite(want)]).max(initial=1e-30)
    return float(np.max(apart) / size), float(np.mean(apart) / size)


def require(found: Iterable[Parity], tolerance: float, what: str) -> None:
    """Raise `GateFailed` for the worst case beyond the tolerance; NaN is beyond every one."""
    worst = max(found, key=lambda p: p.max_error if p.max_error == p.max_error else np.inf)
    if not worst.max_error <= tolerance:
        raise GateFailed(
            f"{what}: differs from the MLX model by {worst.max_error:.1e} on {worst.case}, "
            f"{tolerance:.0e} is allowed; nothing was written."
        )
