"""What torch can compute, in groups: `GROUPS` names a function or module and its input's shape.

module_of("pools")     the group as a module in eval mode; it returns a list of tensors
"""

import torch
import torch.nn.functional as F
from torch import nn


def activations(x):
    plain = (
        "relu",
        "relu6",
        "hardswish",
        "hardsigmoid",
        "silu",
        "mish",
        "elu",
        "leaky_relu",
        "celu",
        "selu",
        "softplus",
        "logsigmoid",
        "softsign",
        "tanhshrink",
        "hardtanh",
    )
    out = [getattr(F, name)(x) for name in plain]  # fmt: skip
    out += [F.gelu(x), F.gelu(x, approximate="tanh"), F.elu(x, 0.3), F.leaky_relu(x, 0.2)]
    out += [F.glu(torch.cat([x, x], -1)), F.threshold(x, 0.1, -2.0), F.hardshrink(x)]
    return [*out, torch.sigmoid(x), F.prelu(x, torch.tensor([0.3])), F.softplus(x, 2.0, 1.0)]


def arithmetic(x):
    positive = x.abs() + 0.1
    unary = ("abs", "neg", "exp", "expm1", "sin", "cos", "tan", "sinh", "cosh", "tanh", "asinh",
             "atan", "erf", "floor", "ceil", "round", "trunc", "sign", "frac")  # fmt: skip
    out = [getattr(torch, name)(x) for name in unary]
    out += [getattr(torch, name)(positive) for name in
            ("log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal")]  # fmt: skip
    out += [torch.acos(torch.tanh(x)), torch.asin(torch.tanh(x)), torch.atanh(torch.tanh(x) / 2)]
    out += [
        torch.add(x, positive, alpha=3),
        torch.sub(x, 2.0, alpha=2),
        1 - x,
        torch.rsub(x, x, alpha=2),
    ]
    out += [x / 3, 2 / positive, x // 0.3, torch.div(x, 0.3, rounding_mode="trunc"), x % 0.3]
    out += [x**2, positive**0.5, positive**-0.5, x**3, positive**1.7, 2.0**x, x**1, positive**-1]
    out += [torch.remainder(x, positive), torch.fmod(x, positive), torch.atan2(x, positive)]
    out += [torch.maximum(x, 2 * x), torch.minimum(x, 2 * x), torch.hypot(x, positive)]
    return [
        *out,
        torch.logaddexp(x, positive),
        torch.lerp(x, positive, 0.3),
        torch.addcmul(x, x, x),
    ]


def comparisons(x):
    y = x.flip(1)
    out = [
        x > 0,
        x >= y,
        x < y,
        x <= 0.1,
        x == y,
        x != y,
        ~(x > 0),
        (x > 0) & (y > 0),
        (x > 0) | (y > 0),
    ]
    out += [
        torch.logical_and(x > 0, y > 0),
        torch.logical_or(x > 0, y < 0),
        torch.logical_xor(x > 0, y > 0),
    ]
    out += [
        (x > 0) ^ (y > 0),
        torch.logical_not(x > 0),
        torch.isnan(x),
        torch.isinf(x / 0),
        torch.isfinite(x),
    ]
    out += [torch.where(x > 0, x, y), torch.where(x > 0, x, 2.0), x.masked_fill(x > 0, -5.0)]
    out += [x.clamp(-0.5, 0.5), x.clamp(min=0), x.clamp(max=0), x.clamp(min=y), x.clip(-1, 1)]
    return [a.float() if a.dtype == torch.bool else a for a in out]


def reductions(x):
    out = [x.sum(), x.sum(1), x.sum((0, 2), keepdim=True), x.mean(), x.mean(-1), x.mean((1, 2))]
    out += [
        x.amax(1),
        x.amin((1, 2)),
        x.max(),
        x.min(),
        x.prod(1),
        x.var(1),
        x.var(1, correction=0),
    ]
    out += [x.std(-1), *torch.var_mean(x, dim=2), x.max(1).values, x.min(2).values, x.argmax(1)]
    out += [
        x.argmin(-1, keepdim=True),
        x.argmax(),
        x.max(2).indices,
        (x > 0).any(1),
        (x > 0).all(2),
    ]
    out += [
        (x > 3).any(),
        x.norm(dim=1),
        x.norm(),
        x.norm(p=1, dim=-1),
        x.logsumexp(1),
        x.cumsum(1),
    ]
    out += [x.cumprod(2), x.softmax(1), x.log_softmax(-1), F.normalize(x, dim=-1)]
    out += [torch.linalg.vector_norm(x, ord=float("inf"), dim=1)]
    return [a.float() for a in out]


def orders(x):
    values, places = x.sort(dim=1)
    out = [values, places, x.sort(descending=True).values, x.argsort(-1), x.topk(2).values]
    return [*out, x.topk(3, dim=1, largest=False).values, x.topk(2, dim=1).indices]


def shapes(x):
    out = [x.view(x.shape[0], 15), x.reshape(-1, 5), x.permute(2, 0, 1), x.transpose(1, 2), x.mT]
    out += [x.unsqueeze(1).expand(-1, 4, -1, -1), x.expand(2, *x.shape), x[:, None].squeeze(1)]
    out += [
        x[:, :, :1].squeeze(),
        x.flatten(1),
        x.flatten(),
        x.unflatten(2, (5, 1)),
        x.repeat(1, 2, 3),
    ]
    out += [x[:, 1:3], x[:, -2:], x[:, ::2], x[..., 1], x[:, -1], x.narrow(1, 1, 2), x.select(2, 3)]
    out += [*x.split(2, dim=1), *x.split([1, 4], dim=2), *x.chunk(2, dim=2), *x.unbind(1)]
    out += [torch.cat([x, x * 2], 1), torch.stack([x, x + 1], -1), x.flip(1), x.flip(0, 2)]
    out += [
        x.roll(1, 1),
        x.roll((1, -2), (1, 2)),
        F.pad(x, (1, 2)),
        F.pad(x, (1, -1, 0, 2), value=3.0),
    ]
    out += [x.tril(), x.triu(1), x.repeat_interleave(2, dim=1), x.tile(1, 2, 1), x.movedim(0, 2)]
    out += [
        F.pad(x, (1, 1), mode="reflect"),
        F.pad(x, (2, 1), mode="replicate"),
        x.contiguous().clone(),
    ]
    return [*out, x.detach(), torch.broadcast_tensors(x, x[:1])[1], x.swapaxes(0, 1)]


def indexing(x):
    rows = torch.tensor([2, 0, 2])
    out = [
        x[:, rows],
        x[:, rows, rows],
        x[:, rows, :2],
        x.index_select(2, rows),
        x[0, rows],
        x[:, :, rows, None],
    ]
    places = x.argsort(1)[:, :2]
    out += [x.gather(1, places), x.scatter(1, places, 0.5)]
    out += [
        x.scatter(2, x.argsort(2), x * 2),
        x.index_fill(1, rows, 9.0),
        x.index_copy(2, rows[:2], x[:, :, :2]),
    ]
    out += [F.embedding(places, torch.arange(12.0).view(6, 2)), F.one_hot(places, 3).float()]
    out += [x.slice_scatter(x[:, :1] * 2, 1, 2, 3), x.select_scatter(x[:, 0], 1, 2)]
    y = x.clone()
    y[:, 1] = 7.0
    y[:, rows[:2], 0] = 3.0
    return [*out, y, x.index_add(1, rows[:1], x[:, :1])]


def makers(x):
    n = x.shape[0]
    out = [
        torch.arange(5) + x,
        torch.arange(1, 11, 2) * x,
        torch.arange(n),
        torch.full((n, 2), 3.5),
    ]
    out += [
        torch.zeros(n, 3),
        torch.ones(2, n),
        torch.zeros_like(x),
        torch.ones_like(x),
        x.new_zeros(n),
    ]
    out += [
        torch.full_like(x, 2),
        x.new_full((2, n), 4.0),
        torch.eye(3),
        x.new_ones(1),
        torch.linspace(0, 1, 5),
    ]
    out += [
        x.to(torch.float16),
        x.to(torch.int32),
        x.double(),
        x.bool(),
        x.long(),
        x.half().type_as(x),
    ]
    return [
        a.float()
        for a in [*out, torch.tensor(3.0) * x, torch.scalar_tensor(2.0) + x, torch.empty(0).sum()]
    ]


def products(x):
    w = torch.linspace(-1, 1, 20).view(4, 5)
    out = [x @ w.T, F.linear(x, w, w[:, 0]), torch.bmm(x, x.mT), torch.matmul(x, x.mT), x[0] @ w.T]
    out += [torch.addmm(w[:, 0], x[0], w.T), torch.addmm(w[:3, :4], x[0], w.T, beta=0.5, alpha=2)]
    out += [
        torch.baddbmm(x @ x.mT, x, x.mT),
        torch.einsum("bij,kj->bik", x, w),
        x[0] @ w[0],
        w[0] @ w[1],
    ]
    return [*out, torch.einsum("bij,bkj->bik", x, x), torch.einsum("bij->b", x)]


def attention(x):
    q, k = x.unsqueeze(1).repeat(1, 4, 1, 1), x.unsqueeze(1).repeat(1, 4, 1, 1) * 0.5
    sees = torch.ones(3, 3).tril().bool()
    added = torch.zeros(3, 3).masked_fill(~sees, float("-inf"))
    attend = F.scaled_dot_product_attention
    out = [attend(q, k, q), attend(q, k, q, scale=0.3), attend(q, k, q, is_causal=True)]
    out += [attend(q, k, q, attn_mask=sees), attend(q, k, q, attn_mask=added), attend(x, x, x)]
    out += [
        attend(q[:, :, :2], k, q, is_causal=True),
        attend(q, k[:, :2], q[:, :2], enable_gqa=True),
    ]
    return [*out, attend(q, k, q[..., :2])]


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.plain = nn.ModuleList([
            nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, (3, 1), stride=2, padding=(2, 0), bias=False),
            nn.Conv2d(4, 8, 3, padding="same", groups=2), nn.Conv2d(4, 4, 3, groups=4, dilation=2),
            nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
            nn.ConvTranspose2d(4, 8, (2, 3), groups=2, dilation=(2, 1)),
        ])  # fmt: skip
        self.lines = nn.ModuleList([
            nn.Conv1d(4, 6, 3, padding=1), nn.ConvTranspose1d(4, 2, 4, stride=2)
        ])  # fmt: skip

    def forward(self, x):
        whole = nn.functional.conv3d(x[:, :, None], torch.ones(2, 4, 1, 2, 2))
        return [*(f(x) for f in self.plain), *(f(x[:, :, 0]) for f in self.lines), whole]


