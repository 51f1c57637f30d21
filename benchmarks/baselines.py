"""The methods to compare: each leaves a smaller model, all at one budget and from the same samples.

    METHODS["FLAP"](bench, aim, seed) -> Pruned

Criteria are those of `importance.py`, with one count for all layers. Published methods follow
their authors' code, told in units of the graph's dimensions:

FLAP    fluctuations standardised layer by layer, ranked across all of them, a unit weighing what
        it takes with it; what the removed units gave on average becomes a bias. Attention's
        fluctuations are squared, as there. Every layer keeps one unit at least.
        An et al., 2024, https://arxiv.org/abs/2312.11983
OSSCAR  block by block, on the inputs that the pruned blocks before it hand over: greedy removal,
        then swaps, then W_K = (H_KK + lambda I)^-1 ((H + lambda I) W)_K, lambda a hundredth of the
        mean diagonal. Meng et al., 2024, https://arxiv.org/abs/2403.12983
layers  whole blocks of the least influence. Men et al., 2024, https://arxiv.org/abs/2403.03853
auto    what `compress` does: the criterion that loses least on held-out samples, then its refit.
searched  what it does with --max-trials and --dims layers beside the others: how much to keep of
        what, and of how many layers, found on held-out samples too.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..allocate import Request, choose, choose_layers, prunable_layers
from ..axes import Dimension, NamedAxes
from ..bridges.mlx_lm import LanguageModel
from ..budget import block_parameters, language_budget
from ..calibrate import calibrate
from ..calibration import Calibration
from ..contractions import Contraction, consumers
from ..errors import InputError
from ..expressible import fitted_config
from ..importance import Scores, Sources, criterion, read_matrices
from ..influence import LAYER_CRITERIA, LayerSources, calibrate_layers
from ..layers import layer_dimensions, renamed_paths
from ..options import Options
from ..plan import Cut, PrunePlan
from ..planning import choose_plan, one_kind_whole
from ..prune import (
    Cutter,
    picks,
    prune_array,
    pruned_fetch,
    pruner,
    spread_array,
    zero_parameters,
)
from ..recipe import units
from ..refit import USUAL, refit
from ..residual import entry_of
from ..swaps import refine

INFLUENCE = "activation"  # the name of block influence among criteria of layers
FITTED = " + refit"
TRIALS = 24


@dataclass(frozen=True)
class Bench:
    """What methods read. `named` is at a short length, `sources` and `batches` at a batch's.

    `sources` holds the statistics of all samples; `calibration` keeps some of them back to judge.
    """

    model: LanguageModel
    named: NamedAxes
    calibration: Calibration
    sources: Sources
    batches: Sequence[Sequence[mx.array]]


@dataclass(frozen=True)
class Aim:
    """One fraction to remove: the counts to keep, as stock configs can express them."""

    options: Options
    dims: list[Dimension]
    wanted: Request


@dataclass(frozen=True)
class Pruned:
    """A plan, a float32 module that computes what it leaves, and what is worth telling."""

    plan: PrunePlan
    module: nn.Module
    about: dict = field(default_factory=dict)


Method = Callable[[Bench, Aim, int], Pruned]


def method(name: str) -> Method:
    """Of `METHODS`, or a criterion, or one followed by " + refit"."""
    if name in METHODS:
        return METHODS[name]
    return _of_criterion(name.removesuffix(FITTED), fitted=name.endswith(FITTED))


def _of_criterion(name: str, *, fitted: bool = False) -> Method:
    score = criterion(name)

    def run(bench: Bench, aim: Aim, seed: int) -> Pruned:
        sources = replace(bench.sources, seed=seed)
        plan = choose(bench.named, aim.dims, score(sources), aim.wanted, aim.options)
        cut = refit(sources.named, plan, sources.statistics) if fitted else None
        return Pruned(plan, pruned_module(bench.model, bench.named, plan, cut))

    return run


def pruned_module(
    model: LanguageModel, named: NamedAxes, plan: PrunePlan, cut: Cutter | None = None
) -> nn.Module:
    """The stock model that a plan leaves, in float32, in memory."""
    module = model.build(fitted_config(model, named, plan))
    paths = renamed_paths(named, plan)
    pruned = pruned_fetch(model.fetch, cut or pruner(named, plan))(paths)
    return float32(module.load_weights([(new, pruned[old]) for old, new in paths.items()]))


def float32(module: nn.Module) -> nn.Module:
    module.set_dtype(mx.float32)  # the CPU has no fast half precision
    mx.eval(module.parameters())
    return module


def _auto(bench: Bench, aim: Aim, seed: int) -> Pruned:
    calibration = _calibrated(bench, replace(aim.options, importance="auto"))
    plan, _ = choose_plan(
        calibration, bench.named, aim.dims, [], aim.wanted, _others(bench, calibration),
        together=True,
    )  # fmt: skip
    return _fitted(bench, calibration, aim, plan)


def _searched(bench: Bench, aim: Aim, seed: int) -> Pruned:
    options = replace(
        aim.options, importance="auto", max_trials=TRIALS, dims=(*aim.options.dims, "layers")
    )
    calibration = _calibrated(bench, options)
    layers = prunable_layers(bench.named, options, calibration.budget)
    plan, _ = choose_plan(
        calibration, bench.named, aim.dims, layers, aim.wanted, _others(bench, calibration),
        together=True, holds=partial(_holds, bench),
    )  # fmt: skip
    return _fitted(bench, calibration, aim, plan)


def _others(bench: Bench, calibration: Calibration) -> list[Request]:
    def ask(options: Options) -> Request:
        return units(bench.model, bench.named, options)[1]

    return one_kind_whole(calibration.options, ask)


def _calibrated(bench: Bench, options: Options) -> Calibration:
    budget = language_budget(bench.model, options)
    return replace(bench.calibration, options=options, budget=budget, notes=[])


def _holds(bench: Bench, plan: PrunePlan) -> bool:
    try:
        fitted_config(bench.model, bench.named, plan)
    except InputError:
        return False
    return True


def _fitted(bench: Bench, calibration: Calibration, aim: Aim, plan: PrunePlan) -> Pruned:
    cut, record = calibration.fitted(plan, aim.dims)
    module = pruned_module(bench.model, bench.named, plan, cut)
    chosen = plan.recipe.get("chosen", plan.recipe["importance"])
    return Pruned(plan, module, {"criterion": chosen, "refit": record})


def _layers(bench: Bench, aim: Aim, seed: int) -> Pruned:
    """The number of blocks whose parameters come nearest to what is to be removed."""
    options, named = replace(aim.options, dims=("layers",)), bench.sources.named
    dims = prunable_layers(bench.named, options)
    here = tuple(d for d in layer_dimensions(named) if d.name in {d.name for d in dims})
    statistics = calibrate_layers(named, bench.batches, bench.model.fetch, dims=here)
    sources = LayerSources(named, here, bench.model.fetch, statistics)
    scores = LAYER_CRITERIA[INFLUENCE](sources)
    plan = PrunePlan(choose_layers(bench.named, dims, scores, options))
    return Pruned(plan, pruned_module(bench.model, bench.named, plan))


# ---- FLAP


def _flap(bench: Bench, aim: Aim, seed: int) -> Pruned:
    scores = flap_scores(bench.sources, aim.dims)
    goal = block_parameters(bench.named, aim.wanted.counts)
    plan = ranked_across(bench.named, aim.dims, scores, goal)
    return Pruned(plan, compensated(bench, plan))


def _flap_uniform(bench: Bench, aim: Aim, seed: int) -> Pruned:
    """With one count for all layers, so that a stock config can hold it."""
    scores = flap_scores(bench.sources, aim.dims)
    plan = choose(bench.named, aim.dims, scores, aim.wanted, aim.options)
    return Pruned(plan, compensated(bench, plan))


def flap_scores(sources: Sources, dims: Sequence[Dimension]) -> Scores:
    """Mean over a unit's slots of Var(x) |W|^2, standardised over all slots of its layer.

    Where units have several slots (heads) it is squared before that.
    """
    out = {}
    for d in dims:
        place, units = reader(sources, d)
        (weight,), _ = read_matrices(sources, place)
        fluctuation = sources.statistics.moments[place.key].variance * (weight**2).sum(axis=1)
        slots = np.bincount(units)
        if slots.max() > 1:
            fluctuation = fluctuation**2
        standard = (fluctuation - fluctuation.mean()) / fluctuation.std(ddof=1)
        out[d.name] = np.bincount(units, weights=standard) / slots
    return out


def reader(sources: Sources, dim: Dimension) -> tuple[Contraction, np.ndarray]:
    """The one linear layer that reads a dimension, and the unit of each slot of its input."""
    places = consumers(sources.named, [dim.name])[dim.name]
    plain = [p for p in places if p.weight and p.layout and p.experts is None and not p.window]
    if len(places) != 1 or len(plain) != 1 or dim.within:
        raise InputError(
            f"{dim.name}: FLAP and OSSCAR are written for units that one linear layer reads; "
            "leave them out with --methods."
        )
    return plain[0], sources.named.units_along(plain[0].axis)[dim.name]


def ranked_across(
    named: NamedAxes, dims: Sequence[Dimension], scores: Scores, goal: int
) -> PrunePlan:
    """Keep the units of the highest scores, whatever their layer: nearest to `goal` parameters.

    A unit weighs the block parameters that go with it, and each dimension keeps its best one.
    """
    whole = block_parameters(named)
    weight = {d.name: whole - block_parameters(named, {d.name: d.size - 1}) for d in dims}
    best = {(d.name, int(scores[d.name].argmax())) for d in dims}
    units = [(d.name, i) for d in dims for i in range(d.size)]
    units.sort(key=lambda unit: (unit not in best, -scores[unit[0]][unit[1]]))
    weights = np.cumsum([weight[name] for name, _ in units])
    kept = whole - weights[-1] + weights
    count = max(len(dims), int(np.abs(kept - goal).argmin()) + 1)
    keep = {d.name: sorted(i for name, i in units[:count] if name == d.name) for d in dims}
    return PrunePlan({
        d.name: Cut(d.name, d.kind, d.size, keep[d.name], slots=d.slots)
        for d in dims if len(keep[d.name]) < d.size
    })  # fmt: skip


def compensated(bench: Bench, plan: PrunePlan) -> nn.Module:
    """The stock dense module with what is removed zeroed, and the mean of it added as a bias.

    Zeroing a unit is the same as removing it, so each layer can have a width of its own.
    """
    zeroed = zero_parameters(bench.named, plan, bench.model.fetch(bench.named.graph.parameters))
    module = float32(bench.model.module().load_weights(list(zeroed.items())))
    layers = dict(module.named_modules())
    for path, bias in biases(bench.sources, plan).items():
        layer = layers[path.rpartition(".")[0]]
        if not isinstance(layer, nn.Linear):
            raise InputError(f"{path}: FLAP adds a bias, and {type(layer).__name__} takes none.")
        layer.bias = layer.get("bias", 0) + mx.array(bias, mx.float32)
    return module


def biases(sources: Sources, plan: PrunePlan) -> Mapping[str, np.ndarray]:
    """W[:, P] E[x_P] of the removed slots P, float64 [outputs], by the weight's path."""
    out = {}
    for cut in plan:
        place, units = reader(sources, sources.named.dimensions[cut.name])
        (weight,), _ = read_matrices(sources, place)
        held = sources.statistics.moments[place.key]
        gone = ~cut.mask()[units]
        out[place.weight[0]] = (held.total / held.rows)[gone] @ weight[gone]
    return out


