"""The inputs of a task's sites: their covariances, and the subspaces that grow by them from task to task."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from codyra_llm.config.methods.base import InputsConfig
from codyra_llm.core.errors import Fault
from codyra_llm.core.products import gram
from codyra_llm.lora.layer import LoraLinear, sites
from codyra_llm.lora.shared import layer_by_layer
from codyra_llm.methods.base import Task
from codyra_llm.methods.parts.subspace import Subspace, most_bytes
from codyra_llm.models import families

if TYPE_CHECKING:
    from codyra_llm.data.batches import Batch


AT_ONCE = 2 * 10**9  # bytes of sums over examples that are in memory together

# Name of the first site that reads an input, its C [in, in] in float64 on the CPU, and all that read it.
Covariance = tuple[str, Tensor, list[LoraLinear]]


def loaded(state: dict[str, Tensor]) -> dict[str, Subspace]:
    """From the state that `grown` gave, the subspaces by the input's name."""
    return {
        key.rpartition(".")[0]: Subspace(basis.double(), key.endswith(".free"))
        for key, basis in state.items()
    }


def grown(config: InputsConfig, task: Task, found: Iterator[Covariance]) -> dict[str, Tensor]:
    """The state that `loaded` reads: the subspaces of the tasks before with what this task's inputs add."""
    old, state, energy = loaded(task.state), {}, energy_at(config, task)
    for name, covariance, _ in found:
        space = old.get(name, Subspace.nothing(len(covariance))).grown(covariance, energy)
        state |= space.state(name)
    return state


def energy_at(config: InputsConfig, task: Task) -> float:
    """ε of this task, interpolated linearly between the first task and one after the last."""
    rise = config.energy_last - config.energy_first
    return config.energy_first + rise * task.index / len(task.stream.tasks)


def free_rows(
    space: Subspace,
    name: str,
    covariance: Tensor,
    rank: int,
    task: Task,
    keys: str = "method.energy_first or method.energy_last",
) -> Tensor:
    """The leading left singular vectors of P C as rows [rank, in], C being `covariance` and P the projector
    on what `space` leaves free. Raises Fault where nothing is free; it names the `keys` to lower.
    """
    rows = space.leading(covariance, rank).T
    if not rows.any():
        raise Fault(
            f"{name}: earlier tasks' inputs leave no direction free for task {task.index + 1}; lower {keys}"
        )
    return rows


def distinct_inputs(model: nn.Module) -> list[list[str]]:
    """Names of the adapted sites, grouped by the input that they share."""
    groups: dict[tuple, list[str]] = {}
    siblings = families.of(model.config).siblings
    for name in sites(model):
        block, _, leaf = name.rpartition(".")
        together = next((names for names in siblings if leaf in names), leaf)
        groups.setdefault((block, together), []).append(name)
    return list(groups.values())


def input_sizes(model: nn.Module) -> list[int]:
    """The size of every distinct input of the adapted sites."""
    found = sites(model)
    return [found[names[0]].in_features for names in distinct_inputs(model)]


def memory_bytes(model: nn.Module) -> int:
    """The most bytes that the state which `grown` gives can have."""
    return sum(map(most_bytes, input_sizes(model)))


def input_covariances(
    config: InputsConfig,
    model: nn.Module,
    task: Task,
    seed: int,
    before: Callable[["Batch"], None] | None = None,
) -> Iterator[Covariance]:
    """C of every distinct input of the adapted sites, a portion at a time; `before` is called with every
    batch.
    """
    layers, examples = sites(model), task.sample(config.max_examples, seed)
    found = distinct_inputs(model)
    sizes = [layers[names[0]].in_features ** 2 for names in found]
    for portion in portions(found, sizes, config.inputs_at_once):
        sums = covariances(model, [layers[names[0]] for names in portion], task, examples, before)
        for names, covariance in zip(portion, sums, strict=True):
            yield names[0], covariance, [layers[name] for name in names]


def portions(inputs: list[list[str]], sizes: list[int], at_once: int | None) -> Iterator[list[list[str]]]:
    """The inputs in groups of `at_once`; if that is None, in groups whose sums fit into AT_ONCE bytes, where
    the sum of an input takes its entry of `sizes` in float64 numbers. Each group has at least one input."""
    portion, count = [], 0
    for names, size in zip(inputs, sizes, strict=True):
        full = count + size > AT_ONCE // 8 if at_once is None else len(portion) == at_once
        if portion and full:
            yield portion
            portion, count = [], 0
        portion.append(names)
        count += size
    if portion:
        yield portion


@torch.no_grad()
def covariances(
    model: nn.Module,
    layers: list[nn.Module],
    task: Task,
    examples: list,
    before: Callable[["Batch"], None] | None = None,
) -> list[Tensor]:
    """C = (1/n) Σ x xᵀ [in, in] of the input of each of `layers`, over the n tokens of prompts and answers
    except the first of every example. Products are summed in float32, batches in float64; the
    results are on the CPU."""
    sums = [
        torch.zeros(layer.in_features, layer.in_features, dtype=torch.float64, device=layer.weight.device)
        for layer in layers
    ]

    def add(i: int, x: Tensor) -> None:
        sums[i].add_(gram(x))

    count = read_inputs(model, layers, task, examples, add, before)
    return [total.div_(count).cpu() for total in sums]


@torch.no_grad()
def read_inputs(
    model: nn.Module,
    layers: list[nn.Module],
    task: Task,
    examples: list,
    take: Callable[[int, Tensor], None],
    before: Callable[["Batch"], None] | None = None,
) -> int:
    """Call `take(i, x)` with the input x [n, in] of layer i, as the layer reads it, for every batch of
    examples, without the first token of each; returns the number of tokens."""
    seen: dict[int, Tensor] = {}
    hooks = [_recording_hook(layer, i, seen) for i, layer in enumerate(layers)]
    count, training = 0, model.training
    model.eval()
    with layer_by_layer(model):
        for batch in task.batches(examples):
            if before:
                before(batch)
            batch.hidden(model)
            read = batch.content([len(examples[i]) for i in batch.examples])
            count += len(read)
            for i in range(len(layers)):
                take(i, seen.pop(i).flatten(0, -2).index_select(0, read))
    for hook in hooks:
        hook.remove()
    model.train(training)
    return count


def _recording_hook(layer: nn.Module, number: int, seen: dict[int, Tensor]) -> RemovableHandle:
    """A hook that keeps what the layer reads in each forward, under its `number`."""

    def record(_, arguments: tuple[Tensor, ...]) -> None:
        seen[number] = arguments[0]

    return layer.register_forward_pre_hook(record)
