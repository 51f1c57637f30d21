"""The part of the table from ATen to MLX that knows layers: products, convolutions, pools, norms,
attention, resizing.

Images are [N, C, ...] in torch and [N, ..., C] in MLX. The rules in `IMAGES` take their first
argument with the channels last and give it back so; `imported` sees to the order of axes. Weights
stay as torch keeps them and are turned on their way into the operation.
"""

import math
from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from ...errors import InputError

# ---- products


def _add_product(bias, x, weight, beta=1, alpha=1):
    return mx.addmm(bias, x, weight, alpha=alpha, beta=beta)


def _linear(x, weight, bias=None):
    return x @ weight.T if bias is None else mx.addmm(bias, x, weight.T)


# ---- convolutions


def _spread(value, count: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * count if len(values) == 1 else values


def _convolution(
    x, weight, bias, stride, padding, dilation, transposed=False, output_padding=0, groups=1
):
    """x [N, ..., C]; weight [O, C / groups, ...], or transposed [C, O / groups, ...]."""
    count = x.ndim - 2
    stride, padding, dilation, extra = (
        _spread(v, count) for v in (stride, padding, dilation, output_padding)
    )
    spatial = range(2, x.ndim)
    if transposed:
        weight = _turned(weight, groups)
        reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[1:-1], strict=True)]
        low = [r - p for r, p in zip(reach, padding, strict=True)]
        options = {"input_dilation": stride, "flip": True}
        options["padding"] = (low, [n + e for n, e in zip(low, extra, strict=True)])
    else:
        weight = mx.transpose(weight, [0, *spatial, 1])
        options = {"stride": stride, "padding": (padding, padding)}
    y = mx.conv_general(x, weight, kernel_dilation=dilation, groups=groups, **options)
    return y if bias is None else y + bias


def _turned(weight: mx.array, groups: int) -> mx.array:
    """A transposed convolution's weight [C, O / groups, ...] as [O, ..., C / groups]."""
    rest = weight.shape[2:]
    if groups == 1:
        return mx.transpose(weight, [1, *range(2, weight.ndim), 0])
    split = mx.reshape(weight, (groups, -1, *weight.shape[1:]))
    split = mx.transpose(split, [0, 2, *range(3, split.ndim), 1])
    return mx.reshape(split, (groups * weight.shape[1], *rest, -1))


