"""InfLoRA: each task's A is chosen before training, in the directions that earlier tasks' inputs leave free;
only B trains."""

import math

import torch
from torch import Tensor

from codyra_llm.config.methods.projection import InfLoraConfig
from codyra_llm.methods.base import Task
from codyra_llm.methods.parts.inputs import free_rows, grown, input_covariances, loaded, memory_bytes
from codyra_llm.methods.parts.subspace import Subspace
from codyra_llm.methods.projection.fixed_rows import FixedRows


class InfLora(FixedRows):
    """ΔW_t = s·B_t A_t, A_t = U_rᵀ/√3 frozen; U_r: leading left singular vectors of P C, C = mean of x xᵀ
    over the task's inputs, P the projector on the directions that old inputs leave free (`Subspace`, which
    grows by DualGPM after each task).

    Source: Liang and Li (2404.00228) and its released code; no setting for TRACE is published; its authors
    use ε = 0.995 for language models (GainLoRA's code, T5 on SuperNI and the long stream). As there, the
    energy is that of the covariance's squared singular values, so few directions make up the share: on
    SmolLM2 135M (24 examples of FOMC, then of NumGLUE-cm) it is 1 or 2 of 576 at 0.95, and A captures 6 to 14
    % of the old inputs' energy, where a random A captures 1 %. At 0.9999 it is 33 to 146, and A captures 0.2
    %: raise `energy_first` to protect more. Ours: the first token of every example does not count (BOS, or a
    token that takes its role in attention, has outliers that would dominate C); sites with the same input (q,
    k, v; gate, up) share one covariance; the first task too takes the fewest vectors that reach ε (the
    release takes one fewer, and the wrong ones where it keeps the complement); rows of A for which no free
    direction is left are zero. Cost per step: none. Per task: for every portion of the inputs
    (`inputs_at_once`) a pass over `max_examples` before and one after; one eigenproblem in float64 of size
    `in`, on the GPU if there is one, for each distinct input before and one after; all ranks do the same.
    Memory: in² float64 for each distinct input of a portion. State: at most in²/2 float32 for each, so think
    of leaving down_proj out of `targets` on large models."""

    name, Config = "inflora", InfLoraConfig
    summary = "fresh LoRA per task with A in the inputs that old tasks leave free"
    config: InfLoraConfig

    @torch.no_grad()
    def begin_task(self, model, task: Task) -> None:
        """Choose A in the directions of the task's inputs that earlier tasks leave free."""
        super().begin_task(model, task)  # B = 0, so the inputs are those of the current model
        old = loaded(task.state)
        for name, covariance, layers in input_covariances(self.config, model, task, self.seed):
            space = old.get(name, Subspace.nothing(len(covariance)))
            rows = free_rows(space, name, covariance, self.config.rank, task) / math.sqrt(3)
            for layer in layers:
                layer.lora_A.copy_(rows)

    def state_bytes(self, model, tasks: int) -> int:
        """The subspace of every input, at its largest."""
        return memory_bytes(model)

    def end_task(self, model, task: Task, gradients) -> dict[str, Tensor]:
        """The old inputs' subspaces, grown by this task's."""
        return grown(self.config, task, input_covariances(self.config, model, task, self.seed))
