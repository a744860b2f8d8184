"""What one task trains on, and how it is divided into global batches and steps."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from codyra_llm.data.batches import shuffled
from codyra_llm.data.encoding import Encoded


@dataclass
class TaskData:
    """What one task trains on: examples, which of them each epoch visits, and the eval split, if it is
    used.
    """

    name: str
    index: int
    examples: list[Encoded]
    epochs: list[range]
    validation: list[Encoded]
    apart: int = 0  # the last epochs that have a learning-rate schedule of their own

    def batches(self, seed: int, size: int) -> Iterator[list[int]]:
        """Global batches; a function of (seed, task, epoch) alone."""
        for epoch, visited in enumerate(self.epochs):
            order = shuffled(visited, seed, self.index, epoch)
            yield from _divided(order, size)

    def steps(self, size: int) -> int:
        """Optimizer steps over all epochs, with `size` examples each."""
        return _steps(self.epochs, size)

    def phase(self, step: int, size: int) -> tuple[int, int]:
        """The position of step `step` in its learning-rate schedule, and how many steps that schedule has."""
        first = _steps(self.epochs[: len(self.epochs) - self.apart], size)
        return (step, first) if step < first else (step - first, self.steps(size) - first)


def _divided(order: list[int], size: int) -> Iterator[list[int]]:
    """An epoch's batches of `size`, the last with the rest. Where the rest would be less than half a batch,
    the epoch is divided evenly instead: Adam moves the weights as far for a few examples as for a full
    batch."""
    count, start = math.ceil(len(order) / size), 0
    uneven = 0 < 2 * (len(order) % size) < size and count > 1
    for i in range(count):
        stop = (i + 1) * len(order) // count if uneven else start + size
        yield order[start:stop]
        start = stop


def _steps(epochs: list[range], size: int) -> int:
    return sum(math.ceil(len(visited) / size) for visited in epochs)
