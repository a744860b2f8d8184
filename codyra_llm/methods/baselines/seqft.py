"""SeqFT: all weights trained on one task after the other, and nothing else."""

import torch
from torch import Tensor

from codyra_llm.config.methods.baselines import SeqFtConfig
from codyra_llm.lora.update import Adapter, Update
from codyra_llm.methods.base import Method, Task, restore


class SeqFt(Method):
    """Full fine-tuning: every parameter trains, embeddings, norms and head among them; tied embeddings stay
    tied.

    As published on TRACE (2310.06762): optim.lr 1e-5 constant, epochs 1, 1, 5, 5, 1, 5, 5, 5 in order 1,
    `carry_optimizer` true. Parameters, gradients and moments are float32; with model.dtype bfloat16 the
    blocks compute in bfloat16 by autocast, the head in float32. Weights are rounded to model.dtype once per
    task, when they are archived, and the next task starts from what was evaluated.
    Cost: 16 bytes of memory per parameter plus the activations, and on disk one copy of the model per task.
    One process or data parallel. A task can't be taken out again, since no part of the weights is its own.
    """

    name, summary, Config, trains = (
        "seqft",
        "all weights trained on all tasks in turn",
        SeqFtConfig,
        "all weights",
    )
    separable, mode, max_zero_stage, archives_weights = False, "replace", 0, True
    config: SeqFtConfig

    @property
    def carries_optimizer(self) -> bool:
        """Whether Adam's moments go on into the next task."""
        return self.config.carry_optimizer

    def attach(self, model) -> None:
        """All parameters train, in float32."""
        self._dtype = next(model.parameters()).dtype
        model.float().requires_grad_(True)

    def begin_task(self, model, task: Task) -> None:
        """Go on with the weights that the previous task left."""
        if task.index:
            restore(model, task.archive.load(task.index - 1))

    def loss(self, model, batch) -> dict[str, Tensor]:
        """Cross entropy, with the model's products in its own dtype."""
        with torch.autocast(batch.ids.device.type, self._dtype, enabled=self._dtype != torch.float32):
            hidden = batch.hidden(model)
        return {"loss": batch.cross_entropy_of(model, hidden.float())}

    def end_task(self, model, task: Task, gradients) -> dict[str, Tensor]:
        """Take the trained weights, in the model's dtype, for `consolidate`."""
        self._trained = {name: p.detach().to(self._dtype).cpu() for name, p in model.named_parameters()}
        return {}

    def consolidate(self, adapters: dict[str, Adapter], index: int) -> Update:
        """The weights as a whole."""
        return Update(adapters, 1.0, self.mode, self._trained)
