"""C-LoRA: one pair of factors for all tasks with an r×r routing matrix between them, which the tasks move."""

import math

import torch
from torch import Tensor, nn

from codyra_llm.config.methods.regularised import CLoraConfig
from codyra_llm.core.tensors import generator
from codyra_llm.lora.layer import LoraLinear, attach, sites
from codyra_llm.lora.update import Adapter, Update
from codyra_llm.methods.base import Task, factor_bytes, load_factors, trained_factors
from codyra_llm.methods.sequential.seqlora import SeqLora


class RoutedLinear(LoraLinear):
    """y = x Wᵀ + b + s·x (B R A)ᵀ. R [r, r] is kept in `lora_w`, where other adapters have a weight per
    rank."""

    def __init__(self, base: nn.Linear, spec):
        super().__init__(base, spec)
        self.lora_w = nn.Parameter(self.lora_A.new_empty(spec.rank, spec.rank))

    @property
    def factors(self) -> tuple[Tensor, None, Tensor]:
        """(A, None, B R)."""
        return self.lora_A, None, self.lora_B @ self.lora_w

    @property
    def sources(self) -> tuple[Tensor, ...]:
        """A, w and B: the masters that `factors` are made from."""
        return self.lora_A, self.lora_w, self.lora_B

    @torch.no_grad()
    def reset(self, *key: int | str) -> None:
        """A and B drawn, U(-1/√in, 1/√in) and U(-1/√r, 1/√r), R = 0: so ΔW = 0."""
        super().reset(*key)
        self.lora_w.zero_()
        draw = generator(*key, "B")
        self.lora_B.copy_((torch.rand(self.lora_B.shape, generator=draw) * 2 - 1) / math.sqrt(self.spec.rank))


class CLora(SeqLora):
    """ΔW = s·B (R_old + R_δ) A with L + λ Σ_sites ‖R_oldᵀ R_δ‖_F²; after each task R_old ← R_old + R_δ, R_δ ←
    0.

    Source: C-LoRA (2502.17920), of which only the abstract was read: one shared pair, R = R_old (frozen) +
    R_δ, and an orthogonality between the two. Ours: the order B R A, the regulariser's form and λ, the start
    (A, B drawn, R = 0), and that A and B train in the first task and are frozen (`factor_lr` 0) afterwards. R
    = R_old + R_δ is one parameter that starts a task at R_old, which is the same, without weight decay. R_old
    has full rank after one task, so the term penalises changes of R in the directions that R_old uses, in
    proportion to their weight. The archive has the plain factors A and B·R. Cost per step: out·r² per site to
    multiply B R, r³ for the term. Memory: r² more parameters per site, and R_old."""

    name, summary, Config = "clora", "shared LoRA factors, tasks move an r×r matrix between them", CLoraConfig
    config: CLoraConfig
    max_zero_stage = 2  # factors are composed from whole parameters

    def attach(self, model) -> None:
        """`RoutedLinear` on all targets."""
        attach(model, self.config.targets, self.spec(), RoutedLinear, self.config.layers)

    def begin_task(self, model, task: Task) -> None:
        """Go on with A, R and B of the previous task, and remember its R."""
        if task.index:
            load_factors(model, task.state)
        else:
            super().begin_task(model, task)
        self._layers = list(sites(model).values())
        # R_old [sites, r, r], at first 0.
        self._old = torch.stack([layer.lora_w.detach() for layer in self._layers])
        self._later = task.index > 0

    def param_groups(self, model, lr: float) -> list[dict]:
        """R at the optimizer's rate without weight decay; A and B at their share of it, or frozen."""
        share = self.config.factor_lr if self._later else 1.0
        routes = {"params": [layer.lora_w for layer in self._layers], "lr": lr, "weight_decay": 0.0}
        factors = []
        for layer in self._layers:
            factors += [layer.lora_A, layer.lora_B]
        for factor in factors:
            factor.requires_grad_(share > 0)
        if share == 0:
            return [routes]
        return [routes, {"params": factors, "lr": share * lr}]

    def penalty(self, model) -> dict[str, Tensor]:
        """λ‖R_oldᵀ R_δ‖_F², summed over sites, from the second task on."""
        if not (self._later and self.config.weight):
            return {}
        delta = torch.stack([layer.lora_w for layer in self._layers]) - self._old
        return {"routing": self.config.weight * (self._old.mT @ delta).square().sum()}

    def state_bytes(self, model, tasks: int) -> int:
        """A, R and B."""
        return factor_bytes(model)

    def end_task(self, model, task: Task, gradients) -> dict[str, Tensor]:
        """A, R and B as they are, since the archive holds B R in place of both."""
        return trained_factors(model)

    def consolidate(self, adapters: dict[str, Adapter], index: int) -> Update:
        """ΔW = s·(B R) A as plain factors."""
        plain = {site: Adapter(x.a, x.b @ x.w, None) for site, x in adapters.items()}
        return Update(plain, self.spec().scale, self.mode)
