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
