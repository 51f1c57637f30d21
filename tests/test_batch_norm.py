"""Statistics of batch norms, measured anew on what a pruned network computes."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_compress.axes import named_axes
from mlx_compress.batch_norm import batch_norms, recalibrated
from mlx_compress.graph import trace
from mlx_compress.plan import Cut, PrunePlan


class Net(nn.Module):
    """A norm before the cut, one that is cut, one behind it, and a residual sum."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm(4)
        self.conv1, self.bn1 = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 4, 3, padding=1, bias=False), nn.BatchNorm(4)
        self.head = nn.Linear(4, 2)

    def __call__(self, x):
        x = nn.relu(self.bn0(self.stem(x)))
        y = self.bn2(self.conv2(nn.relu(self.bn1(self.conv1(x)))))
        return self.head(nn.relu(x + y).mean(axis=(1, 2)))


@pytest.fixture(scope="module")
def network():
    mx.random.seed(0)
    net = Net()
    for _ in range(3):
        net(mx.random.normal((8, 5, 5, 3)))  # statistics that matter
    net.eval()
    batches = [[mx.random.normal((8, 5, 5, 3))] for _ in range(2)]
    named = named_axes(trace(net, batches[0][0]))
    dim = next(d for d in named.free(("channels",)) if d.size == 6)
    plan = PrunePlan({dim.name: Cut(dim.name, dim.kind, 6, [0, 2, 5], None, dim.slots)})
    held = dict(tree_flatten(net.parameters()))
    return net, named, plan, batches, lambda paths: {path: held[path] for path in paths}


def test_the_norms_of_a_network_are_found(network):
    found = batch_norms(network[1].graph)
    paths = [f"bn{k}.running_{what}" for k in range(3) for what in ("mean", "var")]
    assert [path for norm in found for path in (norm.mean, norm.variance)] == paths


def test_what_is_measured_is_what_the_pruned_network_computes(network):
    net, named, plan, batches, fetch = network
    cut = recalibrated(named, plan, batches, fetch)
    x = mx.concatenate([batch[0] for batch in batches])
    keep = mx.array([0, 2, 5])
    stem = nn.relu(net.bn0(net.stem(x)))
    inner = mx.conv2d(stem, net.conv1.weight[keep], padding=1)
    flat = inner.reshape(-1, 3)  # the norm before has its new statistics by then
    scale = net.bn1.weight[keep] / mx.sqrt(flat.var(axis=0) + net.bn1.eps)
    norm1 = (inner - flat.mean(axis=0)) * scale + net.bn1.bias[keep]
    outer = mx.conv2d(nn.relu(norm1), net.conv2.weight[..., keep], padding=1)
    rows = np.array(outer, dtype=np.float64).reshape(-1, 4)
    np.testing.assert_allclose(np.array(cut.fitted["bn2.running_mean"]), rows.mean(0), atol=1e-5)
    np.testing.assert_allclose(np.array(cut.fitted["bn2.running_var"]), rows.var(0), rtol=1e-4)


def test_norms_that_nothing_was_removed_before_are_left(network):
    _, named, plan, batches, fetch = network
    fitted = recalibrated(named, plan, batches, fetch).fitted
    assert not any(path.startswith("bn0") for path in fitted)
    assert not recalibrated(named, PrunePlan({}), batches, fetch).fitted
