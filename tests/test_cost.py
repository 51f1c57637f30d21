import math

import mlx.core as mx
import mlx.nn as nn
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_compress.axes import named_axes
from mlx_compress.cost import FLOPS, PRODUCTS, VIEWS, by_module, cost
from mlx_compress.edit import edit_graph
from mlx_compress.errors import InputError
from mlx_compress.execute import OPS
from mlx_compress.graph import Graph, Node, Value, trace
from mlx_compress.patterns import recognise
from mlx_compress.plan import Cut, PrunePlan
from mlx_compress.simplify import simplify
from reference import SHARING, live_bytes
from zoo import build

X = mx.zeros((4, 6))
IMAGES = mx.zeros((2, 9, 8, 6))
TOKENS = mx.array([[3, 1, 4, 1, 5]])


def flops_of(fn, *inputs):
    return cost(trace(fn, *inputs)).flops


def product(fn, *inputs):
    """The cost of the one matrix product of a function."""
    graph = trace(fn, *inputs)
    (spent,) = (c for c, n in zip(cost(graph).nodes, graph.nodes, strict=True) if n.op in PRODUCTS)
    return spent


def last(fn, *inputs):
    """The cost of the node that makes the output."""
    return cost(trace(fn, *inputs)).nodes[-1]


def test_every_primitive_that_runs_has_a_cost():
    assert sorted(set(FLOPS) ^ set(OPS)) == []


COMPOSITES = {
    "Linear": (lambda x, w, b: mx.addmm(b, x, w.T), ((2, 5, 12), (9, 12), (9,))),
    "Attention": (
        lambda q, k, v: mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3),
        ((2, 6, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4)),
    ),
    "RMSNorm": (lambda x, w: mx.fast.rms_norm(x, w, 1e-5), ((2, 5, 12), (12,))),
    "LayerNorm": (lambda x, w, b: mx.fast.layer_norm(x, w, b, 1e-5), ((2, 5, 12), (12,), (12,))),
    "GELU": (nn.gelu, ((2, 5),)),
    "SiLU": (nn.silu, ((2, 5),)),
}


@pytest.mark.parametrize("name", COMPOSITES)
def test_a_composite_costs_what_its_primitives_cost(name):
    fn, shapes = COMPOSITES[name]
    held = {str(k): mx.zeros(shape) for k, shape in enumerate(shapes[1:])}
    plain = simplify(trace(lambda p, x: fn(x, *p.values()), mx.zeros(shapes[0]), parameters=held))
    whole = recognise(plain)
    assert name in [node.op for node in whole.nodes]
    assert (cost(whole).flops, cost(whole).macs) == (cost(plain).flops, cost(plain).macs)


def test_turning_costs_four_products_and_two_sums_for_each_pair():
    graph = recognise(trace(
        lambda x: mx.fast.rope(x, 4, traditional=False, base=10.0, scale=1.0, offset=0),
        mx.zeros((2, 3, 5, 8)),
    ))  # fmt: skip
    (spent,) = (c for c, n in zip(cost(graph).nodes, graph.nodes, strict=True) if n.op == "RoPE")
    assert spent.flops == 2 * 3 * 5 * 2 * 6


def test_unknown_primitives_are_named_all_at_once():
    graph = trace(lambda x: [mx.fft.fft(x), mx.linalg.inv(x[:, :4])], X)
    with pytest.raises(InputError, match="no rule for primitive FFT, Inverse"):
        cost(graph)


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_costs_a_multiply_and_an_add_per_weight_and_row(bias):
    layer, x = nn.Linear(6, 5, bias=bias), mx.zeros((2, 4, 6))
    costs = cost(trace(layer, x))
    assert (costs.flops, costs.macs) == (2 * 8 * 6 * 5, 8 * 6 * 5)
    assert costs.parameters == 30 + 5 * bias
    assert costs.parameter_bytes == 4 * costs.parameters
    assert product(layer, x).bytes_read == 4 * (8 * 6 + 30 + 5 * bias)
    assert product(layer, x).bytes_written == 4 * 8 * 5


