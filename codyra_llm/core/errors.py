"""Mistakes of the user, reported in one sentence each and never as a traceback."""

import difflib
from collections.abc import Callable, Iterable
from typing import Any


class Fault(Exception):
    """One or more mistakes of the user. Each message names the key, the value, what was expected and what to
    do.
    """

    def __init__(self, *messages: str):
        super().__init__("\n".join(messages))
        self.messages = list(messages)


class Attempts:
    """Calls functions one after the other and keeps the faults that they raise, so that all are reported
    together."""

    def __init__(self) -> None:
        self.faults: list[str] = []

    def __call__(self, action: Callable, *args: Any) -> Any:
        """What `action(*args)` returns, or None where it raised a Fault."""
        try:
            return action(*args)
        except Fault as fault:
            self.faults += fault.messages


def nearest(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the known name closest to `name`, or an empty string."""
    found = difflib.get_close_matches(name, [str(k) for k in known], n=1, cutoff=0.5)
    return f" Did you mean '{found[0]}'?" if found else ""
