"""Slow and obvious versions of the maths: plain loops that the fast code must equal."""

import itertools
import math

import numpy as np


def token_losses(logits_NTV, windows_NT):
    """-log softmax(logits)[target] of each token but the first, one at a time."""
    losses = np.zeros((len(windows_NT), len(windows_NT[0]) - 1))
    for n, window in enumerate(windows_NT):
        for t in range(len(window) - 1):
            logits = [float(x) for x in logits_NTV[n][t]]
            top = max(logits)
            log_total = top + math.log(sum(math.exp(x - top) for x in logits))
            losses[n, t] = log_total - logits[window[t + 1]]
    return losses


def top_tokens(logits_NTV):
    """The first of the largest logits at each position but the last."""
    return [[list(row).index(max(row)) for row in window[:-1]] for window in logits_NTV]


def bootstrap_ratios(numerator, denominator, *, seed, resamples):
    """Sorted sum(numerator) / sum(denominator) of each resample of the windows."""
    rng = np.random.default_rng(seed)
    count = len(numerator)
    ratios = []
    for _ in range(resamples):
        drawn = [int(rng.integers(count)) for _ in range(count)]
        ratios.append(sum(numerator[i] for i in drawn) / sum(denominator[i] for i in drawn))
    return sorted(ratios)


def percentile(ordered, percent):
    """Linear interpolation between the two nearest of sorted values."""
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


SHARING = {
    "AsStrided", "Broadcast", "Copy", "Depends", "ExpandDims", "Flatten", "Reshape", "Slice",
    "Split", "Squeeze", "StopGradient", "Transpose", "Unflatten", "View",
}  # fmt: skip


def live_bytes(nodes, sizes, inputs, outputs, resident):
    """Bytes in memory while each node runs: run them, and after each throw away what is not needed.

    `nodes` are (op, inputs, outputs), `sizes` the bytes of each value; `resident` ones are not
    counted. A SHARING op makes no buffer: Depends hands on its inputs, the others the first.
    """
    buffer = {i: i for i in [*inputs, *resident]}
    memory = {i: sizes[i] for i in inputs}
    history = []
    for position, (op, reads, writes) in enumerate([(None, [], []), *nodes]):
        for slot, value in enumerate(writes):
            if op in SHARING:
                buffer[value] = buffer[reads[slot] if op == "Depends" else reads[0]]
            else:
                buffer[value] = value
                memory[value] = sizes[value]
        history.append(sum(memory.values()))
        needed = {value for _, reads, _ in nodes[position:] for value in reads} | set(outputs)
        kept = {buffer[value] for value in needed if value in buffer}
        memory = {owner: size for owner, size in memory.items() if owner in kept}
    return history[1:]


def survivors(shape, coordinates, cuts):
    """For each slot of a parameter, whether all units that it belongs to are kept.

    `coordinates` gives, for each axis, {dimension: unit of each slot, or -1}.
    """
    alive = np.ones(shape, dtype=bool)
    for index in np.ndindex(*shape):
        units = [
            {name: int(of[i]) for name, of in axis.items()}
            for i, axis in zip(index, coordinates, strict=True)
        ]
        for axis in units:
            for name, unit in axis.items():
                if name not in cuts or unit < 0:
                    continue
                keep, outer = cuts[name].keep, cuts[name].within
                if outer is not None:
                    (row,) = {there[outer] for there in (axis, *units) if outer in there}
                    keep = keep[row]
                alive[index] &= unit in keep
    return alive


def layer_scores(values, weights):
    """Scores of a block or a branch from x, the terms that it adds, and the slopes at them."""
    x, outs, slopes = values
    turned, grown, count = 0.0, 0.0, 0
    for at in np.ndindex(*x.shape[:-1]):
        before = [float(v) for v in x[at]]
        added = [sum(float(out[at][j]) for out in outs) for j in range(x.shape[-1])]
        after = [a + b for a, b in zip(before, added, strict=True)]
        norms = [math.sqrt(sum(v * v for v in each)) for each in (before, added, after)]
        dot = sum(a * b for a, b in zip(before, after, strict=True))
        turned += 1 - dot / (norms[0] * norms[2])
        grown += norms[1] / norms[0]
        count += 1
    change = 0.0
    for n in range(len(x)):
        change += abs(sum(float((o[n] * s[n]).sum()) for o, s in zip(outs, slopes, strict=True)))
    return {
        "magnitude": math.sqrt(sum(float((w.astype(float) ** 2).sum()) for w in weights)),
        "activation": turned / count,
        "wanda": grown / count,
        "taylor": change / len(x),
    }


def unit_norms(arrays, unit):
    """Sum over parameters of the L2 norm of the entries that belong to a unit.

    `unit` maps a parameter's path to {axis: the indices on it}; an axis left out is taken whole.
    """
    total = 0.0
    for path, where in unit.items():
        square = 0.0
        for place, x in np.ndenumerate(np.array(arrays[path])):
            if all(place[axis] in indices for axis, indices in where.items()):
                square += float(x) ** 2
        total += math.sqrt(square)
    return total


def handed_on(batches, slots):
    """L2 over slots of the mean over batches of the L2 norm over a batch's rows, [rows, slots]."""
    total = 0.0
    for slot in slots:
        norms = [math.sqrt(sum(float(row[slot]) ** 2 for row in rows)) for rows in batches]
        total += (sum(norms) / len(norms)) ** 2
    return math.sqrt(total)


def weight_times_input(weight_ON, batches, slots):
    """Sum over slots of sum |W| over the outputs, times the L2 norm of the inputs over all rows."""
    total = 0.0
    for slot in slots:
        norm = math.sqrt(sum(float(row[slot]) ** 2 for rows in batches for row in rows))
        total += sum(abs(float(out[slot])) for out in weight_ON) * norm
    return total


