"""Mistakes of the user, reported in one sentence each and never as a traceback."""

import difflib
from collections.abc import Callable, Iterable
from typing import Any

# What errors other than torch.OutOfMemoryError say where memory ran out: CUDA, such as when it makes a graph,
# and its libraries, such as cuBLAS when it has no room for a handle.
NO_MEMORY = ("CUDA error: out of memory", "_STATUS_ALLOC_FAILED")


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


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether a GPU's memory ran out, as this error says or one that it followed: where something fails that
    is recorded, the end of the recording may fail too, and tells of something else. By name, since torch is
    slow to import."""
    while isinstance(error, RuntimeError):
        named = type(error).__name__ == "OutOfMemoryError"
        if named or any(words in str(error) for words in NO_MEMORY):
            return True
        error = error.__context__
    return False


def nearest(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the known name closest to `name`, or an empty string."""
    found = difflib.get_close_matches(name, [str(k) for k in known], n=1, cutoff=0.5)
    return f" Did you mean '{found[0]}'?" if found else ""
