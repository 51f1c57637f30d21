"""Carriers: stock mlx-lm architectures that say per layer what a model's own config cannot.

    openelm        per layer: heads, KV heads, MLP width; no biases, no rope scaling
    nemotron-nas   per layer: no attention, no MLP, KV heads, MLP width in steps of 256

A carrier is a named target, so this file knows names: those of the carriers' parameters and of
Llama's, which many architectures share. Whether a carrier fits is not decided by names: it must
compute what the edited graph computes, with the real weights, or it is refused.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..axes import NamedAxes
from ..checkpoint import SHARD_BYTES
from ..edit import edit_graph
from ..errors import InputError
from ..layers import renamed_paths, settled
from ..parity import TOLERANCE
from ..plan import PrunePlan
from ..prune import check_plan, pruned_fetch, pruned_shapes, pruner
from ..residual import entry_of
from ..stream import Fetch, Progress, silent, stream_forward
from .carrier_configs import Misfit, Place, Source, nemotron_nas, openelm
from .mlx_lm import LanguageModel, trace_logits

# The end of a parameter's path -> its role; in the layers, then outside of them.
LAYER_ROLES = {
    "input_layernorm.weight": "attention_norm",
    "post_attention_layernorm.weight": "mlp_norm",
    **{
        f"self_attn.{name}_proj.{kind}": f"{name}.{kind}"
        for name in ("q", "k", "v", "o")
        for kind in ("weight", "bias")
    },
    **{
        f"mlp.{name}_proj.{kind}": f"{name}.{kind}"
        for name in ("gate", "up", "down")
        for kind in ("weight", "bias")
    },
    "self_attn.q_norm.weight": "q_norm",
    "self_attn.k_norm.weight": "k_norm",
}
OTHER_ROLES = {
    "embed_tokens.weight": "embedding",
    "norm.weight": "norm",
    "lm_head.weight": "head",
}
# Where each carrier keeps them; several roles are joined along the first axis, in this order.
OPENELM = {
    "transformer.layers.{}.attn_norm.weight": ("attention_norm",),
    "transformer.layers.{}.attn.qkv_proj.weight": ("q.weight", "k.weight", "v.weight"),
    "transformer.layers.{}.attn.q_norm.weight": ("q_norm",),
    "transformer.layers.{}.attn.k_norm.weight": ("k_norm",),
    "transformer.layers.{}.attn.out_proj.weight": ("o.weight",),
    "transformer.layers.{}.ffn_norm.weight": ("mlp_norm",),
    "transformer.layers.{}.ffn.proj_1.weight": ("gate.weight", "up.weight"),
    "transformer.layers.{}.ffn.proj_2.weight": ("down.weight",),
    "transformer.token_embeddings.weight": ("embedding",),
    "transformer.norm.weight": ("norm",),
    "lm_head.weight": ("head",),
}
NEMOTRON_NAS = {
    **{
        f"model.layers.{{}}.{end}": (role,)
        for end, role in LAYER_ROLES.items()
        if role not in ("q_norm", "k_norm")
    },
    **{f"model.{end}": (role,) for end, role in OTHER_ROLES.items() if role != "head"},
    "lm_head.weight": ("head",),
}
# Fields of a config that both carriers take over, or that say nothing about the computation.
UNDERSTOOD = {
    "attention_bias", "head_dim", "hidden_act", "hidden_size", "intermediate_size", "layer_types",
    "max_position_embeddings", "mlp_bias", "model_type", "num_attention_heads",
    "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "rope_scaling", "rope_theta",
    "rope_traditional", "sliding_window", "tie_word_embeddings", "vocab_size",
}  # fmt: skip
COPIED = ("bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype")


@dataclass(frozen=True)
class Carrier:
    """A stock architecture for a pruned model; `why_not` is empty where it fits.

    `sources` gives, for each parameter of the carrier, those of the source that are joined along
    the first axis to make it; for a bias that the source does not have, none (zeros).
    """

    name: str
    why_not: str = ""
    config: dict = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    sources: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        return not self.why_not

    def convert(self, path: str, arrays: Mapping[str, mx.array]) -> mx.array:
        """One parameter of the carrier from pruned parameters of the source."""
        parts = [arrays[source] for source in self.sources[path]]
        if not parts:
            return mx.zeros(self.shapes[path], next(iter(arrays.values())).dtype)
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=0)


def carriers(model: LanguageModel, named: NamedAxes, plan: PrunePlan) -> list[Carrier]:
    """Every carrier, with the config that holds the pruned model, or why it cannot.

    Raises `InputError` for a plan of another model.
    """
    check_plan(named, plan)
    plan = settled(named, plan)
    return [_carrier(name, model, named, plan) for name in CARRIERS]


def carrier_named(name: str, model: LanguageModel, named: NamedAxes, plan: PrunePlan) -> Carrier:
    """The carrier that was asked for. Raises `InputError` if there is none or it does not fit."""
    if name not in CARRIERS:
        raise InputError(f"--carrier {name}: unknown; choose from {', '.join(CARRIERS)}.")
    check_plan(named, plan)
    found = _carrier(name, model, named, settled(named, plan))
    if not found.fits:
        raise InputError(f"--carrier {name}: does not fit, {found.why_not}.")
    return found


def advice(found: Iterable[Carrier]) -> str:
    """What to tell who asked for a plan that the model's own config cannot express."""
    fitting = [carrier.name for carrier in found if carrier.fits]
    if not fitting:
        return "; ".join(f"carrier {carrier.name} cannot: {carrier.why_not}" for carrier in found)
    return f"carrier {fitting[0]} can: --carrier {fitting[0]}"


