"""Losses on logits that are never whole: hidden states meet the vocabulary a few tokens at a time.

N tokens, D width of the hidden states, V vocabulary, C tokens of a chunk, B rows of the head.

The gradients are taken in the forward pass, while a chunk's logits are there, as in Liger Kernel
(Hsu et al., 2024, https://arxiv.org/abs/2410.10989); the backward pass only scales them.
"""

from collections.abc import Callable, Sequence

import mlx.core as mx

# The head's gradient grows in so many pieces. While an update is under way the next one may have
# to copy what it adds to: a piece then, and not the whole.
PIECES = 16


def projected_loss(
    hidden_ND: mx.array,
    head_VD: mx.array,
    mask_N: mx.array,
    *,
    loss: Callable[..., mx.array],
    chunk: int,
    per_token: Sequence[mx.array] = (),
    bias_V: mx.array | None = None,
    train_head: bool = True,
) -> mx.array:
    """Sum over tokens of `mask * loss`, float32; divide by `mask_N.sum()` for nats per token.

    `loss(logits_CV, *rows)` gives nats [C] for the student's logits (float32) of a chunk and the
    chunk's rows of each array in `per_token` ([N, ...]). Whatever differs by token must come
    through there: only so does a chunk wait for the one before. The teacher's head is closed over:

        loss=lambda logits, hidden: forward_kl(logits, teacher_head(hidden)), per_token=[hidden]
        loss=cross_entropy, per_token=[targets]
        loss=truncated_kl, per_token=[top_logprobs, top_indices]

    Differentiable once in hidden, head and bias, under `mx.grad`, `mx.compile`, `mx.checkpoint`;
    the mask, `per_token` and what `loss` closes over are constants. `train_head=False` leaves the
    gradients of head and bias out, and their cost. Memory above inputs and results does not grow
    with N: the head's gradient (float32) a second time, and some tens of [chunk, V] arrays, as many
    as the evaluator starts ahead (fewer when `mx.set_memory_limit` holds it back).
    Raises ValueError where the shapes do not agree.
    """
    frozen = {} if train_head else {"head": head_VD, "bias": bias_V}
    trained = {"hidden": hidden_ND} | ({"head": head_VD, "bias": bias_V} if train_head else {})
    trained = {name: array for name, array in trained.items() if array is not None}
    _check(hidden_ND, head_VD, mask_N, per_token, bias_V, chunk)

    @mx.custom_function
    def total_and_grads(trained):
        weights = trained | frozen
        return _sweep(weights, mask_N, per_token, loss, chunk, train_head, stepwise=False)

    @total_and_grads.vjp
    def scale(trained, cotangents, outputs):
        upstream, grads = cotangents[0], outputs[1]
        return {name: (upstream * grads[name]).astype(trained[name].dtype) for name in trained}

    return total_and_grads(trained)[0]


def projected_grads(
    hidden_ND: mx.array,
    head_VD: mx.array,
    mask_N: mx.array,
    *,
    loss: Callable[..., mx.array],
    chunk: int,
    per_token: Sequence[mx.array] = (),
    bias_V: mx.array | None = None,
    train_head: bool = True,
) -> tuple[mx.array, dict[str, mx.array]]:
    """`projected_loss` and its gradients, float32 for "head" and "bias", with each chunk evaluated.

    The leanest form: one head's gradient and one chunk's arrays. It cannot be traced; the gradient
    "hidden" goes into `mx.vjp` of the layers below, which runs them a second time.
    """
    _check(hidden_ND, head_VD, mask_N, per_token, bias_V, chunk)
    weights = {"hidden": hidden_ND, "head": head_VD, "bias": bias_V}
    return _sweep(weights, mask_N, per_token, loss, chunk, train_head, stepwise=True)


