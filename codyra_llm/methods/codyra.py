"""CoDyRA: LoRA whose rank-one parts carry weights, shrunk by a soft threshold while training; survivors are merged."""

from typing import Literal

import torch
from pydantic import Field, model_validator

from ..lora.archive import Adapter, Update
from ..lora.layer import AdapterSpec, sites
from ..optim import budget_kappa, published_kappa, vanishing_rate
from ..schema import Fraction, NotNegative, Positive, Strict
from ..seeds import generator
from .base import LoraConfig, Method, survivors


class Threshold(Strict):
    """How hard the weights w are shrunk, and when."""

    schedule: Literal["budget", "published"] = Field("budget", description="budget: the shrinks of all steps sum to "
                                                     "`budget`; published: κ climbs to `kappa_max` in 50 stages")
    budget: NotNegative | None = Field(None, description="S = Σκ over the sparse phase; default 0.1")
    kappa_max: NotNegative | None = Field(None, description="published schedule only: the last κ; default 0.005")
    dense: Fraction = Field(0.5, lt=1, description="share of the steps before any shrinking")
    operator: Literal["soft", "released"] = Field("soft", description="soft: sign(w)·max(|w|-κ, 0); released: the "
                                                  "public code's rule, with a dead zone of 2κ")

    @model_validator(mode="after")
    def _used(self) -> "Threshold":
        unused = "kappa_max" if self.schedule == "budget" else "budget"
        if getattr(self, unused) is not None:
            raise ValueError(f"'{unused}' has no effect with schedule '{self.schedule}'; remove it")
        return self

    def kappa(self, step: int, steps: int, schedule: str) -> float:
        if self.schedule == "budget":
            return budget_kappa(step, steps, self.dense, 0.1 if self.budget is None else self.budget, schedule)
        return published_kappa(step, steps, self.dense, 0.005 if self.kappa_max is None else self.kappa_max)


class CodyraConfig(LoraConfig):
    name: Literal["codyra"] = "codyra"
    scale: Positive = Field(1.0, description="s in ΔW = s·B diag(w) A; the published code has 1")
    importance_init: Literal["constant", "normal"] = Field("constant", description="w at the start of a task: one "
                                                           "value, or N(0, value²) as published")
    importance_value: Positive = Field(1.0, description="the constant, or the standard deviation")
    importance_lr: NotNegative | None = Field(None, description="learning rate of w; default: the optimizer's")
    align: bool = Field(True, description="when the dense phase ends, rewrite each ΔW by its singular directions, with "
                        "w = σ/σ₁, so that the threshold meets parts in the order of their size")
    threshold: Threshold = Field(Threshold(), description="how hard the weights w are shrunk, and when")
    selection: Literal["threshold", "random"] = Field("threshold", description="random: the control that drops ranks "
                                                      "by lot, along a straight line to zero")
    keep: Fraction | None = Field(None, description="random only: share of all ranks kept")

    @model_validator(mode="after")
    def _keep_goes_with_random(self) -> "CodyraConfig":
        if (self.keep is None) == (self.selection == "random"):
            raise ValueError("'keep' goes with selection 'random' and with nothing else; "
                             + ("remove it" if self.keep is not None else "give the share of ranks to keep"))
        return self


class Codyra(Method):
    """ΔW = s·B diag(w) A per task; w ← prox_κ(w) after every AdamW step of the sparse phase; parts at w = 0 are dropped.

    Source: CoDyRA (2412.01004), objective L + λ Σ‖w‖₁ by proximal gradient, κ ramping up after a dense phase. As
    published: scale 1, importance_init normal, align false, schedule published, operator released, importance_lr null.

    Ours, and the default: the constant start; the threshold budget that does not depend on the number of steps; and
    `align`. Without it the parts share the update among them, each is as needed as the next, and which of them outlive
    the threshold is decided by where their w began (docs/codyra.md has the figures).
    Cost: r more parameters per site, an element-wise pass over them per step, one QR and SVD of rank r per site and
    task; nothing after the merge.
    """

    name, summary, Config = "codyra", "LoRA with learned rank weights, thresholded, pruned and merged", CodyraConfig
    config: CodyraConfig

    @property
    def max_zero_stage(self) -> int:
        return 0 if self.config.selection == "random" else 3  # its masks have the parameters' shapes, ZeRO's shards not

    def spec(self) -> AdapterSpec:
        c = self.config
        return AdapterSpec(c.rank, c.scale, c.dropout, c.importance_init, c.importance_value)

    def param_groups(self, model, lr: float) -> list[dict]:
        layers = sites(model).values()
        weights = [layer.lora_w for layer in layers]
        own = self.config.importance_lr
        group = {"params": weights, "lr": lr if own is None else own, "kappa": 0.0,
                 "operator": self.config.threshold.operator, "weight_decay": 0.0}
        if self.config.selection == "random":
            group["drop"] = self._lots(weights)
        return [{"params": [p for layer in layers for p in (layer.lora_A, layer.lora_B)], "lr": lr}, group]

    def before_step(self, groups: list[dict], step: int, steps: int, schedule: str) -> None:
        threshold = self.config.threshold
        for group in groups:
            if "kappa" in group:
                group["kappa"] = (vanishing_rate(step, steps, threshold.dense) if "drop" in group
                                  else threshold.kappa(step, steps, schedule))

    def rewrite(self, step: int, steps: int):
        return aligned if self.config.align and step == int(self.config.threshold.dense * steps) else None

    def consolidate(self, adapters: dict[str, Adapter], index: int) -> Update:
        return Update({site: survivors(adapter) for site, adapter in adapters.items()}, self.config.scale)

    def _lots(self, weights: list) -> list:
        """Masks over all sites together, 1 where a rank is to go; as many stay as `keep` says, to the nearest rank."""
        sizes = [w.numel() for w in weights]
        order = torch.randperm(sum(sizes), generator=generator("lots", self.seed))
        dropped = (order >= round(self.config.keep * sum(sizes))).to(weights[0])
        return list(dropped.split(sizes))


def aligned(adapter: Adapter) -> Adapter:
    """The same ΔW by its singular directions: with B diag(w) A = U diag(σ) Vᵀ, rows of A along V, columns of B along U,
    w = σ/σ₁. A's rows get the norm 1/√3 of fresh ones, so that a step of the optimizer means to them what it did."""
    q_b, r_b = torch.linalg.qr(adapter.b * adapter.w)
    q_a, r_a = torch.linalg.qr(adapter.a.T)
    u, sigma, vt = torch.linalg.svd(r_b @ r_a.T)
    if not sigma[0] > 0:
        return adapter
    norm = 3**-0.5
    return Adapter(norm * vt @ q_a.T, q_b @ u * (sigma[0] / norm), sigma / sigma[0])
