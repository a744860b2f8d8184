"""The comparison of a sweep's arms: its finished runs, arm by arm, every mean with an interval.

Where an arm has several seeds or orders of the tasks, the interval is Student's t at 95 %. Where it has one
run, it is the percentile bootstrap over test examples, with the same draws in every cell of a task and in
every arm. Differences between arms are paired: by seed and order, or by these draws."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import fmean

import numpy as np
from rich.box import SIMPLE
from rich.table import Column, Table

from codyra_llm.core.files import write_json, write_text
from codyra_llm.evaluate.matrix import summary as summarise
from codyra_llm.evaluate.statistics import MEASURES, RESAMPLES, interval, measures, resampled
from codyra_llm.report import answers
from codyra_llm.report.grid import plain
from codyra_llm.report.groups import LOAD, POOLED, Basis, basis, differing, order_of, said_of
from codyra_llm.store.folder import RunFolder
from codyra_llm.sweep.spec import Run, Settings, Sweep, finished


def compare(sweep: Sweep) -> dict:
    """What sweep.json holds, of the finished runs: `{"baseline", "by", "unlike", "rows", "by_order", "tries",
    "runs"}`. `unlike`: in what the runs were measured otherwise than others; `rows` is empty if there are
    none, `by_order` if all learn the tasks in one order."""
    runs = finished(sweep.runs())
    described = [{"arm": run.arm, "settings": run.settings, **run.folder.summary} for run in runs]
    pooled, by_order = _grouped(runs, over_orders=True), _grouped(runs, over_orders=False)
    tries = []
    for run in finished(sweep.tries):
        found = {sweep.by: run.folder.summary[sweep.by]} | measures(run.folder.summary)
        told = {"arm": run.arm, "settings": run.settings, "split": run.recipe.eval.split}
        tries.append(told | found)
    return {
        "baseline": sweep.baseline,
        "by": sweep.by,
        "unlike": differing([_basis(run) for run in runs]),
        "rows": _rows(sweep, pooled),
        "by_order": _rows(sweep, by_order) if len(by_order) > len(pooled) else [],
        "tries": tries,
        "runs": described,
    }


def write(sweep: Sweep, title: str) -> dict:
    """Compare what is finished, and write sweep.json and sweep.md with that title; returns the comparison."""
    found = compare(sweep)
    write_json(sweep.output / "sweep.json", found)
    write_text(sweep.output / "sweep.md", render(found, title))
    return found


def _basis(run: Run) -> Basis:
    return basis(run.recipe, run.folder.summary)


FRONTIER = ("learnt", "forgetting", "delta_r")  # of a try, in addition to what tries are chosen by
Groups = dict[tuple, list[Run]]  # by arm, by point except seed and order, and by tasks


def _grouped(runs: list[Run], over_orders: bool) -> Groups:
    """The runs of an arm at one point of the grid that differ only in seed; with `over_orders`, also those
    that differ in the order of the same tasks."""
    groups: Groups = {}
    for run in runs:
        tasks = sorted(run.recipe.tasks) if over_orders else run.recipe.tasks
        groups.setdefault((run.arm, _rest(run.settings), tuple(tasks)), []).append(run)
    return groups


def _rows(sweep: Sweep, groups: Groups) -> list[dict]:
    """A row for each group; where groups differ in the order of their tasks, rows name it."""
    streams = {tasks for _, _, tasks in groups}
    found = []
    for (arm, rest, tasks), members in groups.items():
        order = f"order {order_of(members[0].recipe)}" if len(streams) > 1 else ""
        settings = ", ".join(filter(None, (rest, order)))
        row = _row(arm, settings, members, groups.get((sweep.baseline, rest, tasks), []))
        found.append(row | {"chosen": sweep.chosen(arm)})
    return found


def _rest(settings: Settings) -> str:
    """The settings of a point but for seed and order, as text."""
    return ", ".join(f"{key}={value}" for key, value in settings.items() if key not in POOLED)


def _row(arm: str, rest: str, runs: list[Run], baseline: list[Run]) -> dict:
    """The measures of one arm over its runs, their differences to the baseline's of the same seeds and
    orders, and the costs.
    """
    pairs = [
        (own, other)
        for own in runs
        for other in baseline
        if own.settings == other.settings and not differing([_basis(own), _basis(other)])
    ]
    found = [measures(run.folder.summary) for run in runs]
    alone = _drawn(runs[0]) if len(runs) == 1 else {}
    over_seeds = {}
    for name in MEASURES:
        values = [each[name] for each in found]
        over_seeds[name] = interval(values, alone.get(name))
    seeds = {run.recipe.seed for run in runs}
    orders = {tuple(run.recipe.tasks) for run in runs}
    own_costs = _costs([own for own, _ in pairs])
    other_costs = _costs([other for _, other in pairs])
    summaries = [run.folder.summary for run in runs]
    noted = [summary.get("answers", []) for summary in summaries]
    return {
        "arm": arm,
        "settings": rest,
        "runs": len(runs),
        "seeds": len(seeds),
        "orders": len(orders),
        **over_seeds,
        "difference": _difference(pairs) if pairs and runs != baseline else None,
        "floor": answers.mean_floor(summaries),
        "answers": answers.tallied(noted),
        "costs": _costs(runs),
        "relative": _relative(own_costs, other_costs),
    }


def _difference(pairs: list[tuple[Run, Run]]) -> dict:
    """By measure the mean difference over the pairs, and its interval."""
    own = [measures(one.folder.summary) for one, _ in pairs]
    baseline = [measures(other.folder.summary) for _, other in pairs]
    drawn = {}
    if len(pairs) == 1:
        one, other = map(_drawn, pairs[0])
        drawn = {name: one[name] - other[name] for name in one.keys() & other.keys()}
    found = {}
    for name in MEASURES:
        values = [_minus(a[name], b[name]) for a, b in zip(own, baseline, strict=True)]
        found[name] = interval(values, drawn.get(name))
    return found


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _drawn(run: Run) -> dict[str, np.ndarray]:
    """By measure its bootstrap samples, [RESAMPLES]."""
    return _resampled(run.folder.path, len(run.folder.recipe.tasks))


@cache
def _resampled(path: Path, count: int) -> dict[str, np.ndarray]:
    """The measures of the run of `count` tasks at `path`, [RESAMPLES] each, on test sets drawn with
    replacement from its own; without measures that the run lacks."""
    folder = RunFolder(path)
    found = folder.summary
    cells = {}
    for row in folder.scores:
        answers = folder.predictions(row.stage, row.task)
        if answers:
            scores = [answer[row.headline] for answer in answers]
            cells[row.step, row.task] = resampled(row.task, scores)
    samples = [_sample(folder.recipe.tasks, found, cells, count, i) for i in range(RESAMPLES)]
    drawn = {}
    for name in MEASURES:
        values = [sample[name] for sample in samples]
        if values[0] is not None:
            drawn[name] = np.array(values)
    return drawn


def _sample(
    tasks: list[str], found: dict, cells: dict[tuple[int, str], np.ndarray], count: int, i: int
) -> dict[str, float | None]:
    """The measures on resampled test sets number `i`. `cells`: by step and task, the mean scores
    [RESAMPLES]."""

    def cell(step: int, task: str) -> float | None:
        return float(cells[step, task][i]) if (step, task) in cells else None

    matrix = []
    for step in range(1, len(found["matrix"]) + 1):
        matrix.append([cell(step, task) for task in tasks])
    out = summarise(tasks, matrix, None)
    if not matrix and found["op"] is not None:
        out["op"] = fmean(cell(0, task) for task in tasks)
    general = {}
    for name, scores in found["general"].items():
        steps = {"before": 0, "after": count}
        # Leave out what the summary leaves out.
        general[name] = {key: cell(steps[key], name) for key, score in scores.items() if score is not None}
    return measures(out | {"general": general})


def _costs(runs: list[Run]) -> dict | None:
    """Means over the runs: parameters trained, seconds of training, peak of memory in bytes."""
    costs = [run.folder.summary.get("costs") for run in runs]
    if not costs or None in costs:
        return None
    means = {}
    for key in ("trained", "seconds", "peak_bytes"):
        values = [cost[key] for cost in costs]
        means[key] = None if None in values else fmean(values)
    return means


def _relative(own: dict | None, baseline: dict | None) -> dict | None:
    """Costs as multiples of the baseline's; None where one is not known."""
    if not own or not baseline:
        return None
    return {key: own[key] / baseline[key] if own[key] and baseline[key] else None for key in own}


