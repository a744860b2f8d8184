"""The comparison that a sweep was made for: its finished runs, arm by arm, every mean with an interval.

Over seeds where an arm has several: Student's t at 95 %. Where it has one: the percentile bootstrap over test
examples, the same draws in every cell of a task and in every arm, so that a difference between arms is a
paired one.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import fmean

import numpy as np
from rich.box import SIMPLE
from rich.table import Column, Table

from codyra_llm.evaluate.matrix import summary as summarise
from codyra_llm.evaluate.statistics import MEASURES, interval, measures
from codyra_llm.store.folder import RunFolder
from codyra_llm.sweep.spec import Run, Settings, Sweep

RESAMPLES = 1000


def compare(sweep: Sweep) -> dict:
    """`{"baseline", "by", "rows", "tries", "runs"}` of the finished runs; `rows` is empty if there are
    none."""
    runs, groups = [run for run in sweep.runs() if run.finished], {}
    for run in runs:
        groups.setdefault((run.arm, _rest(run.settings)), []).append(run)
    return {
        "baseline": sweep.baseline,
        "by": sweep.by,
        "rows": [
            _row(arm, rest, members, groups.get((sweep.baseline, rest), [])) | {"chosen": sweep.chosen(arm)}
            for (arm, rest), members in groups.items()
        ],
        "tries": [
            {"arm": run.arm, "settings": run.settings, sweep.by: run.folder.summary[sweep.by]}
            for run in sweep.tries
            if run.finished
        ],
        "runs": [{"arm": run.arm, "settings": run.settings, **run.folder.summary} for run in runs],
    }


def _rest(settings: Settings) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings.items() if key != "seed")


def _row(arm: str, rest: str, runs: list[Run], baseline: list[Run]) -> dict:
    """The measures of one arm over its seeds, their differences to the baseline's of the same seeds, and the
    costs.
    """
    found = [measures(run.folder.summary) for run in runs]
    pairs = [(a, b) for a in runs for b in baseline if a.settings == b.settings]
    differences = [
        {k: _minus(measures(a.folder.summary)[k], measures(b.folder.summary)[k]) for k in MEASURES}
        for a, b in pairs
    ]
    alone = _drawn(runs[0]) if len(runs) == 1 else {}
    one, other = map(_drawn, pairs[0]) if len(pairs) == 1 else ({}, {})
    drawn = {k: one[k] - other[k] for k in one.keys() & other.keys()}
    return {
        "arm": arm,
        "settings": rest,
        "seeds": len(runs),
        **{name: interval([f[name] for f in found], alone.get(name)) for name in MEASURES},
        "difference": {name: interval([d[name] for d in differences], drawn.get(name)) for name in MEASURES}
        if pairs and runs != baseline
        else None,
        "costs": _costs(runs),
        "relative": _relative(_costs([a for a, _ in pairs]), _costs([b for _, b in pairs])),
    }


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _drawn(run: Run) -> dict[str, np.ndarray]:
    return _resampled(run.folder.path, len(run.folder.recipe.tasks))


@cache
def _resampled(path: Path, count: int) -> dict[str, np.ndarray]:
    """The measures, [RESAMPLES] each, of test sets drawn with replacement from that of the run of `count`
    tasks at `path`; without those not measured."""
    folder = RunFolder(path)
    tasks, found, cells = folder.recipe.tasks, folder.summary, {}
    for row in folder.scores:
        rows = folder.predictions(row["step"], row["after"], row["task"])
        scores = np.array([r[row["headline"]] for r in rows], dtype=float)
        cells[row["step"], row["task"]] = scores[_draws(row["task"], len(scores))].mean(axis=1)
    steps = len(found["matrix"])

    def cell(step: int, task: str, i: int) -> float | None:
        return float(cells[step, task][i]) if (step, task) in cells else None

    def sample(i: int) -> dict[str, float | None]:
        out = summarise(
            tasks, [[cell(step, task, i) for task in tasks] for step in range(1, steps + 1)], None
        )
        if not steps and found["op"] is not None:
            out["op"] = fmean(cell(0, task, i) for task in tasks)
        return measures(
            out
            | {
                "general": {
                    name: {"before": cell(0, name, i), "after": cell(count, name, i)}
                    for name in found["general"]
                }
            }
        )

    samples = [sample(i) for i in range(RESAMPLES)]
    return {name: np.array([s[name] for s in samples]) for name in MEASURES if samples[0][name] is not None}


def _draws(task: str, n: int) -> np.ndarray:
    """[RESAMPLES, n] places of examples: the same for a task wherever it is scored, others for other
    tasks.
    """
    return np.random.default_rng(list(task.encode())).integers(n, size=(RESAMPLES, n))


def _costs(runs: list[Run]) -> dict | None:
    """Means over the runs: parameters trained, seconds of training, peak of memory in bytes."""
    costs = [run.folder.summary.get("costs") for run in runs]
    if not costs or None in costs:
        return None
    return {
        key: None if any(c[key] is None for c in costs) else fmean(c[key] for c in costs)
        for key in ("trained", "seconds", "peak_bytes")
    }


def _relative(own: dict | None, baseline: dict | None) -> dict | None:
    return (
        {key: own[key] / baseline[key] if own[key] and baseline[key] else None for key in own}
        if own and baseline
        else None
    )


COLUMNS: dict[str, Callable[[dict], str]] = {
    "arm": lambda row: " ".join(filter(None, (row["arm"], row["settings"]))),
    **{title: lambda row, name=name: _shown(row[name]) for name, title in MEASURES.items()},
    "OP, less the baseline's": lambda row: _shown(row["difference"] and row["difference"]["op"], "+.1f"),
    "forgetting, less the baseline's": lambda row: _shown(
        row["difference"] and row["difference"]["forgetting"], "+.1f"
    ),
    "trained": lambda row: f"{row['costs']['trained']:,.0f}" if row["costs"] else "",
    "time": lambda row: _times(row, "seconds"),
    "memory": lambda row: _times(row, "peak_bytes"),
}


def _shown(value: dict | None, form: str = ".1f") -> str:
    if value is None:
        return ""
    half = "" if value["low"] is None else f" ± {(value['high'] - value['low']) / 2:.1f}"
    return f"{value['mean']:{form}}{half}"


def _times(row: dict, key: str) -> str:
    ratio = row["relative"] and row["relative"][key]
    return f"{ratio:.2f}" if ratio else ""


def table(found: dict) -> Table:
    """For the terminal: the columns that fit into 80 or so, all rows."""
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
    lines = [
        f"# {name}",
        "",
        _caption(found),
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
    ]
    lines += ["| " + " | ".join(show(row) for show in COLUMNS.values()) + " |" for row in found["rows"]]
    if found["tries"]:
        lines += [
            "",
            f"Settings of each arm were chosen by {found['by']} on the eval splits, among:",
            "",
            f"| arm | try | {found['by']} | chosen |",
            "|---|---|---|---|",
        ]
        chosen = {row["arm"]: row["chosen"] for row in found["rows"]}
        lines += [
            f"| {x['arm']} | {', '.join(f'{k}={v}' for k, v in x['settings'].items()) or 'as it is'} | "
            f"{x[found['by']]:.1f} | {'yes' if chosen.get(x['arm']) == x['settings'] else ''} |"
            for x in found["tries"]
        ]
    return "\n".join(lines) + "\n"


def _caption(found: dict) -> str:
    if not found["rows"]:
        return "No run is finished yet"
    over = sorted({row["op"]["over"] for row in found["rows"] if row["op"] and row["op"]["over"]})
    seeds = sorted({row["seeds"] for row in found["rows"]})
    interval = f", ± half the width of a 95 % interval over {' or '.join(over)}" if over else ""
    return (
        f"Means over {'/'.join(map(str, seeds))} seed{'s' * (seeds != [1])}{interval}; time and peak memory "
        f"of training as multiples of {found['baseline']}'s"
    )