class Norms(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList([
            nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True),
            nn.LayerNorm((9, 8)), nn.LayerNorm(8, elementwise_affine=False), nn.RMSNorm(8),
            nn.RMSNorm((9, 8), eps=1e-3), nn.LocalResponseNorm(2), nn.PReLU(4),
            nn.ChannelShuffle(2), nn.PixelShuffle(2), nn.Dropout(), nn.Dropout2d(),
        ])  # fmt: skip
        self.line = nn.BatchNorm1d(4)
        for tensor in self.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(0.5 + torch.rand(tensor.shape))

    def forward(self, x):
        return [*(f(x) for f in self.layers), self.line(x[..., 0]), self.line(x[:, :, 0])]


def pools(x):
    out = [F.max_pool2d(x, 2), F.max_pool2d(x, 3, 2, 1), F.max_pool2d(x, (2, 3), 1, dilation=2)]
    out += [F.max_pool2d(x, 2, ceil_mode=True), F.avg_pool2d(x, 2), F.avg_pool2d(x, 3, 2, 1)]
    out += [F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), F.avg_pool2d(x, 2, ceil_mode=True)]
    out += [
        F.avg_pool2d(x, (9, 8)),
        F.avg_pool2d(x, 2, divisor_override=3),
        F.adaptive_avg_pool2d(x, 1),
    ]
    out += [
        F.adaptive_avg_pool2d(x, (3, 4)),
        F.adaptive_avg_pool2d(x, (4, 5)),
        F.adaptive_max_pool2d(x, 1),
    ]
    out += [
        F.adaptive_max_pool2d(x, (4, 3)),
        F.max_pool1d(x[:, :, 0], 2),
        F.avg_pool1d(x[:, :, 0], 3, 2, 1),
    ]
    out += [
        F.adaptive_avg_pool1d(x[:, :, 0], 3),
        F.adaptive_avg_pool2d(x, (None, 2)),
        F.lp_pool2d(x.abs(), 2, 2),
    ]
    return [*out, F.avg_pool3d(x[:, :, None], (1, 2, 2)), F.max_pool3d(x[:, :, None], (1, 2, 2))]


