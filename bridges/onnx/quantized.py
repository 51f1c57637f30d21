"""MLX's quantised weights in ONNX: see `ops.py` for what a rule is."""

from ...errors import InputError


def matmul(x, a, out):
    raise InputError("QuantizedMatmul has no rule.")


def gather_qmm(x, a, out):
    raise InputError("GatherQMM has no rule.")
