"""The run folder: everything that must survive a restart, and the names of its files."""

import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from codyra_llm.config import plugins
from codyra_llm.config.differences import differences
from codyra_llm.config.recipe import Recipe, parse_recipe
from codyra_llm.core.errors import Fault
from codyra_llm.core.files import (
    append_jsonl,
    await_file,
    is_leftover,
    read_jsonl,
    remove_leftovers,
    to_json,
    to_jsonl,
    write_text,
)
from codyra_llm.core.parsing import read_mapping
from codyra_llm.store import observer
from codyra_llm.store.checksums import NAME as SEALS
from codyra_llm.store.checksums import Seals
from codyra_llm.store.lock import Lease, holder
from codyra_llm.store.rows import CostRow, FloorRow, LogRow, Row, ScoreRow, Stage, UpdateRow

# Reports and `status` read a run without tensors, and torch is slow to import.
if TYPE_CHECKING:
    from torch import Tensor

    from codyra_llm.store.archive import Archive
    from codyra_llm.store.checkpoint import Progress

R = TypeVar("R", bound=Row)
LOG, SUMMARY = "log.jsonl", "summary.json"
OWN = ("lease.json", SEALS, "recipe.json")  # may be in a folder that is about to become a run's


class RunFolder:
    """`recipe.json`, `manifest.json`, `updates/`, `state/`, `predictions/`, `answers/`, `updates.jsonl`,
    `costs.jsonl`, `floor.jsonl`, `scores.jsonl`, with their hashes in `seals.json` (updates have their own);
    `log.jsonl`, `judged/`; `progress/`, the checkpoints inside a task; `lease.json`, the lock; `trackers/`;
    and what is derived: `summary.json`, `report.md`, `report.html`, `checkpoint/`.

    Reading a file that was changed, damaged or lost since it was written is a Fault."""

    def __init__(self, path: Path, lease: Lease | None = None, checks: bool = True):
        """`lease`: the lock, held by the one process that may write. In a launch of several only that process
        `checks` hashes: on a network file system others may see the new file and the old hash for a while."""
        self.path, self.lease, self.seals = path, lease, Seals(path, checks)

    @property
    def is_run(self) -> bool:
        """Whether there is a run, which has a recipe.json or has lost it; an evaluation has none."""
        return (self.path / "recipe.json").is_file() or "recipe.json" in self.seals.noted

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe of an existing run. Raises Fault where there is none."""
        file = self.path / "recipe.json"
        if not self.is_run:
            raise Fault(
                f"{self.path} is not a run folder (it has no recipe.json); give the `output` of a run"
            )
        raw = self._mapping("recipe.json")
        self._need_plugins()
        return parse_recipe(raw, str(file))

    def _need_plugins(self) -> None:
        """Raises Fault with every plug-in that the run was made with and that is not loaded here."""
        file = self.path / "manifest.json"
        recorded = read_mapping(file, "what the run wrote").get("plugins", {}) if file.is_file() else {}
        faults = plugins.missing(recorded, str(self.path))
        if faults:
            raise Fault(*faults)

    @property
    def origins(self) -> dict[str, plugins.Origin]:
        """Where the method and the metrics that are not shipped came from."""
        return self.manifest.get("plugins", {})

    @cached_property
    def manifest(self) -> dict:
        """What manifest.json holds: what the run was made with. Raises Fault where it was damaged or lost."""
        return self._mapping("manifest.json")

    def clear_up(self) -> None:
        """Remove what a killed process left half written. Raises Fault where the folder has files of
        something else, or has lost the hashes of its files."""
        names = [p.name for p in self.path.iterdir()] if self.path.is_dir() else []
        if SEALS not in names and "manifest.json" in names:
            raise Fault(
                f"{self.path / SEALS} is missing, which has the hashes of this run's files; restore it from "
                "a copy, or begin again in another output"
            )
        if SEALS not in names and any(name not in OWN and not is_leftover(name) for name in names):
            raise Fault(f"output: {self.path} holds files of something else; give a new or empty folder")
        remove_leftovers(self.path)

    def read_by_all(self) -> list[str]:
        """The files that every process of a launch reads, not only the first: what a run resumes from."""
        patterns = (
            "manifest.json",
            "updates/*.safetensors",
            "state/*.safetensors",
            "progress/*/complete.json",
        )
        found = [file for pattern in patterns for file in sorted(self.path.glob(pattern))]
        return [file.relative_to(self.path).as_posix() for file in found]

    def await_files(self, names: list[str]) -> None:
        """Wait until this process sees these files, all of which the first process sees."""
        for name in names:
            await_file(self.path / name)

    def may_write(self) -> None:
        """Raises Fault where another process has taken the folder over."""
        if self.lease:
            self.lease.check()

    def open(self, recipe: Recipe, manifest: dict) -> str:
        """Claim the folder for a resolved recipe: a new folder, or that of the same recipe, to which tasks
        may have been added at the end. Returns a remark for the user, or an empty text."""
        for name in ("recipe.json", "manifest.json"):
            self.seals.check(self.path / name)
        remark = self._resumes(recipe, manifest) if (self.path / "manifest.json").is_file() else ""
        self._write("recipe.json", to_json(recipe.model_dump(mode="json")))
        self.write_manifest(manifest)
        self.__dict__.pop("recipe", None)  # so that it is read again
        return remark

    def _resumes(self, recipe: Recipe, manifest: dict) -> str:
        """The remark of `open` for a folder that is in use. Raises Fault where it has something other than a
        run of this recipe."""
        if "recipe" in self.manifest:
            raise Fault(f"output: {self.path} is the folder of an evaluation; give another one")
        self._refuse_another_plugin(recipe)
        faults = plugins.changed(self.origins, manifest.get("plugins", {}), str(self.path))
        if faults:
            raise Fault(*faults)
        faults = [
            f"{self.path} belongs to another recipe: {line}; give another `output`, or remove the folder"
            for line in (*differences(self.recipe, recipe), *self._other_files(manifest))
        ]
        if faults:
            raise Fault(*faults)
        return _other_launch(self.manifest, manifest)

    def _refuse_another_plugin(self, recipe: Recipe) -> None:
        """Raises Fault where the folder's run is by another method, from a plug-in. That one may not be known
        here, and then its recipe can't be read."""
        section = self._mapping("recipe.json").get("method")
        was = section.get("name") if isinstance(section, dict) else section
        if was != recipe.method.name and f"method {was}" in self.origins:
            raise Fault(
                f"{self.path} belongs to another recipe: method.name was {was!r}, now "
                f"{recipe.method.name!r}; give another `output`, or remove the folder"
            )

    def write_manifest(self, manifest: dict) -> None:
        """Write manifest.json, which is read again when it is next needed."""
        self._write("manifest.json", to_json(manifest))
        self.__dict__.pop("manifest", None)

    def _other_files(self, manifest: dict) -> list[str]:
        """Which of base, tokenizer, data and metrics differ from those that the run started with."""
        was = self.manifest
        lines = [
            f"the {key} was {str(was[key])[:12]}, and is {str(manifest[key])[:12]} now"
            for key in ("base", "tokenizer")
            if key in was and was[key] != manifest[key]
        ]
        for kind in ("data", "method_data", "metrics"):
            now = manifest.get(kind, {})
            lines += [
                f"{name} was {value}, and is {now.get(name, 'not there')} now"
                for name, value in was.get(kind, {}).items()
                if now.get(name) != value
            ]
        return lines

    def archive(self) -> "Archive":
        """The run's updates. Raises Fault where they don't belong to the run's base, or to each other."""
        from codyra_llm.store.archive import Archive

        if "base" not in self.manifest:
            raise Fault(
                f"{self.path / 'manifest.json'} does not say which base the run began with; restore it from "
                "a copy"
            )
        return Archive(self.path / "updates", self.manifest["base"])

    def state(self, index: int) -> Path:
        """The file of the method's state after task `index`."""
        return self.path / "state" / f"{index:02d}.safetensors"

    def load_state(self, index: int) -> dict[str, "Tensor"]:
        """The method's state after task `index`, which is not part of the update; empty if there is none."""
        from safetensors.torch import load_file

        self.seals.check(self.state(index))
        return load_file(self.state(index)) if self.state(index).is_file() else {}

    def save_state(self, index: int, state: dict[str, "Tensor"]) -> None:
        """Write the method's state after task `index`."""
        from codyra_llm.core.tensors import save_tensors

        self.may_write()
        with self.seals.replacing(self.state(index)) as temporary:
            save_tensors({k: v.detach().cpu().contiguous() for k, v in state.items()}, temporary)

    def progress(self, index: int, task: str, parent: str) -> "Progress":
        """The checkpoints inside task `index`, which starts from the updates of lineage `parent`."""
        from codyra_llm.store.checkpoint import Progress

        return Progress(self.path / "progress", index, task, parent, self.recipe.save, self.may_write)

    def check_scores(self, learnt: int) -> None:
        """Raise Fault where an update was lost: where later ones are there, or where there are scores after
        more tasks than the `learnt` ones.
        """
        names = sorted(file.name for file in self.path.glob("updates/*.safetensors"))
        for number, name in enumerate(names):
            if int(name.partition("-")[0]) != number:
                raise Fault(
                    f"{self.path / 'updates'} has no update of task {number + 1}, but {name}; restore it "
                    "from a copy, or begin again in another output"
                )
        lost = [row.after for row in self.scores if row.step > learnt]
        if lost:
            raise Fault(
                f"{self.path / 'updates'} has no update of {lost[0]}, after which scores.jsonl has scores; "
                "restore it from a copy, or begin again in another output"
            )

    def check_results(self) -> None:
        """Raise one Fault that names every file of results which was changed, damaged or lost: scores, the
        predictions that they were computed from, answers, costs, and what the run was given. Called before a
        run is reported on or resumed. Updates and states are checked as they are read, and a summary can be
        made again from the rest."""
        self.seals.check_all(but=("state", SUMMARY))

    def clear_progress(self) -> None:
        """Remove the checkpoints inside a task, once it is learnt."""
        self.may_write()
        shutil.rmtree(self.path / "progress", ignore_errors=True)

    @property
    def scores(self) -> list[ScoreRow]:
        return self._rows(ScoreRow, "scores.jsonl")

    def add_scores(self, row: ScoreRow, predictions: list[dict]) -> None:
        """Write predictions, then scores: a score without its predictions can't be checked."""
        name = self._predictions(row.stage, row.task).relative_to(self.path).as_posix()
        self._write(name, to_jsonl(predictions))
        self._write_rows("scores.jsonl", [*self.scores, row])
        observer.scored(row)

    @property
    def floor(self) -> list[FloorRow]:
        """What each task's most frequent training answer scores; [] for a run that did not record it."""
        return self._rows(FloorRow, "floor.jsonl")

    def add_floor(self, rows: list[FloorRow]) -> None:
        self._write_rows("floor.jsonl", [*self.floor, *rows])

    def tasks_scored(self, stage: Stage) -> set[str]:
        """The tasks that have scores of this stage."""
        return {row.task for row in self.scores if row.step == stage.step}

    def predictions(self, stage: Stage, task: str) -> list[dict]:
        """Prompt, prediction, answer and scores of the examples of `task`, as answered at the stage; [] if
        they weren't.
        """
        self.seals.check(self._predictions(stage, task))
        return read_jsonl(self._predictions(stage, task))

    def _predictions(self, stage: Stage, task: str) -> Path:
        return self.path / "predictions" / stage.folder / f"{task}.jsonl"

    def answers(self, name: str) -> list[dict]:
        """{"prompt", "base", "final", "after"} for each answered open-ended prompt of file `name`."""
        file = self.path / "answers" / f"{name}.jsonl"
        self.seals.check(file)
        return read_jsonl(file)

    def write_answers(self, name: str, rows: list[dict]) -> None:
        self._write(f"answers/{name}.jsonl", to_jsonl(rows))

    def pairs(self, name: str) -> list[dict]:
        """The answers to prompts that both models have answered."""
        return [row for row in self.answers(name) if row.keys() >= {"base", "final"}]

    def restart_log(self, task: str, step: int) -> None:
        """Remove from the log what an earlier attempt at `task` wrote after `step`."""
        self.may_write()
        self.seals.forget(self.path / LOG)  # rows are appended from here on, so its hash would not hold
        kept = [row.as_json() for row in self.log_rows if row.task != task or row.step <= step]
        write_text(self.path / LOG, to_jsonl(kept))

    def close_log(self) -> None:
        """Record the hash of the log, which is complete now."""
        if (self.path / LOG).is_file():
            self._write_rows(LOG, self.log_rows)

    def log(self, row: LogRow) -> None:
        """Append one optimizer step to the log."""
        self.may_write()
        append_jsonl(self.path / LOG, row.as_json())
        observer.row_logged(row)

    @property
    def log_rows(self) -> list[LogRow]:
        return LogRow.read(self.path / LOG)

    @property
    def updates(self) -> list[UpdateRow]:
        return self._rows(UpdateRow, "updates.jsonl")

    def add_update_report(self, task: str, rows: list[UpdateRow]) -> None:
        """Put `rows` in place of those of an earlier attempt at `task`."""
        kept = [row for row in self.updates if row.task != task]
        self._write_rows("updates.jsonl", kept + rows)

    @property
    def costs(self) -> list[CostRow]:
        return self._rows(CostRow, "costs.jsonl")

    def add_costs(self, row: CostRow) -> None:
        """Put `row` in place of that of an earlier attempt at its task."""
        kept = [other for other in self.costs if other.task != row.task]
        self._write_rows("costs.jsonl", [*kept, row])

    def _rows(self, kind: type[R], name: str) -> list[R]:
        self.seals.check(self.path / name)
        return kind.read(self.path / name)

    def _write_rows(self, name: str, rows: Sequence[Row]) -> None:
        self._write(name, to_jsonl([row.as_json() for row in rows]))

    def _mapping(self, name: str) -> dict:
        self.seals.check(self.path / name)
        return read_mapping(self.path / name, "what the run wrote")

    def _write(self, name: str, text: str) -> None:
        self.may_write()
        with self.seals.replacing(self.path / name) as temporary:
            temporary.write_text(text, encoding="utf-8")

    @property
    def summary(self) -> dict:
        """What summary.json holds; empty until the run is finished. Raises Fault where it was damaged."""
        file = self.path / SUMMARY
        if file.is_file() and not self.seals.holds(file):
            raise Fault(
                f"{file} was changed or damaged since it was written; `codyra-llm report {self.path}` writes "
                "it again"
            )
        return read_mapping(file, "what the run wrote") if file.is_file() else {}

    @property
    def finished(self) -> bool:
        """Whether the run is complete and no process works on it; its summary may have been damaged since."""
        file, owner = self.path / SUMMARY, holder(self.path)
        if not file.is_file() or (owner and owner["alive"]):
            return False
        return not self.seals.holds(file) or self.summary.get("tasks") == self.recipe.tasks

    def write_summary(self, summary: dict, report: str) -> None:
        """Write the summary last: its presence marks a finished run."""
        self.write_report(report)
        self._write(SUMMARY, to_json(summary))

    def write_report(self, report: str) -> None:
        self.may_write()
        write_text(self.path / "report.md", report)


def _other_launch(was: dict, now: dict) -> str:
    """A sentence where a run resumes with other versions, devices or numbers of processes; else empty."""
    # `open` refuses a change of most of these; the others do not depend on the launch.
    elsewhere = {"base", "tokenizer", "benchmark", "data", "metrics", "plugins", "stages"}
    changed = [
        f"{key} was {was[key]}, now {now[key]}"
        for key in was.keys() & now.keys() - elsewhere
        if was[key] != now[key]
    ]
    if not changed:
        return ""
    return f"going on where the run stopped, equal to rounding only: {', '.join(sorted(changed))}"
