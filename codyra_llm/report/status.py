"""How far a run is, read from its folder while it runs or later; without torch, so that it is quick."""

import os
import re
import time
from pathlib import Path

from rich.console import Console

from codyra_llm.core.errors import Fault
from codyra_llm.core.parsing import read_mapping
from codyra_llm.runtime.forecast import duration
from codyra_llm.store.folder import RunFolder
from codyra_llm.store.lock import holder
from codyra_llm.store.rows import BASE, LogRow, ScoreRow


def look(folder: Path) -> dict:
    """State (running, stopped, died, finished), tasks and those learnt, the last row of the log, who holds
    the folder, when it was last written (s since 1970), what the run would do next, the scores by stage and
    task. Raises Fault where there is no run, and where an inactive run has lost results."""
    owner = holder(folder)
    recipe = _recipe(folder, owner)
    tasks, scores = recipe["data"]["tasks"], ScoreRow.read(folder / "scores.jsonl")
    learnt = len(list(folder.glob("updates/*.safetensors")))
    if not (owner and owner["alive"]):  # an active run checks its files itself
        RunFolder(folder).check_results()
        RunFolder(folder).check_scores(learnt)
    summary = _mapping(folder / "summary.json", "what the run wrote")
    finished = summary.get("tasks") == tasks and not (owner and owner["alive"])
    if owner and owner["alive"]:
        state = "running"
    elif finished:
        state = "finished"
    else:
        state = "died" if owner else "stopped"  # a process that stops in an orderly way releases the folder
    log = LogRow.read(folder / "log.jsonl")[-1:]
    by_stage: dict[str, dict[str, float | None]] = {}
    for row in scores:
        by_stage.setdefault(row.after, {})[row.task] = row.score
    return {
        "run": str(folder),
        "state": state,
        "method": recipe["method"]["name"],
        "tasks": tasks,
        "learnt": tasks[:learnt],
        "last": log[0].as_json() if log else None,
        "holder": owner,
        "written": _written(folder),
        "next": None if finished else _next(folder, tasks, learnt, scores),
        "scores": by_stage,
    }


def show(found: dict, console: Console) -> None:
    """Print what `look` found."""
    tasks, last, owner = found["tasks"], found["last"], found["holder"]
    who = f", by process {owner['pid']} on {owner['host']}" if owner else ""
    lines = [
        f"{found['run']}: {found['state']}{who}; last written {duration(time.time() - found['written'])} ago",
        f"method {found['method']}, {len(found['learnt'])} of {len(tasks)} tasks learnt: "
        f"{', '.join(found['learnt']) or 'none'}",
    ]
    if last:
        row = LogRow.parse(last, found["run"])
        lines.append(
            f"last step: task {tasks.index(row.task) + 1}/{len(tasks)} {row.task}, "
            f"step {row.step}/{row.steps}, loss {row.loss:.3f}, {row.speed:,.0f} tokens/s"
        )
    for stage, by_task in found["scores"].items():
        scores = ", ".join(f"{task} {score:z.1f}" for task, score in by_task.items())
        lines.append(f"after {stage}: {scores}")
    if found["next"]:
        lead = "next" if found["state"] == "running" else "to resume, run the same command; next"
        lines.append(f"{lead}: {found['next']}")
    for line in lines:
        console.print(line, soft_wrap=True)


def _recipe(folder: Path, owner: dict | None) -> dict:
    """The run's recipe as it is on disk. Raises Fault where there is none (yet), or it is not a recipe."""
    found = _mapping(folder / "recipe.json", "what the run wrote")
    match found:
        case {"data": {"tasks": [*tasks]}, "method": {"name": str()}} if _all_text(tasks):
            return found
    if found:
        raise Fault(
            f"{folder / 'recipe.json'} is not a run's (it names no method or no tasks); give the `output` of "
            "a run"
        )
    if owner and owner["alive"]:
        raise Fault(
            f"{folder}: process {owner['pid']} on {owner['host']} is about to begin a run there; ask again "
            "in a moment"
        )
    raise Fault(f"{folder} is not a run folder (it has no recipe.json); give the `output` of a run")


def _all_text(values: list) -> bool:
    return all(isinstance(value, str) for value in values)


def _mapping(file: Path, what: str) -> dict:
    return read_mapping(file, what) if file.is_file() else {}


def _written(folder: Path) -> float:
    """When a file of the run last changed, in seconds since 1970. The lease does not count: it is renewed
    even if the run makes no progress."""
    times = []
    # os.walk skips folders that are removed meanwhile; glob fails at them.
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                if name != "lease.json" and not name.startswith("."):
                    times.append(os.stat(os.path.join(place, name)).st_mtime)
            except FileNotFoundError:  # removed meanwhile
                continue
    return max(times)


def _next(folder: Path, tasks: list[str], learnt: int, scores: list[ScoreRow]) -> str:
    """What `codyra-llm run` would do first."""
    stages = _mapping(folder / "manifest.json", "what the run wrote").get("stages") or {
        task: [] for task in tasks
    }
    scored = {(row.after, row.task) for row in scores}
    for stage, names in stages.items():
        index = tasks.index(stage) if stage != BASE else -1
        if index >= learnt:
            step = _saved(folder / "progress", f"{index:02d}-{stage}-")
            begin = "from its start" if step is None else f"after step {step}"
            return f"task {index + 1}/{len(tasks)} {stage}, {begin}"
        missing = [name for name in names if (stage, name) not in scored]
        if missing:
            return f"{missing[0]} after {stage}, {len(names) - len(missing)} of {len(names)} scored there"
    return "the final checkpoint and the reports"


def _saved(folder: Path, prefix: str) -> int | None:
    """The step of the last whole checkpoint whose name begins so."""
    steps = []
    for place, _, files in os.walk(folder):
        found = re.fullmatch(re.escape(prefix) + r"(\d{8})", os.path.basename(place))
        if found and "complete.json" in files:
            steps.append(int(found[1]))
    return max(steps, default=None)
