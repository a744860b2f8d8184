"""Sequential LoRA: one adapter for the whole stream, trained on one task after the other and nothing else."""

from codyra_llm.config.methods.base import MethodConfig
from codyra_llm.config.methods.sequential import SeqLoraConfig, StartConfig
from codyra_llm.lora.layer import AdapterSpec
from codyra_llm.methods.base import Method, Task, restore
from codyra_llm.methods.parts import starts


class SeqLora(Method):
    """ΔW = (alpha/rank)·B A, A ~ U(-1/√in, 1/√in), B = 0 at the start of the stream (Hu et al., 2106.09685).

    As published on TRACE: targets q_proj and v_proj, rank 8, alpha 32, dropout 0.1, `carry_optimizer` true.
    Cost: none but the adapter's. The archive holds the whole adapter after each task (mode "replace"); with
    `fresh` it holds each task's own update, and then the only difference to codyra is the rank selection.
    `start` initialises A where the model's inputs have little energy (`starts.start`)."""

    name, summary, Config = "seqlora", "one LoRA adapter trained on all tasks in turn", SeqLoraConfig

    def __init__(self, config: MethodConfig, seed: int):
        super().__init__(config, seed)
        if isinstance(config, StartConfig) and config.start != "random":  # which reads whole weights
            self.max_zero_stage = min(self.max_zero_stage, 2)

    @property
    def mode(self):
        """What an archived update means: "add" with a fresh adapter per task, else "replace"."""
        return "add" if self.config.fresh else "replace"

    @property
    def carries_optimizer(self):
        """Whether Adam's moments go on into the next task."""
        return self.config.carry_optimizer

    @property
    def merge_factor(self):
        """`merge_scale`: the control that shrinks every update."""
        return self.config.merge_scale

    def spec(self) -> AdapterSpec:
        """Plain LoRA of scale alpha / rank."""
        c = self.config
        return AdapterSpec(c.rank, (c.alpha or c.rank) / c.rank, c.dropout)

    def begin_task(self, model, task: Task) -> None:
        """Go on with the last task's adapter, or begin a fresh one."""
        if task.index and not self.config.fresh:
            restore(model, task.archive.load(task.index - 1))
        else:
            super().begin_task(model, task)
            if isinstance(self.config, StartConfig):
                starts.start(self.config, model, task, self.seed)
