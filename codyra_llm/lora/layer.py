"""A frozen linear layer with a rank-selective adapter, and how it gets into a model."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from codyra_llm.core.errors import Fault, nearest
from codyra_llm.core.tensors import generator
from codyra_llm.lora.shared import SharedInput

Factors = tuple[Tensor, Tensor | None, Tensor]  # (A, w, B)


@dataclass(frozen=True)
class AdapterSpec:
    """What every adapter of a model has in common. `importance` None: plain LoRA, ΔW = s·B A."""

    rank: int
    scale: float = 1.0
    dropout: float = 0.0
    importance: str | None = None  # "constant" or "normal": how w starts
    importance_value: float = 1.0  # the constant, or the standard deviation


class LoraLinear(nn.Linear):
    """y = x Wᵀ + b + s·((drop(x) Aᵀ) ⊙ w) Bᵀ: W and b frozen, A [r, in], w [r] (or None) and B [out, r]
    trained.

    It owns W itself, under the name that the plain layer had, so that the model's state dict keeps its keys;
    a packed W (`quantize.py`) stays packed. A, w and B are float32 unless W is float64. `shared` computes its
    output, together with those of the layers that have the same input."""

    def __init__(self, base: nn.Linear, spec: AdapterSpec):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.spec = base.in_features, base.out_features, spec
        self.weight, self.bias = base.weight.requires_grad_(False), base.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)
        kind = {"device": base.weight.device, "dtype": torch.promote_types(base.weight.dtype, torch.float32)}
        self.lora_A = nn.Parameter(torch.empty(spec.rank, self.in_features, **kind))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, spec.rank, **kind))
        self.lora_w = nn.Parameter(torch.empty(spec.rank, **kind)) if spec.importance else None
        self.stand_in: Factors | None = None
        self.shared = SharedInput([self])

    @property
    def factors(self) -> Factors:
        """The factors it computes with: the masters (A, w, B), or the ones that replace them (`stand_in`)."""
        return self.stand_in or (self.lora_A, self.lora_w, self.lora_B)

    @property
    def sources(self) -> tuple[Tensor | None, ...]:
        """The tensors that `factors` are computed from; if one of them changes, so do the factors."""
        return self.factors

    @property
    def dtype(self) -> torch.dtype:
        """The dtype it computes in: autocast's where that is on, else that of W."""
        device = self.weight.device.type
        is_on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        return torch.get_autocast_dtype(device) if is_on else self.weight.dtype

    def frozen(self, dtype: torch.dtype) -> Tensor:
        """W [out, in] in the given dtype; dequantised at each call where W is packed."""
        return self.weight.to(dtype) if isinstance(self.weight, Tensor) else self.weight.dequantize(dtype)

    @torch.no_grad()
    def reset(self, *key: int | str) -> None:
        """A fresh adapter with ΔW = 0, drawn from a generator seeded by `key`: the same on every rank and
        device.
        """
        draw = generator(*key)
        bound = 1 / math.sqrt(self.in_features)  # kaiming_uniform with a = √5
        self.lora_A.copy_((torch.rand(self.lora_A.shape, generator=draw) * 2 - 1) * bound)
        self.lora_B.zero_()
        if self.lora_w is not None:
            value = self.spec.importance_value
            if self.spec.importance == "constant":
                self.lora_w.fill_(value)
            else:
                self.lora_w.copy_(value * torch.randn(self.lora_w.shape, generator=draw))

    def forward(self, x: Tensor) -> Tensor:
        """y [..., out] of x [..., in], computed by `shared`."""
        return self.shared.output(self, x)

    def extra_repr(self) -> str:
        """What printing the model shows about this layer."""
        return f"{super().extra_repr()}, rank={self.spec.rank}, scale={self.spec.scale}"


def block_number(name: str) -> int | None:
    """The number of the decoder block that a module of this name is in, 3 of
    'model.layers.3.self_attn.q_proj'; None outside of the blocks."""
    numbers = [int(part) for part in name.split(".") if part.isdecimal()]
    return numbers[0] if numbers else None


def attach(
    model: nn.Module,
    targets: list[str],
    spec: AdapterSpec,
    kind: Callable[[nn.Linear, AdapterSpec], LoraLinear] = LoraLinear,
    layers: list[int] | None = None,
) -> None:
    """Replace every linear layer whose last name is in `targets` by an adapted one of this `kind`, in the
    decoder blocks with the numbers `layers` (None: in all); it keeps the layer's training mode. Raises Fault
    for a target that no layer has."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    present = {name.rpartition(".")[2] for name in linears}
    faults = [
        f"method.targets: the model has no projection '{target}'.{nearest(target, present)}"
        for target in targets
        if target not in present
    ]
    if faults:
        raise Fault(*faults)
    for name, linear in linears.items():
        parent, _, leaf = name.rpartition(".")
        if leaf not in targets or (layers is not None and block_number(name) not in layers):
            continue
        setattr(model.get_submodule(parent), leaf, kind(linear, spec).train(linear.training))


def train_only_b(model: nn.Module) -> None:
    """Freeze every adapter's A, for methods that choose it before training."""
    for layer in sites(model).values():
        layer.lora_A.requires_grad_(False)


def sites(model: nn.Module) -> dict[str, LoraLinear]:
    """The model's adapted layers by name, e.g. 'model.layers.0.self_attn.q_proj'."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def by_shape(layers: dict[str, LoraLinear]) -> list[dict[str, LoraLinear]]:
    """The sites grouped by the shape of A, in the model's order within each group, so that a method can treat
    those of one shape by one batched product."""
    groups: dict[tuple, dict[str, LoraLinear]] = {}
    for site, layer in layers.items():
        groups.setdefault(tuple(layer.lora_A.shape), {})[site] = layer
    return list(groups.values())


def snapshot(model: nn.Module) -> dict[str, Factors]:
    """A copy of the factors at every site, without gradient."""
    return {site: _copied(layer.factors) for site, layer in sites(model).items()}


def without_update(factors: dict[str, Factors]) -> dict[str, Factors]:
    """These factors with B = 0, with which the model is the base that it was loaded as."""
    return {site: (a, w, torch.zeros_like(b)) for site, (a, w, b) in factors.items()}


def _copied(factors: Factors) -> Factors:
    a, w, b = factors
    return a.detach().clone(), None if w is None else w.detach().clone(), b.detach().clone()


@contextmanager
def stand_in(model: nn.Module, factors: dict[str, Factors]) -> Iterator[None]:
    """Within this block the adapters compute with these factors (of every site, on its device) instead of
    their parameters, and without dropout: as another stage of the run on the same base, e.g. a teacher under
    no_grad. Call backward inside the block, or gradient checkpointing would recompute with the parameters."""
    layers = sites(model)
    for site, layer in layers.items():
        layer.stand_in = factors[site]
    try:
        with without_dropout(model):
            yield
    finally:
        for layer in layers.values():
            layer.stand_in = None


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Within this block there is no dropout, neither in the adapters nor in the base, whose attention may
    have its own. model.eval() would also turn off gradient checkpointing."""
    dropping = []  # not modules that checkpoint, which they do in training mode alone
    for module in model.modules():
        if module.training and not getattr(module, "gradient_checkpointing", False):
            dropping.append(module)
    for module in dropping:
        module.training = False
    try:
        yield
    finally:
        for module in dropping:
            module.training = True
