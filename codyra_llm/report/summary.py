"""From the rows of a run folder to its summary: score matrix, measures, general ability, costs, and what each
task changed. Needs no model.
"""

from collections.abc import Callable, Iterable
from statistics import fmean
from typing import NamedTuple

import numpy as np

from codyra_llm.config.recipe import Recipe
from codyra_llm.config.registry import METHODS
from codyra_llm.evaluate.matrix import summary
from codyra_llm.evaluate.statistics import delta_r, interval, resampled
from codyra_llm.metrics.text import versioned
from codyra_llm.report import answers, judged
from codyra_llm.report.grid import Cell, number
from codyra_llm.store.folder import RunFolder
from codyra_llm.store.rows import CostRow, FloorRow, ScoreRow, UpdateRow

MEASURES = ("op", "bwt", "bwt_treelora", "bwt_treelora_clipped", "forgetting", "fwt")


def summarised(folder: RunFolder) -> dict:
    """The run's summary, recomputed from its rows. Raises Fault where the folder holds no run."""
    recipe = folder.recipe
    found = summarise_run(recipe, bool(METHODS[recipe.method.name].trains), folder.scores, folder.costs)
    steps = len(found["matrix"])
    if found["delta_r"]:
        found["delta_r"] |= _over_examples(folder, found["delta_r"])
    return found | {
        "floor": answers.floor(recipe.tasks, folder.floor, steps or len(recipe.tasks)),
        "answers": answers.noted(folder.scores, steps),
        "open_ended": judged.summarise(recipe, folder),
    }


def scored(row: ScoreRow | FloorRow | None, marked: bool = False) -> Cell | None:
    """The cell of one row of scores.jsonl or floor.jsonl, with the interval over test examples below."""
    if row is None or row.score is None:
        return None
    known = row.interval
    low, high = known.get("low"), known.get("high")
    return number(
        row.score,
        low=low,
        high=high,
        small="" if low is None else f"{low:.0f}–{high:.0f}",
        heat=row.score,
        hint=f"{known['n']} examples, {row.headline}" if "n" in known else "",
        marked=marked,
    )


def summarise_run(recipe: Recipe, trains: bool, rows: list[ScoreRow], costs: list[CostRow]) -> dict:
    """summary.json: tasks, matrix, the measures, general ability before and after, and what training took:
    the most parameters trained at once, seconds, and the peak of memory in bytes."""
    tasks = recipe.tasks
    of_tasks = [row for row in rows if not row.general]
    before, after = _matrix(tasks, of_tasks)
    known = [value for value in before if value is not None]
    zero_shot = before if known else None
    found = summary(tasks, after, zero_shot)
    if not trains and zero_shot:
        # A model that never changes has one row of scores, whose mean is OP, and can't forget.
        found["op"] = fmean(known) if len(known) == len(tasks) else None
    metrics = {row.task: versioned(row.headline) for row in of_tasks}
    general = before_and_after(rows, lambda row: row.step > 0)
    return {
        "method": recipe.method.name,
        "protocol": recipe.data.protocol,
        "seed": recipe.seed,
        "metrics": [metrics.get(task, "not scored") for task in tasks],
        **found,
        "general": general,
        "delta_r": delta_r(general),
        "costs": _costs(costs),
    }


def _matrix(tasks: list[str], rows: list[ScoreRow]) -> tuple[list[float | None], list[list[float | None]]]:
    """The scores of the base on each task, and those after each task up to the last that was scored; None
    where a task was not."""
    cells = {(row.step, row.task): row.score for row in rows}
    by_step: list[list[float | None]] = []
    last = 0
    for step in range(len(tasks) + 1):
        scores = [cells.get((step, task)) for task in tasks]
        by_step.append(scores)
        if scores.count(None) < len(scores):
            last = step
    return by_step[0], by_step[1 : last + 1]


