"""Quantised weights: MLX's codes, scales and biases become one weight of the graph, and of MIL.

MLX keeps a row in groups, each with a scale and a bias: w = scale * code + bias. Core ML's
`constexpr_blockwise_shift_scale` says scale * (code - offset), so the offset is -bias / scale.
"""

from ...graph import Graph


def merge_quantised(graph: Graph) -> Graph:
    return graph
