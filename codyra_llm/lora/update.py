"""The update that one task leaves: low-rank factors per projection."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Mode = Literal["add", "replace", "apart"]
MODES: dict[str, Mode] = {mode: mode for mode in get_args(Mode)}  # from text


class Adapter(NamedTuple):
    """The factors at one site: A [k, in], B [out, k] and w [k] (None: all ones), float32 on the CPU."""

    a: Tensor
    b: Tensor
    w: Tensor | None

    def weighted_b(self, scale: float) -> Tensor:
        """s·B diag(w), [out, k]."""
        return scale * (self.b if self.w is None else self.b * self.w)

    def delta(self, scale: float) -> Tensor:
        """ΔW = s·B diag(w) A, [out, in], float32."""
        return self.weighted_b(scale) @ self.a

    def to(self, device: torch.device) -> "Adapter":
        """The same factors on a device."""
        return Adapter(*(None if factor is None else factor.to(device) for factor in self))


@dataclass(frozen=True)
class Update:
    """What one task changed. mode "add": on top of the tasks before; "replace": instead of them (one growing
    adapter); "apart": next to the base, for a method that chooses among the tasks' adapters, or has none, at
    inference.

    `dense`: whole new parameters by name, in the dtype of the model; only in mode "replace"."""

    adapters: dict[str, Adapter]
    scale: float
    mode: Mode = "add"
    dense: dict[str, Tensor] = field(default_factory=dict)


def negative(update: Update) -> Update:
    """The update whose ΔW takes this one's away again."""
    return Update(update.adapters, -update.scale, update.mode)
