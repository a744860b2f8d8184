"""What InfLoRA and KeepLoRA have in common: A is chosen before a task and stays; only B trains."""

from codyra_llm.lora.layer import train_only_b
from codyra_llm.methods.sequential.seqlora import SeqLora


class FixedRows(SeqLora):
    """A fresh adapter per task whose rows of A `begin_task` chooses, by passes over data, in what earlier
    tasks leave free (`parts.inputs.free_rows`)."""

    max_zero_stage = 2  # passes over data need whole parameters
    grows = True

    def attach(self, model) -> None:
        """Adapters whose B alone trains."""
        super().attach(model)
        train_only_b(model)
