"""OSFT: all of a projection trains but its leading singular directions, which no task may touch."""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from codyra_llm.config.methods.projection import OsftConfig
from codyra_llm.lora.layer import AdapterSpec, LoraLinear, attach, sites
from codyra_llm.lora.update import Adapter, Update
from codyra_llm.methods.base import Method, Task, restore


class Kept(NamedTuple):
    """The leading singular directions of a layer's W: U_hi [out, k] and V_hi [in, k], float32."""

    u: Tensor
    v: Tensor

    def columns(self, b: Tensor) -> Tensor:
        """(I - U_hi U_hiᵀ) b, of b [out, r]."""
        return b - self.u @ (self.u.T @ b)

    def rows(self, a: Tensor) -> Tensor:
        """a (I - V_hi V_hiᵀ), of a [r, in]."""
        return a - (a @ self.v) @ self.v.T


class Split(NamedTuple):
    """W = W_hi + U diag(S) Vᵀ, W_hi the part of the leading directions."""

    kept: Kept
    u: Tensor  # [out, r]
    s: Tensor  # [r]
    vt: Tensor  # [r, in]


class AwayFromKept(Method):
    """Factors whose gradients and steps are projected off the leading directions of their layer's W."""

    max_zero_stage = 0

    @torch.no_grad()
    def edit_gradients(self, gradients) -> None:
        """Project the gradients of A and B off the kept directions."""
        for layer, kept in self._kept.items():
            layer.lora_A.grad = kept.rows(layer.lora_A.grad)
            layer.lora_B.grad = kept.columns(layer.lora_B.grad)

    @torch.no_grad()
    def after_step(self, gradients) -> None:
        """Adam scales each entry by itself, so what it made of the gradients is projected again."""
        for layer, kept in self._kept.items():
            layer.lora_A.copy_(kept.rows(layer.lora_A))
            layer.lora_B.copy_(kept.columns(layer.lora_B))


class ResidualLinear(LoraLinear):
    """A layer whose adapter has all the singular directions that are not preserved: B = U_lo, w = S_lo,
    A = V_loᵀ; a frozen W_hi takes W's place."""

    def __init__(self, base: nn.Linear, spec: AdapterSpec, preserved: float):
        smaller = min(base.in_features, base.out_features)
        super().__init__(base, replace(spec, rank=smaller - preserved_rank(smaller, preserved)))


class Osft(AwayFromKept):
    """W = U_hi S_hi V_hiᵀ + U_lo S_lo V_loᵀ by a new SVD for each task; U_lo, S_lo, V_lo train, with ∂U_lo ←
    (I - U_hi U_hiᵀ) ∂U_lo and ∂V_lo ← (I - V_hi V_hiᵀ) ∂V_lo, and the same for the factors after each step.

    Source: OSFT (Nayak et al., 2504.07097), by its abstract and as PEFT implements it (`osf`, a share of half
    preserved): a test compares the two. PEFT projects only the gradients; AdamW's steps can still leave the
    complement, so here the factors are projected as well, as in the authors' later trainer (mini_trainer);
    the paper's own code projects gradients alone. Left out: embeddings, norms and head, which the paper's
    code trains without a constraint; the paper's choice of the share by layer, from the cosine between a
    layer's input and output, and a share that grows with the tasks. With model.dtype bfloat16 W_hi is rounded
    once more while a task trains; the archive holds W_hi + U_lo S_lo V_loᵀ summed in float32 and rounded
    once, as whole weights of the projections. Cost per step: the factors' products, for square W as many as
    W's own, and the two projections, 4·k·r·(in + out) per site. Per task: an SVD of W per site on the device.
    Memory: U, S, V of all sites in float32, with gradients and moments for what trains; W_hi once more on the
    CPU, and in checkpoints inside a task. On disk a copy of the projections per task. Training takes 1.1
    times as long as seqlora's on the quickstart.
    """

    name, Config, trains = "osft", OsftConfig, "projections"
    summary = "all of W trains but its leading singular directions"
    config: OsftConfig
    separable, mode, archives_weights = False, "replace", True

    def spec(self) -> AdapterSpec:
        """An adapter with weights on its ranks; how many depends on each W."""
        return AdapterSpec(1, importance="constant")  # each layer has a rank of its own

    def attach(self, model) -> None:
        """`ResidualLinear` on all targets."""
        kind = partial(ResidualLinear, preserved=self.config.preserved)
        attach(model, self.config.targets, self.spec(), kind, self.config.layers)

    @torch.no_grad()
    def begin_task(self, model, task: Task) -> None:
        """Split each W: the leading directions stay in W, the others become the adapter."""
        if task.index:
            restore(model, task.archive.load(task.index - 1))
        self._kept: dict[LoraLinear, Kept] = {}
        self._high: dict[str, tuple[Tensor, torch.dtype]] = {}  # W_hi on the CPU, and the dtype of W
        for site, layer in sites(model).items():
            weight = layer.weight.to(layer.lora_B)
            split = split_weight(weight, preserved_rank(min(weight.shape), self.config.preserved))
            high = weight - split.u * split.s @ split.vt
            self._kept[layer] = split.kept
            self._high[site] = high.float().cpu(), layer.weight.dtype
            layer.weight.copy_(high)
            layer.lora_A.copy_(split.vt)
            layer.lora_w.copy_(split.s)
            layer.lora_B.copy_(split.u)

    def progress(self) -> dict[str, Tensor]:
        """W_hi of every site."""
        return {site: high for site, (high, _) in self._high.items()}

    @torch.no_grad()
    def resume(self, progress: dict[str, Tensor]) -> None:
        """Take the W_hi that the saved factors belong to. Where singular values are equal, or nearly so, an
        SVD with other threads or on another device splits W elsewhere, and the two parts would not add up."""
        layers = dict(zip(self._high, self._kept, strict=True))
        for site, layer in layers.items():
            saved, (high, dtype) = progress[site], self._high[site]
            if torch.equal(saved, high):
                continue
            count = self._kept[layer].u.shape[1]
            self._high[site] = saved, dtype
            self._kept[layer] = split_weight(saved.to(layer.lora_B), count).kept
            layer.weight.copy_(saved)

    def consolidate(self, adapters: dict[str, Adapter], index: int) -> Update:
        """The whole W of every site: W_hi and what trained, added."""
        whole = {}
        for site, adapter in adapters.items():
            high, dtype = self._high[site]
            whole[f"{site}.weight"] = (high + adapter.delta(1.0)).to(dtype)
        return Update({}, 1.0, self.mode, whole)


def preserved_rank(size: int, share: float) -> int:
    """How many of `size` singular directions are kept; at least one trains, as `share` is below 1."""
    return int(share * size)


def split_weight(weight: Tensor, kept: int) -> Split:
    """W [out, in] by its first `kept` singular directions and the others."""
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    leading = Kept(u[:, :kept].contiguous(), vt[:kept].T.contiguous())
    return Split(leading, u[:, kept:], s[kept:], vt[kept:])
