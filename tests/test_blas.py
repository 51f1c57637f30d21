import subprocess
import sys

import pytest

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="MLX brings a fast BLAS on a Mac")


def run(code):
    return subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)


@linux_only
def test_a_fast_blas_is_there_for_the_whole_process_before_mlx_is():
    result = run(
        "import ctypes, sys, mlx_compress\n"
        "assert hasattr(ctypes.CDLL(None), 'cblas_sgemm')\n"
        "assert 'mlx.core' not in sys.modules\n"
        "assert mlx_compress.blas.load() is None\n"
    )
    assert (result.returncode, result.stderr) == (0, "")


@linux_only
def test_importing_mlx_first_warns_at_the_line_that_imports_us():
    result = run("import mlx.core\nimport mlx_compress\n")
    assert result.returncode == 0
    assert "<string>:2: RuntimeWarning: mlx was imported first" in result.stderr


@linux_only
def test_a_machine_without_a_fast_blas_gets_a_warning():
    result = run(
        "import ctypes\n"
        "load = ctypes.CDLL\n"
        "def none(name, *args, **kwargs):\n"
        "    if name: raise OSError(name)\n"
        "    return load(None)\n"
        "ctypes.CDLL = none\n"
        "import mlx_compress\n"
    )
    assert result.returncode == 0
    assert "no fast BLAS was found" in result.stderr


def test_other_systems_are_left_alone():
    result = run("import sys; sys.platform = 'darwin'; import mlx_compress; import mlx.core")
    assert (result.returncode, result.stderr) == (0, "")
