"""torch-pruning on networks like those of the benchmark: what it removes, reads and leaves."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mlx_compress.benchmarks.networks import as_in_training, resnet
from torch import nn

from mlx_compress.errors import InputError

pytest.importorskip("torch_pruning", reason="torch-pruning is not installed: mlx-compress[bench]")

from mlx_compress.benchmarks import peers  # noqa: E402


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    module = resnet(8, widths=(4, 8, 16))
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for held in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
                nn.init.uniform_(held, 0.5, 1.5)
    return module


@pytest.fixture(scope="module")
def seen():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(12, 3, 32, 32, generator=generator)
    return images, torch.randint(0, 10, (12,), generator=generator)


def outputs(module, images):
    with torch.no_grad():
        return module(images)


def zeroed(module, importance, family, scope, ratio):
    """A copy of `module` with zeros for the channels that a pruner would remove."""
    twin, shadow = copy.deepcopy(module), copy.deepcopy(module)
    layers, names = dict(twin.named_modules()), {m: n for n, m in shadow.named_modules()}
    for group in peers.pruner_of(shadow, importance, family, scope, ratio).step(interactive=True):
        for dependency, channels in group:
            layer = layers.get(names.get(dependency.target.module))
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.data[channels] = 0
                layer.bias.data[channels] = 0
            elif isinstance(layer, peers.Selection):
                writes = dependency.handler == peers.tp.prune_conv_out_channels
                layer.weight.data.transpose(0, 0 if writes else 1)[channels] = 0
        group.prune()
    return twin


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("family", ["inner", "all"])
def test_what_the_peer_prunes_equals_zeroing_it(network, seen, family, scope):
    start = peers.followed(network) if family == "all" else network
    importance = peers.scored(start, peers.CRITERIA["L2, groups"], *seen)
    smaller = peers.pruned(start, importance, family, scope, 0.4)
    assert peers.size(smaller)[1] < 0.75 * peers.size(start)[1]
    want = outputs(zeroed(start, importance, family, scope, 0.4), seen[0])
    assert (outputs(smaller, seen[0]) - want).abs().max() < 1e-4 * want.abs().max()
    assert (outputs(start, seen[0]) - want).abs().max() > 0.01 * want.abs().max()


def test_a_shortcut_that_can_be_followed_computes_and_counts_the_same(network, seen):
    followed = peers.followed(network)
    assert torch.equal(outputs(followed, seen[0]), outputs(network, seen[0]))
    assert peers.size(followed) == peers.size(network)


@pytest.mark.parametrize("name", peers.CRITERIA)
def test_every_criterion_meets_its_macs_in_two_steps(network, seen, name):
    def score(module):
        return peers.scored(module, peers.CRITERIA[name], *seen)

    start = peers.followed(network)
    smaller = peers.in_steps(start, score(start), score, "all", "local", 2, 0.5)
    share = peers.size(smaller)[0] / peers.size(network)[0]
    assert 0.3 < share <= 0.5
    assert outputs(smaller, seen[0]).shape == (12, 10)


def test_squares_are_those_of_single_images(network, seen):
    peers._squares(network, *seen)
    want = torch.zeros_like(network.linear.weight)
    for image, label in zip(*seen, strict=True):
        logits = network(image[None])
        network.linear.weight.grad, held = None, network.linear.weight.grad
        F.cross_entropy(logits, label[None]).backward()
        want += network.linear.weight.grad**2 / 12
        network.linear.weight.grad = held
    assert torch.allclose(network.linear.weight.grad, want, rtol=1e-4)


def test_new_statistics_are_those_of_the_images(network, seen):
    new = peers.with_new_statistics(network, seen[0])
    values = outputs(network.conv1, seen[0])
    assert torch.allclose(new.bn1.running_mean, values.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(new.bn1.running_var, values.var((0, 2, 3)), rtol=1e-4)
    assert not new.bn1.training


def test_macs_out_of_reach_are_refused(network):
    with pytest.raises(InputError, match="out of reach"):
        peers.pruned_to(1.0, lambda ratio: network)


def test_images_as_in_training_are_shifted_and_mirrored_windows():
    images = np.arange(2 * 3 * 32 * 32, dtype=np.float32).reshape(2, 3, 32, 32)
    found = as_in_training(images, seed=0)
    for image, window in zip(images, found, strict=True):
        centre = window[:, 8:24, 8:24]
        views = np.lib.stride_tricks.sliding_window_view(image, (16, 16), axis=(1, 2))
        same = (views == centre[:, None, None]).all((0, 3, 4))
        mirrored = (views == centre[:, None, None, :, ::-1]).all((0, 3, 4))
        assert same[4:13, 4:13].any() or mirrored[4:13, 4:13].any()


def test_the_best_row_of_each_criterion_is_kept():
    rows = [peers.PeerRow("L1", str(k), 0.5, 0.5, a, 1 - a) for k, a in enumerate((0.2, 0.9, 0.4))]
    assert peers.best(rows, "accuracy")["L1"].settings == "1"
    assert peers.best(rows, "accuracy_bn")["L1"].settings == "0"
