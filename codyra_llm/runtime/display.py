"""The display of a run: on a terminal one line that is kept up to date, elsewhere a log line now and then.

Only the process that called `running` writes; in all others every function here does nothing.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from threading import RLock

from rich.cells import cell_len
from rich.live import Live
from rich.text import Text

from codyra_llm.core.terminal import Terminal
from codyra_llm.runtime import heartbeat
from codyra_llm.runtime.forecast import Forecast, Piece, duration

EVERY = 30.0  # seconds between lines of a log
REFRESH = 2  # per second, of the line on a terminal

console = Terminal()  # one for all output during a run: other writers would run into the line

WORDS = {
    "learn": ("", ""),
    "load": ("loading the model", "loading"),
    "answer": ("answers to {}", "{}"),
    "general": ("general ability {}", "{}"),
    "close": ("final checkpoint and reports", "closing"),
}  # long and short

UNITS = {"learn": "step", "answer": "example", "general": "request"}


@dataclass
class Phase:
    """What the process is doing. Counting began at `start` (time, count); the last count was at `last`."""

    piece: Piece
    place: tuple[str, str]
    amount: float
    began: float
    what: tuple[str, str] = ("", "")
    counts: bool = False  # whether this phase has a count
    total: int = 0
    start: tuple[float, int] = (0.0, 0)
    last: tuple[float, int] = (0.0, 0)
    row: dict = field(default_factory=dict)
    tokens: int = 0

    @property
    def pace(self) -> float | None:
        """Seconds per count."""
        counted = self.last[1] - self.start[1]
        return (self.last[0] - self.start[0]) / counted if self.counts and counted else None

    @property
    def done(self) -> float:
        """How much of `amount` this process did: the rest was done before it."""
        return self.amount * (1 - self.start[1] / self.total) if self.total else self.amount


class Line:
    """The line that shows one phase after the other, and the time that is left."""

    def __init__(self) -> None:
        self.forecast, self.lock = Forecast(), RLock()  # the terminal's line has a thread of its own
        self.phase: Phase | None = None
        self.told = time.monotonic()

    def begin(self, piece: Piece, place: tuple[str, str]) -> None:
        """Show the next piece; what the last one took goes into the forecast."""
        now = time.monotonic()
        with self.lock:
            if was := self.phase:
                self.forecast.done(was.piece, was.done, now - was.began)
            what = tuple(words.format(piece.name) for words in WORDS[piece.kind])
            self.phase = Phase(piece, place, self.forecast.due.pop(piece, 0.0), now, what)

    def count(self, done: int, total: int, row: dict) -> None:
        """Show how much of the piece is done; on a log print a line now and then."""
        now = time.monotonic()
        with self.lock:
            phase = self.phase
            if phase.total != total or done < phase.last[1]:
                phase.start, phase.tokens = (now, done), 0
            phase.counts, phase.total, phase.last, phase.row = True, total, (now, done), row
            phase.tokens += row.get("tokens", 0)
        edge = bool(row) and (done - phase.start[1] == 1 or done == total)
        if not console.is_interactive and (edge or now - self.told >= EVERY):
            self.told = now
            console.print(self.words(), soft_wrap=True)

    def words(self, width: int | None = None) -> str:
        """The line: in long words where they fit into `width` columns, else in short ones, the least
        important left out.
        """
        with self.lock:
            parts = self._parts() if self.phase else []
        for short in (0, 1):
            line = ", ".join(part[short] for part in parts)
            if width is None or cell_len(line) <= width:
                return line
        while len(parts) > 1 and cell_len(", ".join(part[1] for part in parts)) > width:
            parts.remove(max(parts, key=lambda part: part[2]))
        return ", ".join(part[1] for part in parts)

    def shown(self) -> Text:
        """The line as rich draws it, cut to the terminal."""
        return Text(self.words(console.width - 1), no_wrap=True, overflow="crop")

    def _parts(self) -> list[tuple[str, str, int]]:
        """Long words, short words, and a rank: parts with a higher one are dropped first."""
        phase, parts = self.phase, []
        if phase.place[0]:
            parts.append((*phase.place, 0))
        if phase.what[0]:
            parts.append((*phase.what, 1))
        if phase.counts:
            counted = f"{phase.last[1]}/{phase.total}"
            parts.append((f"{UNITS[phase.piece.kind]} {counted}", counted, 2))
        if "loss" in phase.row:
            parts.append((f"loss {phase.row['loss']:.3f}",) * 2 + (3,))
            speed = f"{phase.tokens / max(phase.last[0] - phase.start[0], 1e-9):,.0f} tok"
            parts.append((f"{speed}ens/s", f"{speed}/s", 6))
        parts += self._times(phase)
        if ranks := heartbeat.alive():
            here = f"{ranks[0]}/{ranks[1]} ranks"
            parts.append((f"{here} alive", here, 7 if ranks[0] == ranks[1] else 1))
        return parts

    def _times(self, phase: Phase) -> list[tuple[str, str, int]]:
        """The time left for the phase, if it can be estimated, and for the whole."""
        now, own, parts = time.monotonic(), self.forecast.seconds(phase.piece, phase.amount), []
        if phase.pace is not None:
            own = phase.pace * (phase.total - phase.last[1]) - (now - phase.last[0])
        elif own is not None:
            own -= now - phase.began
        if own is not None:
            own = max(own, 0.0)
            parts.append((f"{duration(own)} left", duration(own), 5))
        if self.forecast.due:
            learning = phase.pace and phase.tokens and (phase.last[0] - phase.start[0]) / phase.tokens
            rest, whole = self.forecast.left(learning)
            if rest + (own or 0):
                about, sign = ("about", "~") if whole and own is not None else ("at least", ">")
                left = duration(rest + (own or 0))
                parts.append((f"{about} {left} in all", f"all {sign}{left}", 4))
        return parts


_line: Line | None = None


@contextmanager
def running(speaks: bool) -> Iterator[None]:
    """Within this block this process, if it `speaks`, shows how far it is; all other output appears above
    the line.
    """
    global _line
    if not speaks:
        yield
        return
    _line = Line()
    shown = (
        Live(
            get_renderable=_line.shown,
            console=console,
            transient=True,
            refresh_per_second=REFRESH,
            redirect_stderr=sys.stderr.isatty(),
        )
        if console.is_interactive
        else nullcontext()
    )
    try:
        with shown:
            console.show_cursor(True)  # a process that is killed would leave it hidden
            yield
    finally:
        _line = None


def expect(due: dict[Piece, float]) -> None:
    """Add pieces that are still to do, each with its amount; see `Forecast`."""
    if _line:
        with _line.lock:
            _line.forecast.due |= due


def measured(piece: Piece, amount: float, seconds: float) -> None:
    """Add the seconds that an earlier process took for a piece."""
    if _line:
        _line.forecast.done(piece, amount, seconds)


def begin(piece: Piece, after: str, tasks: list[str]) -> None:
    """The piece at hand from here on, after or at the task of that name."""
    if _line:
        short = f"{tasks.index(after) + 1}/{len(tasks)} {after}" if after in tasks else after
        _line.begin(piece, (f"task {short}" if after in tasks else short, short))


def count(done: int, total: int, row: dict | None = None) -> None:
    """How much of the piece is done, for the first time before any; `row`: of log.jsonl."""
    if _line:
        _line.count(done, total, row or {})


def note(what: str) -> None:
    """What is done of the piece where there is nothing to count."""
    if _line:
        with _line.lock:
            _line.phase.what, _line.phase.counts, _line.phase.row = (what, what), False, {}
