"""Small plain `mlx.nn` models, for tests that hold for any architecture.

    build("resnet_padded")     the model and example inputs; every parameter is random
    traced("resnet_padded")    its named axes, the inputs and the parameters by path
    random_plan(named, dimensions, seed)

Random means that nothing is inert: norm weights, biases and the statistics of BatchNorm all move
the output. Models are in eval mode, float32, and of sizes that tell their axes apart.
"""

import random
from functools import cache

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path

from mlx_compress.axes import NamedAxes, named_axes
from mlx_compress.graph import trace
from mlx_compress.plan import Cut, PrunePlan


def build(name: str, seed: int = 0) -> tuple[nn.Module, list[mx.array]]:
    """A model by its name in `MODELS`, in eval mode, and inputs for it."""
    make, *inputs = MODELS[name]
    mx.random.seed(seed)
    model = randomised(make()).eval()
    arrays = [
        mx.random.randint(0, VOCABULARY, shape) if name in TOKENS else mx.random.normal(shape)
        for shape in inputs
    ]
    mx.eval(model.parameters(), arrays)
    return model, arrays


@cache
def traced(name: str) -> tuple[NamedAxes, list[mx.array], dict[str, mx.array]]:
    """The named axes of a model, its inputs and its parameters; shared, so not to be changed."""
    model, inputs = build(name)
    return named_axes(trace(model, *inputs)), inputs, dict(tree_flatten(model.parameters()))


def random_plan(named: NamedAxes, dimensions, seed: int, *, least: int = 1) -> PrunePlan:
    """Keeps a random part of each dimension, `least` units or more, but never all.

    Where units are chosen anew for each unit of another dimension, so they are here.
    """
    rng = random.Random(seed)
    cuts = {}
    for d in dimensions:
        count = rng.randint(least, d.size - 1)
        rows = named.dimensions[d.within].size if d.within else 1
        keep = [sorted(rng.sample(range(d.size), count)) for _ in range(rows)]
        cuts[d.name] = Cut(d.name, d.kind, d.size, keep if d.within else keep[0], d.within, d.slots)
    return PrunePlan(cuts)


def randomised(model: nn.Module) -> nn.Module:
    """The same model with random parameters; scales stay near 1, variances stay positive."""

    def draw(path: str, array: mx.array) -> mx.array:
        noise = mx.random.normal(array.shape)
        if path.endswith("running_var"):
            return mx.random.uniform(0.5, 2.0, array.shape)
        if path.endswith("weight") and array.ndim == 1:
            return 1 + 0.3 * noise
        if array.ndim == 1:
            return 0.3 * noise
        return noise * (array.size / array.shape[0]) ** -0.5

    model.update(tree_map_with_path(draw, model.parameters()))
    return model


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 9), nn.Tanh(), nn.Linear(9, 4))


