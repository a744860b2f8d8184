"""Asked to stop: SIGTERM and SIGUSR1 (SLURM's warning) set a flag, which is looked at between steps, batches
and layers.
"""

import os
import signal

PARENT = os.getppid()  # what started this process, as long as that lives
EXIT = 75  # EX_TEMPFAIL: all is saved, the same command goes on
_asked: list[str] = []


class Stopped(Exception):
    """Raised where the flag is seen and all that is needed to go on is saved."""


def listen() -> None:
    """From here on the two signals ask, and no longer end the process."""
    _asked.clear()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda received, frame: ask(signal.Signals(received).name))


def ask(reason: str) -> None:
    _asked.append(reason)


def asked() -> bool:
    return bool(_asked)


def check() -> None:
    """Raise Stopped if this process was asked: for work that is done again as a whole."""
    if _asked:
        raise Stopped(_asked[0])
