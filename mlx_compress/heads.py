"""The last layer of a language model, taken apart from what feeds it.

Logits of a large vocabulary are by far the largest arrays of a training step. With the hidden
states [B, T, D] and the head [V, D] apart they are made a few tokens at a time
(`kernels/projected.py`), for student and teacher alike.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn

PROBE = (1, 2)  # the shape of the tokens that a head is tried on


@dataclass
class Head:
    """The layer `layer` of `module`, whose `method` makes logits of hidden states."""

    module: nn.Module
    layer: nn.Module
    method: str
    _plain: Callable = field(init=False)
    _off: bool = field(default=False, init=False)

    def __post_init__(self):
        kind = type(self.layer)
        self._plain = getattr(kind, self.method)

        def call(layer, x):
            return x if self._off else self._plain(layer, x)

        # A class of its own: other models have layers of this kind.
        self.layer.__class__ = type(kind.__name__, (kind,), {self.method: call})

    def hidden(self, tokens_BT: mx.array) -> mx.array:
        """What the head reads, [B, T, D]."""
        with self.taken_off():
            return first_array(self.module(tokens_BT))

    def logits(self, hidden: mx.array) -> mx.array:
        """[..., V] of hidden states [..., D]."""
        return self._plain(self.layer, hidden)

    @property
    def weight(self) -> mx.array:
        """[V, D]; of a quantised layer, packed."""
        return self.layer.weight

    @property
    def bias(self) -> mx.array | None:
        return self.layer.get("bias")

    @property
    def trained(self) -> bool:
        return bool(self.layer.trainable_parameters())

    def put_back(self) -> None:
        """The layer as it was."""
        self.layer.__class__ = type(self.layer).__mro__[1]

    @contextlib.contextmanager
    def taken_off(self) -> Iterator[None]:
        """The module gives hidden states for this while."""
        self._off = True
        try:
            yield
        finally:
            self._off = False


def head_of(module: nn.Module) -> Head | None:
    """The layer whose output is the model's logits; None where more is done to these.

    Found by trying: a layer is taken off, and put behind again.
    """
    tokens = mx.zeros(PROBE, mx.int32)
    logits = first_array(module(tokens))
    for _, layer in reversed(module.named_modules()):
        if not _could_be(layer, logits.shape[-1]):
            continue
        # A table that the head shares, or a layer of its own.
        head = Head(module, layer, "as_linear" if hasattr(layer, "as_linear") else "__call__")
        if _is_last(head, tokens, logits):
            return head
        head.put_back()
    return None


def _could_be(layer: nn.Module, vocabulary: int) -> bool:
    weight = layer.get("weight")
    return isinstance(weight, mx.array) and weight.ndim == 2 and len(weight) == vocabulary


def _is_last(head: Head, tokens: mx.array, logits: mx.array) -> bool:
    hidden = head.hidden(tokens)
    if hidden.ndim != 3 or hidden.shape[-1] == logits.shape[-1]:
        return False
    found = head.logits(hidden)
    return found.shape == logits.shape and mx.allclose(found, logits, rtol=1e-3, atol=1e-3).item()


def first_array(out) -> mx.array:
    """A model's logits, where it gives more behind them."""
    while not isinstance(out, mx.array):
        out = out[0]
    return out
