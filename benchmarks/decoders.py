"""Exported decoders on ONNX Runtime's CPU: against its own builder, pruned; how lean the export is.

    python -P -m mlx_compress.benchmarks.decoders --model ../shared/data/lm-books5m --markdown

Peers: the same folder exported by this project and by onnxruntime-genai's builder, in float32 and
with 4-bit weights in blocks of 32 (activations rounded to int8, on both sides), run in one harness
(`sessions.py`). MLX's own 4 bits have a zero point for each block, the builder's have none: ours
are measured in both ways. Goal: at least as fast.

Pruned: prefill in float32 after channels and heads were cut. Goal: of the factor by which FLOPs
fall, at least 0.85 shows as speed.

Lean: a random Llama of 1B parameters in float16, exported in a fresh process. Goal: peak memory at
most 2.5 times the weights.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from ..quantize import part_names
from ..report import machine, write_report
from .lean import Size, write_model
from .sessions import open_session, share_threads, step, times_ms

STEPS = {"prefill 128": (128, 0), "decode at 128": (1, 128), "decode at 1024": (1, 1024)}
CAPACITY, BLOCK = 2048, 32
RANDOM = Size(layers=8, hidden=512, ffn=1536, heads=8, kv_heads=4, vocab=8192)
LARGE = Size()
RATIOS = (0.3, 0.5)
EFFICIENCY_GOAL, MEMORY_GOAL = 0.85, 2.5


def export_ours(folder: Path, out: Path) -> dict[str, Path]:
    """By precision and kind of cache."""
    from ..bridges.onnx.export import export_onnx
    from ..bridges.programs import open_program
    from ..quantize import quantize_program

    program = open_program(folder)
    packed, _ = quantize_program(program, bits=4, group_size=BLOCK)
    kinds = {"fp32": program, "int4": packed, "int4 symmetric": symmetric(program, packed)}
    files = {}
    for precision, one in kinds.items():
        for cache in ("grow", "buffer"):
            path = out / f"{precision.replace(' ', '-')}-{cache}.onnx"
            files[f"{precision} {cache}"] = export_onnx(one, path, cache=cache).path
    return files


def symmetric(program, packed):
    """The packed program with a scale alone for each block, as onnxruntime-genai's builder does."""

    owners = {name: (weight, k) for weight in program.graph.parameters
              for k, name in enumerate(part_names(weight))}  # fmt: skip

    def parts(weight) -> tuple:
        blocks = weight.reshape(weight.shape[0], -1, BLOCK)
        scales = mx.maximum(mx.abs(blocks).max(-1) / 7, 1e-9)
        codes = mx.clip(mx.round(blocks / scales[..., None]) + 8, 0, 15).astype(mx.uint32)
        eights = codes.reshape(weight.shape[0], -1, 8)
        bits = (eights << (4 * mx.arange(8, dtype=mx.uint32))).sum(-1)
        return bits.astype(mx.uint32), scales, -8 * scales

    def one(path: str):
        if path not in owners:
            return program.fetch([path])[path]
        weight, part = owners[path]
        return parts(program.fetch([weight])[weight])[part]

    return replace(packed, fetch=lambda paths: {path: one(path) for path in paths})


def export_theirs(folder: Path, out: Path) -> dict[str, Path]:
    """By precision: onnxruntime-genai's builder, as it is run from the command line."""
    files = {}
    for precision in ("fp32", "int4"):
        place = out / f"genai-{precision}"
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", "local"]
        command += ["-i", str(folder), "-o", str(place), "-p", precision, "-e", "cpu"]
        command += ["-c", str(out / "cache")]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1]
            raise SystemExit(f"onnxruntime-genai's builder failed: {reason}")
        name = {"fp32": "fp32", "int4": "int4 symmetric"}[precision]
        files[f"{name} onnxruntime-genai"] = place / "model.onnx"
    return files


