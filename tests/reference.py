"""Slow and obvious versions of the maths: plain loops that the fast code must equal."""

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
