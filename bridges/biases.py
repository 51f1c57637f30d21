"""Give a model the biases that its architecture can hold, all zero, so that a refit can use them.

Llama and its kin have config fields for biases that most checkpoints leave off. With such a bias
the refit can also put right what the removed units gave on average. Which fields these are is
found by trying: each one that is off is put on, and kept where the model that stock mlx-lm then
builds has just some biases more.
"""

import dataclasses
from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from ..errors import InputError
from ..parity import TOLERANCE
from ..probes import Shapes
from ..stream import stream_forward
from .mlx_lm import LanguageModel

TOKENS = 8


def with_biases(model: LanguageModel) -> LanguageModel:
    """The same model with every bias that its config can put on, zero where it had none.

    Raises `InputError` where it can hold no more than it has.
    """
    config, base = dict(model.config), model.shapes_of(model.config)
    added: set[str] = set()
    for name in _off(model):
        shapes = model.shapes_of(config | {name: True})
        more = _biases_more(model.shapes_of(config), shapes)
        if more and _same(model, _zero_filled(model, config | {name: True}, added | more)):
            config, added = config | {name: True}, added | more
    if not added:
        kind = model.config.get("model_type")
        held = "it has them all" if any(_is_bias(path) for path in base) else "it can hold none"
        raise InputError(f"--biases: no config of {kind!r} adds biases ({held}); leave it out.")
    fields = ", ".join(name for name in config if config[name] is not model.config.get(name))
    found = _zero_filled(model, config, added)
    found.notes.append(f"{fields}: {len(added)} biases put on; a refit in sequence fills them")
    return found


def _off(model: LanguageModel) -> Iterator[str]:
    """The config's fields that could be put on: declared, and false or left out."""
    for f in model.declared_fields():
        value = model.config.get(f.name, f.default)
        if value is False or value is None and f.name not in model.config:
            yield f.name


def _biases_more(before: Shapes, after: Shapes | None) -> set[str]:
    """The biases of weights known before that come new; none if anything else differs."""
    more = set(after or ()) - set(before)
    if any((after or {}).get(path) != shape for path, shape in before.items()):
        return set()
    own = (before.get(path.removesuffix("bias") + "weight") for path in more if _is_bias(path))
    fits = all(_is_bias(path) for path in more) and all(
        weight and after[path] == weight[:1] for path, weight in zip(more, own, strict=True)
    )
    return more if fits else set()


def _is_bias(path: str) -> bool:
    return path.endswith(".bias")


def _zero_filled(model: LanguageModel, config: dict, added: set[str]) -> LanguageModel:
    return dataclasses.replace(
        model, config=config, zeros=frozenset(added), _paths=model._paths | added,
        _absent=model._absent - added, _weights={}, notes=list(model.notes),
    )  # fmt: skip


def _same(model: LanguageModel, other: LanguageModel) -> bool:
    """Whether zero biases change nothing, on random tokens."""
    found: list[mx.array] = []
    for each in (model, other):
        graph = each.trace(mx.zeros((1, TOKENS), mx.int32), dtype=mx.float32)
        vocabulary = graph.values[graph.outputs[0]].shape[-1]
        tokens = np.random.default_rng(0).integers(0, vocabulary, (1, TOKENS)).astype(np.int32)
        stream_forward(
            graph, [[mx.array(tokens)]], each.fetch,
            on_outputs=lambda b, outputs: found.append(outputs[0].astype(mx.float32)),
        )  # fmt: skip
    error = mx.abs(found[0] - found[1]).max() / mx.maximum(mx.abs(found[0]).max(), 1e-30)
    return error.item() <= TOLERANCE[mx.float32]
