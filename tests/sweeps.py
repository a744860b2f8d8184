"""Sweeps: which runs a file asks for, that each is run once, how settings are chosen, and the intervals of
the comparison.
"""

from pathlib import Path

from codyra_llm.sweep import runner
from codyra_llm.sweep.spec import Sweep, load_sweep


class Ended:
    """A process that has ended."""

    def __init__(self, code: int):
        self.returncode = code

    def poll(self) -> int:
        return self.returncode


def go(file: Path, *overrides: str) -> Sweep:
    asked = load_sweep(file, list(overrides))
    runner.execute(asked, 1, None, lambda: None)
    return asked
