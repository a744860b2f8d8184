"""All methods by name."""

from .agem import AGem
from .base import Method, MethodConfig
from .codyra import Codyra
from .ewc import Ewc
from .gem import Gem
from .lwf import Lwf
from .none import NoMethod
from .ogd import Ogd
from .replay import Replay
from .seqlora import SeqLora

METHODS: dict[str, type[Method]] = {m.name: m for m in (NoMethod, SeqLora, Replay, Ewc, Gem, AGem, Ogd, Lwf, Codyra)}

__all__ = ["METHODS", "Method", "MethodConfig"]
