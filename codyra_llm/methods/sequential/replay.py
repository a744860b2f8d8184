"""Replay: sequential LoRA that also visits stored examples of the tasks before."""

from codyra_llm.config.methods.sequential import ReplayConfig
from codyra_llm.methods.sequential.seqlora import SeqLora


class Replay(SeqLora):
    """TRACE's replay: after the epochs of task t one epoch over the first 10 % of each earlier task and all
    of Lima.

    Source: TRACE (2310.06762) and its code. Ours: one adapter trains, as in seqlora; `lima` false where its
    set is not at hand.
    Cost: the memory's examples, up to 0.7 of an epoch and Lima, per task (or per epoch with `when` mixed).
    """

    name, summary, Config = (
        "replay",
        "seqlora that also visits stored examples of earlier tasks",
        ReplayConfig,
    )
    old_data = grows = True

    def train_data(self, stream, index: int):
        records, epochs = super().train_data(stream, index)
        memory = [r for past in range(index) for r in head(stream.records(past, "train"), self.config.ratio)]
        if self.config.lima:
            memory += stream.extra("Lima")
        everything = range(len(records) + len(memory))
        if not memory:
            return records, epochs
        if self.config.when == "mixed":
            return records + memory, [everything] * len(epochs)
        return records + memory, epochs + [everything[len(records) :]]


def head(records: list[dict], ratio: float) -> list[dict]:
    """The first part of a training set, its share `ratio`."""
    return records[: round(ratio * len(records))]
