"""How far a student's next-token distribution q is from a teacher's p: losses of distillation.

    loss(student_logits, teacher_logits, *, temperature=1.0, ...) -> nats per token

Logits are [..., V] of any float type, losses float32 [...]; `masked_mean` makes one number of them.
Both arguments get their gradient, but for what a docstring calls constant. At temperature T both
distributions are softmax(logits / T) and the loss is multiplied by T^2, so that gradients keep
their size (Hinton et al., 2015, https://arxiv.org/abs/1503.02531). A logit of -inf is a probability
of 0; where its logarithm is needed it counts as the smallest normal float32, e^-87, which keeps
reverse divergences finite.
"""

import math
from dataclasses import dataclass, replace

import mlx.core as mx

from .errors import InputError
from .kernels.kl import LOG_ZERO

SMALLEST = 2.0**-126
LOWEST = -1e30


def log_probs(logits: mx.array, temperature: float = 1.0) -> mx.array:
    """log softmax(logits / temperature) over the last axis, finite float32."""
    logits = logits.astype(mx.float32)
    # First, as float32 keeps three decimals of a logit of 1e4.
    logits = (logits - mx.stop_gradient(logits.max(axis=-1, keepdims=True))) / temperature
    found = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return mx.where(found == -mx.inf, LOG_ZERO, found)


def divergence(log_target: mx.array, log_approximation: mx.array) -> mx.array:
    """KL(target || approximation) over the last axis, of finite log-probabilities."""
    return (mx.exp(log_target) * (log_target - log_approximation)).sum(axis=-1)


def forward_kl(
    student_logits: mx.array, teacher_logits: mx.array, *, temperature: float = 1.0
) -> mx.array:
    """KL(p || q): the student covers all that the teacher does."""
    log_q, log_p = _both(student_logits, teacher_logits, temperature)
    return temperature**2 * divergence(log_p, log_q)


def reverse_kl(
    student_logits: mx.array, teacher_logits: mx.array, *, temperature: float = 1.0
) -> mx.array:
    """KL(q || p): the student stays where the teacher is.

    Gu et al., 2023 (MiniLLM), https://arxiv.org/abs/2306.08543
    """
    log_q, log_p = _both(student_logits, teacher_logits, temperature)
    return temperature**2 * divergence(log_q, log_p)


