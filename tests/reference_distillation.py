"""Slow loops in float64 that losses of distillation must equal."""

import math

import numpy as np


def kl_row(student, teacher, *, temperature, forward):
    """Nats of one row of logits, and the slope by each of the student's, class by class."""

    def probabilities(logits):
        top = max(logits)
        parts = [math.exp((x - top) / temperature) for x in logits]
        return [part / sum(parts) for part in parts]

    def divergence(first, second):
        return sum(a * math.log(a / b) for a, b in zip(first, second, strict=True) if a > 0)

    q, p = probabilities(student), probabilities(teacher)
    pairs = list(zip(q, p, strict=True))
    if forward:
        return divergence(p, q), [(b - a) / temperature for b, a in pairs]
    nats = divergence(q, p)
    return nats, [b * (math.log(b / a) - nats) / temperature if b > 0 else 0.0 for b, a in pairs]


def projected_kl(hidden, head, bias, teacher_logits, mask, *, forward=True):
    """Sum of mask * KL over tokens, and its gradients by hidden, head and bias, token by token."""
    total, by_hidden = 0.0, np.zeros(hidden.shape)
    by_head, by_bias = np.zeros(head.shape), np.zeros(bias.shape)
    for n, state in enumerate(hidden):
        logits = [sum(w * x for w, x in zip(r, state, strict=True)) for r in head] + bias
        nats, slope = kl_row(logits, teacher_logits[n], temperature=1.0, forward=forward)
        total += mask[n] * nats
        for v, by_logit in enumerate(slope):
            by_hidden[n] += mask[n] * by_logit * head[v]
            by_head[v] += mask[n] * by_logit * state
            by_bias[v] += mask[n] * by_logit
    return total, by_hidden, by_head, by_bias


# Losses of distillation: one token at a time, lists of V numbers. A probability of 0 counts as the
# smallest normal float32 where its logarithm is taken.
LOG_ZERO = math.log(2.0**-126)


def log_softmax(logits, temperature=1.0):
    top = max(logits)
    log_total = math.log(sum(math.exp((x - top) / temperature) for x in logits))
    return [
        (x - top) / temperature - log_total if x > -math.inf else LOG_ZERO
        for x in map(float, logits)
    ]


def kl_nats(log_p, log_q):
    return sum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True))


def mixed(log_a, log_b, weight):
    if weight in (0, 1):
        return log_a if weight else log_b
    both = zip(log_a, log_b, strict=True)
    return [np.logaddexp(math.log(weight) + a, math.log(1 - weight) + b) for a, b in both]


def share_of_head(log_p, log_q, mass):
    """Share of sum |p - q| at the likeliest tokens of p while their sum is at most `mass`."""
    total = inside = every = 0.0
    for place, v in enumerate(sorted(range(len(log_p)), key=lambda v: -log_p[v])):
        gap = abs(math.exp(log_p[v]) - math.exp(log_q[v]))
        total += math.exp(log_p[v])
        every += gap
        inside += gap if place == 0 or total <= mass else 0.0
    return inside / every if every else 0.5


def distillation_loss(
    name, student, teacher, *, fixed=None, temperature=1.0, beta=0.5, alpha=0.1, head=0.5, t=None
):
    """Nats of a token by a loss's name; what is constant by definition is taken from `fixed`.

    `fixed` is a pair (student, teacher) of logits, by default the arguments.
    """
    q, p = log_softmax(student, temperature), log_softmax(teacher, temperature)
    fixed_q, fixed_p = (log_softmax(x, temperature) for x in fixed or (student, teacher))
    if name == "forward-kl" or (name == "js" and beta == 0):
        nats = kl_nats(p, q)
    elif name == "reverse-kl" or (name == "js" and beta == 1):
        nats = kl_nats(q, p)
    elif name == "js":
        middle = mixed(p, q, beta)
        nats = beta * kl_nats(p, middle) + (1 - beta) * kl_nats(q, middle)
    elif name == "skew-kl":
        nats = kl_nats(p, mixed(p, q, alpha))
    elif name == "skew-reverse-kl":
        nats = kl_nats(q, mixed(q, p, alpha))
    elif name == "adaptive-kl":
        share = share_of_head(fixed_p, fixed_q, head)
        nats = share * kl_nats(p, q) + (1 - share) * kl_nats(q, p)
    elif name == "taid":
        target = log_softmax([(1 - t) * b + t * a for a, b in zip(p, fixed_q, strict=True)])
        nats = kl_nats(target, q)
    return temperature**2 * nats


def bucketed_token(student, indices, teacher_log_probs):
    """Log-probabilities of the listed tokens and of all others, of student and teacher."""
    probabilities = [math.exp(x) for x in log_softmax(student)]
    others = sum(q for v, q in enumerate(probabilities) if v not in indices)
    rest = 1 - sum(math.exp(x) for x in teacher_log_probs)
    classes = [probabilities[v] for v in indices] + [others]
    return (
        [math.log(q) if q > 0 else -math.inf for q in classes],
        [*map(float, teacher_log_probs), math.log(rest) if rest > 0 else -math.inf],
    )


def taid_steps(losses, *, steps, start, end, alpha, beta):
    """t before the first and after each of the losses of the first of `steps` steps."""
    ts, momentum = [start], 0.0
    for step, loss in enumerate(losses):
        if step == 0:
            ts.append(start)
            continue
        momentum = beta * momentum + (1 - beta) * (losses[step - 1] - loss) / losses[step - 1]
        moved = ts[-1] + alpha / (1 + math.exp(-momentum)) * (1 - ts[-1])
        ts.append(min(end, max(start + (end - start) * step / steps, moved)))
    return ts


def hidden_distance(student, teacher, mask, projection, measure):
    """Mean over counted tokens of the mean square, or 1 - cosine, of projected hidden states."""
    found = []
    for place in np.argwhere(mask):
        s, t = student[tuple(place)] @ projection, teacher[tuple(place)]
        if measure == "mse":
            found.append(sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / len(t))
        else:
            found.append(1 - (s @ t) / math.sqrt((s @ s) * (t @ t)))
    return sum(found) / len(found) if found else 0.0


def map_distance(student, teacher, mask, measure):
    """Mean over counted queries and heads of KL(teacher || student), or of the squared error."""
    if len(student[0]) != len(teacher[0]):
        student, teacher = student.mean(axis=1)[:, None], teacher.mean(axis=1)[:, None]
    found = []
    for b, t in np.argwhere(mask):
        for a, c in zip(student[b, :, t], teacher[b, :, t], strict=True):
            if measure == "kl":
                log_c, log_a = ([math.log(max(x, 2.0**-126)) for x in row] for row in (c, a))
                found.append(kl_nats(log_c, log_a))
            else:
                found.append(sum((x - y) ** 2 for x, y in zip(a, c, strict=True)))
    return sum(found) / len(found) if found else 0.0


def slopes(function, array, step=1e-5):
    """Central differences of a scalar function of an array, number by number."""
    found = np.zeros(array.shape)
    for place in np.ndindex(*array.shape):
        ends = []
        for sign in (1, -1):
            moved = array.astype(np.float64)
            moved[place] += sign * step
            ends.append(function(moved))
        found[place] = (ends[0] - ends[1]) / (2 * step)
    return found
