"""Prune a saved program: plan, prune, prove, save. No architecture has to be able to hold it.

Widths are free in a program, so nothing is snapped to what a config can say. Criteria that read
weights alone are offered.
"""

from dataclasses import asdict
from pathlib import Path

import numpy as np

from .allocate import block_parameters, choose, prunable, request
from .archive import save_program
from .axes import NamedAxes, named_axes
from .checkpoint import new_folder
from .errors import GateFailed, InputError
from .importance import CRITERIA, NEEDS_DATA, Sources
from .options import Options
from .parity import TOLERANCE, error_of
from .plan import PrunePlan
from .program import Program, prune_program, with_weights
from .prune import zero_parameters


def plan_for(program: Program, options: Options) -> tuple[PrunePlan, list[str]]:
    """What to keep, and notes. Raises `InputError` for a criterion that reads data."""
    options.require_amount()
    if options.importance in NEEDS_DATA:
        names = ", ".join(name for name in CRITERIA if name not in NEEDS_DATA)
        raise InputError(
            f"--importance {options.importance} reads text, which this model does not take; "
            f"choose from {names}."
        )
    named = named_axes(program.at())
    dims = prunable(named, options)
    wanted = request(named, dims, options)
    sources = Sources(named, tuple(dims), program.fetch, seed=options.seed)
    recipe = {k: v for k, v in asdict(options).items() if v is not None}
    plan = choose(named, dims, CRITERIA[options.importance](sources), wanted, options, recipe)
    return plan, wanted.notes


def save_shrunk(
    program: Program, plan: PrunePlan, out: Path, notes: list[str] | None = None
) -> Program:
    """Prune, prove that it equals zeroing, and save as a program folder, all or nothing.

    Raises `GateFailed` if the pruned program computes something else.
    """
    named = named_axes(program.at())
    pruned = prune_program(program, plan)
    record = {
        "plan": plan.to_json(),
        "notes": notes or [],
        "kept_block_parameters": block_parameters(named, plan.counts()) / block_parameters(named),
        "verified": {"error_against_zeroing": _prove(program, named, plan, pruned)},
    }
    with new_folder(out) as folder:
        save_program(pruned, folder, record)
    return pruned


def _prove(program: Program, named: NamedAxes, plan: PrunePlan, pruned: Program) -> float | None:
    """The error against the zeroed program; None where removing is not zeroing by nature."""
    if not all(named.dimensions[cut.name].exact for cut in plan):
        return None
    weights = dict(program.fetch(list(program.graph.parameters)))
    zeroed = with_weights(program, zero_parameters(named, plan, weights))
    feeds = program.feeds()
    pairs = zip(pruned.run(feeds), zeroed.run(feeds), strict=True)
    error = max(error_of(np.array(got), np.array(want))[0] for got, want in pairs)
    if not error <= TOLERANCE["float32"]:
        raise GateFailed(f"the pruned model differs from the zeroed one by {error:.1e}.")
    return error
