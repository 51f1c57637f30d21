"""Second-order selection: remove the unit whose loss the others make up for best, and again.

For y = x W, removing the slots S of a unit and refitting all others costs

    1/2 tr(W_S^T [(H^-1)_SS]^-1 W_S),            H = X^T X,

and leaves weights and an inverse that a rank-|S| update gives. So each step counts what the units
that are still there can take over from the ones that are gone, and from each other.

Meng et al., 2024 (OSSCAR), https://arxiv.org/abs/2403.12983; Hassibi and Stork, 1993.
"""

import numpy as np

DAMPING = 1e-2  # of the mean of H's diagonal
STEPS = 128  # where there are more units, several go at once


def removal_costs(weight: np.ndarray, moments: np.ndarray, units: np.ndarray) -> np.ndarray:
    """The summed cost at which each unit is removed, in the order that is cheapest; float64 [u].

    `weight` is [n, m], `moments` [n, n], `units` [n] the unit of each slot, -1 for slots that stay.
    The last unit removed costs most.
    """
    slots = [np.flatnonzero(units == u) for u in range(units.max() + 1)]
    state = _State(weight, moments)
    costs, spent = np.zeros(len(slots)), 0.0
    left = list(range(len(slots)))
    at_once = max(1, len(left) // STEPS)
    while left:
        prices = state.prices([slots[u] for u in left])
        cheapest = np.argsort(prices, kind="stable")[:at_once]
        for k in cheapest:
            spent += max(float(prices[k]), 0.0)
            costs[left[k]] = spent
        state.remove(np.concatenate([slots[left[k]] for k in cheapest]))
        gone = set(cheapest.tolist())
        left = [u for k, u in enumerate(left) if k not in gone]
    return costs


class _State:
    """The weights after the removals so far, and the inverse of H among what is left."""

    def __init__(self, weight: np.ndarray, moments: np.ndarray):
        damping = DAMPING * max(np.trace(moments) / len(moments), 1e-30)
        self.inverse = np.linalg.inv(moments + damping * np.eye(len(moments)))
        self.weight = weight.astype(np.float64).copy()

    def prices(self, slots: list[np.ndarray]) -> np.ndarray:
        if all(len(s) == 1 for s in slots):
            index = np.concatenate(slots)
            return 0.5 * (self.weight[index] ** 2).sum(axis=1) / np.diag(self.inverse)[index]
        return np.array([self._price(s) for s in slots])

    def _price(self, s: np.ndarray) -> float:
        return 0.5 * float(
            np.sum(self.weight[s] * np.linalg.solve(self.inverse[np.ix_(s, s)], self.weight[s]))
        )

    def remove(self, s: np.ndarray) -> None:
        columns = self.inverse[:, s]
        gain = np.linalg.solve(self.inverse[np.ix_(s, s)], columns.T).T
        self.weight -= gain @ self.weight[s]
        self.inverse -= gain @ columns.T
        self.weight[s] = 0
        self.inverse[s] = self.inverse[:, s] = 0
        self.inverse[s, s] = 1  # never read again; keeps it invertible