def before_and_after(
    rows: Iterable[ScoreRow], at_the_end: Callable[[ScoreRow], bool]
) -> dict[str, dict[str, float | None]]:
    """For each task of general ability its score `after`, from its last row that is `at_the_end`, and
    `before`, from its last other row. `before` is None where it has another metric, since the difference
    would mean nothing."""
    general = {}
    for task, ends in _ends(rows, at_the_end).items():
        general[task] = {when: row.score for when, row in ends.items()}
        if len({row.headline for row in ends.values()}) > 1:
            general[task]["before"] = None
    return general


def _ends(rows: Iterable[ScoreRow], at_the_end: Callable[[ScoreRow], bool]) -> dict[str, dict[str, ScoreRow]]:
    """For each task of general ability its last row that is `at_the_end`, as "after", and its last other one,
    as "before"."""
    found: dict[str, dict[str, ScoreRow]] = {}
    for row in rows:
        if row.general:
            found.setdefault(row.task, {})["after" if at_the_end(row) else "before"] = row
    return found


def _over_examples(folder: RunFolder, change: dict) -> dict[str, float | None]:
    """ΔR's 95 % interval over test examples, {"low", "high"}: the bootstrap of a sweep's comparison, in which
    the same examples are drawn before and after. Nulls where predictions are not there."""
    ends, drawn = _ends(folder.scores, lambda row: row.step > 0), []
    for task in change["members"]:
        before, after = (_per_example(folder, ends[task][when]) for when in ("before", "after"))
        if not before or len(before) != len(after):
            return {"low": None, "high": None}
        drawn.append(resampled(task, after) - resampled(task, before))
    found = interval([change["value"]], np.mean(drawn, axis=0)) or {}
    return {"low": found.get("low"), "high": found.get("high")}


def _per_example(folder: RunFolder, row: ScoreRow) -> list[float]:
    return [answer[row.headline] for answer in folder.predictions(row.stage, row.task)]


def change_in_words(change: dict) -> str:
    """ΔR with its interval, where there is one, and what it is the mean of."""
    low, high = change.get("low"), change.get("high")
    known = "" if low is None else f" (95 % interval over test examples: {low:+z.2f} to {high:+z.2f})"
    return f"ΔR {change['value']:+z.2f}{known}, mean change over {', '.join(change['members'])}"


def _costs(rows: list[CostRow]) -> dict | None:
    if not rows:
        return None
    peaks = [row.peak_bytes for row in rows if row.peak_bytes is not None]
    most = max(row.trained for row in rows)
    seconds = sum(row.seconds for row in rows)
    peak = max(peaks) if len(peaks) == len(rows) else None
    return {"trained": most, "seconds": round(seconds, 1), "peak_bytes": peak}


class Change(NamedTuple):
    """What one task changed in one projection, over the layers: ranks `kept` of `rank` (None without ranks),
    mean ‖ΔW‖ (`norm`), mean `drift`, and the share of the updates that survived the cast (`surviving`,
    weighted by ‖ΔW‖²)."""

    task: str
    projection: str
    kept: int | None
    rank: int | None
    norm: float
    drift: float
    surviving: float | None


def by_projection(rows: list[UpdateRow]) -> list[Change]:
    """The changes of each task, projection by projection, in the order of the rows."""
    groups: dict[tuple[str, str], list[UpdateRow]] = {}
    for row in rows:
        groups.setdefault((row.task, row.projection), []).append(row)
    return [_change(task, projection, members) for (task, projection), members in groups.items()]


def _change(task: str, projection: str, rows: list[UpdateRow]) -> Change:
    norm = fmean(row.update_norm for row in rows)
    drift = fmean(row.drift for row in rows)
    if rows[0].rank is None:
        return Change(task, projection, None, None, norm, drift, None)
    moved = sum(row.update_norm**2 for row in rows)
    survived = sum((row.surviving or 0) * row.update_norm**2 for row in rows)
    kept = sum(row.kept or 0 for row in rows)
    rank = sum(row.rank or 0 for row in rows)
    return Change(task, projection, kept, rank, norm, drift, survived / moved if moved else None)
