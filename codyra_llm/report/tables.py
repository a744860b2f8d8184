"""From score rows to the summary, the table in the terminal and the report in Markdown; needs no model."""

from statistics import fmean

from rich.box import SIMPLE
from rich.table import Column, Table

from ..benchmarks.trace.metrics import versioned
from ..evaluate.matrix import FORMULAS, summary
from ..recipe import Recipe
from . import judged

MEASURES = ("op", "bwt", "bwt_treelora", "bwt_treelora_clipped", "forgetting", "fwt")


def summarise_run(recipe: Recipe, trains: bool, rows: list[dict], costs: list[dict]) -> dict:
    """summary.json: tasks, matrix, the measures, general ability before and after, and what training took: the most
    parameters trained at once, seconds, and the peak of memory in bytes."""
    tasks = recipe.tasks
    cells = {(row["step"], row["task"]): row["score"] for row in rows if row["kind"] == "task"}
    by_step = [[cells.get((step, task)) for task in tasks] for step in range(len(tasks) + 1)]
    zero_shot = by_step[0] if any(value is not None for value in by_step[0]) else None
    measured = [step for step in range(1, len(by_step)) if any(value is not None for value in by_step[step])]
    found = summary(tasks, by_step[1: max(measured, default=0) + 1], zero_shot)
    if not trains and zero_shot:  # a model that never changes has one row, and forgets nothing that could be measured
        found["op"] = fmean(zero_shot)
    metrics = {row["task"]: versioned(row["headline"]) for row in rows if row["kind"] == "task"}
    general = {row["task"]: {} for row in rows if row["kind"] == "general"}
    for row in rows:
        if row["kind"] == "general":
            general[row["task"]]["before" if row["step"] == 0 else "after"] = row["score"]
    return {"method": recipe.method.name, "protocol": recipe.data.protocol, "seed": recipe.seed,
            "metrics": [metrics.get(task, "not scored") for task in tasks],
            **found, "general": general, "delta_r": delta_r(general), "costs": _costs(costs)}


def delta_r(general: dict[str, dict]) -> dict | None:
    """ΔR (TRACE): the mean change against the base over its `members`, which are the tasks of general ability scored
    before and after, IFEval aside: following instructions is a measure of its own there. None where there is no member."""
    members = [name for name, v in general.items() if v.keys() >= {"before", "after"} and not name.startswith("ifeval")]
    changes = [general[name]["after"] - general[name]["before"] for name in members]
    return {"value": fmean(changes), "members": members} if members else None


def _change(found: dict) -> list[str]:
    """One line on ΔR, or none."""
    change = found.get("delta_r")
    return [f"ΔR {change['value']:+.2f}, mean change over {', '.join(change['members'])}"] if change else []


def _costs(rows: list[dict]) -> dict | None:
    if not rows:
        return None
    peaks = [row["peak_bytes"] for row in rows]
    return {"trained": max(row["trained"] for row in rows), "seconds": round(sum(row["seconds"] for row in rows), 1),
            "peak_bytes": None if None in peaks else max(peaks)}


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def table(found: dict) -> Table:
    """The score matrix for the terminal, measures in its caption."""
    out = Table(Column("after", no_wrap=True), *(Column(task, justify="right") for task in found["tasks"]), box=SIMPLE,
                padding=0, collapse_padding=True, title=f"{found['method']}: score on each task, after each task")
    for task, row in [("base", found["zero_shot"] or []), *zip(found["tasks"], found["matrix"])]:
        if row:
            out.add_row(task, *map(_cell, row))
    out.caption = "   ".join(f"{name} {found[name]:.2f}" for name in MEASURES if found[name] is not None)
    if found["general"]:
        out.caption += "\ngeneral ability, before → after: " + ", ".join(
            f"{name} {_cell(v.get('before'))} → {_cell(v.get('after'))}" for name, v in found["general"].items())
        out.caption += "".join(f"\n{line}" for line in _change(found))
    return out


def by_projection(rows: list[dict]) -> list[dict]:
    """What each task changed, per projection over the layers: ranks `kept` of `rank` (None without ranks), mean ‖ΔW‖
    (`norm`), mean `drift`, and the share of the updates that survived the cast (`surviving`, weighted by ‖ΔW‖²)."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["site"].rpartition(".")[2]), []).append(row)
    out = []
    for (task, projection), members in groups.items():
        ranked = members[0]["rank"] is not None
        moved = sum(m["update_norm"] ** 2 for m in members)
        out.append({"task": task, "projection": projection,
                    "kept": sum(m["kept"] for m in members) if ranked else None,
                    "rank": sum(m["rank"] for m in members) if ranked else None,
                    "norm": fmean(m["update_norm"] for m in members), "drift": fmean(m["drift"] for m in members),
                    "surviving": sum((m["surviving"] or 0) * m["update_norm"] ** 2 for m in members) / moved
                    if moved and ranked else None})
    return out


def updates_table(rows: list[dict]) -> list[str]:
    """Lines of a Markdown table of `by_projection`; blank where a row has none."""
    if not rows:
        return []
    lines = ["", "| task | projection | ranks kept | ‖ΔW‖ | drift ‖W - W₀‖ | share that survives the cast |",
             "|---|---|---|---|---|---|"]
    for row in by_projection(rows):
        ranks = "" if row["rank"] is None else f"{row['kept']} of {row['rank']}"
        share = "" if row["surviving"] is None else format(row["surviving"], ".4f")
        lines.append(f"| {row['task']} | {row['projection']} | {ranks} | {row['norm']:.4f} | {row['drift']:.4f} | {share} |")
    return lines


def render(recipe: Recipe, found: dict, updates: list[dict]) -> str:
    """The report in Markdown: measures with their formulas, the matrix, general ability, what each task changed."""
    lines = [f"# {recipe.method.name} on {len(found['tasks'])} tasks", "",
             f"Base model `{recipe.model.path}`, protocol {found['protocol']}, seed {found['seed']}. Scores are 0 to 100.",
             "", "| measure | value | definition |", "|---|---|---|"]
    lines += [f"| {name} | {'not measured' if found[name] is None else format(found[name], '.2f')} | {FORMULAS[name]} |"
              for name in MEASURES]
    lines += ["", "| after | " + " | ".join(found["tasks"]) + " |", "|---" * (len(found["tasks"]) + 1) + "|",
              "| metric | " + " | ".join(found["metrics"]) + " |"]
    if found["zero_shot"]:
        lines.append("| base | " + " | ".join(map(_cell, found["zero_shot"])) + " |")
    lines += [f"| {task} | " + " | ".join(map(_cell, row)) + " |" for task, row in zip(found["tasks"], found["matrix"])]
    if found["general"]:
        lines += ["", "| general ability | before | after |", "|---|---|---|"]
        lines += [f"| {name} | {_cell(v.get('before'))} | {_cell(v.get('after'))} |" for name, v in found["general"].items()]
        lines += [line for change in _change(found) for line in ("", f"{change}.")]
    lines += judged.lines(found["open_ended"])
    if costs := found["costs"]:
        peak = "not measured" if costs["peak_bytes"] is None else f"{costs['peak_bytes'] / 2**20:.0f} MiB"
        lines += ["", f"Training: {costs['trained']:,} parameters, {costs['seconds']:.0f} s, peak memory {peak}."]
    return "\n".join(lines + updates_table(updates)) + "\n"
