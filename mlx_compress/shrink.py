"""Prune a saved program: plan, prune, prove, save. No architecture has to be able to hold it.

Widths are free in a program, so nothing is snapped to what a config can say. Criteria that read
weights alone are offered.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import mlx.core as mx
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
from .prune import check_plan, zero_parameters


@dataclass
class ProgramPlan:
    """A plan for a program, and what is worth telling about it."""

    plan: PrunePlan
    kept_parameters: float
    notes: list[str] = field(default_factory=list)


def plan_program(
    program: Program, options: Options, plan: PrunePlan | None = None
) -> ProgramPlan:
    """Decide what to keep, or take a plan that was made.

    Raises `InputError` for a criterion that reads data, and for a plan of another model.
    """
    named = named_axes(program.at())
    notes: list[str] = []
    if plan is None:
        plan, notes = _choose(program, named, options)
    check_plan(named, plan)
    kept = block_parameters(named, plan.counts()) / block_parameters(named)
    return ProgramPlan(plan, kept, notes)


def _choose(program: Program, named: NamedAxes, options: Options) -> tuple[PrunePlan, list[str]]:
    options.require_amount()
    if options.importance in NEEDS_DATA:
        names = ", ".join(name for name in CRITERIA if name not in NEEDS_DATA)
        raise InputError(
            f"--importance {options.importance} reads text, which a saved program does not take; "
            f"choose from {names}."
        )
    dims = prunable(named, options)
    wanted = request(named, dims, options)
    sources = Sources(named, tuple(dims), program.fetch, seed=options.seed)
    recipe = {k: v for k, v in asdict(options).items() if v is not None}
    scores = CRITERIA[options.importance](sources)
    return choose(named, dims, scores, wanted, options, recipe), wanted.notes


def save_pruned_program(program: Program, planned: ProgramPlan, out: Path) -> Program:
    """Prune, prove that it equals zeroing, and save as a program folder, all or nothing.

    Raises `GateFailed` if the pruned program computes something else.
    """
    named = named_axes(program.at())
    pruned = prune_program(program, planned.plan)
    record = {
        "plan": planned.plan.to_json(),
        "notes": planned.notes,
        "kept_block_parameters": planned.kept_parameters,
        "verified": {"error_against_zeroing": _prove(program, named, planned.plan, pruned)},
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
    if not error <= TOLERANCE[mx.float32]:
        raise GateFailed(f"the pruned model differs from the zeroed one by {error:.1e}.")
    return error
