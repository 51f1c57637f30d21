"""A language model as a program with its cache as plain inputs and outputs.

Works for every mlx-lm architecture whose cache is keys and values: the model is run on a cache that
concatenates, so past keys and values come in as inputs, and go out longer. Batch, length and past
stay open (`sizes.py`). Names follow the field's custom: `input_ids`, `past_key_values.0.key`,
`present.0.key`, `logits`.
"""

from collections.abc import Iterator
from functools import partial

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..errors import InputError
from ..graph import Graph, trace
from ..program import Program
from ..sizes import solve

# Few tokens and many: some code takes another way from 64 routed tokens on.
GRIDS = (
    {"batch": (2, 3), "length": (4, 7), "past": (5, 11)},
    {"batch": (2, 3), "length": (2, 3), "past": (5, 11)},
    {"batch": (8, 9), "length": (10, 13), "past": (15, 21)},
)
EXAMPLE = {"batch": 1, "length": 8, "past": 0}


class ConcatenatingCache:
    """Keys [B, heads, past, d] and values, which may differ in width; grows by concatenation.

    Where a model keeps a window, its mask shows the window; nothing is dropped.
    """

    def __init__(self):
        self.keys = self.values = None

    @property
    def offset(self) -> int:
        return self.keys.shape[2]

    @property
    def state(self) -> tuple[mx.array, mx.array]:
        return self.keys, self.values

    @state.setter
    def state(self, pair) -> None:
        self.keys, self.values = pair

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.keys = mx.concatenate([self.keys, keys], axis=2)
        self.values = mx.concatenate([self.values, values], axis=2)
        return self.state

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        return self.state

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None):
        """Boolean [length, past + length], True where a query sees a key."""
        from mlx_lm.models.base import create_causal_mask

        return create_causal_mask(length, offset=self.offset, window_size=window_size)

    def size(self) -> int:
        return self.offset

    def empty(self) -> bool:
        return self.offset == 0


def module_program(make, *, dtype: mx.Dtype | None = mx.float32, metadata=None) -> Program:
    """The program of the module that `make()` builds: tokens and past in, logits and present out.

    Weights are not yet read. Quantised ones stay quantised; `dtype` is that of the others, None for
    their own. Raises `InputError` for an architecture whose cache is not keys and values, or whose
    code does not leave the sizes open.
    """
    module = make()
    try:
        kept = _cache_shapes(module)
        graph = solve(partial(_trace_at, module, kept, dtype), GRIDS)
    except AttributeError as error:
        raise InputError(
            f"its code asks more of a cache than keys and values ({error}); export it without a "
            "cache (--no-cache)."
        ) from error
    filled = [k for k, shapes in enumerate(kept) if shapes]
    names = [f"{k}.{part}" for k in filled for part in ("key", "value")]
    logits = graph.values[graph.outputs[0]].shape
    return Program(
        graph,
        fetcher(make, dtype),
        ("input_ids", *(f"past_key_values.{name}" for name in names)),
        ("logits", *(f"present.{name}" for name in names)),
        EXAMPLE,
        {"input_ids": logits[-1]},
        metadata or {},
    )


def _trace_at(module: nn.Module, kept, dtype, *, batch: int, length: int, past: int) -> Graph:
    def empty(heads: int, width: int) -> mx.array:
        return mx.zeros((batch, heads, past, width), numbers)

    def fn(parameters, tokens, *state):
        module.update(tree_unflatten(list(parameters.items())))
        arrays = iter(state)
        cache, leaves = _build(_layout(module), ConcatenatingCache)
        for leaf, shapes in zip(leaves, kept, strict=True):
            leaf.state = [next(arrays) if shapes else empty(1, 1) for _ in ("keys", "values")]
        out = module(tokens, cache=cache)
        logits = out[0] if isinstance(out, tuple | list) else out
        filled = [leaf for leaf, shapes in zip(leaves, kept, strict=True) if shapes]
        return [logits, *(array for leaf in filled for array in leaf.state)]

    held = dict(tree_flatten(module.parameters()))
    numbers = dtype or next(a.dtype for a in held.values() if mx.issubdtype(a.dtype, mx.floating))
    state = [empty(*shape) for shapes in kept for shape in shapes]
    tokens = mx.zeros((batch, length), mx.int32)
    try:
        return trace(fn, tokens, *state, parameters=held, dtype=dtype)
    finally:
        module.update(tree_unflatten(list(held.items())))


def _cache_shapes(module: nn.Module) -> list[tuple[tuple[int, int], ...]]:
    """Per cache, (heads, width) of its keys and of its values; nothing for one that stays empty.

    From a lazy run, of which nothing is computed.
    """
    from mlx_lm.models.cache import KVCache

    cache, leaves = _build(_layout(module), KVCache)
    module(mx.zeros((1, 2), mx.int32), cache=cache)
    return [
        tuple((a.shape[1], a.shape[3]) for a in (leaf.keys, leaf.values) if a is not None)
        for leaf in leaves
    ]


def _layout(module: nn.Module) -> list:
    from mlx_lm.models.cache import make_prompt_cache

    return make_prompt_cache(module)


def _build(layout, make) -> tuple[list, list]:
    """The same nest of caches with `make()` for each that holds keys and values; and these."""
    from mlx_lm.models.cache import CacheList, ChunkedKVCache, KVCache, RotatingKVCache

    leaves: list = []

    def one(entry):
        if isinstance(entry, CacheList):
            return CacheList(*map(one, entry.caches))
        if not isinstance(entry, KVCache | RotatingKVCache | ChunkedKVCache):
            raise InputError(
                f"its cache holds {type(entry).__name__}, not keys and values; "
                "export it without a cache (--no-cache)."
            )
        leaves.append(make())
        return leaves[-1]

    return [one(entry) for entry in layout], leaves


def fetcher(make, dtype: mx.Dtype | None):
    """Hands out weights of the module that `make()` builds, each once before it builds it anew."""
    held: dict[str, mx.array] = {}

    def fetch(paths):
        paths = list(paths)
        if not held.keys() >= set(paths):
            held.update(tree_flatten(make().parameters()))
        return {path: cast(held.pop(path), dtype) for path in paths}

    return fetch


def cast(array: mx.array, dtype: mx.Dtype | None) -> mx.array:
    """A floating-point array in `dtype`; others as they are, and all of them for None."""
    floating = mx.issubdtype(array.dtype, mx.floating)
    return array.astype(dtype) if dtype is not None and floating else array


def caches(program: Program) -> Iterator[tuple[str, str]]:
    """Pairs of an input and the output that takes its place in the next step."""
    for name in program.inputs:
        if name.startswith("past_key_values."):
            yield name, name.replace("past_key_values.", "present.", 1)
