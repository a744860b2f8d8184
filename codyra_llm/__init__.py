"""Continual fine-tuning of causal language models with rank-selective LoRA (CoDyRA) on TRACE-like task
streams.

The names in `__all__` are the Python API (docs/python.md); each is imported when first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from codyra_llm.core.version import __version__ as __version__

if TYPE_CHECKING:
    from codyra_llm.api import Run as Run
    from codyra_llm.api import evaluate_checkpoint as evaluate_checkpoint
    from codyra_llm.api import plan as plan
    from codyra_llm.api import register as register
    from codyra_llm.api import run as run
    from codyra_llm.api import run_sweep as run_sweep
    from codyra_llm.api import write_report as write_report
    from codyra_llm.config.methods.sequential import SeqLoraConfig as SeqLoraConfig
    from codyra_llm.config.recipe import Recipe as Recipe
    from codyra_llm.config.recipe import load_recipe as load_recipe
    from codyra_llm.config.registry import METHODS as METHODS
    from codyra_llm.core.errors import Fault as Fault
    from codyra_llm.methods.base import Method as Method
    from codyra_llm.methods.sequential.seqlora import SeqLora as SeqLora
    from codyra_llm.store.observer import Observer as Observer
    from codyra_llm.store.rows import LogRow as LogRow
    from codyra_llm.store.rows import ScoreRow as ScoreRow
    from codyra_llm.store.rows import Stage as Stage

_PLACES = {
    "Fault": "core.errors",
    "LogRow": "store.rows",
    "METHODS": "config.registry",
    "Method": "methods.base",
    "Observer": "store.observer",
    "Recipe": "config.recipe",
    "Run": "api",
    "ScoreRow": "store.rows",
    "SeqLora": "methods.sequential.seqlora",
    "SeqLoraConfig": "config.methods.sequential",
    "Stage": "store.rows",
    "evaluate_checkpoint": "api",
    "load_recipe": "config.recipe",
    "plan": "api",
    "register": "api",
    "run": "api",
    "run_sweep": "api",
    "write_report": "api",
}
__all__ = ["__version__", *_PLACES]  # pyright: ignore  # names of the block above


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'codyra_llm' has no attribute {name!r}")
    return getattr(import_module(f"codyra_llm.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
