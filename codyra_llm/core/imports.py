"""Imports of large packages, at the start of a command."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """The garbage collector rests while torch and transformers are imported, and never walks what they made.

    They make a million objects that stay to the end: looking through them again and again takes a sixth of
    an import, and every later collection a quarter of a second. Where torch is imported already, nothing
    changes: what else the process holds is not known to stay.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
