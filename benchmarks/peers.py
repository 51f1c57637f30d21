"""What torch-pruning keeps of trained ResNets, by each of its criteria, with nothing trained.

    python -P -m mlx_compress.benchmarks.peers --data FOLDER --depths 20,56 --speedups 2.1,3

Every criterion of torch-pruning 1.6 prunes ResNet-20 and -56 for CIFAR-10 to a speed-up in MACs, as
its own counter counts them: the channels inside each block, or all widths but the classes; ranked
within each layer or over all of them; and in one step, or in several with everything scored anew in
between. Top-1 on 1,000 test images as the network comes out, and with the statistics of its batch
norms taken anew on the images that the criteria read, which are shifted and mirrored as they were
in training. The table takes for each figure the best setting by that very figure, which is kinder
than a user can be. Rows are written as they come, and those in the file are not made again.
"""

import argparse
import copy
import importlib.metadata
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
import torch_pruning as tp
from rich.console import Console
from rich.table import Table
from torch import nn

from ..errors import InputError, exit_on_error
from ..report import write_report
from .begun import begun
from .networks import as_in_training, cifar10_test, cifar10_train, trained_resnet

BATCH = 100
EXAMPLE = torch.zeros(1, 3, 32, 32)
STEPS = 3  # at most
# By what is pruned: over what it is ranked, and in how many steps. Of inner channels, which lie
# between the same layers in every block, a global rank is an isomorphic one, too.
SETTINGS = {
    "inner": (("local", 1), ("global", 1), ("local", STEPS), ("global", STEPS)),
    "all": (("local", 1), ("global", 1), ("isomorphic", 1)),
}
IMPORTANCE = tp.importance
CRITERIA: dict[str, Callable] = {
    "random": IMPORTANCE.RandomImportance,
    "L1, filters": lambda: IMPORTANCE.GroupMagnitudeImportance(1, "first", None),
    "L1, groups": lambda: IMPORTANCE.GroupMagnitudeImportance(1),
    "L2, groups": lambda: IMPORTANCE.GroupMagnitudeImportance(2),
    "BN scale": IMPORTANCE.BNScaleImportance,
    "LAMP": IMPORTANCE.LAMPImportance,
    "FPGM": IMPORTANCE.FPGMImportance,
    "activation": IMPORTANCE.ActivationImportance,
    "Taylor": IMPORTANCE.GroupTaylorImportance,
    "Taylor, summed": lambda: IMPORTANCE.GroupTaylorImportance(multivariable=True),
    "Hessian": IMPORTANCE.GroupHessianImportance,
    "OBD-C": lambda: IMPORTANCE.OBDCImportance(num_classes=10),
}


@dataclass(frozen=True)
class PeerRow:
    """`macs_ratio` and `params_ratio` are what is left, 0-1; the accuracies are top-1, 0-1:
    as the network comes out, and with its batch norms' statistics taken anew."""

    criterion: str
    settings: str
    macs_ratio: float
    params_ratio: float
    accuracy: float
    accuracy_bn: float


class Selection(nn.Conv2d):
    """A convolution that only skips pixels and pads channels. A type of its own, so that
    torch-pruning's counter, which goes by the exact type, counts no MACs for it."""


class Followed(nn.Module):
    """A block whose padded shortcut is a convolution with ones and zeros, of the same values.

    torch-pruning takes padding for an elementwise operation, and couples channel i of 16 with
    channel i of 32 where it is channel i + 8: its scores fail, or it prunes another network.
    """

    def __init__(self, block: nn.Module):
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = block.conv1, block.bn1, block.conv2, block.bn2
        before, after = block.conv1.in_channels, block.conv2.out_channels
        self.shortcut = Selection(before, after, 1, block.conv1.stride, bias=False)
        with torch.no_grad():
            eye = F.pad(torch.eye(before), (0, 0, block.extra, block.extra))
            self.shortcut.weight.copy_(eye[..., None, None])

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.shortcut(x) + y)


def followed(module: nn.Module) -> nn.Module:
    """A copy of a network of `networks.resnet` that torch-pruning can prune whole."""
    module = copy.deepcopy(module)
    for stage in (module.layer1, module.layer2, module.layer3):
        for k, block in enumerate(stage):
            if block.extra:
                stage[k] = Followed(block).eval()
    return module


def fixed_layers(module: nn.Module, family: str) -> list[nn.Module]:
    """What a family leaves as it is: the classes, and for "inner" all that the shortcuts add."""
    if family == "all":
        return [module.linear]
    outer = [layer for name, layer in module.named_modules() if name.endswith("conv2")]
    return [module.linear, module.conv1, *outer]


def size(module: nn.Module) -> tuple[float, int]:
    """MACs and parameters, by torch-pruning's counter; selections are free."""
    macs, parameters = tp.utils.count_ops_and_params(module, EXAMPLE)
    selections = (m.weight.numel() for m in module.modules() if isinstance(m, Selection))
    return macs, parameters - sum(selections)


# ---- what the criteria read


