"""Gradients that a method asks for in addition to those of the step, at the current parameters."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from codyra_llm.core.tensors import flat, unflatten
from codyra_llm.data.batches import Batch
from codyra_llm.data.encoding import Encoded
from codyra_llm.lora.layer import without_dropout
from codyra_llm.runtime import heartbeat, signals
from codyra_llm.store import observer
from codyra_llm.train.engine import Engine

Loss = Callable[[nn.Module, Batch], Tensor]


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return batch.cross_entropy(model)


class Gradients:
    """The gradients of one task's training. Every list has the order of `parameters`, which is the model's.
    All gradients but the step's are computed without dropout and have no side effects; they need whole
    parameters, which ranks have up to ZeRO stage 2."""

    def __init__(
        self,
        engine: Engine,
        micro: Callable[[list[Encoded], list[int]], Iterator[Batch]],
        alone: Callable[[Encoded], Batch],
    ):
        self.engine, self.micro, self.alone = engine, micro, alone

    @property
    def model(self) -> nn.Module:
        return self.engine.model

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that trains."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def step(self) -> list[Tensor]:
        """The gradients of the step, summed over ranks. Write into them to change what the optimizer gets.
        Not under ZeRO, which keeps them in shards."""
        return [p.grad for p in self.parameters]

    def mean(self, examples: list[Encoded], loss: Loss = cross_entropy) -> list[Tensor]:
        """Gradient of the loss averaged over `examples` as in training, each rank computing its share."""
        return self.total(self._sum(self.micro(examples, list(range(len(examples)))), loss))

    def each(self, examples: list[Encoded], loss: Loss = cross_entropy) -> Iterator[list[Tensor]]:
        """The gradients of the examples one by one, each of the mean loss over an example's labelled tokens.
        No rank waits for another; if all go through the same examples, they get the same gradients."""
        for example in examples:
            signals.check()
            yield self._sum([self.alone(example)], loss)

    def own(self, examples: list[Encoded]) -> list[Encoded]:
        """This rank's share of `examples`."""
        return examples[self.engine.acc.process_index :: self.engine.acc.num_processes]

    def total(self, tensors: list[Tensor]) -> list[Tensor]:
        """The tensors summed over ranks."""
        if self.engine.acc.num_processes == 1:
            return tensors
        with heartbeat.waiting():
            return unflatten(self.engine.acc.reduce(flat(tensors), "sum"), tensors)

    def _sum(self, batches: Iterable[Batch], loss: Loss) -> list[Tensor]:
        """The gradients of the summed loss of `batches`, by autograd.grad: backward would change the step's
        gradients and call DeepSpeed's hooks."""
        parameters = self.parameters
        found = [torch.zeros_like(p) for p in parameters]
        with without_dropout(self.model):
            for batch in batches:
                observer.at("gradients for the method")
                grads = torch.autograd.grad(loss(self.model, batch), parameters, allow_unused=True)
                for into, grad in zip(found, grads, strict=True):
                    if grad is not None:
                        into += grad
        return found
