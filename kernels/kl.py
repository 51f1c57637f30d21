"""Forward and reverse Kullback-Leibler divergence of logits, with the gradient in the same pass.

R rows (tokens), V vocabulary; q is the student's distribution, p the teacher's.
Both are defined by `reference_rows`. On Metal a kernel takes its place, once it has shown on a
random case that it gives the same; where it does not, it steps aside with a warning.
"""

import functools
import math
import warnings
from collections.abc import Callable

import mlx.core as mx

Rows = Callable[[mx.array, mx.array, float, bool], tuple[mx.array, mx.array]]

LOG_ZERO = -126 * math.log(2)  # of the smallest normal float32
THREADS = 512  # of a row, in simdgroups of 32; at most 32 simdgroups fit in `shared`

# One rounding of the gradient's dtype, and float32 sums in another order.
TOLERANCE = {mx.float32: 1e-4, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}


def forward_kl(
    student_logits: mx.array, teacher_logits: mx.array, *, temperature: float = 1.0
) -> mx.array:
    """T^2 KL(p || q) in nats, float32 [...], of logits [..., V] divided by the temperature T.

    Classes to which p gives nothing count nothing, whatever their logits; where q alone gives
    nothing, its logarithm counts as `LOG_ZERO`. Both gradients are exact, but for such a class.
    Raises ValueError where shapes differ or the temperature is not above 0.
    """
    return _divergence(student_logits, teacher_logits, temperature, forward=True)


def reverse_kl(
    student_logits: mx.array, teacher_logits: mx.array, *, temperature: float = 1.0
) -> mx.array:
    """KL(q || p) in nats: as `forward_kl`, the student's distribution first."""
    return _divergence(student_logits, teacher_logits, temperature, forward=False)


def _divergence(student, teacher, temperature, *, forward: bool) -> mx.array:
    if student.shape != teacher.shape:
        raise ValueError(
            f"student logits {student.shape} and teacher logits {teacher.shape} differ in shape; "
            "give both over one vocabulary."
        )
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; give a number above 0.")

    @mx.custom_function
    def nats_and_slope(student, teacher):
        flat = [logits.reshape(-1, logits.shape[-1]) for logits in (student, teacher)]
        nats_R, slope_RV = _pick(student.dtype, forward)(*flat, temperature, forward)
        return nats_R.reshape(student.shape[:-1]), slope_RV.reshape(student.shape)

    @nats_and_slope.vjp
    def scale(primals, cotangents, outputs):
        student, teacher = primals
        by_student = (cotangents[0][..., None] * outputs[1]).astype(student.dtype)
        # Costs nothing unless somebody asks for it.
        _, (by_teacher,) = mx.vjp(
            lambda logits: reference_rows(student, logits, temperature, forward)[0],
            [teacher],
            [cotangents[0]],
        )
        return by_student, by_teacher

    return temperature**2 * nats_and_slope(student, teacher)[0]


def reference_rows(
    student: mx.array, teacher: mx.array, temperature: float, forward: bool
) -> tuple[mx.array, mx.array]:
    """Nats [R] in float32, and their gradient by the student's logits [R, V] in its dtype."""
    (q, log_q), (p, log_p) = (_softmax(logits, temperature) for logits in (student, teacher))
    weight, first, second = (p, log_p, log_q) if forward else (q, log_q, log_p)
    ratio = mx.where(weight > 0, first - second, 0)
    nats = (weight * ratio).sum(axis=-1)
    slope = q - p if forward else q * (ratio - nats[..., None])
    return nats, (slope / temperature).astype(student.dtype)


def _softmax(logits: mx.array, temperature: float) -> tuple[mx.array, mx.array]:
    """Probabilities and their logarithms, of 0 `LOG_ZERO`: exponentials are what costs on a CPU, so
    each is once."""
    logits = logits.astype(mx.float32)
    below = (logits - mx.stop_gradient(logits.max(axis=-1, keepdims=True))) / temperature
    powers = mx.exp(below)
    total = powers.sum(axis=-1, keepdims=True)
    logs = below - mx.log(total)
    return powers / total, mx.where(logs == -mx.inf, LOG_ZERO, logs)


