"""Losses that hold a student's inner values near a teacher's: hidden states and attention maps.

Everything is computed in float32, and both models (and the projection) get gradients. A token
counts where `mask` [B, T] is not 0; with no token the loss is 0.

B batch, T tokens, D and E widths of student and teacher, H heads, S keys.
"""

import mlx.core as mx

from .errors import InputError
from .losses import SMALLEST, divergence, masked_mean


def hidden_loss(
    student_BTD: mx.array,
    teacher_BTE: mx.array,
    mask: mx.array,
    *,
    measure: str = "mse",
    projection_DE: mx.array | None = None,
) -> mx.array:
    """How far hidden states are apart, a scalar; widths that differ need a projection to learn.

    `measure` is "mse" (mean over E) or "cosine" (1 - cosine, blind to scale).

    Romero et al., 2014 (FitNets), https://arxiv.org/abs/1412.6550
    """
    student, teacher = student_BTD.astype(mx.float32), teacher_BTE.astype(mx.float32)
    if projection_DE is not None:
        student = student @ projection_DE.astype(mx.float32)
    if student.shape != teacher.shape:
        raise InputError(
            f"hidden states of shape {student.shape} for a teacher's {teacher.shape}; "
            f"give a projection [{student_BTD.shape[-1]}, {teacher.shape[-1]}]"
        )
    return masked_mean(HIDDEN_MEASURES[measure](student, teacher), mask)


def attention_loss(
    student_BHTS: mx.array, teacher_BHTS: mx.array, mask: mx.array, *, measure: str = "kl"
) -> mx.array:
    """How far attention maps are apart, a scalar: the mean over heads and counted queries.

    Maps are probabilities, rows over S keys that sum to 1, with 0 at keys that are masked out.
    Heads are compared one by one; where their numbers differ, the mean map of each model is.
    `measure` is "kl", KL(teacher || student) of a row in nats, or "mse", the squared error summed
    over a row (a mean would shrink with padding).

    Jiao et al., 2019 (TinyBERT), https://arxiv.org/abs/1909.10351
    """
    student, teacher = student_BHTS.astype(mx.float32), teacher_BHTS.astype(mx.float32)
    if student.shape[1] != teacher.shape[1]:
        student, teacher = (maps.mean(axis=1, keepdims=True) for maps in (student, teacher))
    if student.shape != teacher.shape:
        raise InputError(
            f"attention maps of shape {student_BHTS.shape} for a teacher's {teacher_BHTS.shape}; "
            "only the number of heads may differ"
        )
    return masked_mean(ATTENTION_MEASURES[measure](student, teacher).mean(axis=1), mask)


def _mean_square(student: mx.array, teacher: mx.array) -> mx.array:
    return mx.square(student - teacher).mean(axis=-1)


def _cosine(student: mx.array, teacher: mx.array) -> mx.array:
    return 1 - (_unit(student) * _unit(teacher)).sum(axis=-1)


def _unit(x: mx.array) -> mx.array:
    """A vector of zeros stays as it is, with a finite gradient."""
    return x * mx.rsqrt(mx.square(x).sum(axis=-1, keepdims=True) + 1e-12)


def _row_kl(student: mx.array, teacher: mx.array) -> mx.array:
    return divergence(*(mx.log(mx.maximum(maps, SMALLEST)) for maps in (teacher, student)))


def _square(student: mx.array, teacher: mx.array) -> mx.array:
    return mx.square(student - teacher).sum(axis=-1)


HIDDEN_MEASURES = {"mse": _mean_square, "cosine": _cosine}
ATTENTION_MEASURES = {"kl": _row_kl, "mse": _square}