class Block(nn.Module):
    """Two convolutions with BatchNorm; a shortcut that changes channels pads or projects."""

    def __init__(self, before: int, after: int, *, shortcut: str):
        super().__init__()
        self.stride, self.extra = (1 if before == after else 2), after - before
        self.conv1 = nn.Conv2d(before, after, 3, stride=self.stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm(after)
        if self.extra and shortcut == "project":
            self.project = nn.Conv2d(before, after, 1, stride=self.stride)

    def __call__(self, x):
        y = self.norm2(self.conv2(nn.relu(self.norm1(self.conv1(x)))))
        if "project" in self:
            x = self.project(x)
        elif self.extra:
            low = self.extra // 2
            x = x[:, :: self.stride, :: self.stride, :]
            x = mx.pad(x, [(0, 0), (0, 0), (0, 0), (low, self.extra - low)])
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Three stages and a linear head on the global average."""

    def __init__(self, *, shortcut: str):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm(4)
        sizes = [(4, 4), (4, 7), (7, 7), (7, 10)]
        self.blocks = [Block(*size, shortcut=shortcut) for size in sizes]
        self.head = nn.Linear(10, 5)

    def __call__(self, x):
        x = nn.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(axis=(1, 2)))


class Inverted(nn.Module):
    """MobileNet's block: expand, convolve each channel alone, project, add."""

    def __init__(self, size: int, hidden: int):
        super().__init__()
        self.expand = nn.Conv2d(size, hidden, 1, bias=False)
        self.norm1 = nn.BatchNorm(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.norm2 = nn.BatchNorm(hidden)
        self.project = nn.Conv2d(hidden, size, 1)

    def __call__(self, x):
        y = nn.relu6(self.norm1(self.expand(x)))
        return x + self.project(nn.relu6(self.norm2(self.depthwise(y))))


class MobileNet(nn.Module):
    """Depthwise and grouped convolutions, and pooling of both kinds."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = [Inverted(6, 11), Inverted(6, 9)]
        self.grouped = nn.Conv2d(6, 8, 3, padding=1, groups=2)
        self.pointwise = nn.Conv2d(8, 7, 1)
        self.max_pool = nn.MaxPool2d(2)
        self.overlapping = nn.MaxPool2d(3, stride=1, padding=1)
        self.average_pool = nn.AvgPool2d(2)
        self.head = nn.Linear(7, 5)

    def __call__(self, x):
        x = self.max_pool(nn.relu(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        x = nn.relu(self.grouped(self.overlapping(x)))
        x = nn.relu(self.pointwise(self.average_pool(x)))
        return self.head(x.mean(axis=(1, 2)))


class Encoder(nn.Module):
    """MLX's own transformer encoder."""

    def __init__(self, *, norm_first: bool):
        super().__init__()
        self.embed = nn.Linear(5, 12)
        self.encoder = nn.TransformerEncoder(2, 12, 3, mlp_dims=14, norm_first=norm_first)
        self.head = nn.Linear(12, 4)

    def __call__(self, x):
        return self.head(self.encoder(self.embed(x), None))


class FusedLayer(nn.Module):
    """Attention with one projection for queries, keys and values; a gated MLP in one piece too."""

    def __init__(self, size: int, heads: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.qkv = nn.Linear(size, 3 * size)
        self.out = nn.Linear(size, size)
        self.gate_up = nn.Linear(size, 2 * hidden)
        self.down = nn.Linear(hidden, size)

    def __call__(self, x):
        q, k, v = (
            part.reshape(*x.shape[:2], self.heads, -1).transpose(0, 2, 1, 3)
            for part in mx.split(self.qkv(self.norm1(x)), 3, axis=-1)
        )
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5)
        x = x + self.out(y.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1))
        gate, up = mx.split(self.gate_up(self.norm2(x)), 2, axis=-1)
        return x + self.down(nn.silu(gate) * up)


class FusedEncoder(nn.Module):
    """Learned positions, fused layers, the mean over the sequence."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 12)
        self.positions = mx.zeros((9, 12))
        self.layers = [FusedLayer(12, 3, 10) for _ in range(2)]
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 4)

    def __call__(self, x):
        x = self.embed(x) + self.positions[: x.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(axis=1))


class UNet(nn.Module):
    """Down, up by transposed convolution, with concatenated skips."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Conv2d(2, 4, 3, padding=1)
        self.down = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(6, 7, 3, padding=1)
        self.up = nn.ConvTranspose2d(7, 5, 2, stride=2)
        self.merge = nn.Conv2d(9, 6, 3, padding=1)
        self.leave = nn.Conv2d(6, 3, 1)

    def __call__(self, x):
        skip = nn.relu(self.enter(x))
        x = nn.relu(self.middle(nn.relu(self.down(skip))))
        x = mx.concatenate([skip, nn.leaky_relu(self.up(x))], axis=-1)
        return self.leave(nn.relu(self.merge(x)))


class Recurrent(nn.Module):
    """Two recurrent layers and a head on every step."""

    def __init__(self, layer):
        super().__init__()
        self.layers = [layer(5, 7), layer(7, 8)]
        self.head = nn.Linear(8, 3)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
            x = x[0] if isinstance(x, tuple) else x
        return self.head(x)


class SharedHeads(nn.Module):
    """Causal attention with rotary positions; two query heads share each key-value head."""

    def __init__(self, size: int, heads: int, group: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.query = nn.Linear(size, heads * group * head_dim)
        self.key = nn.Linear(size, heads * head_dim)
        self.value = nn.Linear(size, heads * head_dim)
        self.out = nn.Linear(heads * group * head_dim, size)
        self.rope = nn.RoPE(head_dim)

    def __call__(self, x):
        q, k, v = (
            layer(x).reshape(*x.shape[:2], -1, self.head_dim).transpose(0, 2, 1, 3)
            for layer in (self.query, self.key, self.value)
        )
        scale = self.head_dim**-0.5
        y = mx.fast.scaled_dot_product_attention(
            self.rope(q), self.rope(k), v, scale=scale, mask="causal"
        )
        return self.out(y.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1))


class Experts(nn.Module):
    """Each token goes through the two of three small MLPs that the router ranks first."""

    def __init__(self, size: int, hidden: int):
        super().__init__()
        self.router = nn.Linear(size, 3)
        self.up = mx.zeros((3, hidden, size))
        self.down = mx.zeros((3, size, hidden))

    def __call__(self, x):
        scores = mx.softmax(self.router(x), axis=-1)
        chosen = mx.argpartition(-scores, kth=1, axis=-1)[..., :2]
        y = mx.expand_dims(x, (-2, -3))
        y = nn.silu(mx.gather_mm(y, self.up.swapaxes(1, 2), rhs_indices=chosen))
        y = mx.gather_mm(y, self.down.swapaxes(1, 2), rhs_indices=chosen).squeeze(-2)
        return (y * mx.take_along_axis(scores, chosen, axis=-1)[..., None]).sum(axis=-2)


class Decoder(nn.Module):
    """A language model: shared heads, then experts."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 12)
        self.attention = SharedHeads(12, heads=3, group=2, head_dim=4)
        self.experts = Experts(12, 10)
        self.norm1, self.norm2, self.norm3 = (nn.RMSNorm(12) for _ in range(3))

    def __call__(self, tokens):
        x = self.embedding(tokens)
        x = x + self.attention(self.norm1(x))
        x = x + self.experts(self.norm2(x))
        return self.embedding.as_linear(self.norm3(x))


class TwoTowers(nn.Module):
    """Two inputs, one embedding, and the product of what each tower makes of it."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 6)
        self.left = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 7))
        self.right = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 7))

    def __call__(self, users, items):
        return self.left(self.embedding(users)) @ self.right(self.embedding(items)).T


VOCABULARY = 13
IMAGES, SEQUENCES = (2, 8, 8, 3), (2, 6, 5)
# Name: how to make the model, and the shape of each of its inputs.
MODELS = {
    "mlp": (mlp, (5, 6)),
    "resnet_padded": (lambda: ResNet(shortcut="pad"), IMAGES),
    "resnet_projected": (lambda: ResNet(shortcut="project"), IMAGES),
    "mobilenet": (MobileNet, IMAGES),
    "encoder": (lambda: Encoder(norm_first=True), SEQUENCES),
    "encoder_norm_last": (lambda: Encoder(norm_first=False), SEQUENCES),
    "fused_encoder": (FusedEncoder, SEQUENCES),
    "unet": (UNet, (2, 8, 8, 2)),
    "rnn": (lambda: Recurrent(nn.RNN), SEQUENCES),
    "gru": (lambda: Recurrent(nn.GRU), SEQUENCES),
    "lstm": (lambda: Recurrent(nn.LSTM), SEQUENCES),
    "decoder": (Decoder, (2, 6)),
    "two_towers": (TwoTowers, (3,), (4,)),
}
TOKENS = {"decoder", "two_towers"}
