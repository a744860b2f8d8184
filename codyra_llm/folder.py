"""The run folder: everything that must survive a restart, and the names of its files."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from . import recipe as recipes
from .errors import Fault
from .files import append_jsonl, read_jsonl, write_json, write_jsonl
from .lora.archive import Archive
from .recipe import Recipe

# settings that change no result
NO_RESULT = ("output", "checkpoint", "optim.micro_batch_tokens", "eval.batch_tokens", "model.fused", "data.batching")


class RunFolder:
    """`recipe.json`, `manifest.json`, `updates/`, `state/`, `predictions/`, `log.jsonl`, `updates.jsonl`, `costs.jsonl`,
    `scores.jsonl`, and what is derived from them: `summary.json`, `report.md`, `report.html`, `checkpoint/`."""

    def __init__(self, path: Path):
        self.path = path

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe of an existing run. Raises Fault where there is none."""
        file = self.path / "recipe.json"
        if not file.is_file():
            raise Fault(f"{self.path} is not a run folder (it has no recipe.json); give the `output` of a run")
        return recipes.parse(json.loads(file.read_text(encoding="utf-8")), str(file))

    @property
    def manifest(self) -> dict:
        return json.loads((self.path / "manifest.json").read_text(encoding="utf-8"))

    def open(self, recipe: Recipe, manifest: dict) -> None:
        """Claim the folder for a resolved recipe: new, the same again, or the same with tasks added at the end."""
        if (self.path / "recipe.json").is_file():
            if other := differences(self.recipe, recipe):
                raise Fault(*(f"{self.path} belongs to another recipe: {line}; give another `output`, or remove the "
                              f"folder" for line in other))
            if (was := self.manifest["base"]) != manifest["base"]:
                raise Fault(f"{self.path} was begun on other base weights ({was[:12]}, now {manifest['base'][:12]}); "
                            f"restore the model at model.path or give another `output`")
        elif self.path.exists() and any(self.path.iterdir()):
            raise Fault(f"output: {self.path} holds files of something else; give a new or empty folder")
        write_json(self.path / "recipe.json", recipe.model_dump(mode="json"))
        write_json(self.path / "manifest.json", manifest)
        self.__dict__.pop("recipe", None)

    def archive(self) -> Archive:
        return Archive(self.path / "updates", self.manifest["base"])

    def state(self, index: int) -> Path:
        """Where the method's state after task `index` lies."""
        return self.path / "state" / f"{index:02d}.safetensors"

    def load_state(self, index: int) -> dict[str, Tensor]:
        """What task `index` left beside its update; empty where it left nothing."""
        return load_file(self.state(index)) if self.state(index).is_file() else {}

    @property
    def scores(self) -> list[dict]:
        return read_jsonl(self.path / "scores.jsonl")

    def add_scores(self, row: dict, predictions: list[dict]) -> None:
        """Predictions first: a score without its predictions can't be checked."""
        write_jsonl(self._predictions(row["step"], row["after"], row["task"]), predictions)
        append_jsonl(self.path / "scores.jsonl", row)

    def predictions(self, step: int, after: str, task: str) -> list[dict]:
        """Prompt, prediction, answer and scores of the examples of `task`, as answered after the step; [] if it wasn't."""
        return read_jsonl(self._predictions(step, after, task))

    def _predictions(self, step: int, after: str, task: str) -> Path:
        return self.path / "predictions" / f"{step:02d}-{after}" / f"{task}.jsonl"

    def restart_log(self, task: str) -> None:
        """Leave out what an attempt at `task` logged before it was stopped."""
        self._replace("log", task, [])

    def log(self, row: dict) -> None:
        append_jsonl(self.path / "log.jsonl", row)

    @property
    def log_rows(self) -> list[dict]:
        return read_jsonl(self.path / "log.jsonl")

    @property
    def updates(self) -> list[dict]:
        return read_jsonl(self.path / "updates.jsonl")

    def add_update_report(self, task: str, rows: list[dict]) -> None:
        self._replace("updates", task, rows)

    @property
    def costs(self) -> list[dict]:
        return read_jsonl(self.path / "costs.jsonl")

    def add_costs(self, task: str, row: dict) -> None:
        self._replace("costs", task, [row])

    def _replace(self, name: str, task: str, rows: list[dict]) -> None:
        """Put `rows` in place of those of an earlier attempt at `task`."""
        file = self.path / f"{name}.jsonl"
        kept = [row for row in read_jsonl(file) if row["task"] != task]
        write_jsonl(file, kept + [{"task": task, **row} for row in rows])

    @property
    def summary(self) -> dict:
        """Empty before the run has come to its end."""
        file = self.path / "summary.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def write_summary(self, summary: dict, report: str) -> None:
        write_json(self.path / "summary.json", summary)
        (self.path / "report.md").write_text(report, encoding="utf-8")


def differences(old: Recipe, new: Recipe) -> list[str]:
    """Keys in which two resolved recipes differ, beside tasks added at the end and settings that change no result."""
    before, after = (flat(r.model_dump(mode="json")) for r in (old, new))
    lines = []
    if new.tasks[: len(old.tasks)] != old.tasks:
        lines.append(f"data.tasks was {old.tasks}, now {new.tasks}")
    for key in sorted(before.keys() | after.keys()):
        free = key in (*NO_RESULT, "data.tasks")
        added = key.startswith(("data.epochs.", "eval.max_new_tokens.")) and key.rpartition(".")[2] not in old.tasks
        if not (free or added) and before.get(key) != after.get(key):
            lines.append(f"{key} was {before.get(key)!r}, now {after.get(key)!r}")
    return lines


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """A nested mapping as one, keys joined by dots."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, inner in value.items() for k, v in flat(inner, f"{prefix}.{key}" if prefix else key).items()}
