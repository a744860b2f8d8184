"""Observers of a run: the display, trackers, the heartbeat, and those that a user of the library adds.

Code at any depth reports by calling the functions of this module, which call the observers. `observing` sets
the observers of this thread for the length of its block; outside of such a block there are none.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar

from codyra_llm.runtime.forecast import Piece
from codyra_llm.store.rows import LogRow, ScoreRow, Stage


class Observer:
    """Is called as a run progresses, in the first process of its launch. The hooks do nothing by default:
    override those that you need. An error that a hook raises ends the run, which can be resumed."""

    def run_begins(self, tasks: list[str]) -> None:
        """The run, or the evaluation of a checkpoint, is about to begin; `tasks` in the order of the run."""

    def run_ends(self) -> None:
        """The run has ended, well or not; called for each observer whose `run_begins` returned."""

    def expected(self, due: dict[Piece, float]) -> None:
        """More pieces are still to do, each with its amount: tokens to learn, prompts to answer, or 1."""

    def measured(self, piece: Piece, amount: float, seconds: float) -> None:
        """An earlier process of this run has done a piece in so many seconds."""

    def stage_begins(self, stage: Stage, piece: Piece) -> None:
        """The run starts `piece` of `stage`: it learns the stage's task, answers prompts, and so on."""

    def counted(self, done: int, total: int) -> None:
        """`done` of the piece's `total` optimizer steps or prompts are done; first called before any is."""

    def noted(self, what: str) -> None:
        """What the run is doing in the piece, in words, where there is nothing to count."""

    def row_logged(self, row: LogRow) -> None:
        """An optimizer step was written to log.jsonl."""

    def scored(self, row: ScoreRow) -> None:
        """The scores on a task at a stage were written to scores.jsonl."""

    def at(self, place: str) -> None:
        """The process has reached this place, which shows that it does not hang."""


_listening: ContextVar[tuple[Observer, ...]] = ContextVar("_listening", default=())


@contextmanager
def observing(tasks: list[str], *observers: Observer) -> Iterator[None]:
    """Within this block these observers, and those of an outer block, are called with what is reported."""
    before = _listening.get()
    with ExitStack() as ends:
        for one in observers:
            one.run_begins(tasks)
            ends.callback(one.run_ends)
        _listening.set((*before, *observers))
        ends.callback(_listening.set, before)
        yield


def expected(due: dict[Piece, float]) -> None:
    """See `Observer.expected`; the same holds for the functions below."""
    for one in _listening.get():
        one.expected(due)


def measured(piece: Piece, amount: float, seconds: float) -> None:
    for one in _listening.get():
        one.measured(piece, amount, seconds)


def stage_begins(stage: Stage, piece: Piece) -> None:
    for one in _listening.get():
        one.stage_begins(stage, piece)


def counted(done: int, total: int) -> None:
    for one in _listening.get():
        one.counted(done, total)


def noted(what: str) -> None:
    for one in _listening.get():
        one.noted(what)


def row_logged(row: LogRow) -> None:
    for one in _listening.get():
        one.row_logged(row)


def scored(row: ScoreRow) -> None:
    for one in _listening.get():
        one.scored(row)


def at(place: str) -> None:
    for one in _listening.get():
        one.at(place)
