"""The config of each carrier for a pruned model, or why it cannot hold it."""

from dataclasses import dataclass

Place = tuple[int | None, str]  # a layer, or None outside of them, and a role
NAS_STEP = 256  # nemotron-nas rounds MLP widths up to a multiple of this


class Misfit(Exception):
    """Why a carrier does not fit, in words."""


@dataclass
class Source:
    """The pruned model as a carrier sees it: its fields, and shapes by layer and role."""

    args: object
    places: dict[Place, str]
    shapes: dict[Place, tuple[int, ...]]
    layers: int

    def has(self, layer: int | None, role: str) -> bool:
        return (layer, role) in self.places

    def size(self, layer: int | None, role: str, axis: int = 0) -> int:
        return self.shapes[layer, role][axis]

    def anywhere(self, role: str) -> bool:
        return any(held == role for _, held in self.places)

    @property
    def head_dim(self) -> int:
        declared = getattr(self.args, "head_dim", None)
        return declared or self.args.hidden_size // self.args.num_attention_heads


def openelm(source: Source) -> dict:
    layers = range(source.layers)
    for layer in layers:
        for role, what in (("q.weight", "attention"), ("gate.weight", "MLP")):
            if not source.has(layer, role):
                raise Misfit(f"it cannot leave out the {what} of layer {layer}")
    if _scaling(getattr(source.args, "rope_scaling", None)):
        raise Misfit("it has no rope scaling")
    width = source.size(None, "embedding", 1)
    return {
        "head_dim": source.head_dim,
        "num_transformer_layers": source.layers,
        "model_dim": width,
        "vocab_size": source.size(None, "embedding"),
        "ffn_dim_divisor": 1,
        "num_query_heads": [source.size(k, "q.weight") // source.head_dim for k in layers],
        "num_kv_heads": [source.size(k, "k.weight") // source.head_dim for k in layers],
        "ffn_multipliers": [source.size(k, "gate.weight") / width for k in layers],
        "ffn_with_glu": True,
        "normalize_qk_projections": source.anywhere("q_norm"),
        "share_input_output_layers": not source.has(None, "head"),
        "rms_norm_eps": source.args.rms_norm_eps,
        "rope_freq_constant": source.args.rope_theta,
    }


def nemotron_nas(source: Source) -> dict:
    layers = range(source.layers)
    heads = {
        source.size(k, "q.weight") // source.head_dim for k in layers if source.has(k, "q.weight")
    }
    if len(heads) != 1:
        listed = ", ".join(map(str, sorted(heads))) or "none"
        raise Misfit(f"it has one number of query heads for all layers, the model has {listed}")
    width, (count,) = source.size(None, "embedding", 1), heads
    if count * source.head_dim != width:
        raise Misfit(
            f"its heads are of {width} / {count}, the hidden width over their number, the model's "
            f"are of {source.head_dim}"
        )
    return {
        "hidden_size": width,
        "num_hidden_layers": source.layers,
        "num_attention_heads": count,
        "vocab_size": source.size(None, "embedding"),
        "rms_norm_eps": source.args.rms_norm_eps,
        "attention_bias": any(source.anywhere(f"{name}.bias") for name in "qkvo"),
        "mlp_bias": any(source.anywhere(f"{name}.bias") for name in ("gate", "up", "down")),
        "rope_theta": source.args.rope_theta,
        "rope_scaling": _scaling(getattr(source.args, "rope_scaling", None)),
        "max_position_embeddings": getattr(source.args, "max_position_embeddings", None) or 131072,
        "tie_word_embeddings": not source.has(None, "head"),
        "block_configs": [_nas_block(source, layer, width) for layer in layers],
    }


def _scaling(scaling: dict | None) -> dict | None:
    kind = scaling and (scaling.get("type") or scaling.get("rope_type"))
    return scaling | {"rope_type": kind} if kind not in (None, "default") else None


def _nas_block(source: Source, layer: int, width: int) -> dict:
    attention: dict = {"no_op": True}
    mlp: dict = {"no_op": True}
    if source.has(layer, "q.weight"):
        groups = source.size(layer, "k.weight")
        attention = {"n_heads_in_group": source.size(layer, "q.weight") // groups}
    if source.has(layer, "gate.weight"):
        inner = source.size(layer, "gate.weight")
        if inner % NAS_STEP:
            raise Misfit(
                f"its MLP widths are multiples of {NAS_STEP}, layer {layer} has {inner} (prune "
                f"with --round-to {NAS_STEP})"
            )
        # It takes int(2 * ffn_mult * width / 3), of ffn_mult with six decimals, and rounds up.
        mlp = {"ffn_mult": round(1.5 * (inner - 0.5) / width, 6)}
    return {"attention": attention, "ffn": mlp}
