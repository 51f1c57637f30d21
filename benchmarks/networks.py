"""Trained networks and their data, in torch, for what the bridge to torch is measured on.

    trained_resnet(data, 20)   ResNet-20 for CIFAR-10, shortcuts that pad (He et al., option A)
    cifar10_test(data)         its 1,000 test images, normalised, and their labels
    cifar10_train(data)        5,000 of its images for training, likewise
    as_in_training(images)     those shifted and mirrored, as the networks saw them
    sentence_pairs(data)       the test pairs of STS-B, with scores

`data` is a folder with cnn-resnet-cifar10, cifar10-lossless and enc-stsb.
"""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    """Two convolutions; where the channels double, the shortcut skips pixels and pads channels."""

    def __init__(self, before: int, after: int):
        super().__init__()
        stride = 1 if before == after else 2
        self.extra = (after - before) // 2
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.extra:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra))
        return F.relu(x + y)


class ResNet(nn.Module):
    def __init__(self, blocks: int, widths=(16, 32, 64), classes: int = 10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        before = widths[0]
        for k, width in enumerate(widths, start=1):
            stage = [Block(before if i == 0 else width, width) for i in range(blocks)]
            self.add_module(f"layer{k}", nn.Sequential(*stage))
            before = width
        self.linear = nn.Linear(before, classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.avg_pool2d(x, x.shape[3])
        return self.linear(x.view(x.shape[0], -1))


def resnet(depth: int, **options) -> nn.Module:
    return ResNet((depth - 2) // 6, **options).eval()


def trained_resnet(data: Path, depth: int) -> nn.Module | None:
    """None where the weights are not there."""
    files = list((data / "cnn-resnet-cifar10").glob(f"resnet{depth}-*.th"))
    if not files:
        return None
    held = torch.load(files[0], weights_only=True, map_location="cpu")["state_dict"]
    module = resnet(depth)
    module.load_state_dict({name.removeprefix("module."): held[name] for name in held})
    return module


def cifar10_test(data: Path, count: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """Images [count, 3, 32, 32], float32, and labels [count]."""
    images, labels = _cifar10_sheets(data, [50])
    return images[:count], labels[:count]


def cifar10_train(data: Path) -> tuple[np.ndarray, np.ndarray]:
    """The first 5,000 images for training [5000, 3, 32, 32], as those for the test, and labels."""
    return _cifar10_sheets(data, range(5))


def as_in_training(images: np.ndarray, *, seed: int) -> np.ndarray:
    """`images` [N, 3, 32, 32], each shifted by up to 4 pixels onto black, every other one mirrored.

    The statistics of batch norms are those of such images: taken anew on plain ones of the training
    set, they cost a dense ResNet-20 3 % of the test images, on these nothing.
    """
    rng = np.random.default_rng(seed)
    black = -(np.array(MEAN, np.float32) / np.array(DEVIATION, np.float32))[:, None, None]
    padded = np.pad(images - black, ((0, 0), (0, 0), (4, 4), (4, 4))) + black
    out = np.empty_like(images)
    for k, (top, left, mirrored) in enumerate(rng.integers(0, (9, 9, 2), (len(images), 3))):
        window = padded[k, :, top : top + 32, left : left + 32]
        out[k] = window[..., ::-1] if mirrored else window
    return out


def _cifar10_sheets(data: Path, numbers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Sheets of 1,000 images, one a row of pixels."""
    from PIL import Image

    folder = data / "cifar10-lossless"
    text = (folder / "cifar10_labels.js").read_text()
    known = np.array(json.loads(text[text.index("[") : text.rindex("]") + 1])).reshape(-1, 1000)
    sheets = []
    for number in numbers:
        with Image.open(folder / f"cifar10_batch_{number}.png") as sheet:
            sheets.append(np.asarray(sheet.convert("RGB")).reshape(1000, 32, 32, 3))
    images = (np.concatenate(sheets) / 255 - np.array(MEAN)) / np.array(DEVIATION)
    return images.transpose(0, 3, 1, 2).astype(np.float32), known[list(numbers)].ravel()


def sentence_pairs(data: Path, count: int | None = None) -> list[tuple[str, str, float]]:
    """Test pairs of STS-B with their scores; none where the data are not there."""
    file = data / "enc-stsb" / "stsb-en-test.csv"
    if not file.exists():
        return []
    with file.open(encoding="utf8", newline="") as stream:
        rows = [(row[0], row[1], float(row[2])) for row in csv.reader(stream)]
    return rows[:count]


def similarities(folder: Path, encode: Callable, pairs: Sequence) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of mean-pooled states and the scores. `encode(ids, mask)` gives [B, T, width]."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [text for first, second, _ in pairs for text in (first, second)]
    vectors = []
    for start in range(0, len(texts), 50):
        tokens = tokenizer(texts[start : start + 50], padding=True, return_tensors="pt")
        mask = tokens["attention_mask"]
        states = encode(tokens["input_ids"], mask) * mask.numpy()[..., None]
        vectors.append(states.sum(1))  # the length of the text does not turn the vector
    unit = np.concatenate(vectors)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    return (unit[::2] * unit[1::2]).sum(1), np.array([score for _, _, score in pairs])
