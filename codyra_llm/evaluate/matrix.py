"""The score matrix R and what continual learning reads from it.

R[i][j], 0..100, is the score on task j after training on task i, in the order of training; Z[j] is the score
before any training (zero-shot). T is the number of rows, so an unfinished stream is summarised over the tasks
learnt so far. The literature has several definitions of forgetting and of backward transfer, which differ in
sign, divisor and clipping: all are computed, each under its own name in FORMULAS.
"""

from collections.abc import Iterable
from statistics import fmean

FORMULAS: dict[str, str] = {
    "op": "Overall performance: mean over j < T of R[T-1][j]",
    "bwt": "Backward transfer (TRACE): sum over j < T-1 of R[T-1][j] - R[j][j], divided by T-1; "
    "a loss is < 0",
    "bwt_treelora": "Forgetting (TreeLoRA's paper): sum over j < T of R[j][j] - R[T-1][j], divided by T",
    "bwt_treelora_clipped": "Forgetting (TreeLoRA's code, sign turned): sum over j < T of "
    "max(R[j][j] - R[T-1][j], 0), divided by T; gains count 0",
    "forgetting": "Forgetting: mean over j < T-1 of (max over i = j..T-2 of R[i][j]) - R[T-1][j]",
    "fwt": "Forward transfer: mean over 1 <= j < T of R[j-1][j] - Z[j], of the tasks where both are measured",
}


def summary(tasks: list[str], scores: list[list[float | None]], zero_shot: list[float | None] | None) -> dict:
    """`tasks`, `matrix`, `zero_shot` and the numbers of FORMULAS, in points of 0..100.

    scores: a row after each task trained so far, a column for each of `tasks`; None where not measured. A
    number is None where it is undefined (backward transfer of one task) or where a score that it needs was
    not measured.
    """
    numbers = dict.fromkeys(FORMULAS)
    seen = len(scores)
    if seen:
        last, old = scores[-1], range(seen - 1)
        dropped = [_minus(scores[j][j], last[j]) for j in range(seen)]
        gained = [_minus(last[j], scores[j][j]) for j in old]
        forgotten = []
        for j in old:
            best = _best(row[j] for row in scores[j:-1])
            forgotten.append(_minus(best, last[j]))
        numbers |= {"op": mean(last[:seen]), "bwt": mean(gained), "forgetting": mean(forgotten)}
        if seen > 1:
            clipped = [value if value is None else max(value, 0.0) for value in dropped]
            numbers |= {"bwt_treelora": mean(dropped), "bwt_treelora_clipped": mean(clipped)}
    if zero_shot is not None:
        gains = [_minus(scores[j - 1][j], zero_shot[j]) for j in range(1, seen)]
        numbers["fwt"] = mean(gain for gain in gains if gain is not None)
    return {"tasks": list(tasks), "matrix": [list(row) for row in scores], "zero_shot": zero_shot, **numbers}


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _best(values: Iterable[float | None]) -> float | None:
    """The highest value; None where one is missing, which might have been it."""
    values = list(values)
    return max(values) if values and None not in values else None


def mean(values: Iterable[float | None]) -> float | None:
    """None where a value is missing, or where there is none."""
    values = list(values)
    return fmean(values) if values and None not in values else None