def resizing(x):
    resize = F.interpolate
    out = [
        resize(x, scale_factor=2),
        resize(x, size=(5, 12)),
        resize(x, scale_factor=0.6),
        resize(x, size=7, mode="nearest-exact"),
    ]
    out += [
        resize(x, scale_factor=m, mode="bilinear", align_corners=a)
        for m in (2, 0.5, 1.7)
        for a in (True, False)
    ]
    out += [
        resize(x, size=(6, 11), mode="bilinear"),
        resize(x[:, :, 0], size=5, mode="linear"),
        resize(x[:, :, 0], scale_factor=3),
    ]
    return [*out]


def images(x):
    """What keeps the channels last on its way, and what turns them back."""
    y = F.conv2d(x, torch.linspace(-1, 1, 24).view(6, 4, 1, 1))
    out = [
        y.mean((2, 3)),
        y.mean((2, 3), keepdim=True),
        y.mean(1),
        y.sum((-1, -2)),
        y.amax(1, keepdim=True),
    ]
    out += [
        torch.cat([y, 2 * y], 1),
        torch.cat([y, x], 1),
        F.pad(y, (1, 0, 2, 1)),
        F.pad(y, (0, 0, 0, 0, 1, 2)),
    ]
    out += [
        y.permute(0, 2, 3, 1),
        y.permute(0, 3, 1, 2),
        y[:, 1:3],
        y[:, :, ::2, 1:],
        y.flatten(1),
        y + x[:, :1],
    ]
    out += [
        y * y.mean((2, 3), keepdim=True),
        y.flatten(2).transpose(1, 2),
        y.softmax(1),
        y.mean(),
        y * torch.arange(8.0),
    ]
    return [
        *out,
        y.argmax(1),
        *y.chunk(2, 1),
        y.view(y.shape[0], 2, 3, 9, 8),
        y.where(y > 0, 0.0),
        y.var((2, 3)),
    ]


GROUPS = {
    "activations": (activations, (3, 5)), "arithmetic": (arithmetic, (3, 5)),
    "comparisons": (comparisons, (3, 5)), "reductions": (reductions, (3, 5)),
    "orders": (orders, (3, 5)), "shapes": (shapes, (3, 5)), "indexing": (indexing, (3, 5)),
    "makers": (makers, (3, 5)), "products": (products, (3, 5)), "attention": (attention, (3, 5)),
    "pools": (pools, (4, 9, 8)), "resizing": (resizing, (4, 9, 8)), "images": (images, (4, 9, 8)),
    "convolutions": (Convolutions(), (4, 9, 8)), "norms": (Norms(), (4, 9, 8)),
}  # fmt: skip


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def module_of(name):
    made = GROUPS[name][0]
    return (made if isinstance(made, nn.Module) else Function(made)).eval()
