"""Rows of log.jsonl and scores, as they are written, to the trackers that Accelerate knows: TensorBoard,
wandb and others.
"""

import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, filter_trackers, get_available_trackers
from accelerate.utils import LoggerType

from codyra_llm.config.differences import flat
from codyra_llm.core.errors import Fault, nearest
from codyra_llm.core.files import write_text
from codyra_llm.core.parsing import read_text
from codyra_llm.experiment.agenda import steps
from codyra_llm.experiment.setup import Setup
from codyra_llm.runtime.display import console
from codyra_llm.runtime.launch import collectively
from codyra_llm.store.folder import RunFolder

PROJECT = "codyra-llm"
NOT_SHOWN = ("task", "step", "steps", "tokens", "seconds", "micro_batch_tokens")  # of the rows of log.jsonl


def check(names: Iterable[str]) -> None:
    """Raises one Fault for all `names` that Accelerate does not know, or whose package is not
    installed.
    """
    known, there = list(LOGGER_TYPE_TO_CLASS), [str(kind) for kind in get_available_trackers()]
    faults = [
        f"trackers: '{name}' is not a tracker that Accelerate knows.{nearest(name, known)} Known: "
        f"{', '.join(known)}"
        for name in names
        if name not in known
    ]
    faults += [
        f"trackers: '{name}' is not installed; pip install {name.replace('_', '-')}, or leave it out"
        for name in names
        if name in known and name in LoggerType and name not in there
    ]
    if faults:
        raise Fault(*faults)


@contextmanager
def running(setup: Setup, folder: RunFolder, acc: Accelerator) -> Iterator[None]:
    """Within this block the recipe's trackers, in the first process, get every row written to the folder.

    Steps are counted over all tasks. A resumed run continues in the tracker's run of the same name, and
    steps that are repeated after a checkpoint are not logged twice. Raises Fault where a tracker can't start;
    one that fails later gets no more rows."""
    if not setup.recipe.trackers:
        yield
        return
    collectively(acc.is_main_process, _begin, setup, folder, acc)
    try:
        yield
    finally:
        for tracker in acc.trackers:
            _tried(tracker, tracker.finish)


def _begin(setup: Setup, folder: RunFolder, acc: Accelerator) -> None:
    place = folder.path / "trackers"
    name, before = _identity(folder, place)
    tasks, counts = (
        setup.recipe.tasks,
        list(accumulate(steps(setup), initial=0)),
    )  # counts: steps before each task
    told = _told(folder, place, tasks, counts) if before else 0
    acc.project_configuration.logging_dir = str(place)
    begun: list[GeneralTracker] = []
    for kind in setup.recipe.trackers:
        acc.log_with, acc.trackers = filter_trackers([kind], place), []
        try:
            acc.init_trackers(
                PROJECT,
                None if before else _settings(setup),
                _options(folder.path.resolve().name, name, place),
            )
        except Exception as error:  # a tracker may raise any error of its package, its server or its login
            for tracker in begun:
                _tried(tracker, tracker.finish)
            raise Fault(
                f"trackers: {kind} can't begin ({_reason(error)}); mend that, or leave it out"
            ) from None
        begun += acc.trackers
    acc.trackers = begun

    def tell(values: dict, step: int) -> None:
        acc.trackers = [
            tracker for tracker in acc.trackers if _tried(tracker, tracker.log, values, step=step)
        ]

    def hear(row: dict) -> None:
        if "after" in row:
            tell(
                {f"{'score' if row['kind'] == 'task' else 'general'}/{row['task']}": row["score"]},
                counts[row["step"]],
            )
        elif (step := counts[tasks.index(row["task"])] + row["step"]) > told:
            values = {key: value for key, value in row.items() if key not in NOT_SHOWN}
            values |= {
                "task": tasks.index(row["task"]) + 1,
                "tokens_per_second": row["tokens"] / max(row["seconds"], 1e-4),
            }
            tell({f"train/{key}": value for key, value in values.items()}, step)

    folder.hear = hear


def _tried(tracker: GeneralTracker, action: Callable, *args, **options) -> bool:
    """Whether the call to the tracker worked. It may raise anything, at any time, and must not end days of
    training: the error is reported once.
    """
    try:
        action(*args, **options)
        return True
    except Exception as error:  # as above
        console.print(
            f"warning: {tracker.name} failed ({_reason(error)}), and gets no more of this process; the run "
            "goes on",
            soft_wrap=True,
        )
        return False


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _told(folder: RunFolder, place: Path, tasks: list[str], counts: list[int]) -> int:
    """The last step already logged to the trackers, by the process before, as its log says, or by an earlier
    one that had got further. It has its own file since a resumed run cuts the log back to its checkpoint."""
    file, last = place / "told.txt", folder.log_rows[-1:]
    logged = max((counts[tasks.index(row["task"])] + row["step"] for row in last), default=0)
    kept = read_text(file, "a number of steps").strip() if file.is_file() else ""
    told = max(logged, int(kept) if kept.isdecimal() else 0)
    folder.may_write()
    write_text(file, f"{told}\n")
    return told


def _identity(folder: RunFolder, place: Path) -> tuple[str, bool]:
    """The name of this run for trackers that identify runs by name, and whether it had one before."""
    file = place / "id.txt"
    if before := file.is_file():
        return file.read_text(encoding="utf-8").strip(), before
    folder.may_write()
    write_text(file, uuid.uuid4().hex[:12] + "\n")
    return _identity(folder, place)[0], before


def _options(title: str, name: str, place: Path) -> dict[str, dict]:
    """What each kind of tracker gets in addition to the project's name, so that it continues the same run."""
    return {
        "wandb": {"id": name, "name": title, "resume": "allow", "dir": str(place)},
        "trackio": {"name": f"{title}-{name}", "resume": "allow"},
        "mlflow": {"run_name": title},
    }


def _settings(setup: Setup) -> dict[str, bool | int | float | str]:
    """The resolved recipe in one level, lists as text."""
    settings = flat(setup.recipe.model_dump(mode="json"))
    return {
        key: value if isinstance(value, bool | int | float | str) else str(value)
        for key, value in settings.items()
    }
