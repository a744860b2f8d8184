"""All methods by name."""

from .base import Method, MethodConfig
from .clora import CLora
from .codyra import Codyra
from .hidelora import HideLoraRepo
from .inflora import InfLora
from .none import NoMethod
from .olora import OLora
from .replay import Replay
from .seqlora import SeqLora
from .sora import Sora
from .treelora import TreeLora
from .treelora_repo import TreeLoraRepo

METHODS: dict[str, type[Method]] = {m.name: m for m in (
    NoMethod, SeqLora, Replay, OLora, Sora, InfLora, TreeLora, TreeLoraRepo, HideLoraRepo, CLora, Codyra)}

__all__ = ["METHODS", "Method", "MethodConfig"]
