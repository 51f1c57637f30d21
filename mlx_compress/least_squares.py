"""Least squares from sums over batches: what to add to the weights of a contraction.

For the inputs X [rows, n] of the contraction and an error E [rows, m] that it can take away,

    minimise |X D - E|^2 + lambda |D|^2,        D = (X^T X + lambda I)^-1 X^T E

Lambda is chosen on data that D was not fitted on, also as infinite: a change that does not hold up
there is not made. With a bias, X has a column of ones, which lambda leaves alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from .padding import without_padding
from .second import FINE, Window, patches

LAMBDAS = (1e1, 1.0, 1e-1, 1e-2, 1e-3, 1e-4)  # times the mean of the diagonal of X^T X
MIXTURES = 256


@dataclass
class Sums:
    """X^T X [n, n] and X^T E [n, m], float64, of what is fitted and of what is only judged on."""

    window: Window | None
    keep: np.ndarray  # slots of the input
    outputs: np.ndarray  # slots of the output
    biased: bool
    fitted: list[np.ndarray] = field(default_factory=list)
    judged: list[np.ndarray] = field(default_factory=list)

    def add(
        self, value: mx.array, error: mx.array, *, judged: bool, mask: mx.array | None = None
    ) -> None:
        """The input of a contraction, and the error of its output in the same shape.

        `mask` says which tokens count.
        """
        kept = mx.take(value, mx.array(self.keep), axis=-1)
        x = patches(kept.astype(mx.float32), self.window)
        if self.biased:
            x = mx.concatenate([x, mx.ones((x.shape[0], 1))], axis=-1)
        if self.window is None:
            x = patches(without_padding(x.reshape(*value.shape[:-1], -1), mask), None)
        e = error.reshape(x.shape[0], -1).astype(mx.float32)
        parts = [x.T @ x, x.T @ mx.take(e, mx.array(self.outputs), axis=-1)]
        mx.eval(parts)
        sums = self.judged if judged else self.fitted
        if not sums:
            sums += [np.zeros(part.shape) for part in parts]
        for total, part in zip(sums, parts, strict=True):
            total += np.array(part)

    def change(self) -> tuple[np.ndarray | None, float]:
        """D, with the bias as its last row, and lambda in means of the diagonal; None for none.

        There is none without data to judge on.
        """
        if not self.judged:
            return None, np.inf
        errors = judged_errors(self.fitted, self.judged, self._ridge, LAMBDAS)
        best = int(np.argmin(errors))
        if not errors[best] < 0:
            return None, np.inf
        return solution(*self.fitted, self._ridge(LAMBDAS[best])), LAMBDAS[best]

    def _ridge(self, lam: float) -> np.ndarray:
        square = self.fitted[0]
        count = len(square) - self.biased
        ridge = np.full(len(square), lam * max(np.trace(square[:count, :count]) / count, 1e-30))
        ridge[count:] = 0
        return ridge


def solution(square: np.ndarray, cross: np.ndarray, ridge: np.ndarray) -> np.ndarray:
    """D of X^T X [n, n], X^T E [n, m] and what is added to the diagonal [n], in their dtype."""
    from scipy.linalg import LinAlgError, cho_factor, cho_solve

    whole = square + np.diag(ridge.astype(square.dtype))
    try:
        # It is symmetric: transposed, LAPACK takes it as it lies in memory.
        return cho_solve(cho_factor(whole.T, check_finite=False), cross, check_finite=False)
    except LinAlgError:  # sums were rounded, and lambda does not make up for it
        return np.linalg.solve(whole, cross)


def judged_errors(
    fitted: Sequence[np.ndarray], judged: Sequence[np.ndarray],
    ridge: Callable[[float], np.ndarray], lambdas: Sequence[float],
) -> list[float]:  # fmt: skip
    """The squared error on other data, less that of no change, of the D that each lambda gives.

    Both are (X^T X, X^T E). Beyond `MIXTURES` outputs, that many random mixtures of them stand for
    all: the expected square of a mixture is the sum of squares, and the lambdas share the mixtures.
    """
    (square, cross), (own_square, own) = judged, fitted
    if own.shape[1] > MIXTURES:
        mixed = np.random.default_rng(0).standard_normal((own.shape[1], MIXTURES))
        own, cross = (each @ (mixed / MIXTURES**0.5) for each in (own, cross))
    if len(square) > FINE:  # enough to tell a lambda from ten times as much
        parts = (square, cross, own_square, own)
        square, cross, own_square, own = (part.astype(np.float32) for part in parts)
    changes = (solution(own_square, own, ridge(lam)) for lam in lambdas)
    return [float(np.sum(change * (square @ change - 2 * cross))) for change in changes]
