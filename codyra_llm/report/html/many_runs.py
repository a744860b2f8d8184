"""What the page of several runs shows: groups of equal recipe but seed, their means with spread, and paired
differences.
"""

from dataclasses import replace
from pathlib import Path
from statistics import fmean

from codyra_llm.config.recipe import Recipe
from codyra_llm.evaluate.statistics import MEASURES, measures
from codyra_llm.report.grid import Cell, Grid, Whence, number, word
from codyra_llm.report.groups import Member, Run, baseline_of, distinguishing, grouped, over, pairing, whence
from codyra_llm.report.groups import names as names_of
from codyra_llm.report.html.charts import scatter
from codyra_llm.report.summary import summarised

BETTER = {  # by title of a measure
    MEASURES[name]: sign
    for name, sign in (
        ("op", 1),
        ("bwt", 1),
        ("bwt_treelora", -1),
        ("forgetting", -1),
        ("learnt", 1),
        ("general", 1),
    )
}


def opened(members: list[Member]) -> list[Run]:
    """The runs with what is measured of them. Raises Fault for a folder that is no run's."""
    runs = []
    for folder, arm, rest in members:
        found = summarised(folder)
        runs.append(Run(folder, found, measures(found), arm, rest))
    return runs


def content(members: list[Member], over_orders: bool = False, numbered: bool = True) -> dict:
    """By name, the parts of the page, groups `numbered` in the order in which their first run was given.
    `over_orders`: runs that differ in the order of their tasks are one group."""
    runs = opened(members)
    groups = grouped(runs, over_orders)
    recipes = [group[0].recipe for group in groups]
    names = names_of(groups, over_orders)
    if numbered:
        names = [f"{number} {name}" for number, name in enumerate(names, 1)]
    return {
        "title": f"{len(runs)} runs in {len(groups)} groups",
        "facts": _facts(groups, over_orders),
        "leaderboard": _leaderboard(names, groups),
        "scatter": _scatter(groups),
        "names": names,
        "tasks": _tasks(names, groups),
        "differences": _differences(names, groups, over_orders),
        "settings": _settings(names, recipes, over_orders),
        "runs_table": _runs(names, groups),
    }


def _settings(names: list[str], recipes: list[Recipe], over_orders: bool) -> Grid | None:
    """Every setting in which two groups differ."""
    known = [distinguishing(recipe, over_orders) for recipe in recipes]
    keys = [
        key
        for key in dict.fromkeys(key for k in known for key in k)
        if any(key in k and k[key] != other[key] for k in known for other in known if key in other)
    ]
    return (
        Grid(
            "settings",
            "setting",
            [name.partition(" ")[0] for name in names],
            [(key, [word(_said(k[key])) if key in k else None for k in known]) for key in keys],
            "In which the groups, here by their numbers, differ; seeds and output aside.",
        )
        if keys
        else None
    )


