"""A frozen linear layer with the adapters of many tasks, weighted separately for every row of a batch."""

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from codyra_llm.lora.layer import LoraLinear, attach
from codyra_llm.lora.update import Adapter

if TYPE_CHECKING:
    from codyra_llm.lora.layer import AdapterSpec


class MixtureLinear(LoraLinear):
    """y_b = x_b Wᵀ + bias + Σ_k m[b, k]·s·drop(x_b) A_kᵀ B_kᵀ for x [rows, T, in] and weights m [rows, K]
    (`rows`).

    The last of the K adapters is the layer's own, A and B, and may train. The others (`hold`) are frozen, in
    the compute dtype; x and m get their gradients through them too. All A_k are one product and all B_k are
    one, with m repeated over the ranks of its adapter between them. With `rows` None it is the plain base.
    Plain autograd, every layer separately: a dequantised W is kept until backward.
    """

    reads_input: ClassVar[bool] = False  # whether `weights` depends on what it is given

    def __init__(self, base: nn.Linear, spec: "AdapterSpec"):
        super().__init__(base, spec)
        del self.shared  # it would compute this layer with its siblings, without the rows' weights
        self.rows: Tensor | None = None
        self.hold([])

    def hold(self, adapters: list[Adapter]) -> None:
        """Keep these frozen adapters of earlier tasks, in front of the layer's own."""
        a, b = self.lora_A.detach(), self.lora_B.detach()
        rows = [adapter.a.to(a) for adapter in adapters]
        columns = [self.spec.scale * adapter.b.to(b) for adapter in adapters]
        # The empty a[:0] and b[:, :0] give the shape where there is no earlier task.
        old_a = torch.cat([a[:0], *rows])  # [R, in]
        old_b = torch.cat([b[:, :0], *columns], 1)  # s·B [out, R]
        self.register_buffer("old_a", old_a.to(self.dtype), persistent=False)
        self.register_buffer("old_b", old_b.to(self.dtype), persistent=False)
        self.parts = [len(adapter.a) for adapter in adapters] + self.own_parts
        repeats = torch.tensor(self.parts, device=a.device)  # made here so that forward waits for no copy
        self.register_buffer("repeats", repeats, persistent=False)

    @property
    def own_parts(self) -> list[int]:
        """How many of the own ranks each weight is for."""
        return [self.spec.rank]

    @property
    def mixes(self) -> bool:
        """Whether adapters are added; False: the plain base."""
        return self.rows is not None

    def weights(self, hidden: Tensor) -> Tensor:
        """m [rows, K], which may depend on hidden = x Aᵀ [rows, T, R], of x without dropout."""
        return self.rows

    def forward(self, x: Tensor) -> Tensor:
        """y [rows, T, out] of x [rows, T, in]."""
        x, weight = x.to(self.dtype), self.frozen(self.dtype)
        if not self.mixes:
            return functional.linear(x, weight, self.bias)
        a = torch.cat([self.old_a, self.lora_A.to(x.dtype)])
        b = torch.cat([self.old_b, (self.spec.scale * self.lora_B).to(x.dtype)], 1)
        hidden = functional.dropout(x, self.spec.dropout, self.training) @ a.T  # [rows, T, R]
        seen = hidden  # what the weights may depend on: without dropout
        if self.reads_input and self.training and self.spec.dropout > 0:
            seen = x @ a.T
        m = self.weights(seen).to(x.dtype)  # [rows, K]
        m = m.repeat_interleave(self.repeats, 1, output_size=len(a))  # [rows, R]: a weight for every rank
        added = (hidden * m[:, None]) @ b.T  # [rows, T, out]
        y = torch.addmm(added.flatten(0, 1), x.flatten(0, 1), weight.T).view_as(added)  # small product first
        return y if self.bias is None else y + self.bias


def mixtures(model: nn.Module) -> dict[str, MixtureLinear]:
    """The model's mixing layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MixtureLinear)}


def attach_mixture(
    model: nn.Module,
    targets: list[str],
    spec: "AdapterSpec",
    adapters: list[dict[str, Adapter]],
    layers: list[int] | None = None,
) -> None:
    """Put mixing layers on all `targets` of the blocks `layers` (None: of all), with the adapters of all
    tasks, oldest first. Nothing of the model is trained afterwards."""
    attach(model, targets, spec, MixtureLinear, layers)
    for name, layer in mixtures(model).items():
        *old, last = (of_task[name] for of_task in adapters)
        layer.hold(old)
        layer.lora_A.data.copy_(last.a)
        layer.lora_B.data.copy_(last.b)
    model.requires_grad_(False)


def weigh(model: nn.Module, rows: Tensor | None) -> None:
    """Let all layers mix by the weights `rows` [rows, K]; None: the plain base."""
    for layer in mixtures(model).values():
        layer.rows = rows


def select(model: nn.Module, chosen: Tensor) -> None:
    """Keep only the weights of these rows of the batch."""
    for layer in mixtures(model).values():
        if layer.rows is not None:
            layer.rows = layer.rows[chosen]