def write_carrier(
    folder: Path, fetch: Fetch, named: NamedAxes, carrier: Carrier,
    *, progress: Progress = silent,
) -> int:  # fmt: skip
    """Write the pruned weights that `fetch` gives under the carrier's names; returns their bytes.

    They are sharded as mlx-lm does. The carrier's config goes beside them with
    `checkpoint.write_config`.
    """
    fetch = _converted(fetch, named, carrier)
    shards = _shards(carrier)
    index, total = {}, 0
    for number, paths in enumerate(shards, start=1):
        part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = f"model{part}.safetensors"
        arrays = fetch(paths)
        mx.save_safetensors(str(folder / file), arrays, metadata={"format": "mlx"})
        total += sum(array.nbytes for array in arrays.values())
        index |= dict.fromkeys(paths, file)
        del arrays
        progress("save", number, len(shards))
    document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
    text = json.dumps(document, indent=4) + "\n"
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf8")
    return total


def _shards(carrier: Carrier) -> list[list[str]]:
    """Paths by file: as many as fit into a shard in float32."""
    shards: list[list[str]] = [[]]
    held = 0
    for path, shape in carrier.shapes.items():
        size = 4 * math.prod(shape)
        if shards[-1] and held + size > SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1].append(path)
        held += size
    return shards


def _carrier(name: str, model: LanguageModel, named: NamedAxes, plan: PrunePlan) -> Carrier:
    configure, table = CARRIERS[name]
    try:
        source = _source(model, named, plan)
        config = {key: model.config[key] for key in COPIED if key in model.config}
        config |= {"model_type": name} | configure(source)
        shapes = {p: w.shape for p, w in tree_flatten(model.build(config).parameters())}
        carrier = Carrier(name, "", config, shapes, _sources(source, shapes, table))
        _check_shapes(source, carrier)
        _check_logits(model, named, plan, carrier)
    except Misfit as misfit:
        return Carrier(name, str(misfit))
    return carrier


def _source(model: LanguageModel, named: NamedAxes, plan: PrunePlan) -> Source:
    args = getattr(model.build(), "args", None)
    _check_fields(args)
    if any(cut.kind == "head_dim" for cut in plan):
        raise Misfit("the plan cuts into heads")
    new, shapes = renamed_paths(named, plan), pruned_shapes(named, plan)
    places = {_place(new[path]): path for path in new}
    source = Source(args, places, {place: shapes[path] for place, path in places.items()}, 0)
    source.layers = 1 + max((layer for layer, _ in places if layer is not None), default=-1)
    return source