def js(
    student_logits: mx.array,
    teacher_logits: mx.array,
    *,
    temperature: float = 1.0,
    beta: float = 0.5,
) -> mx.array:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q: Jensen-Shannon.

    At most log 2 (beta 0.5); divided by beta it tends to the forward KL as beta goes to 0, divided
    by 1 - beta to the reverse KL as beta goes to 1. beta 0 and 1 *are* those two, as in TRL.

    Agarwal et al., 2023 (GKD), https://arxiv.org/abs/2306.13649
    """
    log_q, log_p = _both(student_logits, teacher_logits, temperature)
    if beta in (0, 1):
        return temperature**2 * (divergence(log_q, log_p) if beta else divergence(log_p, log_q))
    mixed = _mixture(log_p, log_q, beta)
    return temperature**2 * (
        beta * divergence(log_p, mixed) + (1 - beta) * divergence(log_q, mixed)
    )


def skew_kl(
    student_logits: mx.array,
    teacher_logits: mx.array,
    *,
    temperature: float = 1.0,
    alpha: float = 0.1,
) -> mx.array:
    """KL(p || alpha p + (1 - alpha) q): at most -log alpha, with gradients as bounded.

    Ko et al., 2024 (DistiLLM), https://arxiv.org/abs/2402.03898
    """
    log_q, log_p = _both(student_logits, teacher_logits, temperature)
    return temperature**2 * divergence(log_p, _mixture(log_p, log_q, alpha))


def skew_reverse_kl(
    student_logits: mx.array,
    teacher_logits: mx.array,
    *,
    temperature: float = 1.0,
    alpha: float = 0.1,
) -> mx.array:
    """KL(q || (1 - alpha) p + alpha q). Ko et al., 2024 (DistiLLM), as `skew_kl`."""
    log_q, log_p = _both(student_logits, teacher_logits, temperature)
    return temperature**2 * divergence(log_q, _mixture(log_q, log_p, alpha))


def adaptive_kl(
    student_logits: mx.array,
    teacher_logits: mx.array,
    *,
    temperature: float = 1.0,
    head: float = 0.5,
) -> mx.array:
    """w KL(p || q) + (1 - w) KL(q || p), w the share of sum |p - q| in the teacher's head.

    The head is the teacher's likeliest tokens up to a mass of `head`, at least one (as in the
    authors' code; the paper adds the token that passes the mass). w is a constant to the gradient.

    Wu et al., 2024, https://arxiv.org/abs/2404.02657
    """
    log_q, log_p = _both(student_logits, teacher_logits, temperature)
    share = mx.stop_gradient(_share_of_head(mx.exp(log_q), mx.exp(log_p), head))
    return temperature**2 * (
        share * divergence(log_p, log_q) + (1 - share) * divergence(log_q, log_p)
    )


def taid(
    student_logits: mx.array,
    teacher_logits: mx.array,
    *,
    temperature: float = 1.0,
    t: float | mx.array,
) -> mx.array:
    """KL(p_t || q) with p_t = softmax((1 - t) student + t teacher), t from 0 (itself) to 1 (p).

    The student within p_t is a constant to the gradient. `TaidSchedule` says which t to take.

    Shing et al., 2025, https://arxiv.org/abs/2501.16937
    """
    log_q, log_p = _both(student_logits, teacher_logits, temperature)
    target = log_probs((1 - t) * mx.stop_gradient(log_q) + t * log_p)
    return temperature**2 * divergence(target, log_q)


LOSSES = {
    "forward-kl": forward_kl,
    "reverse-kl": reverse_kl,
    "js": js,
    "skew-kl": skew_kl,
    "skew-reverse-kl": skew_reverse_kl,
    "adaptive-kl": adaptive_kl,
    "taid": taid,
}


@dataclass(frozen=True)
class TaidSchedule:
    """The t of `taid` (never falling), with what its next value depends on; plain numbers.

    t is at least the straight line from `start` to `end`, and runs ahead of it while the loss
    falls: each step adds alpha sigmoid(momentum) (1 - t), momentum being the running mean
    (decay `beta`) of the loss's relative fall.
    """

    start: float = 0.4
    end: float = 1.0
    alpha: float = 5e-4
    beta: float = 0.99
    t: float | None = None
    momentum: float = 0.0
    loss: float | None = None

    def __post_init__(self):
        if not 0 <= self.start <= self.end <= 1:
            raise InputError(
                f"TAID from t = {self.start} to {self.end}; take 0 <= start <= end <= 1"
            )
        if self.t is None:
            object.__setattr__(self, "t", self.start)

    def after(self, loss: float, progress: float) -> "TaidSchedule":
        """The schedule after a step of that mean loss; `progress` is the share of steps done, 0-1.

        The first loss is only remembered; one that is not finite changes nothing.
        """
        if not math.isfinite(loss):
            return self
        if self.loss is None:
            return replace(self, loss=loss)
        fall = (self.loss - loss) / max(self.loss, 1e-15)
        momentum = self.beta * self.momentum + (1 - self.beta) * fall
        ahead = self.t + self.alpha * (1 + math.tanh(momentum / 2)) / 2 * (1 - self.t)
        line = self.start + (self.end - self.start) * progress
        return replace(self, t=min(self.end, max(line, ahead)), momentum=momentum, loss=loss)


def cross_entropy(student_logits: mx.array, labels: mx.array) -> mx.array:
    """-log q[label] of each token, float32 [...]; `labels` are integers [...] in 0 .. V - 1.

    Tokens that do not count need a valid label too, 0 for example: no bounds are checked.
    """
    return -mx.take_along_axis(log_probs(student_logits), labels[..., None], axis=-1)[..., 0]


def bucketed(
    student_logits: mx.array, indices: mx.array, teacher_log_probs: mx.array,
    rest: mx.array | None = None,
) -> tuple[mx.array, mx.array]:  # fmt: skip
    """Both distributions over the k tokens that a truncated teacher lists, and one for all others.

    `indices` and `teacher_log_probs` are [..., k]: distinct tokens in any order, and the teacher's
    log-probabilities among all V; `rest` [...] is the logarithm of what they leave over, where it
    is known better than by their sum. Returns float32 log-probabilities [..., k + 1], student
    first, the others last (-inf where there are none): any loss here takes them as logits. Without
    the last class a student could move its mass to tokens that are not listed at no cost. At a
    temperature the others count as one class, since nobody knows how they would spread.
    """
    logits = student_logits.astype(mx.float32)
    logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    listed = mx.zeros(logits.shape, dtype=mx.bool_)
    listed = mx.put_along_axis(listed, indices, mx.array(True), axis=-1)
    # Summed, not 1 - sum(listed): a small rest keeps its digits. Of -inf alone the gradient is NaN.
    others = mx.maximum(mx.where(listed, LOWEST, logits), LOWEST)
    others = mx.logsumexp(others, axis=-1, keepdims=True)
    others = mx.where(others <= LOWEST, -mx.inf, others)
    student = mx.concatenate([mx.take_along_axis(logits, indices, axis=-1), others], axis=-1)
    teacher = teacher_log_probs.astype(mx.float32)
    if rest is None:
        left = 1 - mx.exp(teacher).sum(axis=-1)
        rest = mx.where(left > 0, mx.log(mx.where(left > 0, left, 1)), -mx.inf)
    others = rest.astype(mx.float32)[..., None]
    return student, mx.concatenate([teacher, others], axis=-1)


def masked_mean(per_token: mx.array, mask: mx.array) -> mx.array:
    """Mean over the tokens whose `mask` (bool or number, same shape) is not 0.

    Values elsewhere may be anything. With no token at all it is 0, and so is its gradient: a batch
    of prompts alone teaches nothing.
    """
    if per_token.shape != mask.shape:
        raise InputError(f"a mask of shape {mask.shape} for losses of shape {per_token.shape}")
    counts = mask != 0
    return mx.where(counts, per_token, 0).sum() / mx.maximum(counts.sum(), 1)


def _both(student_logits, teacher_logits, temperature) -> tuple[mx.array, mx.array]:
    if student_logits.shape != teacher_logits.shape:
        raise InputError(
            f"student logits of shape {student_logits.shape}, teacher's {teacher_logits.shape}; "
            "distillation needs one vocabulary, and padding of the larger one cut off"
        )
    if not temperature > 0:
        raise InputError(f"temperature {temperature}; give a number above 0")
    return log_probs(student_logits, temperature), log_probs(teacher_logits, temperature)


def _mixture(log_a: mx.array, log_b: mx.array, weight: float) -> mx.array:
    """log(weight a + (1 - weight) b)."""
    if weight in (0, 1):
        return log_a if weight else log_b
    return mx.logaddexp(math.log(weight) + log_a, math.log1p(-weight) + log_b)


def _share_of_head(q: mx.array, p: mx.array, mass: float) -> mx.array:
    """Half where p and q are the same."""
    order = mx.argsort(-p, axis=-1)
    gap = mx.take_along_axis(mx.abs(p - q), order, axis=-1)
    total = mx.cumsum(mx.take_along_axis(p, order, axis=-1), axis=-1)
    head = (total <= mass) | (mx.arange(p.shape[-1]) == 0)
    every = gap.sum(axis=-1)
    return mx.where(every > 0, (gap * head).sum(axis=-1) / mx.maximum(every, SMALLEST), 0.5)
