"""From the scores of single examples to a mean with its uncertainty."""

import numpy as np


def summarise(per_example: list[float], seed: int = 0, resamples: int = 1000) -> dict:
    """`{"mean", "low", "high", "n"}`: the mean and its 95 % percentile bootstrap interval, in the unit of the scores.

    The interval covers the choice of test examples alone, not the seed of training. Nulls where there is no example.
    """
    scores = np.asarray(per_example, dtype=np.float64)
    n = len(scores)
    if n == 0:
        return {"mean": None, "low": None, "high": None, "n": 0}
    drawn = np.random.default_rng(seed).integers(n, size=(resamples, n))
    low, high = np.percentile(scores[drawn].mean(axis=1), [2.5, 97.5])
    return {"mean": float(scores.mean()), "low": float(low), "high": float(high), "n": n}
