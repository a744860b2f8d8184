"""MTL: one LoRA adapter trained on all tasks at once, the upper bound of sequential training."""

from codyra_llm.config.methods.baselines import MtlConfig
from codyra_llm.methods.base import Method, Task
from codyra_llm.methods.sequential.seqlora import SeqLora


class Mtl(SeqLora):
    """All tasks' examples shuffled together, each visited as often as its task has epochs; trained once, when
    the last task has come. Multi-task learning is not continual learning; TRACE (2310.06762) uses it as a
    reference.

    Tasks before the last leave an empty update and are not evaluated, so the matrix has only its last row: OP
    is defined, backward transfer and forgetting are not. Epoch e contains the tasks that have more than e
    epochs. If a task is added to a finished run, all tasks are trained again. Validation losses are over all
    tasks' eval splits together. Cost: the sum of all tasks' steps, at once."""

    name, summary, Config = "mtl", "one LoRA adapter trained on all tasks at once (upper bound)", MtlConfig
    old_data, joint, separable = True, True, False
    mode, carries_optimizer, merge_factor = "replace", False, 1.0

    def begin_task(self, model, task: Task) -> None:
        """A fresh adapter."""
        Method.begin_task(self, model, task)

    def train_data(self, stream, index: int):
        """At the last task the records of all; in epoch e those of tasks with more than e epochs."""
        if index + 1 < len(stream.tasks):
            return stream.records(index, "train"), []
        order = sorted(range(len(stream.tasks)), key=lambda i: -stream.epochs[i])
        # The tasks of most epochs come first, so that every epoch takes a first part of the records.
        records, takes_part = [], [0] * stream.epochs[order[0]]
        for i in order:
            records += stream.records(i, "train")
            for epoch in range(stream.epochs[i]):
                takes_part[epoch] = len(records)
        return records, [range(count) for count in takes_part]
