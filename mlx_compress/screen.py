"""What commands show of what was found: tables, and the document of `inspect --json`."""

from rich import box
from rich.table import Table

from .allocate import family
from .axes import NamedAxes
from .choice import Verdict
from .plan import PrunePlan


def axes_document(named: NamedAxes) -> dict:
    """`inspect --json`: every dimension, every parameter's axes, primitives without a rule."""
    return {
        "dimensions": [
            {
                "name": d.name,
                "kind": d.kind,
                "size": d.size,
                "free": d.free,
                "why_not": d.frozen,
                "within": d.within,
                "exact": d.exact,
                "slots": [list(slot) for slot in d.slots],
            }
            for d in named.dimensions.values()
        ],
        "parameters": {path: named.describe(path) for path in named.graph.parameters},
        "unknown_primitives": named.unknown,
    }


def axes_table(named: NamedAxes) -> Table:
    """One row for each place in the model; layers that are alike share a row."""
    rows: dict[tuple, list] = {}
    for d in named.dimensions.values():
        where = family(d)[0]
        status = f"fixed: {d.frozen}" if not d.free else "free" if d.exact else "free, normalised"
        rows.setdefault((where, d.size, status), []).append(d)
    shown = table("dimension", "size", "times", "status")
    shown.columns[0].no_wrap = True
    for (where, size, status), same in rows.items():
        shown.add_row(where, str(size), str(len(same)), status)
    return shown


def plan_table(plan: PrunePlan) -> Table:
    """What a plan keeps, layer by layer."""
    shown = table("dimension", "kept", "of", "removed")
    for cut in plan:
        gone = sorted(set(range(cut.size)) - set(cut.keep)) if not cut.within else None
        shown.add_row(cut.name, str(cut.kept), str(cut.size), _few(gone))
    return shown


def _few(units: list[int] | None) -> str:
    if units is None:
        return "chosen anew for each"
    return ", ".join(map(str, units[:8])) + (f", ... ({len(units)})" if len(units) > 8 else "")


def table(*columns: str) -> Table:
    """An empty table; the first column is text, as are those called status or axes."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for k, name in enumerate(columns):
        left = k == 0 or name in ("status", "axes", "removed")
        made.add_column(name, overflow="fold", justify="left" if left else "right")
    return made


def verdict_table(verdict: Verdict, about: str) -> Table:
    """Every criterion on held-out calibration samples, and how far it is behind the best."""
    rows = table(about, verdict.unit, "more than the best (95 %)", "status")
    for candidate in verdict.candidates:
        found = verdict.behind[candidate.name]
        behind = "{estimate:+.3f} ({low:+.3f} to {high:+.3f})".format(**found)
        behind = behind if any(found.values()) else ""
        chosen = "chosen" if candidate is verdict.winner else ""
        rows.add_row(candidate.name, f"{candidate.mean:.3f}", behind, chosen)
    return rows
