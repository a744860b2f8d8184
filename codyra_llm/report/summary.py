"""From score rows to the summary, the table in the terminal and the report in Markdown; needs no model."""

from statistics import fmean

from codyra_llm.config.recipe import Recipe
from codyra_llm.config.registry import METHODS
from codyra_llm.evaluate.matrix import summary
from codyra_llm.metrics.text import versioned
from codyra_llm.report import judged
from codyra_llm.report.grid import Cell, number
from codyra_llm.store.folder import RunFolder

MEASURES = ("op", "bwt", "bwt_treelora", "bwt_treelora_clipped", "forgetting", "fwt")


def summarised(folder: RunFolder) -> dict:
    """The run's summary, recomputed from its rows. Raises Fault where the folder holds no run."""
    recipe = folder.recipe
    found = summarise_run(recipe, bool(METHODS[recipe.method.name].trains), folder.scores, folder.costs)
    return found | {"open_ended": judged.summarise(recipe, folder)}


def _interval(row: dict | None) -> dict | None:
    return row and row.get("metrics", {}).get(row["headline"])


def scored(row: dict | None, **more) -> Cell | None:
    """The cell of one row of scores.jsonl, with the interval over test examples below."""
    if row is None or row["score"] is None:
        return None
    known = _interval(row) or {}
    low, high = known.get("low"), known.get("high")
    return number(
        row["score"],
        low=low,
        high=high,
        small="" if low is None else f"{low:.0f}–{high:.0f}",
        heat=row["score"],
        hint=f"{known['n']} examples, {row['headline']}" if "n" in known else "",
        **more,
    )


def summarise_run(recipe: Recipe, trains: bool, rows: list[dict], costs: list[dict]) -> dict:
    """summary.json: tasks, matrix, the measures, general ability before and after, and what training took:
    the most parameters trained at once, seconds, and the peak of memory in bytes."""
    tasks = recipe.tasks
    cells = {(row["step"], row["task"]): row["score"] for row in rows if row["kind"] == "task"}
    by_step = [[cells.get((step, task)) for task in tasks] for step in range(len(tasks) + 1)]
    zero_shot = by_step[0] if any(value is not None for value in by_step[0]) else None
    known = [value for value in by_step[0] if value is not None]
    measured = [step for step in range(1, len(by_step)) if any(value is not None for value in by_step[step])]
    found = summary(tasks, by_step[1 : max(measured, default=0) + 1], zero_shot)
    if (
        not trains and zero_shot
    ):  # a model that never changes has one row, and forgets nothing that could be measured
        found["op"] = fmean(known) if len(known) == len(tasks) else None
    metrics = {row["task"]: versioned(row["headline"]) for row in rows if row["kind"] == "task"}
    general = {row["task"]: {} for row in rows if row["kind"] == "general"}
    for row in rows:
        if row["kind"] == "general":
            general[row["task"]]["before" if row["step"] == 0 else "after"] = row["score"]
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


def delta_r(general: dict[str, dict]) -> dict | None:
    """ΔR (TRACE): the mean change against the base over its `members`, which are the tasks of general ability
    scored before and after, IFEval aside: following instructions is a measure of its own there. None where
    there is no member."""
    members = [
        name
        for name, v in general.items()
        if v.keys() >= {"before", "after"} and not name.startswith("ifeval")
    ]
    changes = [general[name]["after"] - general[name]["before"] for name in members]
    return {"value": fmean(changes), "members": members} if members else None


def _costs(rows: list[dict]) -> dict | None:
    if not rows:
        return None
    peaks = [row["peak_bytes"] for row in rows]
    return {
        "trained": max(row["trained"] for row in rows),
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        "peak_bytes": None if None in peaks else max(peaks),
    }


def by_projection(rows: list[dict]) -> list[dict]:
    """What each task changed, per projection over the layers: ranks `kept` of `rank` (None without ranks),
    mean ‖ΔW‖ (`norm`), mean `drift`, and the share of the updates that survived the cast (`surviving`,
    weighted by ‖ΔW‖²)."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["site"].rpartition(".")[2]), []).append(row)
    out = []
    for (task, projection), members in groups.items():
        ranked = members[0]["rank"] is not None
        moved = sum(m["update_norm"] ** 2 for m in members)
        out.append(
            {
                "task": task,
                "projection": projection,
                "kept": sum(m["kept"] for m in members) if ranked else None,
                "rank": sum(m["rank"] for m in members) if ranked else None,
                "norm": fmean(m["update_norm"] for m in members),
                "drift": fmean(m["drift"] for m in members),
                "surviving": sum((m["surviving"] or 0) * m["update_norm"] ** 2 for m in members) / moved
                if moved and ranked
                else None,
            }
        )
    return out
