"""Strided views: sliding windows over an image, which reductions turn into pooling."""

from math import prod

import numpy as np

from .builder import Handle, constant, emit
from .extents import number, times
from .views import lazily, reshape, transpose


def as_strided(x, a, out):
    shape, strides, offset = a
    kernel = _kernel(x[0].shape, tuple(shape), tuple(strides)) if offset == 0 else None

    def write() -> Handle:
        return _picked(x[0], shape, strides, offset)

    kind = "windows" if kernel else "strided"
    return lazily(kind, (x[0],), kernel or (), write, tuple(shape))


def _contiguous(shape: tuple) -> list:
    return [times(*shape[k + 1 :]) for k in range(len(shape))]


def _kernel(image: tuple, shape: tuple, strides: tuple):
    """(sizes, steps) of windows [batch, places..., sizes..., channels] of an image, or None."""
    axes = len(image) - 2
    own = _contiguous(image)
    if axes < 1 or len(shape) != 2 * axes + 2 or shape[0] != image[0] or shape[-1] != image[-1]:
        return None
    inner = range(1, axes + 1)
    if strides[0] != own[0] or [*strides[axes + 1 :]] != own[1:]:
        return None
    if not all(isinstance(n, int) for n in (*own[1:], *image[1:], *shape[1:], *strides[1:])):
        return None
    steps = tuple(strides[k] // own[k] for k in inner)
    sizes = shape[axes + 1 : -1]
    fits = all(
        strides[k] == step * own[k] and shape[k] == (image[k] - size) // step + 1
        for k, step, size in zip(inner, steps, sizes, strict=True)
    )
    return (sizes, steps) if fits else None


def pooled(x: Handle, code: int, axes, shape: tuple) -> Handle | None:
    """A sum or maximum over whole windows, as pooling; None for anything else."""
    view = x.open_view("windows")
    found = (view.parents[0], *view.detail) if view else _tiles(x)
    if found is None or code not in (2, 5):
        return None
    image, sizes, steps = found
    count = len(sizes)
    if sorted(axes) != list(range(count + 1, 2 * count + 1)):
        return None
    image = transpose(image, (0, count + 1, *range(1, count + 1)))
    op = "MaxPool" if code == 5 else "AveragePool"
    places = x.shape[1 : count + 1]
    y = emit(op, image, kernel_shape=sizes, strides=steps, shape=(*image.shape[:2], *places))
    if code == 2:
        y = emit("Mul", y, constant(np.array(prod(sizes)), y.dtype), shape=y.shape)
    return reshape(transpose(y, (0, *range(2, count + 2), 1)), shape)


def _tiles(x: Handle):
    """The image, sizes and steps, where windows that do not overlap are made by reshaping."""
    turned = x.open_view("transpose")
    split = turned and turned.parents[0].open_view("reshape")
    if not split:
        return None
    image, shape = split.parents[0], split.detail
    count = len(image.shape) - 2
    sizes, places = shape[2::2][:count], shape[1::2][:count]
    order = (0, *range(1, 2 * count, 2), *range(2, 2 * count + 1, 2), 2 * count + 1)
    same = shape[0] == image.shape[0] and shape[-1] == image.shape[-1]
    tiled = len(shape) == 2 * count + 2 and image.shape[1:-1] == tuple(map(times, places, sizes))
    fits = count > 0 and same and tiled and turned.detail == order
    return (image, sizes, sizes) if fits else None


def _picked(x: Handle, shape, strides, offset) -> Handle:
    """Each entry by its place in the flat array."""
    place = number(offset)
    for k, (n, stride) in enumerate(zip(shape, strides, strict=True)):
        steps = emit("Range", number(0), number(n), number(1), shape=(n,))
        steps = emit("Mul", steps, number(stride), shape=(n,))
        place = emit("Add", place, reshape(steps, (n, *[1] * (len(shape) - k - 1))))
    flat = reshape(x, (times(*x.shape),))
    return emit("Gather", flat, place, axis=0, shape=tuple(shape))
