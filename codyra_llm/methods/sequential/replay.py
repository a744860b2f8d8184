"""Replay: sequential LoRA that also visits stored examples of the tasks before."""

from codyra_llm.config.methods.sequential import ReplayConfig
from codyra_llm.methods.parts.general import general_hash, general_set
from codyra_llm.methods.sequential.seqlora import SeqLora


class Replay(SeqLora):
    """Every epoch of a task also visits the memory: the first 10 % of each earlier task's examples, and all
    of a general set, Lima. With `when` after, as in TRACE, the memory has one epoch after the task's own.

    Source: TRACE (2310.06762) and its code, whose learning rate is constant. Ours: one adapter trains, as in
    seqlora; the memory is mixed in; a separate memory epoch has its own schedule (at the end of the task's
    cosine its rate would be almost 0); `general` may be another set, or none. Cost: the memory's examples,
    which are up to 0.7 of an epoch and the general set, per epoch (with `when` after: per task)."""

    name, summary, Config = (
        "replay",
        "seqlora that also visits stored examples of earlier tasks",
        ReplayConfig,
    )
    config: ReplayConfig
    old_data = grows = True

    def train_data(self, stream, index: int):
        """The task's records and the memory's, mixed or in an epoch of their own at the end."""
        records, epochs = super().train_data(stream, index)
        memory = self._memory(stream, index)
        everything = range(len(records) + len(memory))
        if not memory:
            return records, epochs
        if self.config.when == "mixed":
            return records + memory, [everything] * len(epochs)
        return records + memory, epochs + [everything[len(records) :]]

    def epochs_apart(self, stream, index: int) -> int:
        """1 where the memory has an epoch of its own."""
        apart = self.config.when == "after" and self._memory(stream, index)
        return 1 if apart else 0

    def own_data(self, stream) -> dict[str, str]:
        """The general set's hash."""
        return general_hash(stream, self.config.general)

    def _memory(self, stream, index: int) -> list[dict]:
        memory = []
        for past in range(index):
            memory += head(stream.records(past, "train"), self.config.ratio)
        return memory + general_set(stream, self.config.general)


def head(records: list[dict], ratio: float) -> list[dict]:
    """The first part of a training set, its share `ratio`."""
    return records[: round(ratio * len(records))]
