"""Two processes of `mlx.launch` train as one does, and a lost one ends the other with a line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mlx_compress.distill_recipe import training_place
from mlx_compress.errors import InputError
from mlx_compress.workers import ALONE, Workers
from test_distill_command import BOOKS, TEACHER, arguments, student  # noqa: F401

PROGRAM = """import os, pathlib, sys
pathlib.Path(__file__).with_name("rank-" + os.environ["MLX_RANK"]).write_text(str(os.getpid()))
from mlx_compress.cli import main
sys.argv[0] = "compress"
main()
"""
LAUNCH = Path(sys.executable).with_name("mlx.launch")


def test_parts_of_a_batch_are_the_batch():
    rows = np.arange(8)
    parts = [Workers(rank, 4).part(rows) for rank in range(4)]
    assert sorted(np.concatenate(parts)) == list(rows) and {len(part) for part in parts} == {2}


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(InputError, match="--batch-size 3: 2 processes share a batch; give a mult"):
        Workers(0, 2).check(3)
    ALONE.check(3)


def launched(tmp_path, *command):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    port = str(20_000 + os.getpid() % 20_000)
    words = [LAUNCH, "-n", "2", "--backend", "ring", "--starting-port", port, "--python",
             sys.executable, script, *command]  # fmt: skip
    return subprocess.Popen(
        list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def report(folder):
    return json.loads((folder / "report.json").read_text())["distillation"]


@pytest.mark.timeout(300)
def test_two_processes_train_as_one_does(call, student, tmp_path):  # noqa: F811
    code, _, err = call(*arguments(student, tmp_path / "one"))
    assert code == 0, err
    both = launched(tmp_path, *arguments(student, tmp_path / "two"))
    said, _ = both.communicate()
    assert (tmp_path / "two").exists(), said
    assert said.count("step 4:") == 1  # one of them tells
    one, two = report(tmp_path / "one"), report(tmp_path / "two")
    np.testing.assert_allclose(two["losses"], one["losses"], rtol=1e-4)
    for point, same in zip(two["held_out"], one["held_out"], strict=True):
        assert point == pytest.approx(same, rel=1e-4)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_the_run_with_a_line_and_its_state(call, student, tmp_path, lost):  # noqa: F811
    out = tmp_path / "out"
    command = (*arguments(student, out), "--iters", 10_000)
    both = launched(tmp_path, *command)
    until = time.time() + 120
    while not (training_place(out) / "step-4.safetensors").exists() and time.time() < until:
        time.sleep(0.2)
    os.kill(int((tmp_path / f"rank-{lost}").read_text()), signal.SIGKILL)
    said, _ = both.communicate(timeout=120)
    line = [line for line in said.splitlines() if "error:" in line]
    assert len(line) == 1 and str(training_place(out)) in line[0], said
    assert f"process {2 - lost} of 2: another process of this run was lost" in line[0]
    assert (training_place(out) / "state.json").exists() and not out.exists()
