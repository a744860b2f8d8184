"""What the page of several runs shows: groups of equal recipe but seed, their means with spread, and paired
differences.
"""

from dataclasses import replace
from pathlib import Path
from statistics import fmean

from codyra_llm.config.recipe import Recipe
from codyra_llm.config.registry import METHODS
from codyra_llm.evaluate.statistics import MEASURES, measures
from codyra_llm.report import answers
from codyra_llm.report.grid import Cell, Grid, Provenance, number, word
from codyra_llm.report.groups import (
    LOAD,
    OF_GENERAL,
    Basis,
    Member,
    Run,
    baseline_of,
    basis,
    differing,
    distinguishing,
    general_basis,
    grouped,
    over,
    pairing,
    provenance,
    said_of,
)
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
        ("delta_r", 1),
    )
}


def opened(members: list[Member]) -> list[Run]:
    """The runs with what is measured of them. Raises Fault for a folder that is not a run's."""
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
    # The first recipe represents its group: the others differ from it in nothing that is shown.
    recipes = [group[0].recipe for group in groups]
    names = names_of(groups, over_orders)
    if numbered:
        names = [f"{number} {name}" for number, name in enumerate(names, 1)]
    return {
        "title": f"{len(runs)} runs in {len(groups)} groups",
        "facts": [*_facts(groups, over_orders), *_said_of_answers(names, groups)],
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
    lines = []
    for key in dict.fromkeys(key for settings in known for key in settings):
        texts = [_text(settings[key]) if key in settings else None for settings in known]
        if len(set(texts) - {None}) > 1:
            lines.append((key, [word(text) if text is not None else None for text in texts]))
    if not lines:
        return None
    numbers = [name.partition(" ")[0] for name in names]
    note = "In which the groups, here by their numbers, differ; seeds and output aside."
    return Grid("settings", "setting", numbers, lines, note)


def _text(value: object) -> str:
    """A setting's value as it is shown."""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _facts(groups: list[list[Run]], over_orders: bool) -> list[str]:
    seeds = "the seed or the order of tasks" if over_orders else "the seed"
    spread_over = "runs, seeds and orders together" if over_orders else "seeds"
    runs = [run for group in groups for run in group]
    unfinished = [
        run.folder.path
        for run in runs
        if METHODS[run.recipe.method.name].trains and len(run.summary["matrix"]) < len(run.recipe.tasks)
    ]
    unlike = _unlike(runs, "op") + _unlike(runs, "general")
    splits = {run.recipe.eval.split for run in runs}
    lines = [
        f"Runs with the same recipe but for {seeds} are a group. ± is half the 95 % interval over "
        f"{spread_over} (Student's t), sd the standard deviation; a group of one run has neither."
    ]
    if splits != {"test"}:
        lines.append(f"Scored on the {' and '.join(sorted(splits))} split.")
    if unfinished:
        lines.append(f"Not finished: {', '.join(map(str, unfinished))}.")
    if unlike:
        lines.append(said_of(unlike))
    return lines


def _basis(run: Run, measure: str) -> Basis:
    """What a run must share with another for this measure to compare."""
    of_measure = general_basis if measure in OF_GENERAL else basis
    return of_measure(run.recipe, run.summary)


def _unlike(runs: list[Run], measure: str) -> list[str]:
    """In what the bases of a measure differ between runs."""
    return differing([_basis(run, measure) for run in runs])


def _said_of_answers(names: list[str], groups: list[list[Run]]) -> list[str]:
    """The floor's OP, and which groups gave identical, empty or cut answers."""
    floors, tallies = {}, {}
    for name, group in zip(names, groups, strict=True):
        summaries = [run.summary for run in group]
        floors[name] = answers.mean_floor(summaries)
        tallies[name] = answers.tallied([found["answers"] for found in summaries])
    lines = [f"OP of the {label}: {value:z.1f}." for label, value in answers.floors(floors).items()]
    return lines + answers.compared(tallies)


def _leaderboard(names: list[str], groups: list[list[Run]]) -> Grid:
    columns = ["runs", *MEASURES.values(), "parameters trained", "seconds", "peak memory, MiB"]
    lines = [(name, _line(group)) for name, group in zip(names, groups, strict=True)]
    runs = [run for group in groups for run in group]
    better = {}
    for name, title in MEASURES.items():
        if title in BETTER and not _unlike(runs, name):
            better[title] = BETTER[title]
    op = 1 + list(MEASURES).index("op")  # its column, after that of the runs
    lines.sort(key=lambda line: _rank_key(line[1][op]))
    return Grid(
        "leaderboard",
        "group",
        columns,
        lines,
        "The highest OP first. Forgetting: lower is better; BWT: higher is; "
        f"TreeLoRA's BWT: lower is. Time and memory are those of training, time by the clock: {LOAD}.",
        better,
        _provenances(names, groups),
    ).filled()


def _rank_key(cell: Cell | None) -> float:
    """Sorts lines by OP: the highest first, those without one last."""
    return float("inf") if cell is None else -float(cell.value)


def _line(group: list[Run]) -> list[Cell | None]:
    """The cells of a group's line in the leaderboard."""
    cells: list[Cell | None] = [Cell(len(group), str(len(group)))]
    for key in MEASURES:
        values = [run.measures[key] for run in group]
        cells.append(over(values, heat=_mean(values) if key in ("op", "learnt", "general") else None))
    for key, unit in (("trained", 1), ("seconds", 1), ("peak_bytes", 2**20)):
        costs = [(run.summary["costs"] or {}).get(key) for run in group]
        cells.append(number(_mean(costs, unit), ",.0f"))
    return cells


def _provenances(names: list[str], groups: list[list[Run]]) -> dict[str, Provenance]:
    return {name: provenance(group) for name, group in zip(names, groups, strict=True)}


def _mean(values: list[float | None], unit: float = 1) -> float | None:
    """Mean in units of `unit`; None where a value is missing."""
    known = [value for value in values if value is not None]
    return fmean(known) / unit if len(known) == len(values) else None


def _tasks(names: list[str], groups: list[list[Run]]) -> Grid:
    """Score on each task after the last one, mean over seeds."""
    tasks = list(dict.fromkeys(task for group in groups for task in group[0].recipe.tasks))
    lines = []
    for name, group in zip(names, groups, strict=True):
        ends = [_last_scores(run) for run in group]
        cells = []
        for task in tasks:
            values = [end.get(task) for end in ends]
            cells.append(over(values, heat=_mean(values)))
        lines.append((name, cells))
    unlike = _unlike([run for group in groups for run in group], "op")
    return Grid(
        "final scores",
        "group",
        tasks,
        lines,
        "Score on each task after the last one.",
        {} if unlike else dict.fromkeys(tasks, 1),
        _provenances(names, groups),
    )


def _last_scores(run: Run) -> dict[str, float | None]:
    """The scores after the last task, by task; of a method that trains nothing, those of the base."""
    rows = run.summary["matrix"] or [run.summary["zero_shot"] or []]
    return dict(zip(run.summary["tasks"], rows[-1], strict=False))


def _differences(names: list[str], groups: list[list[Run]], over_orders: bool) -> Grid | None:
    """Each group minus its baseline, paired by seed and order."""
    lines = []
    for name, group in zip(names, groups, strict=True):
        baseline = baseline_of(group, groups, over_orders)
        known = {pairing(run, over_orders): run for run in baseline}
        matches = [(run, known.get(pairing(run, over_orders))) for run in group]
        pairs = [(run, match) for run, match in matches if match is not None]
        if not pairs or group is baseline:
            continue
        cells = [_difference(pairs, key) for key in MEASURES]
        if any(cells):
            lines.append((name, [Cell(len(pairs), str(len(pairs))), *cells]))
    if not lines:
        return None
    note = "Means over the seeds and orders that both have. Marked: the 95 % interval leaves 0 out."
    first = groups[0][0].arm or names[0]  # of a sweep, the arm at the row's own point
    columns, corner = ["pairs", *MEASURES.values()], f"less {first}"
    return Grid(
        "paired differences", corner, columns, lines, note, provenance=_provenances(names, groups)
    ).filled()


def _less(one: Run, other: Run, measure: str) -> float | None:
    """The difference of two runs; None where one lacks the measure, or the two don't compare."""
    a, b = one.measures[measure], other.measures[measure]
    if a is None or b is None or differing([_basis(one, measure), _basis(other, measure)]):
        return None
    return a - b


def _difference(pairs: list[tuple[Run, Run]], measure: str) -> Cell | None:
    """The mean difference over the pairs, marked where its 95 % interval leaves 0 out."""
    cell = over([_less(one, other, measure) for one, other in pairs], "+z.1f")
    if cell is None or cell.low is None or cell.high is None:
        return cell
    return replace(cell, marked=cell.low > 0 or cell.high < 0)


def _runs(names: list[str], groups: list[list[Run]]) -> Grid:
    shared = Path(*_common([run.folder.path.parts for group in groups for run in group]))
    lines, provenances = [], {}
    for name, group in zip(names, groups, strict=True):
        for run in group:
            place = str(run.folder.path.relative_to(shared))
            measured = [number(value, "z.2f") for value in run.measures.values()]
            lines.append((place, [word(name), Cell(run.recipe.seed, str(run.recipe.seed)), *measured]))
            provenances[place] = provenance([run])
    return Grid("runs", "run", ["group", "seed", *MEASURES.values()], lines, provenance=provenances).filled()


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
    points = []
    for group in groups:
        pairs = [(run.measures["learnt"], run.measures["forgetting"]) for run in group]
        points.append([pair for pair in pairs if None not in pair])
    means = [_middle(group) for group in points]
    return scatter(points, means) if any(points) else None


def _middle(points: list[tuple[float, float]]) -> tuple[float, float] | None:
    if not points:
        return None
    xs, ys = zip(*points, strict=True)
    return fmean(xs), fmean(ys)
