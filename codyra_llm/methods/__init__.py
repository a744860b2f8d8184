"""All methods by name."""

from rich.box import SIMPLE
from rich.table import Column, Table

from .agem import AGem
from .base import Method, MethodConfig
from .clora import CLora
from .codyra import Codyra
from .color import Color
from .duallora import DualLora
from .dualprompt import DualPrompt
from .ewc import Ewc
from .gem import Gem
from .hidelora import HideLora
from .hidelora_treelora_repo import HideLoraRepo
from .icl import Icl
from .ilora import Ilora
from .inflora import InfLora
from .l2p import L2p
from .lwf import Lwf
from .mtl import Mtl
from .none import NoMethod
from .ogd import Ogd
from .olora import OLora
from .pp import ProgressivePrompts
from .rcl import Rcl
from .replay import Replay
from .sapt import Sapt
from .seqft import SeqFt
from .seqlora import SeqLora
from .single import Single
from .sora import Sora
from .treelora import TreeLora
from .treelora_repo import TreeLoraRepo

METHODS: dict[str, type[Method]] = {m.name: m for m in (
    NoMethod, Icl, SeqFt, SeqLora, Mtl, Single, Replay, Ilora, Rcl, Ewc, Gem, AGem, Ogd, Lwf, L2p, DualPrompt,
    ProgressivePrompts, OLora, Sora, InfLora, TreeLora, TreeLoraRepo, HideLora, HideLoraRepo, Color, Sapt, DualLora, CLora,
    Codyra)}

__all__ = ["METHODS", "Method", "MethodConfig", "table"]


def table() -> Table:
    """The methods' declarations, for the terminal."""
    columns = ("trains", "old data", "task id", "merges", "grows", "launches")
    out = Table(Column("method", no_wrap=True), *(Column(name, no_wrap=True) for name in columns), box=SIMPLE, padding=0,
                collapse_padding=True, caption="old data: needs earlier tasks' examples; task id: must be told it at test; "
                "merges: a plain model after every task; grows: keeps or runs more with every task; DDP: data parallel")
    yes = {True: "yes", False: ""}
    for m in (method.declared() for method in METHODS.values()):
        stage = m["max_zero_stage"]
        launches = "any" if not m["trains"] else "DDP" + ("" if not stage else ", ZeRO-1" + f"..{stage}" * (stage > 1))
        out.add_row(m["name"], m["trains"], yes[m["old_data"]], yes[m["task_id"]],
                    yes[m["merges"]], yes[m["grows"]], launches)
    return out
