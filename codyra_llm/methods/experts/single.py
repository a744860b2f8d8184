"""One adapter per task next to the base, and the method that is given the task whose adapter to use."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from codyra_llm.config.methods.experts import ExpertConfig, SingleConfig
from codyra_llm.lora.layer import AdapterSpec
from codyra_llm.lora.mixture import attach_mixture, select, weigh
from codyra_llm.methods.base import Condition, Method, Task


class Single(Method):
    """A fresh LoRA of its own for each task (Hu et al., 2106.09685), trained from the base and chosen by the
    true task.

    The upper bound for methods that infer the task, and the only one here that is given it. A prompt of no
    task, or of one not learnt yet, is answered by the base. As published on TRACE: rank 8, alpha 32, dropout
    0.1, q_proj and v_proj. Cost per step: none but the adapter's. Inference holds all adapters and
    multiplies with all of them.
    """

    name, summary, Config = "single", "one LoRA per task, chosen by the true task", SingleConfig
    config: ExpertConfig
    mode, merges, task_id, grows, max_zero_stage = "apart", False, True, True, 2

    def spec(self) -> AdapterSpec:
        """Plain LoRA of scale alpha / rank."""
        return AdapterSpec(self.config.rank, self.config.alpha / self.config.rank, self.config.dropout)

    def install(self, model, task: Task) -> None:
        """The adapters of all tasks learnt so far."""
        self.learnt = task.index + 1
        adapters = [task.archive.load(k).adapters for k in range(self.learnt)]
        attach_mixture(model, self.config.targets, self.spec(), adapters, self.config.layers)

    @torch.no_grad()
    def condition(self, model, prompts: list[list[int]], task: int | None) -> Condition:
        """Weigh the adapters by each prompt, as `mixture` says."""
        weigh(model, None)  # what is read from the prompts is the base's
        weigh(model, self.mixture(model, prompts, task))
        return Condition(select=lambda rows: select(model, rows))

    def mixture(self, model: nn.Module, prompts: list[list[int]], task: int | None) -> Tensor | None:
        """Weights [prompts, tasks] of the adapters; None: the base alone."""
        if task is None or task >= self.learnt:
            return None
        return self.only(torch.full((len(prompts),), task, device=model.device))

    def only(self, tasks: Tensor) -> Tensor:
        """Weight 1 for the adapter of each row's task [rows], 0 for the others."""
        return functional.one_hot(tasks, self.learnt).float()
