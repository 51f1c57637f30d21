"""The benchmark of exported decoders measures what it says, on models small enough for a test."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx_compress.benchmarks import decoders
from mlx_compress.benchmarks.lean import Size
from mlx_compress.benchmarks.sessions import open_session, step, times_ms
from mlx_compress.bridges.programs import open_program

import tiny
from mlx_compress.quantize import part_names, quantize_program

SMALL = Size(layers=1, hidden=64, ffn=128, heads=4, kv_heads=2, vocab=50)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return decoders.write_random(tmp_path_factory.mktemp("models") / "small", SMALL)


def test_every_file_of_ours_runs_in_the_harness(folder, tmp_path):
    files = decoders.export_ours(folder, tmp_path)
    assert len(files) == 6
    calls = [
        step(open_session(path, 1), length=length, past=past, vocabulary=50, width=16, capacity=64)
        for path in files.values() for length, past in ((5, 0), (1, 9))
    ]  # fmt: skip
    assert all(ms > 0 for ms in times_ms(calls, 2))


def test_symmetric_blocks_are_their_weights_rounded(folder):
    program = open_program(folder)
    packed, _ = quantize_program(program, bits=4, group_size=32)
    made = decoders.symmetric(program, packed)
    name = "model.layers.0.mlp.up_proj.weight"
    parts = made.fetch(part_names(name))
    got = mx.dequantize(*parts.values(), 32, 4)
    weight = program.fetch([name])[name]
    largest = mx.abs(weight.reshape(128, -1, 32)).max(-1, keepdims=True)
    off = mx.abs((got - weight).reshape(128, -1, 32)) / largest
    assert off.max().item() <= 1 / 14 + 1e-6


def test_cutting_half_halves_the_work_of_the_blocks(folder):
    rows = decoders.pruned(folder, 2, threads=1)
    assert list(rows) == ["0%", "30%", "50%"]
    assert rows["50%"]["gflops"] < rows["30%"]["gflops"] < rows["0%"]["gflops"]
    assert rows["50%"]["efficiency"] == pytest.approx(
        rows["50%"]["faster"] / rows["50%"]["fewer"]
    )


def test_the_tables_hold_what_was_measured():
    steps = dict.fromkeys(decoders.STEPS, 1.25)
    row = {"gflops": 2.0, "ms": 3.0, "fewer": 1.5, "faster": 1.4, "efficiency": 0.93}
    lean = {"weight_bytes": 2e9, "seconds": 5.0, "peak_bytes": 6e9, "weights_of_memory": 3.0}
    report = {"peers": {"m": {"fp32 grow": steps}}, "pruned": {"m": {"30%": row}}, "lean": lean}
    page = decoders.markdown(report)
    assert "| fp32 grow | 1.25 | 1.25 | 1.25 |" in page
    assert "| 30% | 2.00 | 3.00 | 1.50x | 1.40x | 0.93 |" in page
    assert "3.00 x the weights (goal 2.5: MISSED)" in page


def test_one_export_reports_its_memory(tmp_path):
    tiny.save({**tiny.LLAMA, "head_dim": 16}, tmp_path / "model")
    report = decoders.lean_step(tmp_path / "model", tmp_path / "x.onnx")
    assert report["peak_bytes"] > report["weight_bytes"] > 0
    assert json.dumps(report) and np.isfinite(report["seconds"])
