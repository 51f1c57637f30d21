"""A fast BLAS in front of the slow one: MLX's Linux wheel brings Netlib's reference BLAS.

A library that is loaded for the whole process before `mlx.core` wins over the wheel's own, because
the linker asks the process first. It helps float32 matmul, SVD and Cholesky; other dtypes and
quantised matmul do not go through BLAS. On a Mac there is nothing to do.
"""

import ctypes
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path


def load() -> str | None:
    """Load a fast BLAS for the whole process and return its name, or None if nothing was loaded.

    Does nothing where there is nothing to gain: not on Linux, or a BLAS is in place already (this
    function's, or one from LD_PRELOAD). Sets MKL_THREADING_LAYER and OMP_WAIT_POLICY unless
    they are set.
    Warns when mlx was imported before, or when no BLAS is found.
    """
    if sys.platform != "linux" or hasattr(ctypes.CDLL(None), "cblas_sgemm"):
        return None
    if "mlx.core" in sys.modules:
        _warn("mlx was imported first, so its slow BLAS stays; import mlx_compress before mlx.")
        return None
    # Shares one thread pool with torch and its like, which come with GNU's OpenMP.
    os.environ.setdefault("MKL_THREADING_LAYER", "GNU")
    # Threads that spin while they wait halve the speed of a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    for library in _candidates():
        try:
            ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return library
    _warn("no fast BLAS was found, float32 matmul is slow; install the mkl wheel or libopenblas0.")
    return None


def _candidates() -> Iterator[str]:
    yield from map(str, Path(sys.prefix, "lib").glob("libmkl_rt.so*"))
    from importlib import metadata  # slow to import, and hardly ever needed

    try:
        files = metadata.files("mkl") or []
    except metadata.PackageNotFoundError:
        files = []
    yield from (str(file.locate()) for file in files if file.name.startswith("libmkl_rt.so"))
    yield from ("libopenblas.so.0", "libopenblas.so")


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)