# ---- OSSCAR


def _osscar(bench: Bench, aim: Aim, seed: int) -> Pruned:
    plan, weights = osscar_in_sequence(bench, aim)
    named = bench.sources.named

    def cut(path: str, array: mx.array) -> mx.array:
        return prune_array(weights.get(path, array), picks(named, plan, path))

    return Pruned(plan, pruned_module(bench.model, bench.named, plan, cut))


def osscar_in_sequence(bench: Bench, aim: Aim) -> tuple[PrunePlan, dict[str, mx.array]]:
    """The plan, and the fitted weights by path, whole, with zeros for what is removed."""
    named, weights, cuts = bench.sources.named, {}, {}

    def fetch(paths) -> dict[str, mx.array]:
        return {path: weights.get(path, a) for path, a in bench.model.fetch(paths).items()}

    for dims in _by_block(bench.sources, aim.dims):
        names = [d.name for d in dims]
        statistics = calibrate(named, bench.batches, fetch, dims=names, second={})
        sources = Sources(named, dims, fetch, statistics)
        plan = choose(named, dims, criterion("osscar")(sources), aim.wanted, aim.options)
        plan = refine(sources, plan)
        fitted = refit(named, plan, statistics, lambdas=USUAL)
        for path in [reader(sources, d)[0].weight[0] for d in dims if d.name in plan.cuts]:
            array = fetch([path])[path].astype(mx.float32)
            kept = fitted(path, array)
            weights[path] = spread_array(kept, picks(named, plan, path), array.shape)
        cuts |= plan.cuts
    return PrunePlan(cuts), weights


def _by_block(sources: Sources, dims: Sequence[Dimension]) -> list[tuple[Dimension, ...]]:
    """Dimensions of one entry of a module list together, in the order of the graph."""
    place = {d.name: reader(sources, d)[0] for d in dims}
    ordered = sorted(dims, key=lambda d: place[d.name].value)
    groups = groupby(ordered, key=lambda d: entry_of(place[d.name].weight[0]))
    return [tuple(group) for _, group in groups]


METHODS: dict[str, Method] = {
    **{name: _of_criterion(name) for name in ("random", "magnitude", "taylor", "wanda")},
    "layers": _layers,
    "FLAP": _flap,
    "FLAP uniform": _flap_uniform,
    "OSSCAR": _osscar,
    "auto": _auto,
    "searched": _searched,
}
OURS = ("auto", "searched")
WITHOUT_REFIT = tuple(name for name in METHODS if name not in ("OSSCAR", *OURS))