def peers(folder: Path, repeats: int, quantile: float = 0.5) -> dict:
    """Milliseconds of each file and step."""
    config = json.loads((folder / "config.json").read_text())
    sizes = {"vocabulary": config["vocab_size"], "capacity": CAPACITY, "width": config["head_dim"]}
    with tempfile.TemporaryDirectory() as work:
        files = {**export_ours(folder, Path(work)), **export_theirs(folder, Path(work))}
        rows: dict[str, dict[str, float]] = {name: {} for name in files}
        for title, (length, past) in STEPS.items():
            sessions = [open_session(path) for path in files.values()]
            calls = [step(s, length=length, past=past, **sizes) for s in sessions]
            count = max(5, repeats // 4) if length > 1 else repeats
            for name, taken in zip(files, times_ms(calls, count, quantile), strict=True):
                rows[name][title] = taken
    return rows


def pruned(folder: Path, repeats: int, quantile: float = 0.5, threads: int | None = None) -> dict:
    """By ratio: FLOPs, milliseconds of prefill, and how much of the one shows in the other."""
    from ..bridges.onnx.export import export_onnx
    from ..bridges.programs import open_program
    from ..cost import cost
    from ..program import prune_program

    config = json.loads((folder / "config.json").read_text())
    sizes = {"vocabulary": config["vocab_size"], "capacity": CAPACITY, "width": config["head_dim"]}
    dense = open_program(folder)
    programs = {0.0: dense} | {r: prune_program(dense, _plan(dense, r)) for r in RATIOS}
    length, past = STEPS["prefill 128"]
    with tempfile.TemporaryDirectory() as work:
        calls, flops = [], []
        for ratio, program in programs.items():
            path = export_onnx(program, Path(work, f"{ratio}.onnx")).path
            session = open_session(path, threads)
            calls.append(step(session, length=length, past=past, **sizes))
            flops.append(cost(program.at({"batch": 1, "length": length, "past": past})).flops)
        times = times_ms(calls, repeats, quantile)
    rows = {}
    for ratio, work_done, taken in zip(programs, flops, times, strict=True):
        fewer, faster = flops[0] / work_done, times[0] / taken
        rows[f"{ratio:.0%}"] = {
            "gflops": work_done / 1e9, "ms": taken, "fewer": fewer, "faster": faster,
            "efficiency": faster / fewer,
        }  # fmt: skip
    return rows


def _plan(program, ratio: float):
    """Channels in steps of 16 and whole KV groups, at random: only their number matters here."""
    from ..allocate import choose, request
    from ..axes import named_axes
    from ..importance import Sources, random
    from ..options import Options

    options = Options(pruning_ratio=ratio, dims=("channels", "heads"), round_to=16)
    named = named_axes(program.at())
    dims = [d for d in named.free(options.dims) if d.exact and d.size > 1]
    wanted = request(named, dims, options)
    return choose(named, dims, random(Sources(named, tuple(dims), program.fetch)), wanted, options)


def lean_step(folder: Path, out: Path) -> dict:
    """Seconds and peak memory of one export; a process of its own runs this."""
    from ..bridges.onnx.export import export_onnx
    from ..bridges.programs import open_program

    started = time.perf_counter()
    written = export_onnx(open_program(folder), out, dtype="float16")
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "seconds": time.perf_counter() - started,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "weight_bytes": written.weight_bytes,
    }


def lean(size: Size) -> dict:
    with tempfile.TemporaryDirectory() as work:
        write_model(Path(work, "model"), size)
        command = [sys.executable, "-P", "-m", "mlx_compress.benchmarks.decoders", "--step"]
        command += [f"{work}/model", f"{work}/model.onnx"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"export failed with exit code {done.returncode}")
    report = json.loads(done.stdout.splitlines()[-1])
    return report | {"weights_of_memory": report["peak_bytes"] / report["weight_bytes"]}


def write_random(folder: Path, size: Size) -> Path:
    """A random model that onnxruntime-genai's builder opens too."""
    write_model(folder, size)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "eos_token_id": 0,
               "bos_token_id": 0, "max_position_embeddings": CAPACITY}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


def markdown(report: dict) -> str:
    """The tables for a page."""
    out = []
    for model, rows in report.get("peers", {}).items():
        head = "".join(f" {title}, ms |" for title in STEPS)
        out += [f"| {model} |{head}", "|---|" + "---:|" * len(STEPS)]
        out += [f"| {name} | " + " | ".join(f"{ms:.2f}" for ms in row.values()) + " |"
                for name, row in rows.items()]  # fmt: skip
        out.append("")
    for model, rows in report.get("pruned", {}).items():
        out += [f"| {model}, removed | GFLOPs | prefill, ms | fewer | faster | realised |",
                "|---|---:|---:|---:|---:|---:|"]  # fmt: skip
        out += [
            f"| {name} | {r['gflops']:.2f} | {r['ms']:.2f} | {r['fewer']:.2f}x | "
            f"{r['faster']:.2f}x | {r['efficiency']:.2f} |" for name, r in rows.items()
        ]  # fmt: skip
        out.append("")
    if "lean" in report:
        r = report["lean"]
        met = "met" if r["weights_of_memory"] <= MEMORY_GOAL else "MISSED"
        out.append(
            f"1B parameters in float16 ({r['weight_bytes'] / 1e9:.2f} GB): exported in "
            f"{r['seconds']:.0f} s, peak {r['peak_bytes'] / 1e9:.2f} GB, "
            f"{r['weights_of_memory']:.2f} x the weights (goal {MEMORY_GOAL:g}: {met})."
        )
    return "\n".join(out)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, action="append", default=[], help="a Llama's folder")
    parser.add_argument("--parts", default="peers,pruned,lean", help="which of them, by commas")
    parser.add_argument("--repeats", type=int, default=80)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quantile", type=float, default=0.5, help="of the times [the median]")
    parser.add_argument("--out", type=Path, help="JSON [benchmarks/results/decoders.json]")
    parser.add_argument("--markdown", action="store_true", help="print tables as markdown")
    parser.add_argument("--step", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.step:
        print(json.dumps(lean_step(*args.step)))
        return
    share_threads(args.threads)
    parts, report = args.parts.split(","), machine()
    report |= {"threads": args.threads, "quantile": args.quantile}
    if "lean" in parts:  # first: a process starts with the peak memory of the one that forked it
        report["lean"] = lean(LARGE)
    with tempfile.TemporaryDirectory() as work:
        folders = [*args.model, write_random(Path(work, "random-29M"), RANDOM)]
        for part, run in (("peers", peers), ("pruned", pruned)):
            if part in parts:
                report[part] = {f.name: run(f, args.repeats, args.quantile) for f in folders}
    out = args.out or Path(__file__).parent / "results" / "decoders.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_report(report, out)
    print(markdown(report) if args.markdown else json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
