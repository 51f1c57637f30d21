"""Images on their way through a torch program: [N, C, ...] there, [N, ..., C] in MLX.

`run` applies a rule and keeps the channels last from one layer to the next where all that lies
between works entry by entry, or can name its axes anew. Only what needs torch's order of axes turns
them back.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx

from .aten import pad
from .aten_entries import ELEMENTWISE
from .aten_layers import IMAGES

REDUCTIONS = frozenset(("sum", "mean", "amax", "amin", "prod", "var"))


@dataclass(frozen=True)
class ChannelsLast:
    """An image [N, C, ...] that is held as `array` [N, ..., C]."""

    array: mx.array


def run(op: str, rule: Callable, args: list, kwargs: dict):
    """The result of an operator, whose arguments may be images with their channels last."""
    if op in IMAGES:
        return _on_image(rule, args, kwargs)
    images = [a for a in _flat(args) if isinstance(a, ChannelsLast)]
    if images:
        handled = _kept_last(op, rule, args, kwargs, images[0].array.ndim)
        if handled is not None:
            return handled
    return rule(*_each(plain, args), **_each(plain, kwargs))


def plain(value):
    """The value in torch's order of axes."""
    return mx.moveaxis(value.array, -1, 1) if isinstance(value, ChannelsLast) else value


def _on_image(rule: Callable, args: list, kwargs: dict):
    image, *rest = args
    result = rule(_channels_last(image), *_each(plain, rest), **_each(plain, kwargs))
    return [ChannelsLast(r) for r in result] if isinstance(result, list) else ChannelsLast(result)


def _kept_last(op: str, rule: Callable, args: list, kwargs: dict, rank: int):
    """The result of an operator that can do without turning its images; None if it cannot."""
    if op in ELEMENTWISE:
        return _entry_by_entry(rule, args, kwargs, rank)
    if op in REDUCTIONS:
        return _reduced(rule, args, kwargs)
    if op in MOVED:
        return MOVED[op](rule, args, kwargs, rank)
    return None


def _entry_by_entry(rule, args, kwargs, rank):
    arrays = [a for a in _flat(args) if isinstance(a, ChannelsLast | mx.array)]
    if not all(isinstance(a, ChannelsLast) or a.ndim in (0, rank) for a in arrays):
        return None
    return ChannelsLast(rule(*_each(_channels_last, args), **kwargs))


def _reduced(rule, args, kwargs):
    """A reduction over some axes. What is left must still be an image, or hold no place in it."""
    image, dims, *rest = [*args, None] if len(args) == 1 else args
    rank = image.array.ndim
    dims = [d % rank for d in ([dims] if isinstance(dims, int) else dims or range(rank))]
    keep = rest[0] if rest else kwargs.get("keepdim", False)
    if not keep and not set(range(2, rank)) <= set(dims):
        return None
    result = rule(image.array, [_moved(d, rank) for d in dims], *rest, **kwargs)
    return ChannelsLast(result) if keep else result


def _concatenated(rule, args, kwargs, rank):
    arrays, axis = [*args, 0][:2]
    if not all(isinstance(a, ChannelsLast) for a in arrays):
        return None
    return ChannelsLast(rule([a.array for a in arrays], _moved(axis, rank)))


def _permuted(rule, args, kwargs, rank):
    order = [_moved(k, rank) for k in args[1]]
    return args[0].array if order == list(range(rank)) else mx.transpose(args[0].array, order)


def _padded(rule, args, kwargs, rank):
    """Pairs run from the last axis on: those of the channels come first when they are last."""
    image, widths, *value = args
    widths = [*widths, *[0] * (2 * rank - len(widths))]
    spatial, channels, batch = widths[: 2 * rank - 4], widths[2 * rank - 4 : -2], widths[-2:]
    return ChannelsLast(pad(image.array, [*channels, *spatial, *batch], *value))


def _sliced(rule, args, kwargs, rank):
    image, axis, *rest = [*args, 0] if len(args) == 1 else args
    return ChannelsLast(rule(image.array, _moved(axis, rank), *rest, **kwargs))


def _reshaped(rule, args, kwargs, rank):
    """Where an image is one pixel, its channels lie in order either way."""
    one_pixel = all(n == 1 for n in args[0].array.shape[1:-1])
    return rule(args[0].array, *args[1:]) if one_pixel else None


MOVED = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten"), _reshaped),
    "cat": _concatenated, "constant_pad_nd": _padded, "permute": _permuted, "slice": _sliced,
}  # fmt: skip


def _moved(axis: int, rank: int) -> int:
    """Where torch's axis of an image lies when the channels are last."""
    axis %= rank
    return axis if axis == 0 else rank - 1 if axis == 1 else axis - 1


def _channels_last(value):
    if isinstance(value, ChannelsLast):
        return value.array
    is_image = isinstance(value, mx.array) and value.ndim > 1
    return mx.moveaxis(value, 1, -1) if is_image else value


def _each(function, value):
    if isinstance(value, dict):
        return {k: _each(function, v) for k, v in value.items()}
    return [_each(function, v) for v in value] if isinstance(value, list) else function(value)


def _flat(value) -> Iterator:
    if isinstance(value, list):
        for entry in value:
            yield from _flat(entry)
    else:
        yield value
