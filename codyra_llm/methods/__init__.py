"""All methods by name."""

from .base import Method, MethodConfig
from .codyra import Codyra
from .none import NoMethod
from .replay import Replay
from .seqlora import SeqLora

METHODS: dict[str, type[Method]] = {m.name: m for m in (NoMethod, SeqLora, Replay, Codyra)}

__all__ = ["METHODS", "Method", "MethodConfig"]
