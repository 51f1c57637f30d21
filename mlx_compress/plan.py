"""A prune plan: which units of which dimensions are kept, as plain data.

The document names each dimension with its size, its slots and the kept indices, so it can be read,
compared and applied again to the same checkpoint. It holds no weights and no scores.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from numbers import Integral
from pathlib import Path

import numpy as np

from .errors import InputError
from .options import LAYER_KINDS

FORMAT = 1


@dataclass(frozen=True)
class Cut:
    """What is kept of one dimension.

    `keep` holds sorted indices below `size`; with `within`, one list for each unit of that other
    dimension, all of one length. `slots` are pairs (parameter path, axis), for the reader.
    """

    name: str
    kind: str
    size: int
    keep: list
    within: str | None = None
    slots: tuple[tuple[str, int], ...] = ()

    def __post_init__(self):
        rows = (self.keep or [[]]) if self.within else [self.keep]
        for row in rows:
            whole = all(isinstance(i, Integral) and not isinstance(i, bool) for i in row)
            good = whole and bool(row) and list(row) == sorted(set(row))
            if not good or not 0 <= row[0] <= row[-1] < self.size:
                raise InputError(
                    f"{self.name}: kept indices {_short(row)} must be non-empty, sorted, distinct "
                    f"whole numbers below {self.size}."
                )
        if len({len(row) for row in rows}) > 1:
            raise InputError(f"{self.name}: keeps different counts within {self.within}.")

    @property
    def kept(self) -> int:
        """The number of units left."""
        return len(self.keep[0]) if self.within else len(self.keep)

    def mask(self) -> np.ndarray:
        """Booleans: [size], or [size of the outer dimension, size] with `within`."""
        rows = self.keep if self.within else [self.keep]
        mask = np.zeros((len(rows), self.size), dtype=bool)
        for k, row in enumerate(rows):
            mask[k, row] = True
        return mask if self.within else mask[0]


@dataclass(frozen=True)
class PrunePlan:
    """The cuts by dimension, and how they were chosen (`recipe`)."""

    cuts: Mapping[str, Cut]
    recipe: Mapping[str, object] = field(default_factory=dict)

    def kept(self, name: str, size: int) -> int:
        """How many units of a dimension are left."""
        return self.cuts[name].kept if name in self.cuts else size

    def counts(self) -> dict[str, int]:
        """How many units are left of each dimension that the plan cuts."""
        return {cut.name: cut.kept for cut in self}

    def to_json(self) -> dict:
        cuts = [{k: v for k, v in asdict(cut).items() if v not in (None, ())} for cut in self]
        return {"format": FORMAT, "recipe": dict(self.recipe), "dimensions": cuts}

    def __iter__(self):
        return iter(self.cuts.values())

    @classmethod
    def from_json(cls, document: Mapping) -> "PrunePlan":
        """Raises `InputError` when the document is not a plan of this format."""
        if not isinstance(document, Mapping) or document.get("format") != FORMAT:
            raise InputError(f"not a prune plan of format {FORMAT}.")
        try:
            cuts = [_cut_from_json(entry) for entry in document["dimensions"]]
            plan = cls({cut.name: cut for cut in cuts}, dict(document.get("recipe", {})))
        except InputError:
            raise
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"the prune plan is damaged: {error!r}.") from error
        if len(plan.cuts) < len(cuts):
            raise InputError("the prune plan is damaged: it names a dimension twice.")
        return plan

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf8")

    @classmethod
    def load(cls, path: str | Path) -> "PrunePlan":
        """Raises `InputError` when there is no such file or it is not a plan."""
        try:
            return cls.from_json(json.loads(Path(path).read_text(encoding="utf8")))
        except FileNotFoundError as error:
            raise InputError(f"{path}: no such plan.") from error
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}).") from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not JSON ({error}).") from error
        except InputError as error:
            raise InputError(f"{path}: {error}") from error


def diff(left: PrunePlan, right: PrunePlan) -> dict[str, dict[str, list]]:
    """Per dimension, the units that only one of two plans keeps: `{name: {left, right}}`."""
    out = {}
    for name in dict.fromkeys([*left.cuts, *right.cuts]):
        kept = [_kept_units(plan, name, other) for plan, other in ((left, right), (right, left))]
        if kept[0] != kept[1]:
            out[name] = {"left": sorted(kept[0] - kept[1]), "right": sorted(kept[1] - kept[0])}
    return out


def describe(plan: PrunePlan) -> list[str]:
    """What a plan keeps, one phrase for each place in the model: counts by layer."""
    places: dict[str, list[str]] = {}
    for cut in plan:
        kept = [i for i in cut.keep] if cut.kind in LAYER_KINDS else cut.kept
        places.setdefault(re.sub(r"\d+", "*", cut.name), []).append(str(kept))
    return [
        f"{name}: {counts[0] if len(set(counts)) == 1 else '[' + ', '.join(counts) + ']'}"
        for name, counts in places.items()
    ]


def _kept_units(plan: PrunePlan, name: str, other: PrunePlan) -> set:
    if name in plan.cuts:
        return set(map(tuple, np.argwhere(plan.cuts[name].mask()).tolist()))
    whole = np.ones_like(other.cuts[name].mask())
    return set(map(tuple, np.argwhere(whole).tolist()))


def _cut_from_json(entry: Mapping) -> Cut:
    slots = tuple((path, axis) for path, axis in entry.get("slots", ()))
    known = ("name", "kind", "size", "keep", "within")
    return Cut(**{k: entry[k] for k in known if k in entry}, slots=slots)


def _short(row) -> str:
    return str(list(row)) if len(row) < 8 else f"[{row[0]}, {row[1]}, ... {row[-1]}]"
