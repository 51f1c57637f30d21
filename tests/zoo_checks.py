"""The whole road on one architecture of the zoo, and the table of what came out of it.

    check("llama", folder)     write, open, prune, reload: a `Row`
    main()                     the table of all (`make architectures`)

A kind of dimension is "ok" when one unit in four was removed (one where there are fewer), stock
mlx-lm opened the result, and its logits equal those of the model in which the removed units are
zero (or whose router never picks the removed experts). Otherwise it is said why not.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_compress.bridges.mlx_lm import LanguageModel, open_model

import zoo
from mlx_compress import checkpoint
from mlx_compress.allocate import Request, choose
from mlx_compress.axes import Dimension, NamedAxes, named_axes, reads
from mlx_compress.errors import InputError
from mlx_compress.execute import run
from mlx_compress.expressible import fitted_config, snap
from mlx_compress.fields import Inexpressible
from mlx_compress.importance import Sources, random
from mlx_compress.options import Options
from mlx_compress.plan import PrunePlan
from mlx_compress.prune import pruned_fetch, pruner, zero_parameters

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
TOLERANCE = 1e-4
CHANGE = 1e-3  # by how much a cut must move the logits at least
LENGTH = 7
REMOVED = 4  # one unit in 4; one where there are fewer
FREE_KINDS = ("channels", "heads", "query_heads", "head_dim", "experts", "width")
OK, NONE = "ok", "-"
WRONG = "the config found has the shapes, but computes something else"
# Stock code that writes to fixed token ids runs only with a vocabulary that has them.
CHANGES = {"phi3small": {"vocab_size": 100352}}


@dataclass(frozen=True)
class Row:
    """What came out for one architecture; `error` is the largest relative one of all logits."""

    name: str
    free: tuple[str, ...]
    channels: str
    heads: str
    experts: str
    error: float | None


def check(name: str, folder: Path, *, prove: bool = False) -> Row:
    """Prune the architecture in every way it allows; checkpoints are written below `folder`.

    With `prove`, a fresh process opens each of them as well.
    """
    module = zoo.build(name, **CHANGES.get(name, {}))
    tokens = mx.array(np.random.default_rng(len(name)).integers(1, 97, (1, LENGTH)), mx.int32)
    try:
        model = open_model(write_stock(folder / "dense", name, module))
        named = named_axes(model.trace(mx.zeros((1, LENGTH), mx.int32)))
    except InputError as refused:
        return Row(name, (), *[reason_of(refused)] * 3, None)
    bench = Bench(folder, model, named, tokens, logits(model.module(), tokens), prove)
    errors = [relative(bench.dense, logits(module, tokens)), bench.graph_error()]
    channels, heads = bench.expressed("channels"), bench.heads()
    experts = bench.expressed("experts")
    errors += [bench.equals_zeroing(parts) for parts in bench.together([channels, heads])]
    said = experts.said
    if experts.dims:
        off = bench.equals_never_choosing(experts)
        said = said if off <= TOLERANCE else WRONG
        errors += [off] if off <= TOLERANCE else []
    free = tuple(kind for kind in FREE_KINDS if named.free((kind,)))
    return Row(name, free, channels.said, heads.said, said, max(errors))


def write_stock(folder: Path, name: str, module) -> Path:
    """The checkpoint as stock mlx-lm keeps it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**zoo.CONFIGS[name], **CHANGES.get(name, {})}))
    arrays = dict(tree_flatten(module.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, metadata={"format": "mlx"})
    return folder


def logits(module, tokens: mx.array) -> mx.array:
    out = module(tokens)
    return out[0] if isinstance(out, tuple | list) else out


def relative(got: mx.array, wanted: mx.array) -> float:
    """The largest difference over the largest entry; infinite for other shapes or not numbers.

    Logits that are minus infinity in both are equal.
    """
    if got.shape != wanted.shape:
        return float("inf")
    off = mx.where(got == wanted, 0, mx.abs(got - wanted)).max()
    size = mx.where(mx.isinf(wanted), 0, mx.abs(wanted)).max()
    return (off / size).item() if mx.isfinite(off).item() else float("inf")


@dataclass(frozen=True)
class Part:
    """Dimensions to prune, how many units of each to keep, and what there is to say about it."""

    dims: list[Dimension]
    wanted: Request | None
    said: str


@dataclass(frozen=True)
class Bench:
    """An opened checkpoint, its axes, and its logits at some tokens."""

    folder: Path
    model: LanguageModel
    named: NamedAxes
    tokens: mx.array
    dense: mx.array
    prove: bool

    def parameters(self) -> dict[str, mx.array]:
        return dict(tree_flatten(self.model.module().parameters()))

    def graph_error(self) -> float:
        """How far the graph is from the model that it was traced from."""
        outputs, _ = run(self.named.graph, [self.tokens], self.parameters())
        return relative(outputs[0], self.dense)

    def expressed(self, kind: str) -> Part:
        """What of this kind can be pruned so that a stock config tells it."""
        dims = [d for d in self.named.free((kind,)) if d.size > 1]
        if kind != "experts":  # a softmax runs over all of them; the router is masked instead
            dims = [d for d in dims if d.exact]
        if not dims:
            return Part([], None, NONE)
        wanted = Request({d.name: d.size - max(1, d.size // REMOVED) for d in dims})
        options = Options(pruning_ratio=1 / REMOVED, dims=(kind,))
        try:
            kept, wanted = snap(self.model, self.named, dims, wanted, options)
        except InputError as refused:
            return Part([], None, reason_of(refused))
        return Part(kept, wanted, "; ".join([OK, *wanted.notes]))

    def heads(self) -> Part:
        """Whole KV groups, or query heads where these cannot go."""
        groups = self.expressed("heads")
        if groups.dims:
            return groups
        queries = self.expressed("query_heads")
        return queries if queries.dims or groups.said == NONE else groups

    def together(self, parts: list[Part]) -> list[list[Part]]:
        """One plan for all the parts where a config tells them together, else one for each."""
        parts = [part for part in parts if part.dims]
        if len(parts) < 2:
            return [[part] for part in parts]
        try:
            fitted_config(self.model, self.named, self.plan(parts))
        except Inexpressible:
            return [[part] for part in parts]
        return [parts]

    def plan(self, parts: list[Part], seed: int = 0) -> PrunePlan:
        """Units at random, others in each layer."""
        dims = [d for part in parts for d in part.dims]
        wanted = Request({k: n for part in parts for k, n in part.wanted.counts.items()})
        scores = random(Sources(self.named, tuple(dims), self.model.fetch, seed=seed))
        return choose(self.named, dims, scores, wanted, Options(pruning_ratio=1 / REMOVED))

    def equals_zeroing(self, parts: list[Part]) -> float:
        """How far stock mlx-lm's logits of the pruned checkpoint are from the zeroed model's."""
        plan = self.plan(parts)
        zeroed = self.model.module()
        parameters = zero_parameters(self.named, plan, self.parameters())
        zeroed.update(tree_unflatten(list(parameters.items())))
        return self.differ(self.reloaded(plan), logits(zeroed, self.tokens))

    def equals_never_choosing(self, part: Part) -> float:
        """The same, from the dense graph whose router never chooses the removed experts."""
        for seed in range(9):  # until the tokens had chosen a removed expert
            plan = self.plan([part], seed)
            replace = masks(self.named, plan)
            outputs, _ = run(self.named.graph, [self.tokens], self.parameters(), replace=replace)
            if relative(outputs[0], self.dense) > CHANGE:
                break
        return self.differ(self.reloaded(plan), outputs[0])

    def differ(self, pruned: mx.array, oracle: mx.array) -> float:
        assert relative(oracle, self.dense) > CHANGE, "the cut changes nothing"
        return relative(pruned, oracle)

    def reloaded(self, plan: PrunePlan) -> mx.array:
        """Write the pruned checkpoint, let stock mlx-lm open it, and compute."""
        from mlx_lm.utils import load_model

        folder = self.folder / "pruned"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        dtypes = {path: array.dtype for path, array in self.parameters().items()}
        fetch = pruned_fetch(self.model.fetch, pruner(self.named, plan))
        checkpoint.write_weights(folder, self.named, plan, fetch, dtypes)
        checkpoint.write_config(folder, fitted_config(self.model, self.named, plan))
        checkpoint.copy_rest(self.model.path, folder)
        out = logits(load_model(folder)[0], self.tokens)
        if self.prove:
            checkpoint.prove(folder, self.tokens, out, mx.float32)
        return out


NEVER = 1e9  # finite: minus infinity times zero would be no number


def masks(named: NamedAxes, plan: PrunePlan) -> dict[int, Callable[[mx.array], mx.array]]:
    """For the router's logits and for what is ranked: the removed experts come last."""
    graph, readers = named.graph, reads(named.graph)
    out = {}
    for node in graph.nodes:
        if node.op in ("Matmul", "AddMM") and node.outputs[0] not in out:
            out |= mask(named, plan, node.outputs[0], -NEVER)
        if node.op == "ArgPartition":
            chosen = [reader for reader in readers[node.outputs[0]] if reader.op == "Slice"]
            lowest = all(reader.attributes[0][-1] == 0 for reader in chosen)
            out |= mask(named, plan, node.inputs[0], NEVER if lowest else -NEVER)
    return out


def mask(named: NamedAxes, plan: PrunePlan, value: int, worst: float) -> dict:
    """`worst` for the removed units along a value's last axis; nothing where there are none."""
    gone = np.zeros(named.graph.values[value].shape[-1], dtype=bool)
    for name, units in named.units_along(named.inference.axes[value][-1]).items():
        if name in plan.cuts:
            gone |= (units >= 0) & ~plan.cuts[name].mask()[units]
    if not gone.any():
        return {}
    return {value: lambda array: mx.where(mx.array(gone), mx.array(worst, array.dtype), array)}


def reason_of(error: InputError) -> str:
    """What is in the way, without the names of dimensions, options and folders."""
    refused = re.search(r"can express smaller .*?: (.*); choose other", str(error))
    if refused:
        return refused[1]
    text = re.sub(r"\S*/site-packages/(\S+):\d+", r"\1", str(error))
    return re.sub(r"^\S*/dense: ", "", text).partition(": [")[0]


HEADER = """\
# Architectures

Every architecture of mlx-lm {version} that `tests/zoo.py` builds, tiny and with random weights,
pruned and opened again by stock mlx-lm. `make architectures` writes this page, and
`tests/test_zoo.py` holds it true.

- *free*: the kinds of dimension that the graph leaves free.
- *channels*: one in four removed from each layer, at random. *heads*: one KV group of each layer,
  or one query head of each group where no config tells fewer groups. *experts*: one of each layer.
- `ok`: the logits equal those of the model whose removed units are zero (experts: never chosen).
  `-`: there is none that can be removed exactly. Anything else is what stands in the way.
- *error*: the largest relative difference of logits in the checks that are ok; at most 1e-4.

| architecture | free | channels | heads | experts | error |
|---|---|---|---|---|---|
"""


def cells(row: Row) -> list[str]:
    """The row's part of the table that is the same on every machine."""
    said = [row.channels, row.heads, row.experts]
    return [row.name, ", ".join(row.free) or NONE, *(text.replace("|", "/") for text in said)]


def table(rows: list[Row]) -> str:
    from importlib.metadata import version

    lines = [[*cells(row), NONE if row.error is None else f"{row.error:.0e}"] for row in rows]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return HEADER.format(version=version("mlx-lm")) + body + "\n"


def read_table(page: str) -> dict[str, list[str]]:
    """By architecture, the cells of the page's table but for the error."""
    rows = [line[2:-2].split(" | ")[:-1] for line in page.splitlines() if line.startswith("| ")]
    return {row[0]: row for row in rows if row[0] != "architecture"}


def main() -> None:
    mx.disable_compile()  # it would call a C++ compiler for each model
    rows = []
    for name in zoo.CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(check(name, Path(folder)))
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(table(rows), encoding="utf8")
