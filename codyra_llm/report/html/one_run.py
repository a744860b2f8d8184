"""The contents of the page of one run. Parts whose file is missing from the run folder are left out."""

import json
import math
import re
import shlex
from dataclasses import replace
from itertools import groupby
from textwrap import shorten

from codyra_llm.config.registry import METHODS
from codyra_llm.evaluate.matrix import FORMULAS
from codyra_llm.report import answers, judged
from codyra_llm.report.grid import Cell, Grid, number, word
from codyra_llm.report.html.charts import curve, panel, thinned
from codyra_llm.report.html.forgotten import forgotten
from codyra_llm.report.summary import (
    MEASURES,
    Change,
    by_projection,
    change_in_words,
    scored,
    summarised,
)
from codyra_llm.store.folder import RunFolder
from codyra_llm.store.rows import CostRow, FloorRow, LogRow, ScoreRow, UpdateRow

Rows = dict[tuple[int, str], ScoreRow]  # by step and task


def content(folder: RunFolder, examples: bool) -> dict:
    """By name, the parts of the page: facts, grids, charts and examples; empty where there is nothing to
    show.
    """
    recipe, found, updates, log = folder.recipe, summarised(folder), folder.updates, folder.log_rows
    rows = {(row.step, row.task): row for row in folder.scores}
    manifest = folder.manifest if (folder.path / "manifest.json").is_file() else {}
    return {
        "title": f"{recipe.method.name} on {len(recipe.tasks)} tasks",
        "facts": _facts(folder, found, manifest),
        "measures": _measures(found),
        "scores": _scores(found, rows, {row.task: row for row in folder.floor}),
        "panels": _panels(found, rows),
        "general": _general(found, rows),
        "open_ended": judged.grid(found["open_ended"]),
        "ranks": _ranks(updates),
        "rank_maps": _rank_maps(updates),
        "changes": _changes(updates),
        "curves": _curves(log),
        "costs": _costs(folder.costs, log),
        "examples": forgotten(folder, found) if examples else [],
        "manifest": manifest,
        "recipe": json.dumps(recipe.model_dump(mode="json"), ensure_ascii=False, indent=1),
        "command": _command(manifest),
    }


def _facts(folder: RunFolder, found: dict, manifest: dict) -> list[str]:
    recipe, steps = folder.recipe, len(found["matrix"])
    base = f"Base model {recipe.model.path}, protocol {recipe.data.protocol}, seed {recipe.seed}"
    if {"dtype", "device"} <= manifest.keys():
        base += f", {manifest['dtype']} on {manifest['device']}"
    lines = [base]
    if recipe.eval.split == "eval":
        lines.append("Scored on the eval split, not on test.")
    if recipe.eval.max_examples:
        lines.append(f"At most {recipe.eval.max_examples} examples per task were scored.")
    if METHODS[recipe.method.name].trains and steps < len(recipe.tasks):
        lines.append(f"Not finished: {steps} of {len(recipe.tasks)} tasks are learnt and scored.")
    return lines + answers.sentences(found["answers"], answers.floored(found), many=0)


def _measures(found: dict) -> Grid:
    lines = [(name, [number(found[name], "z.2f"), word(FORMULAS[name])]) for name in MEASURES]
    if found["floor"]:
        lines.append(("op of the floor", [number(found["floor"]["op"], "z.2f"), word(answers.FLOOR_SAID)]))
    return Grid(
        "measures",
        "measure",
        ["value", "definition"],
        lines,
        "R[i][j] is the score on task j after task i, 0 to 100; T tasks; Z the scores before training. An "
        "empty value was not measured.",
    )


def _scores(found: dict, rows: Rows, floor: dict[str, FloorRow]) -> Grid:
    tasks = found["tasks"]
    labels = ["before training"]
    labels += [f"{i} {task}" for i, task in enumerate(tasks[: len(found["matrix"])], 1)]
    lines = []
    for step, label in enumerate(labels):
        cells = [scored(rows.get((step, task)), marked=step == i) for i, task in enumerate(tasks, 1)]
        if any(cells):
            lines.append((label, cells))
    if lines and floor:
        lines.insert(0, (answers.FLOOR, [_constant(floor.get(task)) for task in tasks]))
    metrics = ", ".join(f"{task}: {metric}" for task, metric in zip(tasks, found["metrics"], strict=True))
    return Grid(
        "scores",
        "after",
        tasks,
        lines,
        f"Below each score its 95 % interval over test examples; marked: the task just learnt. {metrics}.",
    )


def _constant(row: FloorRow | None) -> Cell | None:
    """The cell of one row of floor.jsonl, which says what the answer is."""
    cell = scored(row)
    if row is None or cell is None:
        return None
    answer = shorten(row.answer, width=60, placeholder=" ...")
    return replace(cell, hint=f"{cell.hint}: “{answer}”, {row.share:.0%} of the training answers")


