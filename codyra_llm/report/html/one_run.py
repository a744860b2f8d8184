"""What the page of one run shows. A part whose file the run folder lacks is left out."""

import json
import math
import re
import shlex
from itertools import groupby

from codyra_llm.config.registry import METHODS
from codyra_llm.evaluate.matrix import FORMULAS
from codyra_llm.report import judged
from codyra_llm.report.grid import Cell, Grid, number, word
from codyra_llm.report.html.charts import curve, panel, thinned
from codyra_llm.report.html.forgotten import forgotten
from codyra_llm.report.summary import MEASURES, _interval, by_projection, scored, summarised
from codyra_llm.store.folder import RunFolder


def content(folder: RunFolder, examples: bool) -> dict:
    """By name, the parts of the page: facts, grids, charts and examples; empty where there is nothing to
    show.
    """
    recipe, found, updates, log = folder.recipe, summarised(folder), folder.updates, folder.log_rows
    rows = {(row["step"], row["task"]): row for row in folder.scores}
    manifest = folder.manifest if (folder.path / "manifest.json").is_file() else {}
    return {
        "title": f"{recipe.method.name} on {len(recipe.tasks)} tasks",
        "facts": _facts(folder, found, manifest),
        "measures": _measures(found),
        "scores": _scores(found, rows),
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
    trains = METHODS[recipe.method.name].trains
    short = trains and steps < len(recipe.tasks)
    counts = [
        f"{row['task']} {row['empty']} of {row['metrics'][row['headline']]['n']}"
        for row in folder.scores
        if row["step"] == steps and row.get("empty")
    ]
    return [
        line
        for line in (
            f"Base model {recipe.model.path}, protocol {recipe.data.protocol}, seed {recipe.seed}"
            + (
                f", {manifest['dtype']} on {manifest['device']}"
                if {"dtype", "device"} <= manifest.keys()
                else ""
            ),
            "Scored on the eval split, not on test." if recipe.eval.split == "eval" else "",
            f"At most {recipe.eval.max_examples} examples per task were scored."
            if recipe.eval.max_examples
            else "",
            f"Not finished: {steps} of {len(recipe.tasks)} tasks are learnt and scored." if short else "",
            f"Empty answers in the last row: {', '.join(counts)}." if counts else "",
        )
        if line
    ]


def _measures(found: dict) -> Grid:
    return Grid(
        "measures",
        "measure",
        ["value", "definition"],
        [(name, [number(found[name], ".2f"), word(FORMULAS[name])]) for name in MEASURES],
        "R[i][j] is the score on task j after task i, 0 to 100; T tasks; Z the scores before training. An "
        "empty value was not measured.",
    )


def _scores(found: dict, rows: dict) -> Grid:
    tasks = found["tasks"]
    lines = [(0, "before training")] * bool(found["zero_shot"])
    lines += [(i, f"{i} {task}") for i, task in enumerate(tasks[: len(found["matrix"])], 1)]
    cells = [
        (label, [scored(rows.get((step, task)), marked=step == i) for i, task in enumerate(tasks, 1)])
        for step, label in lines
    ]
    metrics = ", ".join(f"{task}: {metric}" for task, metric in zip(tasks, found["metrics"], strict=True))
    return Grid(
        "scores",
        "after",
        tasks,
        [line for line in cells if any(line[1])],
        f"Below each score its 95 % interval over test examples; marked: the task just learnt. {metrics}.",
    )


def _panels(found: dict, rows: dict) -> list[dict]:
    """Per task its score after each step; none where no task was scored twice."""
    steps, out = len(found["matrix"]), []
    for learnt, task in enumerate(found["tasks"][:steps], 1):
        known = {
            step: _framed(row)
            for (step, name), row in rows.items()
            if name == task and step <= steps and row["score"] is not None
        }
        ends = [known[step][0] for step in (learnt, steps) if step in known]
        out.append(
            {
                "task": task,
                "change": " → ".join(f"{v:.1f}" for v in dict.fromkeys(ends)),
                "seen": len(known),
                **panel(known, learnt, steps),
            }
        )
    return out if any(p["seen"] > 1 for p in out) else []


def _framed(row: dict) -> tuple[float, float | None, float | None]:
    """A score and the bounds of its interval, where it has one."""
    interval = _interval(row) or {"low": None, "high": None}
    return row["score"], interval["low"], interval["high"]


def _general(found: dict, rows: dict) -> Grid | None:
    last = max((step for step, _ in rows), default=0)
    lines = []
    for name, scores in found["general"].items():
        change = scores["after"] - scores["before"] if scores.keys() >= {"before", "after"} else None
        lines.append(
            (
                name,
                [
                    scored(rows.get((0, name))),
                    scored(rows.get((last, name))) if last else None,
                    number(change, "+.1f"),
                ],
            )
        )
    return (
        Grid("general ability", "probe", ["before", "after", "change"], lines, _general_note(found, rows))
        if lines
        else None
    )


def _general_note(found: dict, rows: dict) -> str:
    kinds = {name: row for (_, name), row in rows.items() if row["kind"] == "general"}
    told = [
        f"{name}: {row['headline']}, {row['shots']}-shot" for name, row in kinds.items() if "shots" in row
    ]
    change = found["delta_r"]
    return " ".join(
        [
            "Tasks that are not trained on, with 95 % intervals over their examples.",
            f"By lm-evaluation-harness: {'; '.join(told)}." if told else "Exact match on probes.",
            *(
                [f"ΔR, the mean change over {', '.join(change['members'])}: {change['value']:+.2f}."]
                if change
                else []
            ),
        ]
    )


def _site(site: str) -> tuple[str, str]:
    """(layer, projection) of a site such as model.layers.3.self_attn.q_proj."""
    layer = re.search(r"\.(\d+)\.", site)
    return layer[1] if layer else "–", site.rpartition(".")[2]


def _ranks(updates: list[dict]) -> Grid | None:
    """Ranks kept per projection and task, and of all."""
    rows = [row for row in by_projection(updates) if row["rank"] is not None]
    tasks, projections = (list(dict.fromkeys(row[key] for row in rows)) for key in ("task", "projection"))
    parts = {(row["task"], row["projection"]): (row["kept"], row["rank"]) for row in rows}
    lines = [
        (name, [_kept(*parts[task, name]) if (task, name) in parts else None for task in tasks])
        for name in projections
    ]
    sums = [
        [sum(v) for v in zip(*(part for (t, _), part in parts.items() if t == task), strict=True)]
        for task in tasks
    ]
    lines.append(("all", [_kept(*both) for both in sums]))
    whole = all(row["kept"] == row["rank"] for row in rows)
    note = "Every rank was kept." if whole else "Over all layers."
    return Grid("ranks kept", "projection", tasks, lines, note) if rows else None


def _kept(kept: int, rank: int) -> Cell:
    return Cell(
        kept, str(kept), small=f"of {rank}", heat=100 * kept / rank if rank else 0, hint=f"{kept} of {rank}"
    )


def _rank_maps(updates: list[dict]) -> list[Grid]:
    """Per task, layer × projection; none where every rank was kept."""
    rows = [row for row in updates if row["rank"] is not None]
    if all(row["kept"] == row["rank"] for row in rows):
        return []
    maps = []
    for task, members in groupby(rows, key=lambda row: row["task"]):
        cells = {_site(row["site"]): row for row in members}
        layers, names = (list(dict.fromkeys(keys)) for keys in zip(*cells, strict=True))
        ranks = sorted({row["rank"] for row in cells.values()})
        maps.append(
            Grid(
                f"ranks kept: {task}",
                "layer",
                [name.removesuffix("_proj") for name in names],
                [(layer, [_mapped(cells.get((layer, name))) for name in names]) for layer in layers],
                f"of {' or '.join(map(str, ranks))}",
            )
        )
    return maps


def _mapped(row: dict | None) -> Cell | None:
    if row is None:
        return None
    return Cell(
        row["kept"],
        str(row["kept"]),
        heat=100 * row["kept"] / row["rank"] if row["rank"] else 0,
        hint=f"{row['site']}: {row['kept']} of {row['rank']}",
    )


CHANGES = {
    "norm": ("norm of the update", "‖ΔW‖, mean over the layers"),
    "drift": ("cumulative drift", "‖W - W₀‖ after the task, mean over the layers"),
    "surviving": (
        "surviving share",
        "How much of the update is left once the sum is rounded to the model's dtype",
    ),
}


def _changes(updates: list[dict]) -> list[Grid]:
    rows = by_projection(updates)
    tasks, projections = (list(dict.fromkeys(row[key] for row in rows)) for key in ("task", "projection"))
    found = {(row["task"], row["projection"]): row for row in rows}
    grids = []
    for key, (name, note) in CHANGES.items():
        values = [row[key] for row in rows if row[key] is not None]
        top = max(values, default=0) or 1
        # What survives is near 1 where all is well, and at most by rounding above it.
        lines = [
            (
                task,
                [
                    number(
                        row[key] if row else None,
                        ".4f" if key == "surviving" else ".3f",
                        heat=min(100.0, 100 * (row[key] or 0) / top) if row else None,
                    )
                    for row in (found.get((task, p)) for p in projections)
                ],
            )
            for task in tasks
        ]
        grids += [Grid(name, "task", projections, lines, note)] * bool(values)
    return grids


def _curves(log: list[dict]) -> list[dict]:
    """Loss (and on the eval split), learning rate and tokens per second over the steps of the stream."""
    spans, first = [], 0
    for task, rows in groupby(log, key=lambda row: row["task"]):
        last = first + len(list(rows)) - 1
        spans.append((task, first, last))
        first = last + 1
    speed = [
        {"tokens/s": row["tokens"] / row["seconds"]} if row.get("tokens") and row.get("seconds") else {}
        for row in log
    ]
    out = []
    for title, keys, rows in (
        ("loss", ("loss", "eval_loss"), log),
        ("learning rate", ("lr",), log),
        ("tokens per second", ("tokens/s",), speed),
    ):
        series = {key: [point for _, a, b in spans for point in _points(rows, key, a, b)] for key in keys}
        if series := {key: line for key, line in series.items() if line}:
            out.append({"title": title, **curve(series, spans, from_zero=True)})
    return out


def _points(rows: list[dict], key: str, first: int, last: int) -> list[tuple[float, float]]:
    found = [(i, rows[i].get(key)) for i in range(first, last + 1)]
    return thinned([(i, value) for i, value in found if value is not None and math.isfinite(value)])


def _costs(costs: list[dict], log: list[dict]) -> Grid | None:
    """Per task, from costs.jsonl and the log: what training took."""
    known, lines = {row["task"]: row for row in costs}, []
    logged = {task: list(rows) for task, rows in groupby(log, key=lambda row: row["task"])}
    for task in {**logged, **known}:
        row, steps = known.get(task, {}), logged.get(task, [])
        tokens, seconds = (sum(step.get(key, 0) for step in steps) for key in ("tokens", "seconds"))
        peak = row.get("peak_bytes")
        lines.append(
            (
                task,
                [
                    number(row.get("trained"), ",d"),
                    number(len(steps) or None, "d"),
                    number(tokens or None, ",d"),
                    number(row.get("seconds", seconds or None)),
                    number(tokens / seconds if seconds else None, ",.0f"),
                    number(None if peak is None else peak / 2**20, ",.0f"),
                ],
            )
        )
    columns = ["parameters trained", "steps", "tokens", "seconds", "tokens/s", "peak memory, MiB"]
    return Grid("costs of training", "task", columns, lines).filled() if lines else None


def _command(manifest: dict) -> str:
    ranks, stage = manifest.get("world_size", 1), manifest.get("zero_stage", 0)
    launch = (
        ["codyra-llm"]
        if ranks == 1 and not stage
        else ["accelerate", "launch", "--num_processes", str(ranks), "-m", "codyra_llm"]
    )
    if stage:
        launch[2:2] = ["--use_deepspeed", "--zero_stage", str(stage)]
    origins = manifest.get("plugins", {}).values()
    named = {origin["file"]: None for origin in origins if "file" in origin}
    options = [word for file in named for word in ("--plugin", file)]
    return shlex.join([*launch, "run", "recipe.json", *options])
