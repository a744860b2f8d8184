"""The project's own observers: the display, the heartbeat, and the trackers that Accelerate knows
(TensorBoard, wandb and others)."""

import logging
import uuid
from collections.abc import Callable, Iterable
from itertools import accumulate
from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, filter_trackers, get_available_trackers
from accelerate.utils import LoggerType

from codyra_llm.config.differences import flat
from codyra_llm.config.recipe import Recipe
from codyra_llm.core.errors import Fault, nearest
from codyra_llm.core.files import write_text
from codyra_llm.core.parsing import read_text
from codyra_llm.runtime import display, heartbeat
from codyra_llm.runtime.forecast import Piece
from codyra_llm.store.folder import RunFolder
from codyra_llm.store.observer import Observer
from codyra_llm.store.rows import LogRow, ScoreRow, Stage

log = logging.getLogger(__name__)
PROJECT = "codyra-llm"


class Beats(Observer):
    """Passes every place on to the watchdog of this process, which tells the other processes."""

    def at(self, place: str) -> None:
        heartbeat.at(place)


class Display(Observer):
    """Shows how far the run is: on a terminal one line that is kept up to date, elsewhere a line printed now
    and then."""

    def __init__(self) -> None:
        self.line = display.Line()
        self.tasks: list[str] = []
        self.live = None

    def run_begins(self, tasks: list[str]) -> None:
        self.tasks, self.live = tasks, display.live(self.line)
        if self.live:
            self.live.start(refresh=True)
            display.console.show_cursor(True)  # a process that is killed would leave it hidden

    def run_ends(self) -> None:
        if self.live:
            self.live.stop()

    def expected(self, due: dict[Piece, float]) -> None:
        self.line.expect(due)

    def measured(self, piece: Piece, amount: float, seconds: float) -> None:
        self.line.forecast.done(piece, amount, seconds)

    def stage_begins(self, stage: Stage, piece: Piece) -> None:
        short = stage.after if piece.kind != "close" else ""
        long = short
        if short in self.tasks:
            short = f"{self.tasks.index(short) + 1}/{len(self.tasks)} {short}"
            long = f"task {short}"
        self.line.begin(piece, (long, short))

    def counted(self, done: int, total: int) -> None:
        self.line.count(done, total)

    def noted(self, what: str) -> None:
        self.line.note(what)

    def row_logged(self, row: LogRow) -> None:
        self.line.count(row.step, row.steps, row.loss, row.tokens)


def check(names: Iterable[str]) -> None:
    """Raises one Fault for all `names` that Accelerate does not know, or whose package is not
    installed.
    """
    known = list(LOGGER_TYPE_TO_CLASS)
    installed = [str(kind) for kind in get_available_trackers()]
    faults = []
    for name in names:
        if name not in known:
            faults.append(
                f"trackers: '{name}' is not a tracker that Accelerate knows.{nearest(name, known)} Known: "
                f"{', '.join(known)}"
            )
    for name in names:
        if name in known and name in LoggerType and name not in installed:
            package = name.replace("_", "-")
            faults.append(f"trackers: '{name}' is not installed; pip install {package}, or leave it out")
    if faults:
        raise Fault(*faults)


