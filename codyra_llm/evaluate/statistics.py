"""From the scores of single examples to a mean with its uncertainty."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np

from codyra_llm.core.errors import Fault
from codyra_llm.core.parsing import read_items
from codyra_llm.data.records import LONGEST as OF_DATA
from codyra_llm.data.records import NAMED

MEASURES = {
    "op": "OP",
    "bwt": "BWT",
    "bwt_treelora": "BWT, TreeLoRA's",
    "forgetting": "forgetting",
    "learnt": "just learnt",
    "general": "general ability",
    "delta_r": "ΔR",
}

RESAMPLES = 1000  # test sets that a bootstrap draws
DRAWN = 2**16  # how many examples the bootstrap draws at once, which bounds its memory
LONGEST = {"prompt": OF_DATA["prompt"], "prediction": 20_000, "answer": OF_DATA["answer"]}  # characters


def measures(summary: dict) -> dict[str, float | None]:
    """The numbers of MEASURES from a run's summary; None where not measured."""
    matrix = summary["matrix"]
    # Without a matrix nothing was trained, so the scores of the base are the model's.
    when = "after" if matrix else "before"
    general = [scores.get(when) for scores in summary["general"].values()]
    learnt = [matrix[i][i] for i in range(len(matrix))]
    change = delta_r(summary["general"])
    return {
        **{name: summary[name] for name in ("op", "bwt", "bwt_treelora", "forgetting")},
        "learnt": fmean(learnt) if learnt and None not in learnt else None,
        "general": fmean(general) if general and None not in general else None,
        "delta_r": change["value"] if change else None,
    }


def delta_r(general: dict[str, dict]) -> dict | None:
    """ΔR (TRACE): the mean change against the base over its `members`, which are the tasks of general ability
    scored before and after, IFEval aside: following instructions is a measure of its own there. None where
    there is no member."""
    members = [
        name
        for name, v in general.items()
        if None not in (v.get("before"), v.get("after")) and not name.startswith("ifeval")
    ]
    changes = [general[name]["after"] - general[name]["before"] for name in members]
    return {"value": fmean(changes), "members": members} if members else None


def commonest(texts: Sequence[str]) -> tuple[str, float] | None:
    """The most frequent of `texts`, in a tie the first, and its share of them, 0 to 1; None where there is no
    text."""
    if not texts:
        return None
    text, count = Counter(texts).most_common(1)[0]
    return text, count / len(texts)


def blank(texts: Iterable[str]) -> int:
    """How many of `texts` are empty or only white space, such as a line break before the end."""
    return len([text for text in texts if not text.strip()])


def interval(values: list[float | None], drawn: np.ndarray | None) -> dict | None:
    """Mean and 95 % bounds: Student's t over several values (runs of different seeds), the percentile
    bootstrap `drawn` for a single one, without bounds where it has no spread to show (`resampled`). None
    where a value is missing."""
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
    if drawn is None or np.isnan(drawn).any():
        return {"mean": values[0], "low": None, "high": None, "over": None}
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"mean": values[0], "low": float(low), "high": float(high), "over": "test examples"}


def resampled(task: str, scores: Sequence[float]) -> np.ndarray:
    """The mean of an n-example test set's scores [n], on RESAMPLES test sets drawn from it with replacement;
    NaN for a single example, which says nothing about the spread.

    The draws follow from the task's name and n alone: the same wherever a task is scored, so that differences
    are paired, and independent between tasks.
    """
    values = np.asarray(scores, dtype=float)
    n = len(values)
    means = np.full(RESAMPLES, np.nan)
    if n < 2:
        return means
    random = np.random.default_rng(list(task.encode()))
    at_once = max(DRAWN // n, 1)
    for first in range(0, RESAMPLES, at_once):
        sets = slice(first, min(first + at_once, RESAMPLES))
        means[sets] = values[random.integers(n, size=(sets.stop - first, n))].mean(axis=1)
    return means


def summarise(per_example: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> dict:
    """`{"mean", "low", "high", "n"}`: the mean and its 95 % percentile bootstrap interval, in the unit of the
    scores.

    The interval covers the choice of test examples alone, not the seed of training. Nulls where there is no
    example; a single one has a mean and no interval.
    """
    return summarise_all({"": per_example}, seed, resamples)[""]


def summarise_all(
    per_example: Mapping[str, Sequence[float]], seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, dict]:
    """`summarise` of several scores of the same examples, by name; examples are drawn once for all scores."""
    scores = {name: np.asarray(values, dtype=np.float64) for name, values in per_example.items()}
    n = len(next(iter(scores.values()), ()))
    if n == 0:
        return {name: {"mean": None, "low": None, "high": None, "n": 0} for name in scores}
    random = np.random.default_rng(seed)
    means = {name: np.empty(resamples) for name in scores}
    at_once = max(DRAWN // n, 1)
    for first in range(0, resamples, at_once):
        sets = slice(first, min(first + at_once, resamples))
        drawn = random.integers(n, size=(sets.stop - first, n))
        for name, values in scores.items():
            means[name][sets] = values[drawn].mean(axis=1)
    return {name: _bounds(values, means[name]) for name, values in scores.items()}


def _bounds(scores: np.ndarray, means: np.ndarray) -> dict:
    """Mean of the scores, and the 95 % interval from the means of resampled sets; no interval for a single
    score, which says nothing about the spread."""
    if len(scores) == 1:
        return {"mean": float(scores[0]), "low": None, "high": None, "n": 1}
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": float(scores.mean()), "low": float(low), "high": float(high), "n": len(scores)}


def predictions(file: Path) -> Iterator[dict[str, str]]:
    """The {"prompt", "prediction", "answer"} of a JSON list, one after the other. Raises one Fault with all
    that is wrong with the file, at its end.
    """
    faults, count, number = [], 0, -1
    for number, row in enumerate(read_items(file, "a JSON list of predictions")):
        wrong = _of_prediction(f"{file}: record {number}", row)
        count += len(wrong)
        faults += wrong[: NAMED - len(faults)]
        if not count:
            yield row
    if count > NAMED:
        faults.append(f"{file}: {count - NAMED} more such faults")
    if faults:
        raise Fault(*faults)
    if number < 0:
        raise Fault(f"{file} must hold a JSON list with at least one prediction; write one")


def _of_prediction(where: str, row: object) -> list[str]:
    """Faults of one record."""
    faults = []
    for key, most in LONGEST.items():
        value = row.get(key) if isinstance(row, dict) else None
        if not isinstance(value, str):
            faults.append(f"{where} must have the text field '{key}'; add it")
        elif len(value) > most:
            faults.append(
                f"{where}: '{key}' has {len(value):,d} characters, expected at most {most:,d}; shorten it"
            )
    return faults
