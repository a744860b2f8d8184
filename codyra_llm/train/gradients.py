"""Gradients that a method asks for in addition to those of the step, at the current parameters."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from codyra_llm.core.tensors import flat, unflatten
from codyra_llm.data.batches import Batch
from codyra_llm.data.encoding import Encoded
from codyra_llm.lora.layer import without_dropout
from codyra_llm.runtime import signals
from codyra_llm.store import observer
from codyra_llm.train.engine import Engine

Loss = Callable[[nn.Module, Batch], Tensor]


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return batch.cross_entropy(model)


class Gradients:
    """Lists are in the order of `parameters`, that of the model. All gradients but the step's are taken
    without dropout and leave no trace; they work wherever parameters are whole, so up to ZeRO stage 2."""

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
        """The gradients of the step, summed over ranks; what is written into them is what the optimizer sees.
        Not under ZeRO, which keeps them in shards."""
        return [p.grad for p in self.parameters]

    def mean(self, examples: list[Encoded], loss: Loss = cross_entropy) -> list[Tensor]:
        """Gradient of the loss averaged over `examples` as in training, each rank computing its share."""
        return self.total(self._sum(self.micro(examples, list(range(len(examples)))), loss))

    def each(self, examples: list[Encoded], loss: Loss = cross_entropy) -> Iterator[list[Tensor]]:
        """The gradient of every single example, its labelled tokens weighted 1/their number; no rank waits
        for another, and where all go through the same examples they get the same."""
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
        return unflatten(self.engine.acc.reduce(flat(tensors), "sum"), tensors)

    def _sum(self, batches: Iterable[Batch], loss: Loss) -> list[Tensor]:
        """autograd.grad, not backward: the step's gradients and DeepSpeed's hooks are left alone."""
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
