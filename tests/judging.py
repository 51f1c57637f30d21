"""A network and an encoder small enough for slow loops, and their data, for tests of samples.

    convolutions(), encoder()   programs with an open batch (and length)
    Words()                     a tokenizer: each word is its length, 1 begins a text
    read(program, data)         samples with defaults; run(program, samples, b) a batch's outputs
    slope(function, at)         its gradient by finite differences
"""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_compress.program import program_of
from mlx_compress.samples import read_samples

CLASSES, WORDS = 4, 12


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.head = nn.Linear(6, CLASSES)

    def __call__(self, image):
        return self.head(nn.relu(self.conv(image)).mean((1, 2)))


class Encoder(nn.Module):
    """States [R, T, 5], or their means [R, 5]; what is masked reaches no other token."""

    def __init__(self, *, pools: bool):
        super().__init__()
        self.pools = pools
        self.table, self.mix = nn.Embedding(WORDS, 5), nn.Linear(5, 5)

    def __call__(self, input_ids, attention_mask):
        weights = attention_mask[..., None].astype(mx.float32)
        x = self.table(input_ids)
        mean = (x * weights).sum(1, keepdims=True) / weights.sum(1, keepdims=True)
        x = mx.tanh(self.mix(x + mean))
        return (x * weights).sum(1) / weights.sum(1) if self.pools else x


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.mlp = nn.Linear(width, width)

    def __call__(self, x, hidden):
        queries, keys = (y.reshape(*x.shape[:2], 2, -1).swapaxes(1, 2) for y in (self.query(x), x))
        maps = mx.softmax(queries @ keys.swapaxes(2, 3) + hidden, axis=-1)
        mixed = maps @ keys
        x = x + self.out(mixed.swapaxes(1, 2).reshape(x.shape))
        return x + mx.tanh(self.mlp(x))


class Deep(nn.Module):
    """States [R, T, 5] of an encoder with residual blocks of attention with two heads."""

    def __init__(self, width: int, blocks: int):
        super().__init__()
        self.table, self.last = nn.Embedding(WORDS, width), nn.Linear(width, 5)
        self.layers = [Block(width) for _ in range(blocks)]

    def __call__(self, input_ids, attention_mask):
        x, hidden = self.table(input_ids), -1e4 * (1 - attention_mask[:, None, None])
        for layer in self.layers:
            x = layer(x, hidden)
        return self.last(x)


class Patches(nn.Module):
    """Class scores of an image that is read as 9 patches of 2 x 2 pixels."""

    def __init__(self, width: int, blocks: int):
        super().__init__()
        self.patch, self.head = nn.Conv2d(3, width, 2, 2), nn.Linear(width, CLASSES)
        self.layers = [Block(width) for _ in range(blocks)]

    def __call__(self, image):
        x = self.patch(image).flatten(1, 2)
        for layer in self.layers:
            x = layer(x, mx.zeros((1, 1, 1, 9)))
        return self.head(x.mean(1))


class Residuals(nn.Module):
    """Class scores of an image by residual convolutions, the last of them at half the size."""

    def __init__(self, blocks: int):
        super().__init__()
        self.wide = [nn.Conv2d(3, 3, 3, padding=1) for _ in range(blocks)]
        self.small = [nn.Conv2d(3, 3, 3, padding=1)]
        self.head = nn.Linear(3, CLASSES)

    def __call__(self, x):
        for layer in self.wide:
            x = x + mx.tanh(layer(x))
        x = x[:, ::2, ::2]
        for layer in self.small:
            x = x + mx.tanh(layer(x))
        return self.head(x.mean((1, 2)))


def patches(width: int, blocks: int):
    mx.random.seed(3)
    return _of_images(Patches(width, blocks))


def residuals(blocks: int):
    mx.random.seed(3)
    return _of_images(Residuals(blocks))


def _of_images(module: nn.Module):
    mx.eval(module.parameters())
    image = {"image": mx.zeros((2, 6, 6, 3))}
    return program_of(module, image, outputs=["scores"], dynamic={"image": {0: "batch"}})


def convolutions(batch: int = 2, *, is_open: bool = True):
    mx.random.seed(1)
    module = Convolutions()
    mx.eval(module.parameters())
    image = {"image": mx.zeros((batch, 6, 6, 3))}
    dynamic = {"image": {0: "batch"}} if is_open else None
    return program_of(module, image, outputs=["scores"], dynamic=dynamic)


def encoder(
    *, pools: bool = False, length: int | None = None, batch: int | None = None, deep=None
):
    """`deep` is the width and the number of residual blocks."""
    mx.random.seed(2)
    module = Deep(*deep) if deep else Encoder(pools=pools)
    mx.eval(module.parameters())
    sizes = {0: None if batch else "batch", 1: None if length else "length"}
    axes = {axis: name for axis, name in sizes.items() if name}
    names = ("input_ids", "attention_mask")
    example = {name: mx.ones((batch or 2, length or 7), mx.int32) for name in names}
    return program_of(module, example, outputs=["states"], dynamic=dict.fromkeys(names, axes))


class Words:
    model_max_length = 10**30

    def __call__(self, texts, *, padding=False, truncation=False, max_length=None, **options):
        ids = [[1, *map(len, text.split())] for text in texts]
        ids = [row[:max_length] if truncation else row for row in ids]
        if not padding:
            return {"input_ids": ids}
        width = max_length if padding == "max_length" else max(map(len, ids))
        mask = [[1] * len(row) + [0] * (width - len(row)) for row in ids]
        ids = [row + [0] * (width - len(row)) for row in ids]
        return {"input_ids": np.array(ids), "attention_mask": np.array(mask)}


def images(count, seed=0):
    rng = np.random.default_rng(seed)
    pixels = rng.standard_normal((count, 6, 6, 3)).astype(np.float32)
    return {"image": pixels, "labels": rng.integers(0, CLASSES, count)}


def pairs(count, seed=0, most=5.0):
    """Sentences of up to 6 words; the scores reach `most`."""
    rng = np.random.default_rng(seed)

    def sentence():
        return " ".join("x" * n for n in rng.integers(1, WORDS, rng.integers(1, 7)))

    scores = np.linspace(0, most, count).round(3).tolist()
    return [{"sentence1": sentence(), "sentence2": sentence(), "score": s} for s in scores]


def write(path, content):
    """A .npz of a dict, a .jsonl of a list."""
    if isinstance(content, dict):
        np.savez(path, **content)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in content), encoding="utf8")
    return path


def read(program, data, split="evaluation", *, count=99, batch_size=4, **options):
    options = {"folder": Path("/none"), "open_tokenizer": lambda folder: Words(), **options}
    return read_samples(program, data, split, count=count, batch_size=batch_size, **options)


def run(program, samples, b):
    return program.run(dict(zip(program.inputs, samples.batches[b], strict=True)))


def folder_of(path, content, suffix):
    for name, seed in (("train", 1), ("test", 2)):
        write(path / f"{name}{suffix}", content(seed))
    return path


def slope(function, at, step=1e-5):
    """Central differences of a scalar function of an array, in float64."""
    out = np.zeros(at.shape)
    for place in np.ndindex(*at.shape):
        move = np.zeros(at.shape)
        move[place] = step
        out[place] = (function(at + move) - function(at - move)) / (2 * step)
    return out