COLUMNS: dict[str, Callable[[dict], str]] = {
    "arm": lambda row: " ".join(filter(None, (row["arm"], row["settings"]))),
    **{title: lambda row, name=name: _shown(row[name]) for name, title in MEASURES.items()},
    "OP, less the baseline's": lambda row: _shown(row["difference"] and row["difference"]["op"], "+z.1f"),
    "forgetting, less the baseline's": lambda row: _shown(
        row["difference"] and row["difference"]["forgetting"], "+z.1f"
    ),
    "trained": lambda row: f"{row['costs']['trained']:,.0f}" if row["costs"] else "",
    "time": lambda row: _times(row, "seconds"),
    "memory": lambda row: _times(row, "peak_bytes"),
}


def _shown(value: dict | None, form: str = "z.1f") -> str:
    """`mean ± half of the interval`; blank where not measured."""
    if value is None:
        return ""
    half = "" if value["low"] is None else f" ± {(value['high'] - value['low']) / 2:.1f}"
    return f"{value['mean']:{form}}{half}"


def _times(row: dict, key: str) -> str:
    """A cost as a multiple of the baseline's; blank where it is not known."""
    ratio = row["relative"] and row["relative"][key]
    return f"{ratio:.2f}" if ratio else ""


def table(found: dict) -> Table:
    """For the terminal: all rows, and the columns that fit into about 80 characters."""
    shown = {
        "arm": "arm",
        "OP": "OP",
        "BWT": "BWT",
        "just learnt": "learnt",
        "OP, less the baseline's": "OP - base",
        "time": "time",
        "memory": "memory",
    }
    heads = [
        Column(title, no_wrap=title != "arm", overflow="fold", justify="left" if title == "arm" else "right")
        for title in shown.values()
    ]
    out = Table(*heads, box=SIMPLE, padding=0, show_edge=False, title=_caption(found))
    for row in found["rows"]:
        out.add_row(*(COLUMNS[name](row) for name in shown))
    return out


