"""Rows of log.jsonl and scores, as they are written, to the trackers that Accelerate knows: TensorBoard, wandb and others."""

import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers, get_available_trackers
from accelerate.utils import LoggerType

from .ahead import steps
from .errors import Fault, nearest
from .files import write_text
from .folder import RunFolder, flat
from .setup import Setup

PROJECT = "codyra-llm"
NOT_SHOWN = ("task", "step", "steps", "tokens", "seconds", "micro_batch_tokens")  # of the rows of log.jsonl


def check(names: Iterable[str]) -> None:
    """Raises one Fault for all of `names` that Accelerate does not know, or whose package is not installed."""
    known, there = list(LOGGER_TYPE_TO_CLASS), [str(kind) for kind in get_available_trackers()]
    faults = [f"trackers: '{name}' is not a tracker that Accelerate knows.{nearest(name, known)} Known: {', '.join(known)}"
              for name in names if name not in known]
    faults += [f"trackers: '{name}' is not installed; pip install {name.replace('_', '-')}, or leave it out"
               for name in names if name in known and name in LoggerType and name not in there]
    if faults:
        raise Fault(*faults)


@contextmanager
def running(setup: Setup, folder: RunFolder, acc: Accelerator) -> Iterator[None]:
    """Within it the trackers of the recipe, in the first process, get what is written to the folder.

    Steps are counted over all tasks. A run that goes on goes on in the tracker's run of the same name, and steps that are
    trained again behind a checkpoint are not told again."""
    if not (setup.recipe.trackers and acc.is_main_process):
        yield
        return
    place = folder.path / "trackers"
    name, before = _identity(folder, place)
    counts = [sum(steps(setup)[:index]) for index in range(len(setup.recipe.tasks) + 1)]
    tasks, heard = setup.recipe.tasks, folder.log_rows[-1:] if before else []
    told = max((counts[tasks.index(row["task"])] + row["step"] for row in heard), default=0)
    acc.log_with = filter_trackers(setup.recipe.trackers, place)
    acc.project_configuration.logging_dir = str(place)
    acc.init_trackers(PROJECT, None if before else _settings(setup), _options(folder.path.resolve().name, name, place))

    def hear(row: dict) -> None:
        if "after" in row:
            acc.log({f"{'score' if row['kind'] == 'task' else 'general'}/{row['task']}": row["score"]}, counts[row["step"]])
        elif (step := counts[tasks.index(row["task"])] + row["step"]) > told:
            values = {key: value for key, value in row.items() if key not in NOT_SHOWN}
            values |= {"task": tasks.index(row["task"]) + 1, "tokens_per_second": row["tokens"] / max(row["seconds"], 1e-4)}
            acc.log({f"train/{key}": value for key, value in values.items()}, step)

    folder.hear = hear
    try:
        yield
    finally:
        for tracker in acc.trackers:
            tracker.finish()


def _identity(folder: RunFolder, place: Path) -> tuple[str, bool]:
    """The name of this run for trackers that keep runs apart by names, and whether it had one before."""
    file = place / "id.txt"
    if before := file.is_file():
        return file.read_text(encoding="utf-8").strip(), before
    folder.may_write()
    write_text(file, uuid.uuid4().hex[:12] + "\n")
    return _identity(folder, place)[0], before


def _options(title: str, name: str, place: Path) -> dict[str, dict]:
    """What each kind of tracker is told beside the project, so that it goes on in the same run."""
    return {"wandb": {"id": name, "name": title, "resume": "allow", "dir": str(place)},
            "trackio": {"name": f"{title}-{name}", "resume": "allow"}, "mlflow": {"run_name": title}}


def _settings(setup: Setup) -> dict[str, bool | int | float | str]:
    """The resolved recipe in one level, lists as text."""
    settings = flat(setup.recipe.model_dump(mode="json"))
    return {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in settings.items()}
