"""The line that tells how far a run is: what it says at any width, where it may be drawn, and what it says is
left.
"""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO

import pytest
import torch.distributed as dist
from rich.cells import cell_len
from rich.console import Console

from codyra_llm.experiment.observers import Display
from codyra_llm.runtime import display, heartbeat
from codyra_llm.runtime.forecast import Forecast, Piece, duration
from codyra_llm.runtime.heartbeat import Watch
from codyra_llm.store import observer
from codyra_llm.store.rows import LogRow, Stage

TASKS = ["ONE", "TWO", "20Minuten"]
ERASE = "\r\x1b[2K"


class Clock:
    """Stands in for the module `time`."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(display, "time", made)
    return made


def screen(monkeypatch, width: int = 60, **options) -> StringIO:
    """Everything that is written to a console of this kind, in place of standard output."""
    made = Console(file=StringIO(), width=width, highlight=False, **options)
    monkeypatch.setattr(display, "console", made)
    return made.file


@contextmanager
def shown() -> Iterator[display.Line]:
    """Within this block a display hears what is reported."""
    made = Display()
    with observer.observing(TASKS, made):
        yield made.line


def step(number: int, total: int, loss: float = 1.5, tokens: int = 100) -> None:
    observer.row_logged(LogRow("ONE", number, total, {"loss": loss}, tokens=tokens))


def train(clock: Clock, seconds: float, first: int, last: int, total: int) -> None:
    for number in range(first, last + 1):
        clock.now += seconds
        step(number, total)


@pytest.mark.parametrize(
    "seconds, told",
    [
        (0.4, "0 s"),
        (59, "59 s"),
        (60, "1 min"),
        (3570, "1 h 0 min"),
        (18600, "5 h 10 min"),
        (86400 + 4 * 3600, "1 d 4 h"),
    ],
)
def test_durations(seconds, told):
    assert duration(seconds) == told


def test_what_is_left_is_what_was_measured_times_what_is_due():
    forecast = Forecast()
    forecast.due = {
        Piece("learn", "TWO", 2): 300.0,
        Piece("answer", "ONE", 2): 10.0,
        Piece("answer", "TWO", 2): 20.0,
    }
    assert forecast.left() == (0.0, False)
    assert forecast.left(learning=0.5) == (150.0, False)  # without answers, and what surrounds the steps
    forecast.done(Piece("learn", "ONE", 1), 100.0, 60.0)
    forecast.done(Piece("answer", "ONE", 1), 10.0, 5.0)
    assert forecast.left(learning=0.5) == (300 * 0.6 + 5.0 + 20 * 0.5, True)
    forecast.done(
        Piece("answer", "THREE", 1), 30.0, 35.0
    )  # the mean of all for what was never asked, each its own else
    assert forecast.left() == (300 * 0.6 + 5.0 + 20 * 40 / 40, True)
    forecast.done(Piece("answer", "ONE", 2), 10.0, 5.0)
    assert Piece("answer", "ONE", 2) not in forecast.due


def test_the_line_of_a_task(clock, monkeypatch):
    """100 tokens a second, 100 steps of a task of 10,000 tokens, of which another is to follow; answers not
    measured.
    """
    screen(monkeypatch)
    with shown() as line:
        observer.expected(
            {
                Piece("learn", "TWO", 2): 1e4,
                Piece("learn", "20Minuten", 3): 72e4,
                Piece("answer", "TWO", 2): 9.0,
            }
        )
        observer.stage_begins(Stage(2, "TWO"), Piece("learn", "TWO", 2))
        assert line.words() == "task 2/3 TWO"
        observer.counted(0, 100)
        train(clock, 1.0, 1, 40, 100)
        own = "task 2/3 TWO, step 40/100, loss 1.500, 100 tokens/s, 1 min left"
        assert line.words() == f"{own}, at least 2 h 1 min in all"
        clock.now += 20  # it counts down while nothing is heard
        assert ", 40 s left, at least 2 h 1 min in all" in line.words()
        assert line.words(60) == "2/3 TWO, 40/100, loss 1.500, 100 tok/s, 40 s, all >2 h 1 min"
        assert line.words(45) == "2/3 TWO, 40/100, loss 1.500, all >2 h 1 min"
        assert line.words(30) == "2/3 TWO, 40/100, loss 1.500"
        assert all(cell_len(line.words(width)) <= width for width in range(7, 130))
        observer.noted("consolidating")
        assert line.words(40) == "task 2/3 TWO, consolidating"
        observer.stage_begins(Stage(2, "TWO"), Piece("answer", "TWO", 2))
        assert (
            line.words() == "task 2/3 TWO, answers to TWO, at least 1 h 12 min in all"
        )  # 60 s for 1e4 tokens


def test_a_task_that_went_on_counts_what_it_did(clock, monkeypatch):
    """40 of 100 steps were done before this process, which takes 60 s for the rest, so 100 s for a task like
    it.
    """
    screen(monkeypatch)
    with shown() as line:
        observer.expected({Piece("learn", "ONE", 1): 1e4, Piece("learn", "TWO", 2): 1e4})
        observer.stage_begins(Stage(1, "ONE"), Piece("learn", "ONE", 1))
        observer.counted(40, 100)
        train(clock, 1.0, 41, 100, 100)
        observer.stage_begins(Stage(1, "ONE"), Piece("load", "tasks", 1))
        assert line.forecast.left() == (pytest.approx(100.0), True)


@pytest.mark.parametrize("kind", [{}, {"force_terminal": True, "_environ": {"TERM": "dumb"}}])
def test_a_log_gets_a_line_now_and_then(kind, clock, monkeypatch):
    out = screen(monkeypatch, **kind)
    with shown():
        observer.stage_begins(Stage(1, "ONE"), Piece("learn", "ONE", 1))
        observer.counted(0, 100)
        train(clock, 1.0, 1, 100, 100)
        observer.stage_begins(Stage(1, "ONE"), Piece("answer", "ONE", 1))
        for answered in range(0, 50, 10):
            observer.counted(answered, 50)
            clock.now += 8.0
        display.console.print("said by others")
    lines = out.getvalue().splitlines()
    assert [re.search(r"(step|example) (\d+)/", line)[2] for line in lines[:-1]] == [
        "1",
        "31",
        "61",
        "91",
        "100",
        "40",
    ]
    assert lines[-1] == "said by others" and "\x1b" not in out.getvalue()


@pytest.mark.parametrize("options", [{}, {"no_color": True}, {"width": 20}])
def test_what_is_printed_stands_above_the_line(options, monkeypatch):
    out = screen(
        monkeypatch, **{"width": 60, "force_terminal": True, "_environ": {"TERM": "xterm"}} | options
    )
    monkeypatch.setattr(display, "REFRESH", 50)
    with shown():
        observer.stage_begins(Stage(1, "ONE"), Piece("learn", "ONE", 1))
        time.sleep(0.1)
        display.console.print("one")
        print("two")  # what libraries print
        observer.counted(0, 4)
        step(1, 4, 1.0, 5)
    said = out.getvalue()
    assert f"task 1/3 ONE{ERASE}one\ntask 1/3 ONE{ERASE}two\ntask 1/3 ONE{ERASE}1/3 ONE, 1/4" in said
    assert said.endswith("\x1b[2K") and said.rindex("\x1b[?25h") > said.rindex("\x1b[?25l")
    drawn = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", part) for part in re.split(r"[\r\n]+", said)]
    assert max(map(len, drawn)) < display.console.width  # the cursor stays in the row


def test_without_a_display_nothing_is_printed(capsys):
    with observer.observing(TASKS, observer.Observer()):
        observer.expected({Piece("learn", "ONE", 1): 1.0})
        observer.stage_begins(Stage(1, "ONE"), Piece("learn", "ONE", 1))
        step(1, 2, 1.0, 5)
        observer.noted("consolidating")
    assert capsys.readouterr().out == ""


def test_ranks_alive(clock, monkeypatch):
    """Named last where all are there, and early where one has been silent, or has not been heard yet."""
    screen(monkeypatch)
    store = dist.HashStore()
    monkeypatch.setattr(Watch, "_run", lambda one: None)
    two = [Watch(store, rank, 2, hung=60) for rank in range(2)]
    monkeypatch.setattr(heartbeat, "_watch", two[0])
    with shown() as line:
        observer.stage_begins(Stage(1, "ONE"), Piece("learn", "ONE", 1))
        observer.counted(0, 9)
        assert line.words() == "task 1/3 ONE, step 0/9, 1/2 ranks alive"
        two[0].look(range(2))
        assert heartbeat.alive() == (2, 2)
        two[0].seen[1] = two[0].seen[1][0], two[0].seen[1][1] - heartbeat.BROKEN
        train(clock, 1.0, 1, 3, 9)
        assert heartbeat.alive() == (1, 2) and line.words(36) == "1/3 ONE, 3/9, loss 1.500, 1/2 ranks"
