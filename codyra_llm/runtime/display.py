"""The display of a run: on a terminal one line that is kept up to date, elsewhere an occasional printed
line."""

import sys
import time
from dataclasses import dataclass
from threading import RLock

from rich.cells import cell_len
from rich.live import Live
from rich.text import Text

from codyra_llm.core.terminal import console
from codyra_llm.runtime import heartbeat
from codyra_llm.runtime.forecast import Forecast, Piece, duration

EVERY = 30.0  # seconds between lines where there is no terminal
REFRESH = 2  # per second, of the line on a terminal

WORDS = {
    "learn": ("", ""),
    "load": ("loading the model", "loading"),
    "answer": ("answers to {}", "{}"),
    "general": ("general ability {}", "{}"),
    "close": ("final checkpoint and reports", "closing"),
}  # by kind of piece: long words, short words

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
    loss: float | None = None
    tokens: int = 0

    @property
    def pace(self) -> float | None:
        """Seconds per count."""
        counted = self.last[1] - self.start[1]
        return (self.last[0] - self.start[0]) / counted if self.counts and counted else None

    @property
    def done(self) -> float:
        """How much of `amount` this process did; an earlier process did the rest."""
        return self.amount * (1 - self.start[1] / self.total) if self.total else self.amount


class Line:
    """The line that shows the current phase and the time that is left."""

    def __init__(self) -> None:
        self.forecast, self.lock = Forecast(), RLock()  # the terminal's line has a thread of its own
        self.phase: Phase | None = None
        self.printed = time.monotonic()  # when a line was last printed

    def expect(self, due: dict[Piece, float]) -> None:
        """Add pieces that are still to do, each with its amount; see `Forecast`."""
        with self.lock:
            self.forecast.due |= due

    def begin(self, piece: Piece, place: tuple[str, str]) -> None:
        """Show the next piece; what the last one took goes into the forecast."""
        now = time.monotonic()
        with self.lock:
            last = self.phase
            if last:
                self.forecast.done(last.piece, last.done, now - last.began)
            what = tuple(words.format(piece.name) for words in WORDS[piece.kind])
            self.phase = Phase(piece, place, self.forecast.due.pop(piece, 0.0), now, what)

    def count(self, done: int, total: int, loss: float | None = None, tokens: int = 0) -> None:
        """Show how much of the piece is done, after an optimizer step also its loss and tokens. Where there
        is not a terminal, print a line for the first and the last step, and every `EVERY` seconds."""
        now = time.monotonic()
        with self.lock:
            phase = self.phase
            if phase is None:
                return
            if phase.total != total or done < phase.last[1]:
                phase.start, phase.tokens = (now, done), 0
            phase.counts, phase.total, phase.last, phase.loss = True, total, (now, done), loss
            phase.tokens += tokens
        first_or_last = loss is not None and (done - phase.start[1] == 1 or done == total)
        if not console.is_interactive and (first_or_last or now - self.printed >= EVERY):
            self.printed = now
            console.print(self.words(), soft_wrap=True)

    def note(self, what: str) -> None:
        """Show what the run is doing in the piece, where there is nothing to count."""
        with self.lock:
            if self.phase:
                self.phase.what, self.phase.counts, self.phase.loss = (what, what), False, None

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
        if phase.loss is not None:
            loss = f"loss {phase.loss:.3f}"
            parts.append((loss, loss, 3))
            speed = f"{phase.tokens / max(phase.last[0] - phase.start[0], 1e-9):,.0f} tok"
            parts.append((f"{speed}ens/s", f"{speed}/s", 6))
        parts += self._times(phase)
        ranks = heartbeat.alive()
        if ranks:
            here = f"{ranks[0]}/{ranks[1]} ranks"
            parts.append((f"{here} alive", here, 7 if ranks[0] == ranks[1] else 1))
        return parts

    def _times(self, phase: Phase) -> list[tuple[str, str, int]]:
        """The time left for the phase, if it can be estimated, and for the whole."""
        now, parts = time.monotonic(), []
        own = self.forecast.seconds(phase.piece, phase.amount)  # what is left of this phase
        if phase.pace is not None:
            own = phase.pace * (phase.total - phase.last[1]) - (now - phase.last[0])
        elif own is not None:
            own -= now - phase.began
        if own is not None:
            own = max(own, 0.0)
            parts.append((f"{duration(own)} left", duration(own), 5))
        if self.forecast.due:
            learning = None  # seconds per token of the task that is being learnt
            if phase.pace and phase.tokens:
                learning = (phase.last[0] - phase.start[0]) / phase.tokens
            rest, whole = self.forecast.left(learning)
            if rest + (own or 0):
                about, sign = ("about", "~") if whole and own is not None else ("at least", ">")
                left = duration(rest + (own or 0))
                parts.append((f"{about} {left} in all", f"all {sign}{left}", 4))
        return parts


def live(line: Line) -> Live | None:
    """What keeps the line up to date on a terminal, between `start` and `stop`; None where there is none.
    Whatever else is printed meanwhile appears above the line."""
    if not console.is_interactive:
        return None
    return Live(
        get_renderable=line.shown,
        console=console,
        transient=True,
        refresh_per_second=REFRESH,
        redirect_stderr=sys.stderr.isatty(),
    )