class Trackers(Observer):
    """Passes every row on to the recipe's trackers.

    Steps are counted over all tasks. A resumed run continues in the tracker's run of the same name, and
    steps that are repeated after a checkpoint are not logged twice. A tracker that fails gets no more
    rows."""

    def __init__(self, recipe: Recipe, folder: RunFolder, acc: Accelerator, steps: list[int]):
        """`steps`: of each task. Raises Fault where a tracker can't begin."""
        self.tasks = recipe.tasks
        self.before = list(accumulate(steps, initial=0))  # of each task, the steps of those before it
        place = folder.path / "trackers"
        name, goes_on = _identity(folder, place)
        self.logged = self._already_logged(folder, place) if goes_on else 0
        acc.project_configuration.logging_dir = str(place)
        options = _options(folder.path.resolve().name, name, place)
        settings = None if goes_on else _settings(recipe)
        self.running: list[GeneralTracker] = []
        for kind in recipe.trackers:
            acc.log_with, acc.trackers = filter_trackers([kind], place), []
            try:
                acc.init_trackers(PROJECT, settings, options)
            except Exception as error:
                # A tracker may raise any error of its package, its server or its login.
                self.run_ends()
                raise Fault(
                    f"trackers: {kind} can't begin ({_reason(error)}); correct that, or leave it out"
                ) from None
            self.running += acc.trackers
        acc.trackers = self.running

    def run_ends(self) -> None:
        for tracker in self.running:
            _tried(tracker, tracker.finish)

    def row_logged(self, row: LogRow) -> None:
        number = self.tasks.index(row.task)
        step = self.before[number] + row.step
        if step <= self.logged:
            return
        shown = {"grad_norm": row.grad_norm, "eval_loss": row.eval_loss, "lr": row.lr, "kappa": row.kappa}
        shown = {key: value for key, value in shown.items() if value is not None}
        values = {**row.terms, **shown, "task": number + 1, "tokens_per_second": row.speed}
        self._log({f"train/{key}": value for key, value in values.items()}, step)

    def scored(self, row: ScoreRow) -> None:
        kind = "general" if row.general else "score"
        self._log({f"{kind}/{row.task}": row.score}, self.before[row.step])

    def _log(self, values: dict, step: int) -> None:
        """Log to every tracker, and drop those that fail."""
        self.running = [one for one in self.running if _tried(one, one.log, values, step=step)]

    def _already_logged(self, folder: RunFolder, place: Path) -> int:
        """The last step that the trackers have, over all tasks. The log alone does not say, since a resumed
        run cuts it back to its checkpoint; so the furthest step that any process had logged when the next one
        began is kept in a file of its own."""
        file = place / "told.txt"
        kept = read_text(file, "a number of steps").strip() if file.is_file() else ""
        logged = int(kept) if kept.isdecimal() else 0
        for row in folder.log_rows[-1:]:
            logged = max(logged, self.before[self.tasks.index(row.task)] + row.step)
        folder.may_write()
        write_text(file, f"{logged}\n")
        return logged


def _tried(tracker: GeneralTracker, action: Callable, *args, **options) -> bool:
    """Whether the call to the tracker worked. It may raise anything, at any time, and must not end days of
    training: the error is reported once.
    """
    try:
        action(*args, **options)
        return True
    except Exception as error:  # as above
        log.warning(
            "%s failed (%s), and gets nothing more from this process; the run goes on",
            tracker.name,
            _reason(error),
        )
        return False


def _reason(error: Exception) -> str:
    """The first line of what the error says, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _identity(folder: RunFolder, place: Path) -> tuple[str, bool]:
    """The name of this run for trackers that identify runs by name, and whether it had one before."""
    file = place / "id.txt"
    had = file.is_file()
    if not had:
        folder.may_write()
        write_text(file, uuid.uuid4().hex[:12] + "\n")
    return file.read_text(encoding="utf-8").strip(), had


def _options(title: str, name: str, place: Path) -> dict[str, dict]:
    """What each kind of tracker gets in addition to the project's name, so that it continues the same run."""
    return {
        "wandb": {"id": name, "name": title, "resume": "allow", "dir": str(place)},
        "trackio": {"name": f"{title}-{name}", "resume": "allow"},
        "mlflow": {"run_name": title},
    }


def _settings(recipe: Recipe) -> dict[str, bool | int | float | str]:
    """The resolved recipe in one level, lists as text."""
    settings = flat(recipe.model_dump(mode="json"))
    return {
        key: value if isinstance(value, bool | int | float | str) else str(value)
        for key, value in settings.items()
    }
