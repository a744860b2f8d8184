"""EWC: sequential LoRA, where each parameter is pulled back to its value at the beginning of the task, the
more strongly the more earlier tasks depend on it.
"""

import torch
from torch import Tensor

from codyra_llm.config.methods.regularised import EwcConfig
from codyra_llm.methods.base import Task, trained_bytes
from codyra_llm.methods.sequential.seqlora import SeqLora


class Ewc(SeqLora):
    """Loss + λ/2 Σ_i F_i (θ_i - θ*_i)², θ* the adapter that the task began with; after each task F ← γ F +
    F_new, with F_new = mean over examples of (∂/∂θ mean CE of one example)², the empirical diagonal Fisher at
    the task's end.

    Source: Kirkpatrick et al. (1612.00796), in the online form of Schwarz et al. (1805.06370). λ = 400, γ = 1
    as in TRACE, whose code squares batch gradients during training, including those of its own penalty. Ours:
    drawn examples one by one, without dropout; only for the adapter's factors. Cost: an element-wise pass per
    step, `examples` backward passes of one example per task. Memory: two more copies of the adapter in
    float32; one on disk per task."""

    name, summary, Config = (
        "ewc",
        "seqlora pulled to the last task's end, weighted by Fisher information",
        EwcConfig,
    )
    max_zero_stage = 2  # the penalty reads whole parameters

    def begin_task(self, model, task: Task) -> None:
        """Keep F and θ*, the parameters as the previous task left them."""
        super().begin_task(model, task)
        self._anchors: dict[str, tuple[Tensor, Tensor]] = {}  # (F, θ*) by parameter, none in the first task
        for name, p in model.named_parameters():
            if name in task.state:
                self._anchors[name] = task.state[name].to(p.device), p.detach().clone()

    def penalty(self, model) -> dict[str, Tensor]:
        """λ/2 Σ F (θ - θ*)²."""
        terms = [
            (fisher * (model.get_parameter(name) - start).square()).sum()
            for name, (fisher, start) in self._anchors.items()
        ]
        return {"ewc": self.config.weight / 2 * torch.stack(terms).sum()} if terms else {}

    def state_bytes(self, model, tasks: int) -> int:
        """F, of the size of what trains."""
        return trained_bytes(model)

    def held_bytes(self, model, tasks: int) -> int:
        """F and θ*."""
        return 2 * trained_bytes(model) if tasks else 0

    def end_task(self, model, task: Task, gradients) -> dict[str, Tensor]:
        """γ F + F_new by parameter."""
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        found = fisher(gradients, task.sample(self.config.examples, self.seed))
        state = {}
        for name, new in zip(names, found, strict=True):
            old = task.state.get(name, torch.zeros(())).to(new.device)
            state[name] = self.config.decay * old + new
        return state


def fisher(gradients, examples: list) -> list[Tensor]:
    """The mean over `examples` of the squared gradient of each, by parameter; every rank takes its share of
    them.
    """
    squares = [torch.zeros_like(p) for p in gradients.parameters]
    for single in gradients.each(gradients.own(examples)):
        for total, grad in zip(squares, single, strict=True):
            total.addcmul_(grad, grad, value=1 / len(examples))
    return gradients.total(squares)