CONVOLUTIONS = {
    "dense": ({}, 6 * 10),
    "grouped": ({"groups": 2}, 3 * 10),
    "strided": ({"stride": 2, "padding": 1}, 6 * 10),
    "dilated": ({"dilation": 2}, 6 * 10),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_costs_its_kernel_per_output_place(name):
    choices, channels = CONVOLUTIONS[name]
    layer = nn.Conv2d(6, 10, (3, 2), bias=False, **choices)
    n, height, width, _ = layer(IMAGES).shape
    assert cost(trace(layer, IMAGES)).macs == n * height * width * 3 * 2 * channels


def test_a_depthwise_convolution_costs_its_kernel_per_channel():
    layer = nn.Conv2d(6, 6, 3, groups=6, bias=False)
    assert flops_of(layer, IMAGES) == 2 * (2 * 7 * 6) * 9 * 6


def test_a_transposed_convolution_costs_its_kernel_per_input_place():
    layer = nn.ConvTranspose2d(6, 10, 3, stride=2, bias=False)
    assert cost(trace(layer, IMAGES)).macs == (2 * 9 * 8) * 9 * 6 * 10


def test_attention_costs_its_projections_and_two_products_of_all_pairs():
    layer = nn.MultiHeadAttention(16, 4)
    x = mx.zeros((2, 5, 16))
    expected = 4 * (2 * 5) * 16 * 16 + 2 * 2 * 5 * 5 * 16
    assert cost(trace(layer, x, x, x)).macs == expected


def test_a_llama_costs_two_flops_per_parameter_and_token_and_its_attention():
    graph = trace(build("llama"), TOKENS)
    costs = cost(graph)
    weights = [s for p, s in graph.shapes().items() if len(s) == 2 and "embed" not in p]
    layers, heads, head_dim, tokens = 2, 4, 16, 5
    attention = 2 * layers * heads * tokens * tokens * head_dim
    assert costs.macs == tokens * sum(map(math.prod, weights)) + attention
    assert costs.parameters == sum(map(math.prod, graph.shapes().values()))
    # What is not a product is small even here, with a width of 64.
    assert 2 * costs.macs < costs.flops < 2.1 * costs.macs


def experts_of(x, indices, w):
    return mx.gather_mm(x, w, rhs_indices=indices)


def test_an_expert_layer_costs_the_experts_that_are_routed_to():
    tokens, experts, routes = mx.zeros((3, 1, 1, 6)), mx.zeros((16, 6, 4)), mx.zeros((3, 2))
    routes = routes.astype(mx.uint32)
    index_bytes = 4 * 6 + 4 * 3  # The rows of `tokens` are counted off, and broadcast.
    spent = product(experts_of, tokens, routes, experts)
    assert spent.flops == 2 * 3 * 2 * 6 * 4
    assert spent.bytes_read == 4 * (3 * 6 + 6 * 6 * 4) + index_bytes
    # Where there are more rows than experts, each expert is read once.
    few = product(experts_of, tokens, routes, experts[:5])
    assert few.bytes_read == 4 * (3 * 6 + 5 * 6 * 4) + index_bytes


def test_quantised_products_cost_the_flops_of_dense_ones_and_fewer_bytes():
    w, x, routes = mx.ones((5, 64, 128)), mx.zeros((3, 1, 1, 128)), mx.array([[0], [1], [2]])
    packed = mx.quantize(w)
    dense = product(lambda x, w: x @ w.T, x, w[0])
    spent = product(lambda x, *w: mx.quantized_matmul(x, *w), x, *(part[0] for part in packed))
    assert spent.flops == dense.flops == 2 * 3 * 64 * 128
    weight_bytes = 64 * 128 // 2 + 2 * 4 * 64 * 2
    assert spent.bytes_read == 4 * 3 * 128 + weight_bytes < dense.bytes_read
    routed = product(lambda x, i, *w: mx.gather_qmm(x, *w, rhs_indices=i), x, routes, *packed)
    assert routed.flops == dense.flops
    assert routed.bytes_read == 4 * 3 * 128 + 3 * weight_bytes + 2 * 4 * 3


TABLE = {
    "elementwise": (lambda x: mx.exp(x) + x, 2 * 24),
    "two outputs": (lambda x: mx.divmod(x, x), 2 * 24),
    "broadcast": (lambda x: x[:, :1] * x, 24),
    "reduce": (lambda x: mx.sum(x, axis=0), 24),
    "cumulative": (lambda x: mx.cumsum(x, axis=0), 24),
    "largest": (lambda x: mx.argmax(x, axis=0), 24),
    "sort": (lambda x: mx.sort(x, axis=-1), 24 * 3),
    "rank": (lambda x: mx.argsort(x, axis=0), 24 * 2),
    "partition": (lambda x: mx.argpartition(x, 2), 24),
    "hadamard": (lambda x: mx.hadamard_transform(x[:, :4]), 16 * 2 + 16),
    "cast": (lambda x: x.astype(mx.float16), 0),
    "picked": (lambda x: x[mx.array([1, 0])], 0),
    "joined": (lambda x: mx.concatenate([x, x]), 0),
    "padded": (lambda x: mx.pad(x, 1), 0),
    "edged": (lambda x: mx.pad(x, 1, mode="edge"), 0),
    "added at": (lambda x: x.at[1:3].add(x[:2]), 12),
    "added at indices": (lambda x: x.at[mx.array([0, 1, 1])].add(x[:3]), 18),
    "set at": (lambda x: mx.put_along_axis(x, mx.array([[0]]), mx.array(1.0), 1), 0),
}


@pytest.mark.parametrize("name", TABLE)
def test_what_is_not_a_product_costs_as_stated(name):
    fn, expected = TABLE[name]
    assert flops_of(fn, X) == expected
    assert cost(trace(fn, X)).macs == 0


def test_softmax_and_logsumexp_cost_what_they_cost_written_out():
    def softmax(x):
        exp = mx.exp(x - mx.max(x, axis=-1, keepdims=True))
        return exp / mx.sum(exp, axis=-1, keepdims=True)

    def logsumexp(x):
        top = mx.max(x, axis=-1, keepdims=True)
        return top + mx.log(mx.sum(mx.exp(x - top), axis=-1, keepdims=True))

    assert flops_of(lambda x: mx.softmax(x, axis=-1), X) == flops_of(softmax, X)
    assert flops_of(lambda x: mx.logsumexp(x, -1, keepdims=True), X) == flops_of(logsumexp, X)


def test_a_lookup_reads_what_it_picks_and_not_the_table():
    graph = trace(nn.Embedding(1000, 8), TOKENS)
    gather = cost(graph).nodes[0]
    assert gather.bytes_read == 5 * 8 * 4 + 5 * 4
    assert gather.bytes_written == 5 * 8 * 4


def test_a_broadcast_operand_is_read_once_and_a_slice_only_in_part():
    assert last(lambda x, y: x + y, X, X[0]).bytes_read == 4 * (24 + 6)
    assert last(lambda x: mx.exp(x[1:3]), X).bytes_read == 4 * 12
    assert last(lambda x: x * x, X).bytes_read == 4 * 24


LARGE = mx.zeros((512, 512))
VIEWED = {
    "AsStrided": lambda x: mx.as_strided(x.flatten(), (512, 4), (1, 1), 0),
    "Broadcast": lambda x: mx.broadcast_to(x, (3, 512, 512)),
    "Depends": lambda x: mx.depends(x, TOKENS),
    "ExpandDims": lambda x: x[None],
    "Flatten": lambda x: x.flatten(),
    "Reshape": lambda x: x.reshape(256, 1024),
    "Slice": lambda x: x[1:, ::2],
    "Split": lambda x: mx.split(x, [3], axis=1)[1],
    "Squeeze": lambda x: x[None].squeeze(0),
    "StopGradient": mx.stop_gradient,
    "Transpose": lambda x: x.T,
    "Unflatten": lambda x: mx.unflatten(x, 0, (2, 256)),
    "View": lambda x: x.view(mx.int32),
}


def test_every_view_is_compared_with_mlx():
    assert VIEWS == SHARING == {*VIEWED, "Copy"}  # MLX simplifies a Copy away.


@pytest.mark.parametrize("op", VIEWED)
def test_a_view_costs_nothing_and_mlx_allocates_nothing_for_it(op):
    mx.eval(LARGE, TOKENS)
    before = mx.get_active_memory()
    y = VIEWED[op](LARGE)
    mx.eval(y)
    assert mx.get_active_memory() - before < LARGE.nbytes / 64
    graph = trace(VIEWED[op], LARGE)
    assert op in {node.op for node in graph.nodes} or op == "StopGradient"
    costs = cost(graph)
    assert costs.flops == costs.bytes_read == costs.bytes_written == 0
    assert costs.peak_bytes in (0, LARGE.nbytes)


def simulated(graph):
    nodes = [(node.op, node.inputs, node.outputs) for node in graph.nodes]
    sizes = {i: math.prod(v.shape) * v.dtype.size for i, v in graph.values.items()}
    resident = [*graph.parameters.values(), *graph.constants]
    return live_bytes(nodes, sizes, graph.inputs, graph.outputs, resident)


def views_outlive_their_source(x, unread):
    y = mx.exp(x)
    head, tail = mx.split(y, [2], axis=1)
    total = mx.sin(mx.sin(mx.sin(tail.T)))
    return [total, mx.divmod(total, total)[0], x, head[None]]


MEMORY = {
    "llama": (lambda: build("llama"), TOKENS),
    "mixtral": (lambda: build("mixtral"), TOKENS),
    "attention": (lambda: nn.MultiHeadAttention(8, 2), *[mx.zeros((1, 3, 8))] * 3),
    "views": (lambda: views_outlive_their_source, X, X),
    "nothing": (lambda: lambda x: x, X),
}


@pytest.mark.parametrize("name", MEMORY)
def test_live_bytes_equal_those_of_a_simulated_run(name):
    make, *inputs = MEMORY[name]
    graph = trace(make(), *inputs)
    costs, expected = cost(graph), simulated(graph)
    assert [node.live_bytes for node in costs.nodes] == expected
    assert costs.peak_bytes == max(expected, default=0)
    assert costs.peak_node == (expected.index(max(expected)) if expected else None)


ARITY = {"Exp": (1, 1), "Add": (2, 1), "DivMod": (2, 2), "Reshape": (1, 1), "Split": (1, 2),
         "Depends": (3, 2)}  # fmt: skip


@st.composite
def graphs(draw):
    """Any graph of a few primitives, over two inputs, a parameter and a constant."""
    values = [0, 1, 2, 3]
    nodes = []
    for op in draw(st.lists(st.sampled_from(sorted(ARITY)), max_size=12)):
        reads, writes = ARITY[op]
        inputs = tuple(draw(st.sampled_from(values)) for _ in range(reads))
        nodes.append(Node(op, inputs, tuple(range(len(values), len(values) + writes))))
        values += nodes[-1].outputs
    size = st.integers(1, 50)
    shapes = {i: Value((draw(size),), mx.float32) for i in values}
    outputs = draw(st.lists(st.sampled_from(values), min_size=1, max_size=3))
    return Graph(tuple(nodes), shapes, (0, 1), tuple(outputs), {"w": 2}, {3: mx.zeros(1)})


@settings(max_examples=60, deadline=None, derandomize=True)
@given(graphs())
def test_live_bytes_equal_those_of_a_simulated_run_of_any_graph(graph):
    assert [node.live_bytes for node in cost(graph).nodes] == simulated(graph)


def test_the_peak_is_where_most_activations_are_held():
    def wide(x, w):
        return mx.sum(mx.exp(x @ w), axis=-1)

    graph = trace(lambda p, x: wide(x, p["w"]), X, parameters={"w": mx.zeros((6, 100))})
    costs = cost(graph)
    assert graph.nodes[costs.peak_node].op == "Exp"
    assert costs.peak_bytes == 2 * 4 * 400
    assert costs.parameter_bytes == 4 * 600


def test_bytes_follow_the_dtype_and_flops_do_not():
    full, half = (trace(build("llama"), TOKENS, dtype=d) for d in (mx.float32, mx.float16))
    assert 2 * cost(half).parameter_bytes == cost(full).parameter_bytes
    assert cost(half).bytes_read < 0.6 * cost(full).bytes_read
    assert cost(half).macs == cost(full).macs


def test_constants_are_resident_and_counted_apart():
    table = mx.array([[1.0] * 6] * 100)
    costs = cost(trace(lambda x: x @ table.T, X))
    assert costs.constant_bytes == 2400
    assert costs.parameter_bytes == 0
    assert costs.peak_bytes == 4 * (24 + 400)


def test_flops_are_shared_out_to_the_modules_whose_parameters_are_read():
    graph = trace(build("llama"), TOKENS)
    costs = cost(graph)
    shares = by_module(graph, costs)
    assert sum(shares.values()) == costs.flops
    assert shares["model.layers.0.mlp.up_proj"] == 2 * 5 * 64 * 88
    assert shares["lm_head"] == 2 * 5 * 64 * 101
    assert "model.embed_tokens" not in shares
    assert shares[""] > 2 * 2 * 4 * 2 * 5 * 5 * 16


def test_what_is_computed_from_a_parameter_alone_belongs_to_its_module():
    weights = {"a.w": mx.zeros((5, 6)), "b.w": mx.zeros((3, 5))}
    graph = trace(lambda p, x: x @ (p["a.w"] * 2).T @ (1 + p["b.w"].T), X, parameters=weights)
    assert by_module(graph, cost(graph)) == {"a": 30 + 2 * 4 * 30, "b": 15 + 2 * 4 * 15}


def cut_to(dimension, count):
    keep = list(range(count))
    return Cut(dimension.name, dimension.kind, dimension.size, keep)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_pruning_never_raises_a_cost(name):
    graph = trace(build(name), TOKENS)
    named = named_axes(graph)
    before = vars(cost(graph))
    # Experts are ranked by the router, and such a graph cannot be edited.
    free = [dimension for dimension in named.free() if dimension.kind != "experts"]
    assert {"channels", "heads", "width"} & {dimension.kind for dimension in free}
    for dimension in free:
        plan = PrunePlan({dimension.name: cut_to(dimension, dimension.size // 2)})
        after = vars(cost(edit_graph(named, plan)))
        # A mean over fewer channels gets its own constant, of 4 bytes.
        apart = ("nodes", "peak_node", "constant_bytes")
        assert [k for k in before if k not in apart and after[k] > before[k]] == []
        for falls in ("parameters", "parameter_bytes", "flops", "macs", "bytes_read"):
            assert after[falls] < before[falls]


def test_macs_are_those_of_the_products():
    assert set(PRODUCTS) < set(FLOPS)
    assert cost(trace(lambda x: mx.exp(x @ x.T), X)).macs == 4 * 4 * 6
