"""Gradients of the loss with respect to the frozen weights under the adapters. Autograd does not compute
them; here they are made from each layer's inputs and the gradients of its outputs."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from codyra_llm.data.encoding import Encoded
from codyra_llm.lora.layer import LoraLinear, sites
from codyra_llm.lora.shared import layer_by_layer
from codyra_llm.methods.base import Task
from codyra_llm.methods.parts.old_inputs import own_share
from codyra_llm.runtime import heartbeat

if TYPE_CHECKING:
    from codyra_llm.data.batches import Batch


def mean_gradients(
    model: nn.Module, layers: dict[str, LoraLinear], task: Task, examples: list[Encoded]
) -> dict[str, Tensor]:
    """G [out, in] by site: the mean over examples of ∂/∂W of their mean cross entropy, float64 on the CPU.
    One pass; all ranks take all examples, so that they get the same."""
    sums = {name: _zeros(layer) for name, layer in layers.items()}

    def take(name: str, x: Tensor, g: Tensor) -> None:
        sums[name].addmm_(g.T, x, alpha=1 / len(examples))

    read_gradients(model, layers, task, examples, take)
    return {name: total.double().cpu() for name, total in sums.items()}


def weight_fisher(model: nn.Module, task: Task, examples: list[Encoded]) -> dict[str, Tensor]:
    """F [out, in] by site: the mean over examples of (∂/∂W of an example's mean cross entropy)², the
    empirical diagonal Fisher of W, float32 on the device. Every rank takes its share of the examples."""
    layers = sites(model)
    sums = {name: _zeros(layer) for name, layer in layers.items()}

    def take(name: str, x: Tensor, g: Tensor) -> None:
        gradient = g.T @ x
        sums[name].addcmul_(gradient, gradient, value=1 / len(examples))

    read_gradients(model, layers, task, own_share(examples), take)
    with heartbeat.waiting():
        return {name: reduce(total, "sum") for name, total in sums.items()}


def weight_numbers(model: nn.Module) -> int:
    """How many weights the sites have, one by one."""
    return sum(layer.in_features * layer.out_features for layer in sites(model).values())


def _zeros(layer: LoraLinear) -> Tensor:
    """Zeros of W's shape [out, in], in float32; a packed W has another shape itself."""
    return layer.lora_B.new_zeros(layer.out_features, layer.in_features, dtype=torch.float32)


def read_gradients(
    model: nn.Module,
    layers: dict[str, LoraLinear],
    task: Task,
    examples: list[Encoded],
    take: Callable[[str, Tensor, Tensor], None],
) -> None:
    """Call `take(site, x, g)` for every example: x [n, in] are the site's inputs at the example's n tokens, g
    [n, out] is the gradient of the example's mean cross entropy with respect to the site's outputs, both
    float32; so ∂/∂W is gᵀ x. Dropout is off. Some factors must require gradients, since autograd reaches the
    sites through them."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    hooks = [_recording_hook(layer, name, inputs, outputs) for name, layer in layers.items()]
    training = model.training
    model.eval()
    with layer_by_layer(model), torch.enable_grad():
        for batch in task.batches(examples):
            lengths = [len(examples[i]) for i in batch.examples]
            loss = _each_mean(batch, examples).cross_entropy(model)
            found = torch.autograd.grad(loss, [outputs[name] for name in layers])
            for name, gradient in zip(layers, found, strict=True):
                x, g = inputs[name].detach().flatten(0, -2), gradient.flatten(0, -2)
                for rows in _rows(batch, lengths):
                    take(name, x[rows].float(), g[rows].float())
            inputs.clear()
            outputs.clear()
            del loss, found
    for hook in hooks:
        hook.remove()
    model.train(training)


def _recording_hook(
    layer: LoraLinear, name: str, inputs: dict[str, Tensor], outputs: dict[str, Tensor]
) -> RemovableHandle:
    """A hook that keeps what the layer reads and returns in each forward."""

    def record(_, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        inputs[name], outputs[name] = arguments[0], output

    return layer.register_forward_hook(record)


def _each_mean(batch: "Batch", examples: list[Encoded]) -> "Batch":
    """The batch with a loss that is the sum over its examples of each one's mean over its labelled tokens."""
    counts = [len(examples[i].labelled) for i in batch.examples]
    shares = [torch.full((count,), 1 / max(count, 1)) for count in counts]
    return replace(batch, weights=torch.cat(shares).to(batch.weights))


def _rows(batch: "Batch", lengths: list[int]) -> Iterator[slice]:
    """The positions of each example's tokens in the flattened rows."""
    width = batch.ids.shape[1]
    packed = accumulate([0, *lengths[:-1]])
    starts = range(0, batch.ids.numel(), width) if batch.segments is None else packed
    for start, length in zip(starts, lengths, strict=True):
        yield slice(start, start + length)
