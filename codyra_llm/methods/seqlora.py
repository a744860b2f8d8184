"""Sequential LoRA: one adapter for the whole stream, trained on one task after the other and nothing else."""

from typing import Literal

from pydantic import Field

from ..lora.layer import AdapterSpec
from ..schema import Positive
from .base import LoraConfig, Method, Task, restore


class SeqLoraConfig(LoraConfig):
    name: Literal["seqlora"] = "seqlora"
    alpha: Positive | None = Field(None, description="scale s = alpha / rank; null: alpha = rank, so s = 1")
    fresh: bool = Field(False, description="merge and start a fresh adapter after every task, as codyra does")
    carry_optimizer: bool = Field(False, description="keep Adam's moments from task to task, as the published runs did")


class SeqLora(Method):
    """ΔW = (alpha/rank)·B A, A ~ U(-1/√in, 1/√in), B = 0 at the start of the stream (Hu et al., 2106.09685).

    As published on TRACE: targets q_proj and v_proj, rank 8, alpha 32, dropout 0.1, `carry_optimizer` true.
    Cost: none beside the adapter. The archive holds the whole adapter after each task (mode "replace"); with `fresh`
    it holds each task's own update, and what is left of the difference to codyra is the rank selection.
    """

    name, summary, Config = "seqlora", "one LoRA adapter trained on all tasks in turn", SeqLoraConfig

    @property
    def mode(self):
        return "add" if self.config.fresh else "replace"

    @property
    def carries_optimizer(self):
        return self.config.carry_optimizer

    def spec(self) -> AdapterSpec:
        c = self.config
        return AdapterSpec(c.rank, (c.alpha or c.rank) / c.rank, c.dropout)

    def begin_task(self, model, task: Task) -> None:
        if task.index and not self.config.fresh:
            restore(model, task.archive.load(task.index - 1))
        else:
            super().begin_task(model, task)