def weight_times_gradient(pairs, slots):
    """Sum over slots of |sum over outputs of w * dL/dw|; `pairs` of [outputs, slots] add up."""
    total = 0.0
    for slot in slots:
        inner = 0.0
        for weight_ON, gradient_ON in pairs:
            for w, g in zip(weight_ON, gradient_ON, strict=True):
                inner += float(w[slot]) * float(g[slot])
        total += abs(inner)
    return total


def sums_by_unit(array, coordinates, name, outer, sizes):
    """Each entry added to the unit of `name` that it belongs to, once for each axis that says so.

    `coordinates` gives, for each axis, {dimension: unit of each slot, or -1}. With `outer` the
    result is [units of `outer`, units of `name`].
    """
    total = np.zeros((sizes[outer], sizes[name]) if outer else sizes[name])
    for place, x in np.ndenumerate(array):
        units = [
            {dim: int(of[i]) for dim, of in axis.items()}
            for i, axis in zip(place, coordinates, strict=True)
        ]
        for axis in units:
            unit = axis.get(name, -1)
            row = next((u[outer] for u in units if outer in u), -1) if outer else 0
            if unit >= 0 and row >= 0:
                total[(row, unit) if outer else unit] += x
    return total


def weights_times_variance(weight_ON, batches, slots):
    """Sum over slots of the variance of the inputs over all rows, times the sum of W^2."""
    total = 0.0
    for slot in slots:
        column = [float(row[slot]) for rows in batches for row in rows]
        mean = sum(column) / len(column)
        variance = sum((x - mean) ** 2 for x in column) / len(column)
        total += variance * sum(float(out[slot]) ** 2 for out in weight_ON)
    return total


def squared_weight_times_gradient(pairs, slots):
    """Sum over slots and over `pairs` of [outputs, slots] of (sum over outputs of w * dL/dw)^2."""
    return sum(weight_times_gradient([pair], [slot]) ** 2 for pair in pairs for slot in slots)


def mean_parts(parts):
    """For each unit, the sum over `parts` of its score over the mean of the part."""
    means = [sum(part) / len(part) for part in parts]
    return [
        sum(part[u] / mean for part, mean in zip(parts, means, strict=True))
        for u in range(len(parts[0]))
    ]


def outer_products(rows):
    """X^T X, row by row."""
    total = np.zeros((len(rows[0]), len(rows[0])))
    for row in rows:
        total += np.outer(row, row).astype(np.float64)
    return total


def loss_without(weight_NM, moments, gone, damping):
    """Half the squared error of the best weights that are zero on `gone`, solved from scratch.

    `damping`, in means of the diagonal, counts as as much more data in all directions.
    """
    damped = moments + damping * np.trace(moments) / len(moments) * np.eye(len(moments))
    keep = [k for k in range(len(weight_NM)) if k not in set(gone)]
    best = np.zeros_like(weight_NM)
    if keep:
        best[keep] = np.linalg.solve(damped[np.ix_(keep, keep)], damped[keep] @ weight_NM)
    error = weight_NM - best
    return 0.5 * float(np.sum(error * (damped @ error)))


def greedy_costs(weight_NM, moments, units, damping):
    """What is lost when a unit goes, the cheapest first; solved anew for each. In order of unit."""
    gone, costs, left = [], {}, set(units) - {-1}
    while left:
        without = {u: gone + [k for k, owner in enumerate(units) if owner == u] for u in left}
        prices = {u: loss_without(weight_NM, moments, without[u], damping) for u in left}
        cheapest = min(sorted(left), key=prices.get)
        costs[cheapest], gone = prices[cheapest], without[cheapest]
        left.remove(cheapest)
    return [costs[u] for u in sorted(costs)]


def best_subset(units, count, loss):
    """The `count` of `units` with the lowest loss of all, and that loss."""
    every = itertools.combinations(sorted(units), count)
    return min(((list(keep), loss(keep)) for keep in every), key=lambda each: each[1])


def jacobian(function, count):
    """Of an affine function of `count` numbers: its values at 0, and a column for each number."""
    start = function(np.zeros(count)).reshape(-1)
    columns = [function(row).reshape(-1) - start for row in np.eye(count)]
    return start, np.stack(columns, axis=1)


def fitted_change(function, wanted, shape, free, lam):
    """What to add to a weight [slots, outputs], and to `free` numbers beside it.

    `function(changes)` is affine, `wanted` what it should be. The changes of an output are held
    near 0 by lam times the mean over slots of what a change of one does to the output's square.
    """
    slots, outputs = shape
    start, columns = jacobian(function, slots * outputs + free)
    weights = np.square(columns[:, : slots * outputs]).sum(axis=0).reshape(slots, outputs)
    pull = np.sqrt(lam * np.broadcast_to(weights.mean(axis=0), shape).reshape(-1))
    pulls = np.hstack([np.diag(pull), np.zeros((len(pull), free))])
    error = np.concatenate([wanted.reshape(-1) - start, np.zeros(len(pull))])
    found = np.linalg.lstsq(np.vstack([columns, pulls]), error, rcond=None)[0]
    return found[: slots * outputs].reshape(shape), found[slots * outputs :]


def batch_moments(arrays):
    """Mean and variance of each channel, value by value."""
    rows = [[float(x) for x in row] for a in arrays for row in a.reshape(-1, a.shape[-1])]
    means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    squares = [
        sum((x - mean) ** 2 for x in column)
        for column, mean in zip(zip(*rows, strict=True), means, strict=True)
    ]
    return means, [square / len(rows) for square in squares]


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
