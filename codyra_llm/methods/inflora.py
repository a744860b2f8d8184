"""InfLoRA: each task's A is chosen before training in the inputs that earlier tasks leave free; only B trains."""

import math
from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..errors import Fault
from ..lora.layer import sites
from ..lora.shared import layer_by_layer, shared_inputs
from .base import Fraction, Task
from .seqlora import SeqLora, SeqLoraConfig
from .subspace import Subspace


class InfLoraConfig(SeqLoraConfig):
    name: Literal["inflora"] = "inflora"
    fresh: Literal[True] = Field(True, description="must stay true: every task has an A of its own")
    energy_first: Fraction = Field(0.95, description="ε at the first task: share of Σσ² of the inputs' covariance that "
                                   "the basis of old inputs must hold (`lamb` in the released code)")
    energy_last: Fraction = Field(1.0, description="ε of a task after the last one; linear in between (`lame`)")
    max_examples: int = Field(512, ge=1, description="training examples of a task, from the first, that are read")
    layers_at_once: int = Field(4, ge=1, description="decoder layers whose covariances are in memory together; each "
                                "such portion is a pass over the examples")


class InfLora(SeqLora):
    """ΔW_t = s·B_t A_t, A_t = U_rᵀ/√3 frozen; U_r: leading left singular vectors of P C, C = mean of x xᵀ over the
    task's inputs, P the projector on what old inputs leave free (`Subspace`, which grows by DualGPM after each task).

    Source: Liang and Li (2404.00228) and its released code; no setting for TRACE is published. As there, the energy is
    that of singular values of the covariance, squared again, so few directions make up the share: on SmolLM2 135M (24
    examples of FOMC, then of NumGLUE-cm) 1 or 2 of 576 at 0.95, and A reads 6 to 14 % of the old inputs' energy, where a
    random A reads 1 %. At 0.9999 it is 33 to 146, and A reads 0.2 %: raise `energy_first` to protect more.
    Ours: the first token of every example does not count (BOS, or what attends as BOS does, has outliers that would be
    all of C); sites that read one tensor (q, k, v; gate, up) share one covariance; the first task too takes the fewest
    vectors that reach ε (the release takes one fewer, and the wrong ones where it keeps the complement); rows of A that
    no free direction is left for are zero.
    Cost per step: none. Per task: 2·layers/`layers_at_once` passes over `max_examples`, one eigenproblem in float64 of
    size `in` on the CPU for each distinct input before and one after, and all ranks do the same. Memory: in² float64
    for each distinct input of a portion. State: at most in²/2 float32 for each, so think of leaving down_proj out of
    `targets` on large models.
    """

    name, Config = "inflora", InfLoraConfig
    summary = "fresh LoRA per task with A in the inputs that old tasks leave free"
    config: InfLoraConfig
    max_zero_stage = 2  # passes over data need whole parameters
    grows = True

    def attach(self, model) -> None:
        super().attach(model)
        for layer in sites(model).values():
            layer.lora_A.requires_grad_(False)

    def begin_task(self, model, task: Task) -> None:
        super().begin_task(model, task)  # B = 0: the inputs are those of the model as it stands
        old = loaded(task.state)
        for name, (covariance, layers) in self._covariances(model, task):
            free = old.get(name, Subspace.nothing(len(covariance)))
            rows = free.leading(covariance, self.config.rank).T / math.sqrt(3)
            if not rows.any():
                raise Fault(f"{name}: earlier tasks' inputs leave no direction free for task {task.index + 1}; lower "
                            f"method.energy_first or method.energy_last")
            for layer in layers:
                with torch.no_grad():
                    layer.lora_A.copy_(rows)

    def end_task(self, model, task: Task, gradients) -> dict[str, Tensor]:
        c, old, state = self.config, loaded(task.state), {}
        energy = c.energy_first + (c.energy_last - c.energy_first) * task.index / len(task.stream.tasks)
        for name, (covariance, _) in self._covariances(model, task):
            grown = old.get(name, Subspace.nothing(len(covariance))).grown(covariance, energy)
            state[f"{name}.{'free' if grown.complement else 'old'}"] = grown.basis.float()
        return state

    def _covariances(self, model: nn.Module, task: Task) -> Iterator[tuple[str, tuple[Tensor, list[nn.Module]]]]:
        """(name of the first site, (C [in, in] float64 on the CPU, all layers)) of every distinct input."""
        names = {id(layer): name for name, layer in sites(model).items()}
        inputs = [(names[id(shared.layers[0])], shared.layers) for shared in shared_inputs(model)]
        examples = task.encode(task.records()[: self.config.max_examples])
        blocks = list(dict.fromkeys(map(_block, names.values())))
        for first in range(0, len(blocks), self.config.layers_at_once):
            chosen = blocks[first: first + self.config.layers_at_once]
            portion = [(name, layers) for name, layers in inputs if _block(name) in chosen]
            sums = covariances(model, [layers[0] for _, layers in portion], task, examples)
            yield from ((name, (c.cpu(), layers)) for (name, layers), c in zip(portion, sums))


def _block(site: str) -> str:
    """'model.layers.0' of 'model.layers.0.mlp.down_proj'."""
    return site.rsplit(".", 2)[0]


def loaded(state: dict[str, Tensor]) -> dict[str, Subspace]:
    """The subspaces by the input's name."""
    return {key.rpartition(".")[0]: Subspace(basis.double(), key.endswith(".free")) for key, basis in state.items()}


@torch.no_grad()
def covariances(model: nn.Module, layers: list[nn.Module], task: Task, examples: list) -> list[Tensor]:
    """(1/n) Σ x xᵀ of the input of each of `layers`, over the n tokens of prompt and answer but the first of every
    example; products in float32, sums in float64."""
    sums = [torch.zeros(2 * (layer.in_features,), dtype=torch.float64, device=layer.weight.device) for layer in layers]
    inputs: dict[int, Tensor] = {}
    hooks = [layer.register_forward_pre_hook(lambda _, args, i=i: inputs.__setitem__(i, args[0]))
             for i, layer in enumerate(layers)]
    count, training = 0, model.training
    model.eval()
    with layer_by_layer(model):
        for batch in task.batches(examples):
            batch.hidden(model)
            read = batch.content([len(examples[i]) for i in batch.examples])
            count += len(read)
            for i, total in enumerate(sums):
                x = inputs.pop(i).flatten(0, -2).index_select(0, read).float()
                total += x.T @ x
    for hook in hooks:
        hook.remove()
    model.train(training)
    return [total / count for total in sums]
