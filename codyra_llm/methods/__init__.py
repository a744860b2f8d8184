"""All methods by name."""

from rich.box import SIMPLE
from rich.table import Table

from .base import Method, MethodConfig
from .codyra import Codyra
from .dualprompt import DualPrompt
from .l2p import L2p
from .none import NoMethod
from .pp import ProgressivePrompts
from .replay import Replay
from .seqlora import SeqLora

METHODS: dict[str, type[Method]] = {m.name: m for m in (
    NoMethod, SeqLora, Replay, L2p, DualPrompt, ProgressivePrompts, Codyra)}

__all__ = ["METHODS", "Method", "MethodConfig", "table"]


def table() -> Table:
    """The methods and their declarations, for the terminal."""
    out = Table("method", "what it is", "trains", "old data", "task id at test", "merges", "grows", "launches", box=SIMPLE,
                padding=0, collapse_padding=True)
    yes = {True: "yes", False: ""}
    for m in (method.declared() for method in METHODS.values()):
        stage = m["max_zero_stage"]
        launches = "any" if not m["trains"] else "DDP" + ("" if not stage else ", ZeRO-1" + f"..{stage}" * (stage > 1))
        out.add_row(m["name"], m["summary"], m["trains"], yes[m["old_data"]], yes[m["task_id"]], yes[m["merges"]],
                    yes[m["grows"]], launches)
    return out
