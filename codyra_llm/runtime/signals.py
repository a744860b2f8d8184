"""Asked to stop: SIGTERM and SIGUSR1 (SLURM's warning) set a flag, which is looked at between steps, batches
and layers.
"""

import os
import signal

EXIT = 75  # EX_TEMPFAIL: all is saved, the same command goes on
_asked: list[str] = []
_noted: tuple[int, int] | None = None  # a process, and what started it


class Stopped(Exception):
    """Raised where the flag is seen and all that is needed to go on is saved."""


def listen() -> None:
    """From here on the two signals ask, and no longer end the process."""
    _asked.clear()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda received, frame: ask(signal.Signals(received).name))


def note_parent() -> None:
    """Remember what started this process. A command does so first of all: what started it may be gone before
    libraries are imported, and the system would name another parent then."""
    global _noted
    _noted = os.getpid(), os.getppid()


def orphaned() -> bool:
    """Whether what started this process is gone, as far as `note_parent`, or else the first call, saw it.

    A process that was forked after that has a parent of its own, which is looked up anew."""
    if _noted is None or _noted[0] != os.getpid():
        note_parent()
    return _noted != (os.getpid(), os.getppid())


def ask(reason: str) -> None:
    _asked.append(reason)


def asked() -> bool:
    return bool(_asked)


def check() -> None:
    """Raise Stopped if this process was asked: for work that is done again as a whole."""
    if _asked:
        raise Stopped(_asked[0])
