"""From the scores of single examples to a mean with its uncertainty."""

from pathlib import Path
from statistics import fmean

import numpy as np

from codyra_llm.core.errors import Fault
from codyra_llm.core.parsing import read_json
from codyra_llm.data.records import LONGEST as OF_DATA

MEASURES = {
    "op": "OP",
    "bwt": "BWT",
    "bwt_treelora": "BWT, TreeLoRA's",
    "forgetting": "forgetting",
    "learnt": "just learnt",
    "general": "general ability",
}

LONGEST = {"prompt": OF_DATA["prompt"], "prediction": 20_000, "answer": OF_DATA["answer"]}  # characters


def measures(summary: dict) -> dict[str, float | None]:
    """The numbers of MEASURES from a run's summary; None where not measured."""
    matrix = summary["matrix"]
    general = [
        v.get("after" if matrix else "before") for v in summary["general"].values()
    ]  # no matrix: nothing trains
    learnt = [matrix[i][i] for i in range(len(matrix))]
    return {
        **{name: summary[name] for name in ("op", "bwt", "bwt_treelora", "forgetting")},
        "learnt": fmean(learnt) if learnt and None not in learnt else None,
        "general": fmean(general) if general and None not in general else None,
    }


def interval(values: list[float | None], drawn: np.ndarray | None) -> dict | None:
    """Mean and bounds: of `values` over seeds, or of the one value from what was `drawn` for it."""
    if not values or None in values:
        return None
    if len(values) > 1:
        from scipy.stats import sem, t  # slow to import

        half = float(t.ppf(0.975, len(values) - 1) * sem(values))
        return {
            "mean": fmean(values),
            "low": fmean(values) - half,
            "high": fmean(values) + half,
            "over": "seeds",
        }
    if drawn is None:
        return {"mean": values[0], "low": None, "high": None, "over": None}
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"mean": values[0], "low": float(low), "high": float(high), "over": "test examples"}


def summarise(per_example: list[float], seed: int = 0, resamples: int = 1000) -> dict:
    """`{"mean", "low", "high", "n"}`: the mean and its 95 % percentile bootstrap interval, in the unit of the
    scores.

    The interval covers the choice of test examples alone, not the seed of training. Nulls where there is no
    example.
    """
    scores = np.asarray(per_example, dtype=np.float64)
    n = len(scores)
    if n == 0:
        return {"mean": None, "low": None, "high": None, "n": 0}
    drawn = np.random.default_rng(seed).integers(n, size=(resamples, n))
    low, high = np.percentile(scores[drawn].mean(axis=1), [2.5, 97.5])
    return {"mean": float(scores.mean()), "low": float(low), "high": float(high), "n": n}


def read_predictions(file: Path) -> list[dict[str, str]]:
    """A JSON list of {"prompt", "prediction", "answer"}. Raises one Fault with all that is wrong with the
    file.
    """
    rows = read_json(file, "a JSON list of predictions")
    if not isinstance(rows, list) or not rows:
        raise Fault(f"{file} must hold a JSON list with at least one prediction; write one")
    faults = [
        f"{file}: record {i} must have the text field '{key}'; add it"
        if not isinstance(row, dict) or not isinstance(row.get(key), str)
        else f"{file}: record {i}: '{key}' has {len(row[key]):,d} characters, expected at most {most:,d}; "
        "shorten it"
        for i, row in enumerate(rows)
        for key, most in LONGEST.items()
        if not isinstance(row, dict) or not isinstance(row.get(key), str) or len(row[key]) > most
    ]
    if faults:
        raise Fault(
            *faults[:5], *([f"{file}: {len(faults) - 5} more such faults"] if len(faults) > 5 else [])
        )
    return rows
