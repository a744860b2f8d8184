"""The arms: the same adapters, from the same numbers, on copies of one model that share its frozen
weights.
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from codyra_llm.core.errors import Fault
from codyra_llm.lora.layer import AdapterSpec, LoraLinear, attach, sites
from codyra_llm.lora.shared import SharedInput, share_inputs, shared_inputs
from codyra_llm.models import families, fused_norm
from codyra_llm.train.recorded import Recorder

SCALE = 2.0  # s, as PEFT users have it with lora_alpha = 2r
LOW = (torch.bfloat16, torch.float16)

NOTES = {
    "frozen": "the model without adapters, with input gradients: a floor, not a competitor",
    "peft": "PEFT's LoRA by default: float32 adapters, autocast where the base has 16 bits; it has no w",
    "peft-strong": "PEFT's LoRA with adapters in the base's dtype, no autocast, no dropout; it has no w",
    "eager": "LoRA with w by plain autograd",
    "ours": "LoRA with w by the hand-written functions; on a GPU with fused norms and recorded "
    "micro-batches, as in training",
}

# By site: A [r, in], w [r] and B [out, r], all of them random; B is not zero.
Numbers = dict[str, tuple[Tensor, Tensor, Tensor]]


@dataclass
class Arm:
    """A model that is called as the base is, and the masters (A, w or None, B) that train. `folded`: B holds
    s·B·diag(w).
    """

    model: nn.Module
    masters: dict[str, tuple[nn.Parameter, nn.Parameter | None, nn.Parameter]] = field(default_factory=dict)
    folded: dict[str, Tensor] = field(default_factory=dict)  # site -> s·w
    autocast: torch.dtype | None = None
    recorder: Recorder | None = None  # replays micro-batches, as training does on a GPU

    @property
    def shared(self) -> list[SharedInput]:
        """Ours: the groups of adapted layers; else none."""
        return shared_inputs(self.model)

    def context(self, device: torch.device) -> AbstractContextManager:
        """Where the arm runs: under autocast, if it asks for it."""
        return torch.autocast(device.type, self.autocast) if self.autocast else nullcontext()

    def parameters(self) -> list[nn.Parameter]:
        """The masters that train."""
        return [p for triple in self.masters.values() for p in triple if p is not None]

    def forget_gradients(self) -> None:
        """Drop all gradients, before a measurement that computes them anew."""
        for p in self.parameters():
            p.grad = None

    def gradients(self) -> dict[str, Tensor]:
        """All gradients of A, of w and of B as one float64 vector each, B's in terms of the unfolded B."""
        parts: dict[str, list[Tensor]] = {}
        for site, triple in self.masters.items():
            for name, p in zip(("dA", "dw", "dB"), triple, strict=True):
                if p is not None:
                    grad = torch.zeros_like(p) if p.grad is None else p.grad
                    grad = grad.double()
                    if name == "dB" and self.folded:
                        grad = grad * self.folded[site].double()
                    parts.setdefault(name, []).append(grad.flatten())
        return {name: torch.cat(grads) for name, grads in parts.items()}


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy with modules of its own around the same parameters."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def targets(base: nn.Module) -> list[str]:
    """The projections that this model has, by the last part of their names."""
    present = {name.rpartition(".")[2] for name in families.projections(base)}
    return [name for name in families.of(base.config).projections if name in present]


def draw(base: nn.Module, rank: int) -> Numbers:
    """Random factors for every projection of the model, in float32."""
    model = shared_copy(base)
    attach(model, targets(model), AdapterSpec(rank, importance="normal"))
    generator = torch.Generator().manual_seed(0)
    numbers = {}
    for site, layer in sites(model).items():
        layer.reset(0, site)
        b = 0.02 * torch.randn(layer.lora_B.shape, generator=generator)
        numbers[site] = (
            layer.lora_A.detach().float(),
            layer.lora_w.detach().float(),
            b.to(layer.lora_B.device),
        )
    return numbers


def _rank(numbers: Numbers) -> int:
    """The rank of the factors, which all sites share."""
    _, w, _ = next(iter(numbers.values()))
    return len(w)


def frozen(base: nn.Module, numbers: Numbers) -> Arm:
    """The base alone: the floor that no adapter can be faster than."""
    return Arm(shared_copy(base))


def weighted(base: nn.Module, numbers: Numbers, fused: bool) -> Arm:
    """Our adapters with rank weights, by the fused functions or in plain autograd."""
    model = shared_copy(base)
    attach(model, targets(model), AdapterSpec(_rank(numbers), SCALE, importance="constant"))
    share_inputs(model, fused)
    if fused and next(base.parameters()).is_cuda:
        fused_norm.replace(model)  # as training does on a GPU
    layers: dict[str, LoraLinear] = sites(model)
    with torch.no_grad():
        for site, layer in layers.items():
            for master, value in zip(layer.factors, numbers[site], strict=True):
                master.copy_(value)
    return Arm(model, {site: layer.factors for site, layer in layers.items()})


def peft(base: nn.Module, numbers: Numbers, strong: bool) -> Arm:
    """The same ΔW by PEFT. `strong`: with the settings that make it fastest. Raises Fault without peft."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise Fault(
            "the arms peft and peft-strong need the package peft; install codyra-llm[peft], or leave them "
            "out with --arms"
        ) from None
    model, rank = shared_copy(base), _rank(numbers)
    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=targets(model))
    get_peft_model(model, config, autocast_adapter_dtype=not strong)  # puts its layers into `model`
    masters, folded = {}, {}
    with torch.no_grad():
        for site, (a, w, b) in numbers.items():
            layer, folded[site] = model.get_submodule(site), SCALE * w
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            down.copy_(a)
            up.copy_(b * folded[site])
            masters[site] = (down, None, up)
    dtype = next(base.parameters()).dtype
    return Arm(model, masters, folded, dtype if dtype in LOW and not strong else None)


ARMS: dict[str, Callable[[nn.Module, Numbers], Arm]] = {
    "frozen": frozen,
    "peft": lambda base, numbers: peft(base, numbers, strong=False),
    "peft-strong": lambda base, numbers: peft(base, numbers, strong=True),
    "eager": lambda base, numbers: weighted(base, numbers, fused=False),
    "ours": lambda base, numbers: weighted(base, numbers, fused=True),
}


def exact(base: nn.Module, numbers: Numbers, name: str) -> Arm:
    """The reference of arm `name`: the formula in float64 by plain autograd, from the same numbers."""
    return ARMS["frozen" if name == "frozen" else "eager"](copy.deepcopy(base).double(), numbers)
