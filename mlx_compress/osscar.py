"""Second-order selection: remove the unit whose loss the others make up for best, and again.

For y = x W, removing the slots S of a unit and refitting all others costs

    1/2 tr(W_S^T [(H^-1)_SS]^-1 W_S),            H = X^T X,

and leaves weights and an inverse that a rank-|S| update gives. So each step counts what the units
that are still there can take over from the ones that are gone, and from each other.

Greedy choices are never taken back. `swapped` does that: it exchanges a kept and a removed unit,
always the pair that lowers the error of the refit most, until no pair does.

Meng et al., 2024 (OSSCAR), https://arxiv.org/abs/2403.12983; Hassibi and Stork, 1993.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DAMPING = 1e-2  # of the mean of H's diagonal
STEPS = 128  # where there are more units, several go at once
SWAPS = 128  # for the same reason
TOLERANCE = 1e-9  # of the square of the whole output: a swap that gains less is noise


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
        self.inverse = np.linalg.inv(_damped(moments))
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


def _damped(moments: np.ndarray) -> np.ndarray:
    damping = DAMPING * max(np.trace(moments) / len(moments), 1e-30)
    return moments + damping * np.eye(len(moments))


@dataclass(frozen=True)
class Reading:
    """A product y = x W of units to choose among: H, damped, and H W, of the slots in question.

    `units` [n] is the unit of each slot, -1 for slots that stay; `hessian` [n, n], `target` [n, m].
    `energy` is tr(W^T H W), the square of the whole output.
    """

    hessian: np.ndarray
    target: np.ndarray
    units: np.ndarray
    energy: float

    @property
    def slots(self) -> np.ndarray:
        """[units, slots of each], in the order of `choices`."""
        order = np.argsort(self.units, kind="stable")
        return order[np.sum(self.units < 0) :].reshape(len(self.choices), -1)

    @property
    def choices(self) -> np.ndarray:
        """The units that have slots here."""
        return np.unique(self.units[self.units >= 0])


def alike(readings: Sequence[Reading]) -> bool:
    """Whether all have the same units, at least one, each with as many slots as the others."""
    counts = [np.bincount(each.units[each.units >= 0]) for each in readings]
    there = {tuple(np.flatnonzero(count)) for count in counts}
    return len(there) == 1 and () not in there and all(len(set(c[c > 0])) == 1 for c in counts)


def reading(
    weight: np.ndarray, moments: np.ndarray, units: np.ndarray, alive: np.ndarray | None = None
) -> Reading:
    """Of `weight` [n, m] and `moments` [n, n]; slots that are not `alive` are gone for good."""
    hessian = _damped(moments)
    target = hessian @ weight
    energy = float(np.sum(weight * target))
    if alive is not None and not alive.all():
        hessian, target, units = hessian[np.ix_(alive, alive)], target[alive], units[alive]
    return Reading(hessian, target, units, energy)


def swapped(
    readings: Sequence[Reading], keep: Sequence[int], *, row: int | None = None, limit: int = SWAPS
) -> np.ndarray:
    """The units to keep, sorted, after at most `limit` swaps, each the best one there is.

    `readings` must be `alike`; their errors add up. With `row`, units are swapped within rows of so
    many only. Units without slots in them stay as they are.
    """
    choices = readings[0].choices
    kept = np.isin(choices, keep)
    states = [Swept(each, kept) for each in readings]
    least = TOLERANCE * sum(each.energy for each in readings)
    rows = choices // (row or choices[-1] + 1)
    for _ in range(limit if 0 < kept.sum() < len(kept) else 0):
        held, gone = np.flatnonzero(kept), np.flatnonzero(~kept)
        change = sum(state.changes(held, gone) for state in states)
        change[rows[held][:, None] != rows[gone]] = np.inf
        i, j = np.unravel_index(change.argmin(), change.shape)
        if change[i, j] > -least:
            break
        pair = [held[i], gone[j]]
        for state in states:
            state.flip(pair)
        kept[pair] = ~kept[pair]
    return np.sort([*np.setdiff1d(keep, choices), *choices[kept]]).astype(int)


class Swept:
    """H swept on the kept slots, which prices every unit alike, whether kept or removed.

    With B = H W, K the kept and P the removed slots, and A = H_KK^-1,

        N = [[A, A H_KP], [-H_PK A, H_PP - H_PK A H_KP]],    R = [A B_K, B_P - H_PK A B_K],

    and the error changes by 1/2 tr(R_b^T N_bb^-1 R_b) when unit b goes, or falls by it when b comes
    back. N after either is a pivot on N_bb; of R only the products Q = R R^T matter.
    """

    def __init__(self, reading: Reading, kept: np.ndarray):
        slots = reading.slots
        there = np.concatenate([np.flatnonzero(reading.units < 0), slots[kept].ravel()])
        swept = reading.hessian.copy()
        rest = reading.target - _pivot(swept, there) @ reading.target[there]
        mine = slots.ravel()
        self.swept, rest = swept[np.ix_(mine, mine)], rest[mine]
        self.products = rest @ rest.T
        self.slots = np.arange(len(mine)).reshape(slots.shape)

    def flip(self, units: list[int]) -> None:
        """Remove those that are kept and take back those that are not: a rank-|S| update."""
        b = self.slots[units].ravel()
        gain = _pivot(self.swept, b)
        half = self.products[:, b] - 0.5 * gain @ self.products[np.ix_(b, b)]
        self.products -= np.hstack([gain, half]) @ np.hstack([half, gain]).T

    def changes(self, held: np.ndarray, gone: np.ndarray) -> np.ndarray:
        """What swapping each kept unit for each removed one does to the error, [held, gone]."""
        if self.slots.shape[1] == 1:
            return self._of_slots(held, gone)
        return np.stack([self._of_blocks(held, self.slots[p]) for p in gone], axis=1)

    def _of_slots(self, held: np.ndarray, gone: np.ndarray) -> np.ndarray:
        pair = np.ix_(held, gone)
        pivots, squares = np.diag(self.swept), np.diag(self.products)
        share = self.swept[pair] / pivots[gone]
        left = pivots[held][:, None] + share * self.swept[pair]
        rest = squares[held][:, None] - share * (2 * self.products[pair] - share * squares[gone])
        return 0.5 * (rest / left - squares[gone] / pivots[gone])

    def _of_blocks(self, held: np.ndarray, p: np.ndarray) -> np.ndarray:
        """For one removed unit, of slots `p`: its gain, and what each kept one costs after that."""
        u = self.slots[held]
        own, cross = (u[:, :, None], u[:, None, :]), (u[:, :, None], p)
        pivot, square = self.swept[np.ix_(p, p)], self.products[np.ix_(p, p)]
        share = self.swept[cross] @ np.linalg.inv(pivot)
        left = self.swept[own] + share @ self.swept[cross].swapaxes(1, 2)
        half = share @ (self.products[cross].swapaxes(1, 2) - 0.5 * square @ share.swapaxes(1, 2))
        rest = self.products[own] - half - half.swapaxes(1, 2)
        gain = np.trace(np.linalg.solve(pivot, square))
        return 0.5 * (np.trace(np.linalg.solve(left, rest), axis1=1, axis2=2) - gain)


def _pivot(swept: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Let the slots `b` change sides in N, in place; returns G, with which R becomes R - G R_b."""
    pivot = np.linalg.inv(swept[np.ix_(b, b)])
    gain, rows = swept[:, b] @ pivot, swept[b]
    swept -= gain @ rows
    swept[:, b], swept[b] = -gain, pivot @ rows
    swept[np.ix_(b, b)] = pivot
    gain[b] = np.eye(len(b)) - pivot
    return gain