def _panels(found: dict, rows: Rows) -> list[dict]:
    """For each task its score after each step; empty if no task was scored twice."""
    steps, out = len(found["matrix"]), []
    for learnt, task in enumerate(found["tasks"][:steps], 1):
        known = {
            step: _with_bounds(row)
            for (step, name), row in rows.items()
            if name == task and step <= steps and row.score is not None
        }
        ends = [known[step][0] for step in (learnt, steps) if step in known]
        change = " → ".join(f"{value:z.1f}" for value in dict.fromkeys(ends))
        out.append(
            {
                "task": task,
                "change": change,
                "seen": len(known),
                **panel(known, learnt, steps),
            }
        )
    return out if any(p["seen"] > 1 for p in out) else []


def _with_bounds(row: ScoreRow) -> tuple[float, float | None, float | None]:
    """A score and the bounds of its interval, where it has one."""
    assert row.score is not None, "rows without a score are left out"
    return row.score, row.interval.get("low"), row.interval.get("high")


def _general(found: dict, rows: Rows) -> Grid | None:
    if not found["general"]:
        return None
    last = max((step for step, _ in rows), default=0)
    lines = []
    for name, scores in found["general"].items():
        before = scored(rows.get((0, name)))
        after = scored(rows.get((last, name))) if last else None
        ends = scores.get("before"), scores.get("after")
        change = None if None in ends else ends[1] - ends[0]
        lines.append((name, [before, after, number(change, "+z.1f")]))
    columns = ["before", "after", "change"]
    return Grid("general ability", "probe", columns, lines, _general_note(found, rows))


def _general_note(found: dict, rows: Rows) -> str:
    last = {name: row for (_, name), row in rows.items() if row.shots is not None}
    how = [f"{name}: {row.headline}, {row.shots}-shot" for name, row in last.items()]
    sentences = ["Tasks that are not trained on, with 95 % intervals over their examples."]
    sentences.append(f"By lm-evaluation-harness: {'; '.join(how)}." if how else "Exact match on probes.")
    if found["delta_r"]:
        sentences.append(f"{change_in_words(found['delta_r'])}.")
    return " ".join(sentences)


def _site(site: str) -> tuple[str, str]:
    """(layer, projection) of a site such as model.layers.3.self_attn.q_proj."""
    layer = re.search(r"\.(\d+)\.", site)
    return layer[1] if layer else "–", site.rpartition(".")[2]


def _ranks(updates: list[UpdateRow]) -> Grid | None:
    """Ranks kept per projection and task, and of all."""
    rows = [row for row in by_projection(updates) if row.rank is not None]
    if not rows:
        return None
    tasks, projections = _names(rows)
    parts = {(row.task, row.projection): _kept(row.kept or 0, row.rank or 0) for row in rows}
    lines = []
    for name in projections:
        lines.append((name, [parts.get((task, name)) for task in tasks]))
    sums = []
    for task in tasks:
        kept = sum(row.kept or 0 for row in rows if row.task == task)
        rank = sum(row.rank or 0 for row in rows if row.task == task)
        sums.append(_kept(kept, rank))
    lines.append(("all", sums))
    whole = all(row.kept == row.rank for row in rows)
    note = "Every rank was kept." if whole else "Over all layers."
    return Grid("ranks kept", "projection", tasks, lines, note)


def _names(rows: list[Change]) -> tuple[list[str], list[str]]:
    """The tasks and the projections, each once and in the order of the rows."""
    tasks = dict.fromkeys(row.task for row in rows)
    projections = dict.fromkeys(row.projection for row in rows)
    return list(tasks), list(projections)


def _kept(kept: int, rank: int) -> Cell:
    return Cell(kept, str(kept), small=f"of {rank}", heat=100 * kept / rank if rank else 0)


def _rank_maps(updates: list[UpdateRow]) -> list[Grid]:
    """For each task, layer × projection; empty if every rank was kept."""
    rows = [row for row in updates if row.rank is not None]
    if all(row.kept == row.rank for row in rows):
        return []
    return [_rank_map(task, list(members)) for task, members in groupby(rows, key=lambda row: row.task)]


def _rank_map(task: str, members: list[UpdateRow]) -> Grid:
    cells = {_site(row.site): row for row in members}
    layers = list(dict.fromkeys(layer for layer, _ in cells))
    names = list(dict.fromkeys(name for _, name in cells))
    ranks = sorted({row.rank or 0 for row in members})
    columns = [name.removesuffix("_proj") for name in names]
    lines = []
    for layer in layers:
        lines.append((layer, [_mapped(cells.get((layer, name)), len(ranks) > 1) for name in names]))
    return Grid(f"ranks kept: {task}", "layer", columns, lines, f"of {' or '.join(map(str, ranks))}")