def _plain_convolution(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    if padding == "same":
        spans = zip(weight.shape[2:], _spread(dilation, x.ndim - 2), strict=True)
        total = [d * (k - 1) for k, d in spans]
        x = mx.pad(x, [(0, 0), *((n // 2, n - n // 2) for n in total), (0, 0)])
    padding = 0 if isinstance(padding, str) else padding
    return _convolution(x, weight, bias, stride, padding, dilation, groups=groups)


def _upward_convolution(
    x, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1
):
    return _convolution(x, weight, bias, stride, padding, dilation, True, output_padding, groups)


# ---- pools: one axis after the other


def _windows(n: int, kernel: int, stride: int, padding: int, dilation: int, ceil: bool) -> int:
    """How many windows an axis of n entries has."""
    room = n + 2 * padding - dilation * (kernel - 1) - 1
    count = (math.ceil if ceil else math.floor)(room / stride) + 1
    # A window that would start in the padding behind is not one.
    return count - 1 if ceil and (count - 1) * stride >= n + padding else count


def _pool_axis(x, axis, combine, blank, kernel, stride, padding, dilation, ceil):
    """Combine the entries of each window along one axis; `blank` fills the padding."""
    n = x.shape[axis]
    if (kernel, padding) == (n, 0) and dilation == 1:
        return combine([x], axis)
    if kernel == stride and dilation == 1 and padding == 0 and n % kernel == 0:
        shape = (*x.shape[:axis], n // kernel, kernel, *x.shape[axis + 1 :])
        parts = combine([mx.reshape(x, shape)], axis + 1)
        return mx.squeeze(parts, axis + 1)
    count = _windows(n, kernel, stride, padding, dilation, ceil)
    behind = max(0, (count - 1) * stride + dilation * (kernel - 1) + 1 - n - padding)
    if padding or behind:
        widths = [(padding, behind) if k == axis else (0, 0) for k in range(x.ndim)]
        x = mx.pad(x, widths, constant_values=blank)
    parts = []
    for k in range(kernel):
        start = k * dilation
        end = start + (count - 1) * stride + 1
        parts.append(x[(slice(None),) * axis + (slice(start, end, stride),)])
    return combine(parts, None)


def _combined(pair: Callable, whole: Callable) -> Callable:
    def combine(parts: Sequence[mx.array], axis: int | None) -> mx.array:
        if axis is not None:
            return whole(parts[0], axis=axis, keepdims=True)
        total = parts[0]
        for part in parts[1:]:
            total = pair(total, part)
        return total

    return combine


LARGEST, TOTAL = _combined(mx.maximum, mx.max), _combined(mx.add, mx.sum)


def _max_pool(x, kernel, stride=(), padding=0, dilation=1, ceil_mode=False):
    count = x.ndim - 2
    settings = (kernel, stride or kernel, padding, dilation)
    for k, values in enumerate(zip(*(_spread(v, count) for v in settings), strict=True)):
        x = _pool_axis(x, 1 + k, LARGEST, -math.inf, *values, ceil_mode)
    return x


def _max_pool_with_places(*args, **kwargs):
    return [_max_pool(*args, **kwargs)]


def _average_pool(
    x, kernel, stride=(), padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
):
    count = x.ndim - 2
    settings = (kernel, stride or kernel, padding)
    for k, (size, step, edge) in enumerate(
        zip(*(_spread(v, count) for v in settings), strict=True)
    ):
        counts = _entries(x.shape[1 + k], size, step, edge, ceil_mode, count_include_pad)
        x = _pool_axis(x, 1 + k, TOTAL, 0, size, step, edge, 1, ceil_mode)
        if divisor_override is None:
            shape = (-1, *[1] * (x.ndim - 2 - k))
            x = x * (1 / counts[0] if len(set(counts)) == 1 else _reciprocals(counts, shape))
    return x if divisor_override is None else x / divisor_override


def _reciprocals(counts: Sequence[int], shape) -> mx.array:
    return mx.array(1 / np.array(counts, dtype=np.float32).reshape(shape))


def _entries(n, kernel, stride, padding, ceil, with_padding) -> list[int]:
    """How many entries the average of each window along an axis is taken over."""
    out = []
    for k in range(_windows(n, kernel, stride, padding, 1, ceil)):
        start = k * stride - padding
        end = min(start + kernel, n + padding)
        out.append(end - start if with_padding else min(end, n) - max(start, 0))
    return out


def _adaptive(whole: Callable) -> Callable:
    def rule(x, size):
        for k, count in enumerate(_spread(size, x.ndim - 2)):
            x = _adapt_axis(x, 1 + k, x.shape[1 + k] if count is None else count, whole)
        return x

    return rule


def _adapt_axis(x, axis: int, count: int, whole: Callable) -> mx.array:
    n = x.shape[axis]
    if n == count:
        return x
    if count == 1:
        return whole(x, axis=axis, keepdims=True)
    if n % count == 0:
        shape = (*x.shape[:axis], count, n // count, *x.shape[axis + 1 :])
        return whole(mx.reshape(x, shape), axis=axis + 1)
    bounds = [(k * n // count, -(-(k + 1) * n // count)) for k in range(count)]
    lead = (slice(None),) * axis
    parts = [whole(x[(*lead, slice(*b))], axis=axis, keepdims=True) for b in bounds]
    return mx.concatenate(parts, axis=axis)


# ---- resizing


def _new_sizes(x: mx.array, size, scales) -> list[tuple[int, float]]:
    """Per spatial axis, the new size and how far apart its samples lie in the old one."""
    old = x.shape[1:-1]
    scales = [None] * len(old) if scales is None else _spread(scales, len(old))
    sizes = (
        [int(o * s) for o, s in zip(old, scales, strict=True)]
        if size is None
        else _spread(size, len(old))
    )
    steps = [o / n if s is None else 1 / s for o, n, s in zip(old, sizes, scales, strict=True)]
    return list(zip(sizes, steps, strict=True))


def _nearest(exact: bool) -> Callable:
    def rule(x, size, *scales):
        for k, (n, step) in enumerate(_new_sizes(x, size, _given(scales))):
            old = x.shape[1 + k]
            if n % old == 0:
                x = mx.repeat(x, n // old, axis=1 + k)
                continue
            places = np.floor((np.arange(n) + 0.5 * exact) * step).astype(np.int32)
            x = mx.take(x, mx.array(np.minimum(places, old - 1)), axis=1 + k)
        return x

    return rule


def _given(scales: tuple):
    """Scales come as one list (`vec`) or one number for each axis."""
    values = scales[0] if scales and isinstance(scales[0], Sequence) else scales
    return None if not values or None in values else list(values)


def _by_lines(x, size, align_corners, *scales):
    for k, (n, step) in enumerate(_new_sizes(x, size, _given(scales))):
        old, steps = x.shape[1 + k], np.arange(n)
        if align_corners:
            places = steps * ((old - 1) / max(n - 1, 1))
        else:
            places = np.maximum((steps + 0.5) * step - 0.5, 0)
        low = np.minimum(np.floor(places).astype(np.int32), old - 1)
        share = mx.array((places - low).astype(np.float32).reshape(-1, *[1] * (x.ndim - 2 - k)))
        high = mx.array(np.minimum(low + 1, old - 1))
        first, second = mx.take(x, mx.array(low), axis=1 + k), mx.take(x, high, axis=1 + k)
        x = first + (second - first) * share
    return x


# ---- norms


def _norm_by(x, mean, variance, weight, bias, eps):
    y = (x - mean) * mx.rsqrt(variance + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _batch_norm(x, weight, bias, mean, variance, momentum, eps):
    return [_norm_by(x, mean, variance, weight, bias, eps)]


def _whole_batch_norm(x, weight, bias, mean, variance, training, momentum, eps, *_):
    if training:
        raise InputError("aten.batch_norm in training mode: call eval() before torch.export.")
    return _norm_by(x, mean, variance, weight, bias, eps)


def _norm_of_batch(x, weight, bias, training, momentum, eps):
    axes = list(range(x.ndim - 1))
    mean, variance = (f(x, axis=axes) for f in (mx.mean, mx.var))
    return [_norm_by(x, mean, variance, weight, bias, eps)]


def _group_norm(x, weight, bias, n, channels, spatial, groups, eps):
    parts = mx.reshape(x, (x.shape[0], -1, groups, channels // groups))
    mean, variance = (f(parts, axis=(1, 3), keepdims=True) for f in (mx.mean, mx.var))
    y = mx.reshape((parts - mean) * mx.rsqrt(variance + eps), x.shape)
    y = y if weight is None else y * weight
    return [y if bias is None else y + bias]


def _over_last(x, shape: Sequence[int], *weights):
    """Flatten the axes that a norm runs over, so that they are one."""
    lead = x.ndim - len(shape)
    flat = [x if len(shape) == 1 else mx.flatten(x, lead)]
    return flat + [w if w is None or len(shape) == 1 else mx.flatten(w) for w in weights]


def _layer_norm(x, shape, weight=None, bias=None, eps=1e-5, *_):
    y = mx.fast.layer_norm(*_over_last(x, shape, weight, bias), eps)
    return y if len(shape) == 1 else mx.reshape(y, x.shape)


def _layer_norm_with_statistics(*args):
    return [_layer_norm(*args)]


def _rms_norm(x, shape, weight=None, eps=None):
    eps = float(mx.finfo(x.dtype).eps) if eps is None else eps
    y = mx.fast.rms_norm(*_over_last(x, shape, weight), eps)
    return y if len(shape) == 1 else mx.reshape(y, x.shape)


# ---- attention


def _attention(
    q, k, v, mask=None, dropout=0.0, is_causal=False, *, scale=None, enable_gqa=False
):  # fmt: skip
    """q [..., H, L, D], k [..., KV, T, D], v [..., KV, T, Dv]; a missing head axis is one head."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    shape = q.shape
    q, k, v = (_four_axes(a) for a in (q, k, v))
    length, total = q.shape[-2], k.shape[-2]
    if is_causal and length != total:  # torch lets the first query see the first key only
        mask = mx.arange(length)[:, None] >= mx.arange(total)
    elif is_causal:
        mask = "causal"
    elif mask is not None:
        mask = _four_axes(mask) if mask.ndim > 4 else mask
        mask = mask if mask.dtype == mx.bool_ else mask.astype(q.dtype)
    y = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    return y if len(shape) == 4 else mx.reshape(y, (*shape[:-1], y.shape[-1]))


def _four_axes(x: mx.array) -> mx.array:
    if x.ndim < 4:
        return mx.reshape(x, (*[1] * (4 - x.ndim), *x.shape)) if x.ndim < 3 else x[:, None]
    return x if x.ndim == 4 else mx.flatten(x, 0, x.ndim - 4)


def _flash(q, k, v, dropout=0.0, is_causal=False, *_, attn_mask=None, scale=None):
    return [_attention(q, k, v, attn_mask, 0.0, is_causal, scale=scale)]


def _biased(q, k, v, bias=None, compute=False, dropout=0.0, is_causal=False, *_, scale=None):
    return [_attention(q, k, v, bias, 0.0, is_causal, scale=scale)]


def _overrideable(q, k, v, bias=None, dropout=0.0, is_causal=False, *_, scale=None):
    return [_attention(q, k, v, bias, 0.0, is_causal, scale=scale)]


def _safe_softmax(x, dim, dtype=None):
    """A softmax that gives zeros where every entry is minus infinity."""
    seen = mx.max(x, axis=dim, keepdims=True) > -math.inf
    return mx.where(seen, mx.softmax(x, axis=dim), 0)


def _per_channel_slope(x, weight):
    return mx.where(x > 0, x, weight * x)


# Rules whose first argument, and result, have the channels last.
IMAGES = {
    "convolution": _convolution,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _plain_convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
                    _upward_convolution),
    **dict.fromkeys(("max_pool1d", "max_pool2d", "max_pool3d"), _max_pool),
    **dict.fromkeys(("max_pool2d_with_indices", "max_pool3d_with_indices"), _max_pool_with_places),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "avg_pool3d"), _average_pool),
    **dict.fromkeys(("_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d",
                     "adaptive_avg_pool2d", "adaptive_avg_pool3d"), _adaptive(mx.mean)),
    **dict.fromkeys(("adaptive_max_pool2d", "adaptive_max_pool3d"),
                    lambda x, size: [_adaptive(mx.max)(x, size)]),
    **dict.fromkeys(("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d"),
                    _nearest(exact=False)),
    **dict.fromkeys(("_upsample_nearest_exact1d", "_upsample_nearest_exact2d"),
                    _nearest(exact=True)),
    **dict.fromkeys(("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d"),
                    _by_lines),
    "_native_batch_norm_legit_no_training": _batch_norm,
    "_native_batch_norm_legit.no_stats": _norm_of_batch,
    "batch_norm": _whole_batch_norm,
    "native_group_norm": _group_norm,
}  # fmt: skip

LAYERS = {
    **IMAGES,
    **dict.fromkeys(("addmm", "baddbmm"), _add_product),
    "linear": _linear,
    "native_layer_norm": _layer_norm_with_statistics,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "_fused_rms_norm": lambda *args: [_rms_norm(*args)],
    "scaled_dot_product_attention": _attention,
    "_scaled_dot_product_flash_attention_for_cpu": _flash,
    "_scaled_dot_product_flash_attention": _flash,
    "_scaled_dot_product_efficient_attention": _biased,
    "_scaled_dot_product_cudnn_attention": _biased,
    "_scaled_dot_product_fused_attention_overrideable": _overrideable,
    "_scaled_dot_product_attention_math": lambda *args, dropout_mask=None, **kwargs: [
        _attention(*args, **kwargs)
    ],
    "_safe_softmax": _safe_softmax,
    "_prelu_kernel": _per_channel_slope,
}
