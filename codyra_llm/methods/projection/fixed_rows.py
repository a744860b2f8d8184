"""What InfLoRA and KeepLoRA have in common: A is chosen before a task and stays; only B trains."""

from torch import Tensor

from codyra_llm.lora.layer import chosen_rows, put_chosen_rows, train_only_b
from codyra_llm.methods.base import Task
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

    def begin_task(self, model, task: Task) -> None:
        """A fresh adapter, whose A is still to be chosen."""
        super().begin_task(model, task)
        self._model = model

    def progress(self) -> dict[str, Tensor]:
        """A as it was chosen."""
        return chosen_rows(self._model)

    def resume(self, progress: dict[str, Tensor]) -> None:
        """Put it back."""
        put_chosen_rows(self._model, progress)