def _mapped(row: UpdateRow | None, several: bool) -> Cell | None:
    """The cell of one site in a rank map; with the site's rank where there are `several`."""
    if row is None:
        return None
    kept = row.kept or 0
    heat = 100 * kept / row.rank if row.rank else 0
    return Cell(kept, f"{kept}/{row.rank}" if several else str(kept), heat=heat)


CHANGES = {
    "norm": ("norm of the update", "‖ΔW‖, mean over the layers", "z.3f"),
    "drift": ("cumulative drift", "‖W - W₀‖ after the task, mean over the layers", "z.3f"),
    "surviving": (
        "surviving share",
        "How much of the update is left once the sum is rounded to the model's dtype",
        "z.4f",
    ),
}


def _changes(updates: list[UpdateRow]) -> list[Grid]:
    rows = by_projection(updates)
    tasks, projections = _names(rows)
    grids = []
    for key, (name, note, form) in CHANGES.items():
        values = {(row.task, row.projection): getattr(row, key) for row in rows}
        known = [value for value in values.values() if value is not None]
        if not known:
            continue
        top = max(known) or 1
        lines = []
        for task in tasks:
            of_task = [values.get((task, projection)) for projection in projections]
            lines.append((task, [_changed(value, top, form) for value in of_task]))
        grids.append(Grid(name, "task", projections, lines, note))
    return grids


def _changed(value: float | None, top: float, form: str) -> Cell | None:
    # The surviving share is near 1 if all is well, and may be above it by rounding.
    return number(value, form, heat=min(100.0, 100 * (value or 0) / top))


def _curves(log: list[LogRow]) -> list[dict]:
    """Loss (and on the eval split), learning rate and tokens per second over the steps of the stream."""
    spans, first = [], 0
    for task, rows in groupby(log, key=lambda row: row.task):
        last = first + len(list(rows)) - 1
        spans.append((task, first, last))
        first = last + 1
    speeds = [row.speed if row.tokens and row.seconds else None for row in log]
    losses = [row.loss for row in log]
    eval_losses = [row.eval_loss for row in log]
    rates = [row.lr for row in log]
    panels = {
        "loss": {"loss": losses, "eval_loss": eval_losses},
        "learning rate": {"lr": rates},
        "tokens per second": {"tokens/s": speeds},
    }
    out = []
    for title, values_of in panels.items():
        series = {key: _line(values, spans) for key, values in values_of.items()}
        series = {key: line for key, line in series.items() if line}
        if series:
            out.append({"title": title, **curve(series, spans, from_zero=True)})
    return out


def _line(values: list[float | None], spans: list[tuple[str, int, int]]) -> list[tuple[float, float]]:
    """The points of one line: means of neighbours, task by task."""
    points = []
    for _, first, last in spans:
        known = []
        for i in range(first, last + 1):
            value = values[i]
            if value is not None and math.isfinite(value):
                known.append((i, value))
        points += thinned(known)
    return points


def _costs(costs: list[CostRow], log: list[LogRow]) -> Grid | None:
    """What training on each task took, from costs.jsonl and the log."""
    known = {row.task: row for row in costs}
    logged = {task: list(rows) for task, rows in groupby(log, key=lambda row: row.task)}
    lines = [(task, _cost(known.get(task), logged.get(task, []))) for task in {**logged, **known}]
    columns = ["parameters trained", "steps", "tokens", "seconds", "tokens/s", "peak memory, MiB"]
    return Grid("costs of training", "task", columns, lines).filled() if lines else None


def _cost(row: CostRow | None, steps: list[LogRow]) -> list[Cell | None]:
    tokens = sum(step.tokens for step in steps)
    seconds = sum(step.seconds for step in steps)
    peak = row.peak_bytes if row else None
    return [
        number(row.trained if row else None, ",d"),
        number(len(steps) or None, "d"),
        number(tokens or None, ",d"),
        number(row.seconds if row else seconds or None),
        number(tokens / seconds if seconds else None, ",.0f"),
        number(None if peak is None else peak / 2**20, ",.0f"),
    ]


def _command(manifest: dict) -> str:
    """The command that runs the recipe under a launch like the run's own."""
    ranks, stage = manifest.get("world_size", 1), manifest.get("zero_stage", 0)
    launch = ["codyra-llm"]
    if ranks > 1 or stage:
        deepspeed = ["--use_deepspeed", "--zero_stage", str(stage)] if stage else []
        launch = ["accelerate", "launch", *deepspeed, "--num_processes", str(ranks), "-m", "codyra_llm"]
    origins = manifest.get("plugins", {}).values()
    named = {origin["file"]: None for origin in origins if "file" in origin}
    options = [word for file in named for word in ("--plugin", file)]
    return shlex.join([*launch, "run", "recipe.json", *options])
