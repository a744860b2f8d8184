"""LwF: sequential LoRA that keeps to the answers of the adapter before the task, on the task's own inputs."""

import torch
from torch import Tensor

from codyra_llm.config.methods.regularised import LwfConfig
from codyra_llm.lora.layer import snapshot, stand_in
from codyra_llm.methods.base import Task
from codyra_llm.methods.sequential.seqlora import SeqLora
from codyra_llm.models import families
from codyra_llm.models.head_loss import distillation


class Lwf(SeqLora):
    """Loss + α T² Σ weights·KL(softmax(z'/T) ‖ softmax(z/T)) at the labelled positions, averaged like the
    loss; z' are the logits of the model that the task began with.

    Source: Li and Hoiem (1606.09282). α = 1, T = 2 as TRACE, whose code swaps the two models, leaves out T²
    and sums over prompts and padding. The teacher is a second set of factors on the same base. Cost per step
    from the second task on: one forward without gradient or dropout and the head three times; one more copy
    of the adapter."""

    name, summary, Config = (
        "lwf",
        "seqlora that distils the model before the task on the task's own inputs",
        LwfConfig,
    )
    max_zero_stage = 2  # the teacher is a copy of whole parameters

    def begin_task(self, model, task: Task) -> None:
        """Keep the factors as they are: with them the adapters are the teacher."""
        super().begin_task(model, task)
        self._teacher = snapshot(model) if task.index else None

    def loss(self, model, batch) -> dict[str, Tensor]:
        """Cross entropy, and α·T²·KL(teacher ‖ student) on the same tokens."""
        if not self._teacher:
            return super().loss(model, batch)
        with torch.no_grad(), stand_in(model, self._teacher):
            taught = batch.hidden(model)
        head, hidden, cap = families.head(model), batch.hidden(model), families.softcap(model)
        kl = distillation(head, hidden, taught, batch.weights, self.config.temperature, cap)
        ce = batch.cross_entropy_of(model, hidden)
        return {"loss": ce, "lwf": self.config.weight * kl}
