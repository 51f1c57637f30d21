"""Networks in torch with random weights, for the tests of the bridge.

MobileNet()            inverted residuals with depthwise convolutions
randomised(module)     random weights, with statistics of batch norm that matter
"""

import torch
import torch.nn.functional as F
from torch import nn


class Inverted(nn.Module):
    """Expand, convolve each channel alone, project; add where the shape stays."""

    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        hidden = 3 * before
        self.residual = stride == 1 and before == after
        self.layers = nn.Sequential(
            nn.Conv2d(before, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden), nn.Hardswish(),
            nn.Conv2d(hidden, after, 1, bias=False), nn.BatchNorm2d(after),
        )  # fmt: skip

    def forward(self, x):
        y = self.layers(x)
        return x + y if self.residual else y


class MobileNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU6())
        self.blocks = nn.Sequential(Inverted(6, 6, 1), Inverted(6, 9, 2), Inverted(9, 9, 1))
        self.mix = nn.Conv2d(9, 12, 3, padding=1, groups=3)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))

    def forward(self, x):
        return self.head(self.pool(F.silu(self.mix(self.blocks(self.stem(x))))))


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """The same module in eval mode; scales stay near 1, variances stay positive."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                noise = 0.5 + torch.rand(tensor.shape, generator=generator)
            elif tensor.ndim == 1:
                noise = (1 if name.endswith("weight") else 0) + 0.3 * noise
            else:
                noise = noise * (tensor.numel() / tensor.shape[0]) ** -0.5
            tensor.copy_(noise)
    return module.eval()