def _sweep(weights, mask_N, per_token, loss, chunk, train_head, *, stepwise):
    """The sum of the losses, and the gradients by name.

    Either every chunk is evaluated in its turn, or it is made to wait for all results of the one
    before: an evaluator that is free to choose starts the chunks side by side.
    """
    hidden_ND, head_VD, bias_V = weights["hidden"], weights["head"], weights.get("bias")
    pieces = _zeros(head_VD, 1 if stepwise else PIECES) if train_head else []
    sums = {"total": mx.zeros(())}
    hidden_grads, before = [], []
    for start in range(0, len(hidden_ND), chunk):
        rows = [array[start : start + chunk] for array in (hidden_ND, mask_N, *per_token)]
        hidden_CD, mask_C, *rest = mx.depends(rows, before) if before else rows
        total, slope_CV = _slope(hidden_CD, head_VD, bias_V, mask_C, rest, loss)
        sums["total"] = sums["total"] + total
        hidden_grads.append(slope_CV.astype(head_VD.dtype) @ head_VD)
        if train_head:
            pieces = _add_outer(pieces, slope_CV, hidden_CD)
            if bias_V is not None:
                sums["bias"] = sums.get("bias", 0) + slope_CV.sum(axis=0)
        before = [*sums.values(), hidden_grads[-1], *pieces[-1:]]
        if stepwise:
            mx.eval(before)
            before = []
    grads = {"hidden": mx.concatenate(hidden_grads).astype(hidden_ND.dtype)}
    if train_head:
        grads["head"] = mx.concatenate(pieces) if len(pieces) > 1 else pieces[0]
    total = sums.pop("total")
    return total, grads | sums


def _slope(hidden_CD, head_VD, bias_V, mask_C, rest, loss):
    """The masked sum of a chunk's losses, and its gradient by the logits [C, V], float32."""
    logits_CV = hidden_CD @ head_VD.T
    if bias_V is not None:
        logits_CV = logits_CV + bias_V
    weight_C = mask_C.astype(mx.float32)
    (nats_C,), (slope_CV,) = mx.vjp(
        lambda logits: loss(logits, *rest).astype(mx.float32),
        [logits_CV.astype(mx.float32)],
        [weight_C],
    )
    return (nats_C * weight_C).sum(), slope_CV


def _zeros(head_VD: mx.array, count: int) -> list[mx.array]:
    rows, width = head_VD.shape
    size = -(-rows // count)
    return [mx.zeros((min(size, rows - at), width)) for at in range(0, rows, size)]


def _add_outer(pieces_BD, slope_CV, hidden_CD) -> list[mx.array]:
    """Add slope^T hidden to the pieces, one after the other so that the last one ends them all."""
    hidden_CD = hidden_CD.astype(mx.float32)
    out, start = [], 0
    for piece_BD in pieces_BD:
        slope_CB = slope_CV[:, start : start + len(piece_BD)]
        if out:
            (slope_CB,) = mx.depends([slope_CB], [out[-1]])
        out.append(mx.addmm(piece_BD, slope_CB.T, hidden_CD))
        start += len(piece_BD)
    return out


def _check(hidden_ND, head_VD, mask_N, per_token, bias_V, chunk) -> None:
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; give the number of tokens of a chunk, at least 1.")
    if hidden_ND.ndim != 2 or not len(hidden_ND):
        raise ValueError(
            f"hidden has the shape {hidden_ND.shape}; give [tokens, width], tokens > 0."
        )
    if head_VD.ndim != 2 or head_VD.shape[1] != hidden_ND.shape[1]:
        raise ValueError(
            f"head has the shape {head_VD.shape}; for hidden {hidden_ND.shape} give "
            f"[vocabulary, {hidden_ND.shape[1]}]."
        )
    if bias_V is not None and bias_V.shape != head_VD.shape[:1]:
        raise ValueError(f"bias has the shape {bias_V.shape}; give {head_VD.shape[:1]}.")
    if mask_N.shape != hidden_ND.shape[:1]:
        raise ValueError(f"mask has the shape {mask_N.shape}; give {hidden_ND.shape[:1]}.")
    for place, array in enumerate(per_token):
        if array.shape[:1] != hidden_ND.shape[:1]:
            raise ValueError(
                f"per_token[{place}] has {array.shape[:1]} rows; give one for each of the "
                f"{len(hidden_ND)} tokens."
            )
