"""From the scores of single examples to a mean with its uncertainty."""

import json
from pathlib import Path

import numpy as np

from ..errors import Fault


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


def read_predictions(file: Path) -> list[dict[str, str]]:
    """A JSON list of {"prompt", "prediction", "answer"}. Raises one Fault with all that is wrong with the file."""
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Fault(f"there is no file {file}; give a JSON list of predictions") from None
    except ValueError as error:  # of JSON and of UTF-8 alike
        raise Fault(f"{file} is not UTF-8 JSON ({error}); write a JSON list of predictions") from None
    if not isinstance(rows, list) or not rows:
        raise Fault(f"{file} must hold a JSON list with at least one prediction")
    faults = [f"{file}: record {i} must have the text field '{key}'; add it" for i, row in enumerate(rows)
              for key in ("prompt", "prediction", "answer") if not isinstance(row, dict) or not isinstance(row.get(key), str)]
    if faults:
        raise Fault(*faults[:5], *([f"{file}: {len(faults) - 5} more such faults"] if len(faults) > 5 else []))
    return rows
