"""A frozen linear layer with a rank-selective adapter, and how it gets into a model."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import Fault, nearest
from ..models import PROJECTIONS
from ..seeds import generator
from .function import RankSelective


@dataclass(frozen=True)
class AdapterSpec:
    """What every adapter of a model has in common. `importance` None: plain LoRA, ΔW = s·B A."""

    rank: int
    scale: float = 1.0
    dropout: float = 0.0
    importance: str | None = None  # "constant" or "normal": how w starts
    importance_value: float = 1.0  # the constant, or the standard deviation


class LoraLinear(nn.Linear):
    """y = x Wᵀ + b + s·((drop(x) Aᵀ) ⊙ w) Bᵀ: W and b frozen, A [r, in], w [r] (or None) and B [out, r] trained.

    It owns W itself, under the name the plain layer had, so that the model's state dict keeps its keys and ZeRO-3
    gathers W with the layer. A, w and B are float32 unless W is float64. `active` False leaves the plain linear.
    """

    def __init__(self, base: nn.Linear, spec: AdapterSpec):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.spec, self.active = base.in_features, base.out_features, spec, True
        self.weight, self.bias = base.weight.requires_grad_(False), base.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)
        kind = {"device": base.weight.device, "dtype": torch.promote_types(base.weight.dtype, torch.float32)}
        self.lora_A = nn.Parameter(torch.empty(spec.rank, self.in_features, **kind))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, spec.rank, **kind))
        self.lora_w = nn.Parameter(torch.empty(spec.rank, **kind)) if spec.importance else None

    @torch.no_grad()
    def reset(self, *key: int | str) -> None:
        """A fresh adapter with ΔW = 0, drawn from a generator seeded by `key`: the same on every rank and device."""
        draw = generator(*key)
        bound = 1 / math.sqrt(self.in_features)  # kaiming_uniform with a = √5
        self.lora_A.copy_((torch.rand(self.lora_A.shape, generator=draw) * 2 - 1) * bound)
        self.lora_B.zero_()
        if self.lora_w is not None:
            value = self.spec.importance_value
            fixed = self.spec.importance == "constant"
            shape = self.lora_w.shape
            self.lora_w.copy_(torch.full(shape, value) if fixed else value * torch.randn(shape, generator=draw))

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return functional.linear(x, self.weight, self.bias)
        flat = x.reshape(-1, self.in_features).to(self.weight.dtype)
        rate = self.spec.dropout if self.training else 0.0
        dropped = functional.dropout(flat, rate) if rate else None
        y = RankSelective.apply(flat, dropped, self.weight, self.bias,
                                self.lora_A, self.lora_w, self.lora_B, self.spec.scale)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.spec.rank}, scale={self.spec.scale}"


def attach(model: nn.Module, targets: list[str], spec: AdapterSpec) -> None:
    """Put an adapter on every linear layer whose last name is in `targets`. Raises Fault for a target found nowhere."""
    found = {name: module for name, module in model.named_modules()
             if name.rpartition(".")[2] in targets and isinstance(module, nn.Linear)}
    present = {name.rpartition(".")[2] for name in found}
    if missing := [t for t in targets if t not in present]:
        raise Fault(*(f"method.targets: the model has no projection '{t}'.{nearest(t, PROJECTIONS)}" for t in missing))
    for name, linear in found.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, LoraLinear(linear, spec))


def sites(model: nn.Module) -> dict[str, LoraLinear]:
    """The model's adapted layers by name, e.g. 'model.layers.0.self_attn.q_proj'."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}
