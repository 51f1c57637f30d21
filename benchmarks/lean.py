"""How much memory and time pruning takes: a random Llama of 1B parameters, float16 on disk.

    python -P -m mlx_compress.benchmarks.lean

Plans, prunes, saves and proves by each criterion, every time in a fresh process, against one
forward pass over the same calibration tokens. That pass is stock mlx-lm's model, loaded whole in
float32 (on a CPU, half precision is 30 times slower), in the same batches; only the pass itself is
timed, not the loading. A run counts everything after the interpreter's start: imports, planning,
calibration, scoring, writing the checkpoint, and opening it again with stock mlx-lm. On a machine
with other work, the ratio of CPU times is the steadier one.

The fewer tokens, the harder the goals for time, as reading, writing and proving weigh more.

Goals: memory at most 1.5 times the weights on disk; time at most 3 forward passes for magnitude and
activation, 8 for Taylor.
"""

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import mlx.core as mx
import numpy as np
from rich.console import Console
from rich.table import Table

from ..data import Windows
from ..report import machine, write_report

PARTS = ("weight", "scales", "biases")
MEMORY_GOAL = 1.5
TIME_GOALS = {"magnitude": 3.0, "activation": 3.0, "taylor": 8.0}


@dataclass(frozen=True)
class Size:
    """The model, and the calibration tokens."""

    layers: int = 16
    hidden: int = 2048
    ffn: int = 8192
    heads: int = 32
    kv_heads: int = 8
    vocab: int = 32000
    samples: int = 4
    length: int = 256
    batch_size: int = 2
    ratio: float = 0.25
    refit: int = 0

    def config(self) -> dict:
        return {
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "vocab_size": self.vocab,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "torch_dtype": "float16",
        }

    def windows(self) -> Windows:
        """Random tokens: nothing here depends on what they say."""
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, self.vocab, (self.samples, self.length)).astype(np.int32)
        return Windows(tokens, np.zeros(self.samples, np.int64), Path("random tokens"))

    def shards(self) -> list[dict[str, tuple[int, ...]]]:
        """Shapes by name: the embedding and the last norm, then a shard for each layer."""
        h, kv = self.hidden, self.kv_heads * (self.hidden // self.heads)
        layer = {
            "input_layernorm": (h,),
            "self_attn.q_proj": (h, h),
            "self_attn.k_proj": (kv, h),
            "self_attn.v_proj": (kv, h),
            "self_attn.o_proj": (h, h),
            "post_attention_layernorm": (h,),
            "mlp.gate_proj": (self.ffn, h),
            "mlp.up_proj": (self.ffn, h),
            "mlp.down_proj": (h, self.ffn),
        }
        ends = {"model.embed_tokens.weight": (self.vocab, h), "model.norm.weight": (h,)}
        return [ends] + [
            {f"model.layers.{k}.{name}.weight": shape for name, shape in layer.items()}
            for k in range(self.layers)
        ]


def write_model(folder: Path, size: Size, bits: int | None = None) -> int:
    """A random checkpoint, one shard in memory at a time; returns the bytes of its weights.

    With `bits` matrices are quantised as mlx-lm does, in groups of 64.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng, index, total = np.random.default_rng(0), {}, 0
    shards = size.shards()
    for number, shapes in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        arrays = {name: mx.array(_random(rng, shape)) for name, shape in shapes.items()}
        arrays = _quantised(arrays, bits) if bits else arrays
        mx.save_safetensors(str(folder / file), arrays, metadata={"format": "mlx"})
        total += sum(array.nbytes for array in arrays.values())
        index |= dict.fromkeys(arrays, file)
    document = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document))
    packed = {"quantization": {"group_size": 64, "bits": bits}} if bits else {}
    (folder / "config.json").write_text(json.dumps(size.config() | packed))
    return total


def _quantised(arrays: dict[str, mx.array], bits: int) -> dict[str, mx.array]:
    out = {}
    for name, array in arrays.items():
        if array.ndim == 1:
            out[name] = array
            continue
        parts = mx.quantize(array, group_size=64, bits=bits)
        stem = name.removesuffix("weight")
        out |= {stem + kind: part for kind, part in zip(PARTS, parts, strict=True)}
        mx.eval(parts)
    return out


def _random(rng, shape: tuple[int, ...]) -> np.ndarray:
    if len(shape) == 1:
        return np.ones(shape, np.float16)
    return (rng.standard_normal(shape, np.float32) * 0.02).astype(np.float16)


def forward(folder: Path, size: Size) -> dict:
    """Seconds of one forward pass of the stock model, its weights loaded in float32."""
    from mlx_lm.utils import load_model

    model, _ = load_model(folder, lazy=True)
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    tokens = mx.array(size.windows().tokens)
    mx.eval(model(tokens[:1, :8]))  # the first call sets up threads
    started, busy = time.perf_counter(), time.process_time()
    for start in range(0, size.samples, size.batch_size):
        mx.eval(model(tokens[start : start + size.batch_size]))
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - busy,
    }


def prune(folder: Path, size: Size, criterion: str) -> dict:
    """Seconds of planning and of saving. What was saved is thrown away."""
    started = time.perf_counter()
    from ..bridges.mlx_lm import open_model
    from ..options import Options
    from ..recipe import make_plan, save_pruned

    options = Options(
        pruning_ratio=size.ratio, importance=criterion, batch_size=size.batch_size,
        calibration_samples=size.samples, max_seq_length=size.length, refit=bool(size.refit),
    )  # fmt: skip
    model = open_model(folder)
    planned = make_plan(model, options, size.windows())
    planning = time.perf_counter() - started
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        record = save_pruned(model, planned, Path(scratch, "pruned"))
        seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "cpu_seconds": sum(os.times()[:4]),
        "plan_seconds": planning,
        "kept": planned.kept_parameters,
        "logit_error": record["verified"]["logit_error"],
    }


def step(name: str, folder: Path, size: Size) -> dict:
    """One measurement, with the peak memory of this process and of its children."""
    result = forward(folder, size) if name == "forward" else prune(folder, size, name)
    unit = 1 if sys.platform == "darwin" else 1024
    for key, who in (("rss", resource.RUSAGE_SELF), ("child_rss", resource.RUSAGE_CHILDREN)):
        result[f"{key}_bytes"] = resource.getrusage(who).ru_maxrss * unit
    return result | {"peak_bytes": mx.get_peak_memory()}


def in_fresh_process(name: str, folder: Path, size: Size) -> dict:
    """`step`, so that no measurement sees another's memory."""
    command = [sys.executable, "-P", "-m", "mlx_compress.benchmarks.lean"]
    command += ["--step", name, "--folder", str(folder)]
    command += [f"--{k.replace('_', '-')}={v}" for k, v in asdict(size).items()]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(size: Size, folder: Path, criteria: list[str], say=print) -> dict:
    """All of it. The forward pass is timed before and after, and the mean taken."""
    existing = sorted(folder.glob("model*.safetensors"))
    if existing:
        weights = sum(file.stat().st_size for file in existing)
    else:
        say(f"writing a random model to {folder}")
        weights = write_model(folder, size)
    report = {**machine(), "size": asdict(size), "weight_bytes": weights, "rows": {}}
    passes = []
    for name in ["forward", *criteria, "forward"]:
        row = in_fresh_process(name, folder, size)
        say(
            f"{name}: {row['seconds']:.1f} s ({row['cpu_seconds']:.1f} s of CPU), "
            f"peak {row['peak_bytes'] / 1e9:.2f} GB"
        )
        passes += [row] if name == "forward" else []
        report["rows"][name] = row
    reference = report["rows"]["forward"] | {"passes": [row["seconds"] for row in passes]}
    for key in ("seconds", "cpu_seconds"):
        reference[key] = float(np.mean([row[key] for row in passes]))
    report["rows"]["forward"] = reference
    for name, row in report["rows"].items():
        row["passes_of_time"] = row["seconds"] / reference["seconds"]
        row["passes_of_cpu"] = row["cpu_seconds"] / reference["cpu_seconds"]
        row["weights_of_memory"] = row["peak_bytes"] / weights
        if name in TIME_GOALS:
            fast = row["passes_of_time"] <= TIME_GOALS[name]
            row["met"] = bool(fast and row["weights_of_memory"] <= MEMORY_GOAL)
    return report


HEAD = (
    "", "time, s", "forward passes", "goal", "by CPU time",
    "peak, GB", "x weights", "goal", "RSS, GB",
)  # fmt: skip


def lines(report: dict) -> list[list[str]]:
    """The body of the table. RSS is the larger of the process's and its child's."""
    out = []
    for name, row in report["rows"].items():
        time_goal, memory_goal = TIME_GOALS.get(name), MEMORY_GOAL if name in TIME_GOALS else None
        rss = max(row["rss_bytes"], row["child_rss_bytes"])
        out.append([
            name, f"{row['seconds']:.1f}",
            f"{row['passes_of_time']:.2f}", _goal(row["passes_of_time"], time_goal),
            f"{row['passes_of_cpu']:.2f}",
            f"{row['peak_bytes'] / 1e9:.2f}",
            f"{row['weights_of_memory']:.2f}", _goal(row["weights_of_memory"], memory_goal),
            f"{rss / 1e9:.2f}",
        ])  # fmt: skip
    return out


def _goal(value: float, goal: float | None) -> str:
    return "" if goal is None else f"<= {goal:g} {'met' if value <= goal else 'MISSED'}"


def caption(report: dict) -> str:
    size = Size(**report["size"])
    parameters = sum(int(np.prod(s)) for shard in size.shards() for s in shard.values())
    low, high = min(report["rows"]["forward"]["passes"]), max(report["rows"]["forward"]["passes"])
    return (
        f"Random Llama: {parameters / 1e6:.0f}M parameters, {size.layers} layers, hidden "
        f"{size.hidden}, {report['weight_bytes'] / 1e9:.2f} GB in float16; "
        f"{size.samples} x {size.length} tokens, batches of {size.batch_size}, "
        f"{100 * size.ratio:.0f} % of channels and heads removed. forward: the stock model loaded "
        f"in float32, the pass alone, before and after ({low:.1f} to {high:.1f} s). "
        f"{report['chip']} ({report['device']}), {report['machine']}."
    )


def markdown(report: dict) -> str:
    """The table for the README."""
    rows = ["| " + " | ".join(HEAD) + " |", "|---" + "|---:" * (len(HEAD) - 1) + "|"]
    rows += ["| " + " | ".join(line) + " |" for line in lines(report)]
    return "\n".join([*rows, "", caption(report)])


def _table(report: dict) -> Table:
    table = Table(caption=caption(report), caption_justify="left")
    for k, title in enumerate(HEAD):
        table.add_column(title, justify="right" if k else "left")
    for line in lines(report):
        table.add_row(*line)
    return table


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for one in fields(Size):
        flag = "--" + one.name.replace("_", "-")
        parser.add_argument(flag, type=type(one.default), default=one.default)
    parser.add_argument("--importance", default=",".join(TIME_GOALS), help="criteria, by commas")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the model, or use one kept")
    parser.add_argument("--out", type=Path, help="JSON [benchmarks/results/lean.json]")
    parser.add_argument("--markdown", action="store_true", help="print the table as markdown")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    size = Size(**{one.name: getattr(args, one.name) for one in fields(Size)})
    if args.step:
        print(json.dumps(step(args.step, args.folder, size)))
        return
    console = Console()
    with contextlib.ExitStack() as stack:
        folder = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()), "model")
        report = measure(size, folder, args.importance.split(","), say=console.print)
    out = args.out or Path(__file__).parent / "results" / "lean.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_report(report, out)
    print(markdown(report)) if args.markdown else console.print(_table(report))


if __name__ == "__main__":
    main()
