"""Stopping on request: SIGTERM, SIGUSR1 (SLURM's warning) and Ctrl-C set a flag, which is checked between
steps, batches and layers. A second Ctrl-C ends the process at once.
"""

import os
import signal
import sys
import time
from types import FrameType

from codyra_llm.core.terminal import one_line

EXIT = 75  # EX_TEMPFAIL: everything is saved, and the same command resumes
_asked: list[str] = []
_noted: tuple[int, int] | None = None  # this process's id and its parent's
_interrupted: float | None = None  # when the first Ctrl-C came
AGAIN = 1.0  # seconds after which another Ctrl-C is a second one: a launcher passes the first one on as well
MESSAGE = (
    "stopping as soon as everything is saved; the same command resumes. Ctrl-C again ends at once, unsaved\n"
)


class Stopped(Exception):
    """Raised when the flag is seen and everything that a resumed run needs is saved."""


def listen() -> None:
    """From here on the signals ask the process to stop instead of ending it."""
    global _interrupted
    _asked.clear()
    _interrupted = None
    signal.signal(signal.SIGUSR1, lambda received, frame: ask("SIGUSR1"))
    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGINT, _interrupt)


def _interrupt(received: int, frame: FrameType | None) -> None:
    """The first Ctrl-C asks and says so; another one ends the process as if nothing listened."""
    global _interrupted
    if _interrupted is None:
        _interrupted = time.monotonic()
        ask("Ctrl-C")
        if os.environ.get("RANK", "0") == "0":
            os.write(2, MESSAGE.encode())  # a buffered stream may be in the middle of a line of its own
    elif _is_second():
        _end_at_once()


def _terminate(received: int, frame: FrameType | None) -> None:
    """SIGTERM asks. torchrun passes the first Ctrl-C on as it is, and a second one as SIGTERM."""
    if "TORCHELASTIC_RUN_ID" in os.environ and _is_second():
        _end_at_once()
    ask("SIGTERM")


def _is_second() -> bool:
    """Whether this moment is past the first Ctrl-C and what a launcher makes of it."""
    return _interrupted is not None and time.monotonic() - _interrupted > AGAIN


def _end_at_once() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)


def note_parent() -> None:
    """Remember what started this process. A command does so first of all: what started it may be gone before
    libraries are imported, and the system would name another parent then."""
    global _noted
    _noted = os.getpid(), os.getppid()


def orphaned() -> bool:
    """Whether the parent that `note_parent`, or else the first call, saw is gone. A process that was forked
    since then has another parent, which is looked up again."""
    if _noted is None or _noted[0] != os.getpid():
        note_parent()
    return _noted != (os.getpid(), os.getppid())


def ask(reason: str) -> None:
    """Set the flag, as a signal does."""
    _asked.append(reason)


def asked() -> bool:
    """Whether the flag is set."""
    return bool(_asked)


def check() -> None:
    """Raise Stopped if this process was asked: for work that is done again as a whole."""
    if _asked:
        raise Stopped(_asked[0])


def say_stopped(why: str) -> None:
    """Say that this process has stopped, in the first one of each machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(
            f"stopped ({one_line(why)}), all is saved; run the same command to resume",
            file=sys.stderr,
            flush=True,
        )
