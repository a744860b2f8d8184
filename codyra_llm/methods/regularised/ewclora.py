"""EWC-LoRA: a fresh LoRA per task whose whole update of W is held back by the Fisher information of W."""

import torch
from torch import Tensor

from codyra_llm.config.methods.regularised import EwcLoraConfig
from codyra_llm.lora.layer import LoraLinear, sites
from codyra_llm.methods.base import Task
from codyra_llm.methods.parts.weight_gradients import weight_fisher, weight_numbers
from codyra_llm.methods.sequential.seqlora import SeqLora


class EwcLora(SeqLora):
    """L + λ/2 Σ_sites Σ_ij F_ij (ΔW_t)_ij², ΔW_t = s·B A of this task; after each task F ← γ F + F_new, F_new
    the mean over examples of (∂/∂W mean CE of one example)² where the task ends, and ΔW_t is merged.

    Source: Zheng et al. (2602.17559) and their code for vision transformers (k and v; λ 1e7, γ 1, rank 10).
    Unlike in `ewc`, the Fisher information is that of W itself: separate ones for A and B ignore how the two
    interact, and the importance of one factor changes as the other moves. Ours: examples one by one; the
    release squares the gradient of a batch of 128, which is smaller by up to that factor, so λ is smaller
    here (of 1e3 to 1e6 the default was best on mini-TRACE, one seed). ΔW_t is added to W; the release adds A
    to A and B to B, whose product is not the sum of the products. Cost: out·in·r per site and step for ΔW and
    its gradient, which is more than the adapter's own products for few tokens; `examples` backward passes per
    task. Memory and state: one number per weight of the sites in float32, whatever the number of tasks.
    Training takes 1.5 times as long as seqlora's on the quickstart."""

    name, Config = "ewclora", EwcLoraConfig
    summary = "fresh LoRA per task held back by the Fisher information of W itself"
    config: EwcLoraConfig
    max_zero_stage = 2  # the penalty reads whole parameters

    def begin_task(self, model, task: Task) -> None:
        """Put the Fisher information of W next to the layers."""
        super().begin_task(model, task)
        layers = sites(model)
        self._held = [(layers[site], f.to(layers[site].lora_B)) for site, f in task.state.items()]

    def penalty(self, model) -> dict[str, Tensor]:
        """λ/2 Σ F ΔW²."""
        terms = [held_back(layer, fisher) for layer, fisher in self._held]
        return {"ewc": self.config.weight / 2 * torch.stack(terms).sum()} if terms else {}

    def state_bytes(self, model, tasks: int) -> int:
        """F, one number per weight of the sites."""
        return weight_numbers(model) * 4

    def held_bytes(self, model, tasks: int) -> int:
        """F again."""
        return self.state_bytes(model, tasks) if tasks else 0

    def end_task(self, model, task: Task, gradients) -> dict[str, Tensor]:
        """γ F + F_new by site, [out, in]. The sites' sums are moved to the CPU one by one, so that the device
        never holds two of F, F_new and their sum for all sites."""
        self._held = []
        found = weight_fisher(model, task, task.sample(self.config.examples, self.seed))
        left, nothing = {}, torch.zeros(())
        for site in list(found):
            new = found.pop(site)
            left[site] = (self.config.decay * task.state.get(site, nothing).to(new) + new).cpu()
        return left


def held_back(layer: LoraLinear, fisher: Tensor) -> Tensor:
    """Σ_ij F_ij (s·B A)_ij², a scalar with gradient; F [out, in]."""
    delta = layer.spec.scale * layer.lora_B @ layer.lora_A
    return (fisher * delta.square()).sum()