def _check_fields(args: object) -> None:
    """Only fields that the carriers have a word for may say anything."""
    for name, value in vars(args).items() if args is not None else ():
        kinds = set(getattr(args, "layer_types", None) or [])
        if name == "layer_types" and kinds - {"full_attention"}:
            others = ", ".join(sorted(kinds - {"full_attention"}))
            raise Misfit(f"it has no layers of type {others}")
        if name == "sliding_window" and kinds or value in (None, False, 0, {}, []):
            continue
        if name not in UNDERSTOOD or name in ("rope_traditional", "sliding_window"):
            raise Misfit(f"it has no word for {name}={value}")
    if args is None or not hasattr(args, "rope_theta"):
        raise Misfit("the model says no rope_theta, as Llama and its kin do")


def _place(path: str) -> Place:
    entry = entry_of(path)
    if entry is None:
        role = OTHER_ROLES.get(".".join(path.split(".")[-2:]))
    else:
        role = LAYER_ROLES.get(path[len(f"{entry[0]}.{entry[1]}.") :])
    if role is None:
        raise Misfit(f"it has no place for {path}")
    return entry and entry[1], role


def _sources(source: Source, shapes, table) -> dict[str, tuple[str, ...]]:
    used, out = set(), {}
    for path in shapes:
        name, layer = entry_of(path) or ("", None)
        pattern = path if layer is None else path.replace(f"{name}.{layer}.", f"{name}.{{}}.", 1)
        places = [(layer, role) for role in table[pattern]]
        held = [place for place in places if place in source.places]
        if len(held) < len(places) and (held or not path.endswith(".bias")):
            raise Misfit(f"its {path} has no counterpart in the model")
        used.update(held)
        out[path] = tuple(source.places[place] for place in held)
    spare = next((path for place, path in source.places.items() if place not in used), None)
    if spare:
        raise Misfit(f"it has no place for {spare}")
    return out


def _check_shapes(source: Source, carrier: Carrier) -> None:
    by_path = {path: source.shapes[place] for place, path in source.places.items()}
    for path, sources in carrier.sources.items():
        if sources:
            parts = [by_path[each] for each in sources]
            shape = (sum(part[0] for part in parts), *parts[0][1:])
            if shape != carrier.shapes[path]:
                raise Misfit(f"its {path} is {carrier.shapes[path]}, where {shape} is needed")


def _check_logits(model: LanguageModel, named: NamedAxes, plan, carrier: Carrier) -> None:
    """Run the edited graph and the carrier on random tokens, streamed; they must agree."""
    graph = edit_graph(named, plan)
    dtype = graph.values[graph.outputs[0]].dtype
    vocabulary = graph.values[graph.outputs[0]].shape[-1]
    shape = graph.values[graph.inputs[0]].shape
    tokens = mx.array(np.random.default_rng(0).integers(0, vocabulary, shape).astype(np.int32))
    other = trace_logits(model.build(carrier.config), tokens, dtype=dtype)
    pruned = pruned_fetch(model.fetch, pruner(named, plan))
    pairs = ((graph, pruned), (other, _converted(pruned, named, carrier)))
    want, got = (_logits(each, fetch, tokens) for each, fetch in pairs)
    difference = (mx.abs(got - want).max() / mx.maximum(mx.abs(want).max(), 1e-30)).item()
    if not difference <= TOLERANCE.get(dtype, TOLERANCE[mx.float32]):
        raise Misfit(f"it computes something else: logits differ by {difference:.1e}")


def _logits(graph, fetch, tokens: mx.array) -> mx.array:
    out: list[mx.array] = []
    stream_forward(graph, [[tokens]], fetch, on_outputs=lambda b, values: out.append(values[0]))
    return out[0].astype(mx.float32)


def _converted(pruned: Fetch, named: NamedAxes, carrier: Carrier) -> Fetch:
    """A fetch of the carrier's parameters, from one of the pruned model's."""
    some = next(iter(named.graph.parameters))

    def fetch(paths):
        paths = list(paths)
        wanted = {source for path in paths for source in carrier.sources[path]}
        arrays = pruned(sorted(wanted) or [some])
        return {path: carrier.convert(path, arrays) for path in paths}

    return fetch


CARRIERS = {"nemotron-nas": (nemotron_nas, NEMOTRON_NAS), "openelm": (openelm, OPENELM)}