def metal_rows(
    student: mx.array, teacher: mx.array, temperature: float, forward: bool
) -> tuple[mx.array, mx.array]:
    """`reference_rows` by the Metal kernel: one threadgroup for each row of [R, V]."""
    return _kernel()(
        inputs=[student, teacher, mx.array([1 / temperature], mx.float32)],
        template=[("T", student.dtype), ("FORWARD", forward)],
        grid=(THREADS, len(student), 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[student.shape[:1], student.shape],
        output_dtypes=[mx.float32, student.dtype],
    )


@functools.cache
def _kernel():
    return mx.fast.metal_kernel(
        name="kl_rows",
        input_names=["student", "teacher", "inverse_temperature"],
        output_names=["nats", "slope"],
        header=HEADER,
        source=SOURCE,
    )


def _pick(dtype: mx.Dtype, forward: bool) -> Rows:
    return metal_rows if on_metal() and _proven(dtype, forward) else reference_rows


def on_metal() -> bool:
    """Whether arrays are computed by Metal now."""
    return mx.metal.is_available() and mx.default_device().type == mx.DeviceType.gpu


@functools.cache
def _proven(dtype: mx.Dtype, forward: bool) -> bool:
    return agrees(metal_rows, dtype, forward)


def agrees(candidate: Rows, dtype: mx.Dtype, forward: bool) -> bool:
    """Whether `candidate` equals the reference on a random case; warns where it does not.

    Three rows of 1,031 classes at temperature 2, the last class at minus infinity in both, the
    first in the distribution alone that is approximated with.
    """
    keys = mx.random.split(mx.random.key(0))
    case = [3 * mx.random.normal((3, 1031), key=key) for key in keys]
    last, both = mx.arange(1031) == 1030, mx.arange(1031) % 1030 == 0
    ends = (both, last) if forward else (last, both)
    case = [mx.where(end, -mx.inf, logits).astype(dtype)
            for end, logits in zip(ends, case, strict=True)]  # fmt: skip
    try:
        found = candidate(*case, 2.0, forward)
        mx.eval(found)
    except (RuntimeError, ValueError) as error:
        return _step_aside(f"failed: {str(error).strip().partition(chr(10))[0]}", dtype)
    for name, got, want in zip(
        ("values", "gradients"), found, reference_rows(*case, 2.0, forward), strict=True
    ):
        if not mx.allclose(got, want, rtol=TOLERANCE.get(want.dtype, 1e-4), atol=1e-6).item():
            return _step_aside(f"gives other {name} than plain MLX", dtype)
    return True


def _step_aside(reason: str, dtype: mx.Dtype) -> bool:
    warnings.warn(
        f"the Metal kernel of KL divergences ({dtype}) {reason}; plain MLX is used instead.",
        stacklevel=2,
    )
    return False


# The maximum of nothing is the lowest finite number, not minus infinity, whose difference from
# itself is not a number.
HEADER = """
inline float finite(float log) {
  return log < -FLT_MAX ? LOG_ZERO : log;
}

inline float group_sum(float value, threadgroup float* shared, uint lane, uint group, uint groups) {
  value = metal::simd_sum(value);
  if (lane == 0) {
    shared[group] = value;
  }
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  value = metal::simd_sum(lane < groups ? shared[lane] : 0.0f);
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  return value;
}

inline float group_max(float value, threadgroup float* shared, uint lane, uint group, uint groups) {
  value = metal::simd_max(value);
  if (lane == 0) {
    shared[group] = value;
  }
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  value = metal::simd_max(lane < groups ? shared[lane] : -FLT_MAX);
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  return value;
}
""".replace("LOG_ZERO", f"{LOG_ZERO:.8f}f")

SOURCE = """
  threadgroup float shared[32];
  const uint lane = thread_index_in_simdgroup;
  const uint group = simdgroup_index_in_threadgroup;
  const uint groups = simdgroups_per_threadgroup;
  const uint first = thread_position_in_threadgroup.x;
  const uint stride = threads_per_threadgroup.x;
  const uint row = threadgroup_position_in_grid.y;
  const uint vocabulary = student_shape[1];
  const size_t start = size_t(row) * vocabulary;
  const float scale = inverse_temperature[0];

  float q_top = -FLT_MAX;
  float p_top = -FLT_MAX;
  float q_total = 0.0f;
  float p_total = 0.0f;
  for (uint v = first; v < vocabulary; v += stride) {
    const float q_logit = scale * static_cast<float>(student[start + v]);
    const float p_logit = scale * static_cast<float>(teacher[start + v]);
    const float q_higher = metal::max(q_top, q_logit);
    const float p_higher = metal::max(p_top, p_logit);
    q_total = q_total * metal::exp(q_top - q_higher) + metal::exp(q_logit - q_higher);
    p_total = p_total * metal::exp(p_top - p_higher) + metal::exp(p_logit - p_higher);
    q_top = q_higher;
    p_top = p_higher;
  }
  const float q_highest = group_max(q_top, shared, lane, group, groups);
  const float p_highest = group_max(p_top, shared, lane, group, groups);
  q_total = group_sum(q_total * metal::exp(q_top - q_highest), shared, lane, group, groups);
  p_total = group_sum(p_total * metal::exp(p_top - p_highest), shared, lane, group, groups);
  const float q_log_total = q_highest + metal::log(q_total);
  const float p_log_total = p_highest + metal::log(p_total);

  float divergence = 0.0f;
  for (uint v = first; v < vocabulary; v += stride) {
    const float log_q = finite(scale * static_cast<float>(student[start + v]) - q_log_total);
    const float log_p = finite(scale * static_cast<float>(teacher[start + v]) - p_log_total);
    const float weight = metal::exp(FORWARD ? log_p : log_q);
    if (weight > 0.0f) {
      divergence += weight * (FORWARD ? log_p - log_q : log_q - log_p);
    }
  }
  divergence = group_sum(divergence, shared, lane, group, groups);
  if (first == 0) {
    nats[row] = divergence;
  }

  for (uint v = first; v < vocabulary; v += stride) {
    const float log_q = finite(scale * static_cast<float>(student[start + v]) - q_log_total);
    const float log_p = finite(scale * static_cast<float>(teacher[start + v]) - p_log_total);
    const float q = metal::exp(log_q);
    float by_logit = 0.0f;
    if (FORWARD) {
      by_logit = q - metal::exp(log_p);
    } else if (q > 0.0f) {
      by_logit = q * (log_q - log_p - divergence);
    }
    slope[start + v] = static_cast<T>(scale * by_logit);
  }
"""
