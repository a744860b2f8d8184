"""Gradients that a method asks for beside those of the step, at the parameters as they are."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from .data import Batch, Encoded
from .distributed import Engine

Loss = Callable[[nn.Module, Batch], Tensor]


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return batch.cross_entropy(model)


class Gradients:
    """One process or data parallel; under ZeRO gradients are in shards. Lists are in the order of `parameters`."""

    def __init__(self, engine: Engine, micro: Callable[[list[Encoded], list[int]], Iterator[Batch]],
                 alone: Callable[[Encoded], Batch]):
        self.engine, self.micro, self.alone, self.model = engine, micro, alone, engine.model

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that trains."""
        return [p for group in self.engine.groups for p in group["params"]]

    @property
    def step(self) -> list[Tensor]:
        """The gradients of the step, summed over ranks; what is written into them is what the optimizer sees."""
        return [p.grad for p in self.parameters]

    def mean(self, examples: list[Encoded], loss: Loss = cross_entropy) -> list[Tensor]:
        """Gradient of the loss averaged over `examples` as in training, each rank computing its share."""
        return self._apart(self.micro(examples, list(range(len(examples)))), loss, summed=True)

    def each(self, examples: list[Encoded], loss: Loss = cross_entropy) -> Iterator[list[Tensor]]:
        """The gradient of every single example, its labelled tokens weighted 1/their number; on all ranks the same."""
        for example in examples:
            yield self._apart([self.alone(example)], loss, summed=False)

    def _apart(self, batches: list[Batch] | Iterator[Batch], loss: Loss, summed: bool) -> list[Tensor]:
        parameters = self.parameters
        held = [p.grad for p in parameters]
        self.engine.inner.zero_grad(set_to_none=True)
        for batch in batches:
            loss(self.model, batch).backward()
        if summed:
            self.engine.reduce(torch.zeros(1, device=parameters[0].device))
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        for p, grad in zip(parameters, held):
            p.grad = grad
        return found


def flat(tensors: list[Tensor]) -> Tensor:
    """One vector [n]."""
    return torch.cat([t.flatten() for t in tensors])


def unflatten(vector: Tensor, like: list[Tensor]) -> list[Tensor]:
    """The vector cut into the shapes of `like`."""
    return [part.view_as(t) for part, t in zip(vector.split([t.numel() for t in like]), like)]