def scored(module: nn.Module, criterion: Callable, images, labels) -> Callable:
    """A criterion for `module`; what it reads of the data is left in it and in the module."""
    importance = criterion()
    module.zero_grad()
    batches = list(zip(images.split(BATCH), labels.split(BATCH), strict=True))
    if isinstance(importance, IMPORTANCE.OBDCImportance):
        _fisher(module, importance, batches)
    elif isinstance(importance, IMPORTANCE.GroupHessianImportance):
        _squares(module, images, labels)
    elif isinstance(importance, IMPORTANCE.GroupTaylorImportance):
        for batch, wanted in batches:
            F.cross_entropy(module(batch), wanted).backward()
    elif isinstance(importance, IMPORTANCE.ActivationImportance):
        with torch.no_grad(), importance.compute_importance(module):
            module(images)  # at once: it keeps the last batch only
    return importance


def _squares(module: nn.Module, images, labels) -> None:
    """Mean squares of the gradients of single images, as gradients.

    GroupHessianImportance reads these from there; its own `accumulate_grad` looks parameters up by
    name where it keeps them by themselves, and so knows the last image only.
    """
    parameters = list(module.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    for image, label in zip(images.split(1), labels.split(1), strict=True):
        gradients = torch.autograd.grad(F.cross_entropy(module(image), label), parameters)
        for held, gradient in zip(total, gradients, strict=True):
            held += gradient**2
    for parameter, held in zip(parameters, total, strict=True):
        parameter.grad = held / len(images)


def _fisher(module: nn.Module, importance: Callable, batches: list) -> None:
    """Its diagonal, with labels drawn from what the network says, as the authors' script does."""
    pruner = pruner_of(module, importance, "all", "local", 0.5)
    # In 1.6.1 this gives None for a group without attention, and the preparation fails.
    pruner._downstream_node_as_root_if_attention = lambda group: group
    importance._prepare_model(module, pruner)
    generator = torch.Generator().manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of its kind of hook, for what it leaves
        for batch, _ in batches:
            logits = module(batch)
            drawn = torch.multinomial(logits.detach().softmax(1), 1, generator=generator)[:, 0]
            F.cross_entropy(logits, drawn).backward()
            importance.step()
    importance._rm_hooks(module)


# ---- pruning


def pruner_of(module, importance, family: str, scope: str, ratio: float) -> tp.pruner.BasePruner:
    return tp.pruner.BasePruner(
        module, EXAMPLE, importance, pruning_ratio=ratio, global_pruning=scope != "local",
        isomorphic=scope == "isomorphic", ignored_layers=fixed_layers(module, family),
    )  # fmt: skip


def pruned(module, importance, family: str, scope: str, ratio: float) -> nn.Module:
    """A copy with `ratio` of the channels removed in one step; the original stays."""
    smaller, importance = copy.deepcopy((module, importance))  # Fisher's keys are modules
    for new, old in zip(smaller.parameters(), module.parameters(), strict=True):
        new.grad = old.grad
    torch.manual_seed(0)  # random scores have no seed of their own
    pruner_of(smaller, importance, family, scope, ratio).step()
    return smaller


def pruned_to(target: float, prune: Callable[[float], nn.Module]) -> nn.Module:
    """The largest network of at most `target` MACs among `prune(ratio)`, found by bisection.

    Raises `InputError` where no ratio on a grid meets the target: ranks over all layers spare a
    layer that would lose every channel, so that large ratios can remove less.
    """
    low, high = 0.0, 0.2
    while size(best := prune(high))[0] > target:
        low, high = high, high + 0.2 if high < 0.7 else high + 0.1
        if high > 0.95:
            raise InputError(f"{target:.3g} MACs are out of reach of this setting; ask for less.")
    for _ in range(6):
        middle = (low + high) / 2
        trial = prune(middle)
        if size(trial)[0] <= target:
            best, high = trial, middle
        else:
            low = middle
    return best


def in_steps(
    module, importance, score: Callable, family: str, scope: str, steps: int, macs: float
) -> nn.Module:
    """`module` with `macs` of its MACs left, in `steps` that remove as many each.

    `importance` scores the first; `score(module)` gives that of the others.
    """
    dense, smaller = size(module)[0], module
    for step in range(1, steps + 1):
        prune = partial(pruned, smaller, importance, family, scope)
        smaller = pruned_to(dense * (1 - (1 - macs) * step / steps), prune)
        if step < steps:
            importance = score(smaller)
    return smaller


# ---- what is left


def accuracy(module: nn.Module, images, labels) -> float:
    with torch.inference_mode():
        hits = [
            (module(batch).argmax(1) == wanted).sum()
            for batch, wanted in zip(images.split(BATCH), labels.split(BATCH), strict=True)
        ]
    return float(sum(hits)) / len(labels)


def with_new_statistics(module: nn.Module, images) -> nn.Module:
    """A copy whose batch norms hold the means and variances of `images`, averaged over batches."""
    module = copy.deepcopy(module)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None
            layer.train()
    with torch.no_grad():
        for batch in images.split(BATCH):
            module(batch)
    return module.eval()


def torch_pruning_rows(
    data: Path, depth: int, macs: float, images, labels, known: Collection[tuple[str, str]] = (),
    families: Collection[str] = tuple(SETTINGS), at_most: int = STEPS,
) -> Iterator[PeerRow]:  # fmt: skip
    """Every criterion by every setting of `families`, with `macs` of the MACs left (0-1), of those
    that prune in `at_most` steps.

    `images` [N, 3, 32, 32] and `labels` [N] are what criteria and statistics are taken from.
    `known` are criteria and settings to leave out; so are settings that cannot meet `macs`. Raises
    `InputError` where the weights are not there.
    """
    module = trained_resnet(data, depth)
    if module is None:
        raise InputError(f"{data}: no weights of ResNet-{depth} in cnn-resnet-cifar10.")
    seen = torch.from_numpy(images), torch.from_numpy(labels)
    test = tuple(map(torch.from_numpy, cifar10_test(data)))
    return setting_rows(module, macs, seen, test, known, families, at_most)


def setting_rows(
    module, macs: float, seen: tuple, test: tuple, known, families, at_most: int = STEPS
) -> Iterator[PeerRow]:
    dense = size(module)
    for family in families:
        start = followed(module) if family == "all" else module
        for name, criterion in CRITERIA.items():
            score = partial(scored, criterion=criterion, images=seen[0], labels=seen[1])
            settings = {f"{family}, {scope}, {steps}": (scope, steps)
                        for scope, steps in SETTINGS[family] if steps <= at_most}  # fmt: skip
            asked = {words: s for words, s in settings.items() if (name, words) not in known}
            importance = score(start) if asked else None
            for words, (scope, steps) in asked.items():
                try:
                    smaller = in_steps(start, importance, score, family, scope, steps, macs)
                except InputError:
                    continue
                left = [now / before for now, before in zip(size(smaller), dense, strict=True)]
                fresh = with_new_statistics(smaller, seen[0])
                figures = accuracy(smaller, *test), accuracy(fresh, *test)
                yield PeerRow(name, words, *left, *figures)


def best(rows: list[PeerRow], figure: str) -> dict[str, PeerRow]:
    """Of each criterion the row that is best by `figure`."""
    return {row.criterion: row for row in sorted(rows, key=lambda row: getattr(row, figure))}


def table(networks: list[dict]) -> Table:
    out = Table("", "fewer MACs", "criterion", "top-1", "by", "top-1, new BN statistics", "by",
                "MACs left", "parameters left")  # fmt: skip
    for network in networks:
        plain, fresh = (best(network["rows"], f) for f in ("accuracy", "accuracy_bn"))
        for name in plain:
            one, two = plain[name], fresh[name]
            out.add_row(
                f"ResNet-{network['depth']}", f"{network['speedup']:g}x", name,
                f"{one.accuracy:.3f}", one.settings, f"{two.accuracy_bn:.3f}", two.settings,
                f"{two.macs_ratio:.3f}", f"{two.params_ratio:.3f}",
            )  # fmt: skip
    return out


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder with the networks")
    parser.add_argument("--depths", default="20,56")
    parser.add_argument("--speedups", default="2.1,3", help="of MACs")
    parser.add_argument("--family", action="append", choices=list(SETTINGS),
                        help="what is pruned; may be repeated, and is both otherwise")  # fmt: skip
    parser.add_argument("--steps", type=int, default=STEPS, help="prune in at most so many")
    parser.add_argument("--images", type=int, default=1000, help="the first so many for training")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/peers.json")
    args = parser.parse_args(argv)
    with exit_on_error():
        _run(args)


def _run(args) -> None:
    images, labels = (array[: args.images] for array in cifar10_train(args.data))
    images = as_in_training(images, seed=0)
    result = begun(args.out, {"images": args.images}, networks=[])
    networks = {(n["depth"], n["speedup"]): [PeerRow(**row) for row in n["rows"]]
                for n in result["networks"]}  # fmt: skip
    for depth, speedup in product(args.depths.split(","), args.speedups.split(",")):
        key = int(depth), float(speedup)
        rows = networks.setdefault(key, [])
        known = {(row.criterion, row.settings) for row in rows}
        for row in torch_pruning_rows(
            args.data, key[0], 1 / key[1], images, labels, known, args.family or SETTINGS,
            args.steps,
        ):  # fmt: skip
            rows.append(row)
            write_report(result | _report(_listed(networks)), args.out)
    Console(width=150).print(table(_listed(networks)))


def _listed(networks: dict[tuple[int, float], list[PeerRow]]) -> list[dict]:
    return [{"depth": depth, "speedup": speedup, "rows": rows}
            for (depth, speedup), rows in networks.items()]  # fmt: skip


def _report(networks: list[dict]) -> dict:
    peers = {name: importlib.metadata.version(name) for name in ("torch", "torch-pruning")}
    plain = [{**n, "rows": [asdict(row) for row in n["rows"]]} for n in networks]
    return {"peers": peers, "networks": plain}


if __name__ == "__main__":
    main()