def render(found: dict, name: str) -> str:
    """The comparison in Markdown: the arms, and, where settings were chosen, every try."""
    head = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    lines = [f"# {name}", "", plain(_caption(found)), "", *head, *_lines(found["rows"])]
    if found["unlike"]:
        lines += ["", said_of(found["unlike"])]
    for line in answers.compared({COLUMNS["arm"](row): row["answers"] for row in found["rows"]}):
        lines += ["", plain(line)]
    if found["by_order"]:
        lines += ["", "By order of the tasks, over seeds:", "", *head, *_lines(found["by_order"])]
    return "\n".join([*lines, *_tried(found)]) + "\n"


def _tried(found: dict) -> list[str]:
    """Every try with what it learnt and what it forgot, where settings were chosen: each arm's frontier."""
    if not found["tries"]:
        return []
    split = found["tries"][0]["split"]  # the same for all: sweeps with several splits are refused
    shown = {found["by"]: found["by"]} | {name: MEASURES[name] for name in FRONTIER if name != found["by"]}
    heads = ["arm", "try", *shown.values(), "chosen"]
    lines = ["", f"Settings of each arm were chosen by {found['by']} on the {split} splits, among:", ""]
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    chosen = {row["arm"]: row["chosen"] for row in found["rows"]}
    for tried in found["tries"]:
        settings = plain(", ".join(f"{key}={value}" for key, value in tried["settings"].items()))
        scores = ["" if tried.get(name) is None else f"{tried[name]:z.1f}" for name in shown]
        mark = "yes" if chosen.get(tried["arm"]) == tried["settings"] else ""
        lines.append(f"| {' | '.join([tried['arm'], settings or 'as it is', *scores, mark])} |")
    return lines


def _lines(rows: list[dict]) -> list[str]:
    """The lines of the table, without its head."""
    lines = []
    for row in rows:
        cells = [plain(show(row)) for show in COLUMNS.values()]
        lines.append(f"| {' | '.join(cells)} |")
    return lines + _floors(rows)


def _floors(rows: list[dict]) -> list[str]:
    """The lines for the OP of the most frequent training answers."""
    lines = []
    for label, value in answers.floors({COLUMNS["arm"](row): row["floor"] for row in rows}).items():
        lines.append(f"| {plain(label)} | {value:z.1f} |{' |' * (len(COLUMNS) - 2)}")
    return lines


def _caption(found: dict) -> str:
    """What the means and intervals of the table are over, and what its costs mean."""
    if not found["rows"]:
        return "No run is finished yet"
    known = [row["op"] for row in found["rows"] if row["op"]]
    over = {value["over"] for value in known if value["over"]}
    several = any(row["orders"] > 1 for row in found["rows"])
    kinds = sorted("runs" if several and kind == "seeds" else kind for kind in over)
    interval = f", ± half the width of a 95 % interval over {' or '.join(kinds)}" if over else ""
    if len(kinds) > 1:  # which rows have which
        alone = [COLUMNS["arm"](row) for row in found["rows"] if row["runs"] == 1]
        interval += f" (over test examples, of one run each: {'; '.join(alone)})"
    orders = f" and {_counted(found['rows'], 'order')}" if several else ""
    return (
        f"Means over {_counted(found['rows'], 'seed')}{orders}{interval}; time and peak memory of training "
        f"as multiples of {found['baseline']}'s, time by the clock: {LOAD}"
    )


def _counted(rows: list[dict], what: str) -> str:
    """`2 seeds`, or `1/2 seeds` where rows differ."""
    numbers = sorted({row[f"{what}s"] for row in rows})
    return f"{'/'.join(map(str, numbers))} {what}{'' if numbers == [1] else 's'}"