def _said(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _facts(groups: list[list[Run]], over_orders: bool) -> list[str]:
    seeds = "the seed or the order of tasks" if over_orders else "the seed"
    over = "runs, seeds and orders together" if over_orders else "seeds"
    runs = [run for group in groups for run in group]
    short = [
        run.folder.path
        for run in runs
        if run.summary["matrix"] and len(run.summary["matrix"]) < len(run.recipe.tasks)
    ]
    splits = {run.recipe.eval.split for run in runs}
    return [
        line
        for line in (
            (
                f"Runs with the same recipe but for {seeds} are a group. ± is half the 95 % interval over "
                f"{over} (Student's t), sd the standard deviation; a group of one run has neither."
            ),
            f"Scored on the {' and '.join(sorted(splits))} split." if splits != {"test"} else "",
            f"Not finished: {', '.join(map(str, short))}." if short else "",
        )
        if line
    ]


def _leaderboard(names: list[str], groups: list[list[Run]]) -> Grid:
    columns = ["runs", *MEASURES.values(), "parameters trained", "seconds", "peak memory, MiB"]
    lines = []
    for name, group in zip(names, groups, strict=True):
        costs = [run.summary["costs"] or {} for run in group]
        trained, seconds, peak = (
            [cost.get(key) for cost in costs] for key in ("trained", "seconds", "peak_bytes")
        )
        lines.append(
            (
                name,
                [
                    Cell(len(group), str(len(group))),
                    *(
                        over(values, heat=_mean(values) if key in ("op", "learnt", "general") else None)
                        for key in MEASURES
                        for values in [[run.measures[key] for run in group]]
                    ),
                    *(
                        number(_mean(values, unit), ",.0f")
                        for values, unit in ((trained, 1), (seconds, 1), (peak, 2**20))
                    ),
                ],
            )
        )
    op = 1 + list(MEASURES).index("op")
    lines.sort(key=lambda line: -line[1][op].value if line[1][op] else float("inf"))
    return Grid(
        "leaderboard",
        "group",
        columns,
        lines,
        "The highest OP first. Forgetting: lower is better; BWT: higher is; "
        "TreeLoRA's BWT: lower is. Time and memory are those of training.",
        BETTER,
        _whence(names, groups),
    ).filled()


def _whence(names: list[str], groups: list[list[Run]]) -> dict[str, Whence]:
    return {name: whence(group) for name, group in zip(names, groups, strict=True)}


def _mean(values: list[float | None], unit: float = 1) -> float | None:
    """Mean in units of `unit`; None where a value is missing."""
    known = [value for value in values if value is not None]
    return fmean(known) / unit if len(known) == len(values) else None


def _tasks(names: list[str], groups: list[list[Run]]) -> Grid:
    """Score on each task after the last one, mean over seeds."""
    tasks = list(dict.fromkeys(task for group in groups for task in group[0].recipe.tasks))
    lines = []
    for name, group in zip(names, groups, strict=True):
        ends = [
            dict(
                zip(
                    run.summary["tasks"],
                    (run.summary["matrix"] or [run.summary["zero_shot"] or []])[-1],
                    strict=False,
                )
            )
            for run in group
        ]
        columns = [[end.get(task) for end in ends] for task in tasks]
        lines.append((name, [over(values, heat=_mean(values)) for values in columns]))
    return Grid(
        "final scores",
        "group",
        tasks,
        lines,
        "Score on each task after the last one.",
        dict.fromkeys(tasks, 1),
        _whence(names, groups),
    )


def _differences(names: list[str], groups: list[list[Run]], over_orders: bool) -> Grid | None:
    """Each group less its baseline, run by run of the same seed and order."""
    lines = []
    for name, group in zip(names, groups, strict=True):
        baseline = baseline_of(group, groups)
        known = {pairing(run, over_orders): run.measures for run in baseline}
        own = [(run.measures, pairing(run, over_orders)) for run in group]
        pairs = [(measured, known[key]) for measured, key in own if key in known]
        if pairs and group is not baseline:
            values = [[_less(a[key], b[key]) for a, b in pairs] for key in MEASURES]
            lines.append((name, [Cell(len(pairs), str(len(pairs))), *map(_difference, values)]))
    return (
        Grid(
            "paired differences",
            f"less {names[0]}",
            ["pairs", *MEASURES.values()],
            lines,
            "Means over the seeds and orders that both have. Marked: the 95 % interval leaves 0 out.",
            whence=_whence(names, groups),
        ).filled()
        if lines
        else None
    )


def _less(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _difference(values: list[float | None]) -> Cell | None:
    cell = over(values, "+.1f")
    if cell is None or cell.low is None or cell.high is None:
        return cell
    return replace(cell, marked=cell.low > 0 or cell.high < 0)


def _runs(names: list[str], groups: list[list[Run]]) -> Grid:
    shared = Path(*_common([run.folder.path.parts for group in groups for run in group]))
    lines = [
        (
            str(run.folder.path.relative_to(shared)),
            [
                word(name),
                Cell(run.recipe.seed, str(run.recipe.seed)),
                *(number(v, ".2f") for v in run.measures.values()),
            ],
        )
        for name, group in zip(names, groups, strict=True)
        for run in group
    ]
    told = {str(run.folder.path.relative_to(shared)): whence([run]) for group in groups for run in group}
    return Grid("runs", "run", ["group", "seed", *MEASURES.values()], lines, whence=told).filled()


def _common(paths: list[tuple[str, ...]]) -> list[str]:
    """The folders that all paths begin with, at most all but the last of each."""
    out = []
    for level in zip(*(parts[:-1] for parts in paths), strict=False):
        if len(set(level)) > 1:
            break
        out.append(level[0])
    return out


def _scatter(groups: list[list[Run]]) -> dict | None:
    """Plasticity (just learnt: mean of the diagonal) against stability (forgetting)."""
    points = [
        [
            (m["learnt"], m["forgetting"])
            for m in (run.measures for run in group)
            if m["learnt"] is not None and m["forgetting"] is not None
        ]
        for group in groups
    ]
    means = [_middle(group) for group in points]
    return scatter(points, means) if any(points) else None


def _middle(points: list[tuple[float, float]]) -> tuple[float, float] | None:
    if not points:
        return None
    xs, ys = zip(*points, strict=True)
    return fmean(xs), fmean(ys)
