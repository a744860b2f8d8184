"""KeepLoRA: each task's A spans the leading directions of its gradient outside of W's principal directions
and of old inputs; only B trains.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from codyra_llm.config.methods.projection import KeepLoraConfig
from codyra_llm.lora.layer import LoraLinear, sites
from codyra_llm.methods.base import Task
from codyra_llm.methods.parts.inputs import (
    distinct_inputs,
    free_rows,
    input_covariances,
    loaded,
    portions,
)
from codyra_llm.methods.parts.subspace import Subspace, most_bytes, symmetric_root
from codyra_llm.methods.parts.weight_gradients import mean_gradients
from codyra_llm.methods.projection.fixed_rows import FixedRows

KEYS = "method.energy_weights or method.energy_old"


class KeepLora(FixedRows):
    """ΔW_t = s·B_t A_t, A_t = U_rᵀ frozen, B_t from zero; U_r: the leading left singular vectors of (I - M
    Mᵀ) Gᵀ, G [out, in] the mean gradient with respect to W over the task where it begins. M holds W₀'s
    leading input directions (`energy_weights` of ‖W₀‖_F²), and after each task the fewest further directions
    with which it holds `energy_old` of the energy of the task's inputs.

    Source: KeepLoRA (2601.19659) and its released code. Its CLIP code uses W's output side for M, which is
    possible there since the matrices are square; its LLaVA code, followed here, uses the input side, with 0.6
    of W's energy (and one direction fewer than reaches it), rank 64, scale 2, learning rate 2e-5 or 2e-4.
    After a task the paper and the CLIP code add directions of the task's inputs (`old` inputs); the LLaVA
    code those of its gradient where it ends, 0.99 of it (`old` gradients). B starts from zero as in the LLaVA
    code; the CLIP code starts it from the gradient and subtracts the product from W. Ours: exact eigenvectors
    for randomised ones; the first token of an example is left out of the inputs; rows of A for which no free
    direction is left are zero. Cost per step: none. Per task: for every portion of the inputs
    (`inputs_at_once`) a backward pass over `max_examples` before, and a forward (or backward) one after; an
    eigenproblem in float64 of size `in`, on the GPU if there is one, per site before and after. All ranks do
    the same. Memory: G in float32 for the sites of a portion. State: at most in²/2 float32 per site. Training
    takes 1.4 times as long as seqlora's on the quickstart (`old` gradients: 1.8 times)."""

    name, Config = "keeplora", KeepLoraConfig
    summary = "fresh LoRA per task, A from its gradient outside of W's and old inputs' directions"
    config: KeepLoraConfig

    @torch.no_grad()
    def begin_task(self, model, task: Task) -> None:
        """Choose A in the task's gradient, off W's and the old inputs' directions."""
        super().begin_task(model, task)
        self._kept, rank = loaded(task.state), self.config.rank
        for site, layer, gradient in self._gradients(model, task):
            if site not in self._kept:
                weight = layer.frozen(layer.lora_B.dtype).double().cpu()
                empty = Subspace.nothing(layer.in_features)
                self._kept[site] = empty.grown(weight.T, self.config.energy_weights)
            rows = free_rows(self._kept[site], site, gradient.T, rank, task, KEYS)
            layer.lora_A.copy_(rows)

    def state_bytes(self, model, tasks: int) -> int:
        """A subspace for every site, at its largest."""
        return sum(most_bytes(layer.in_features) for layer in sites(model).values())

    def end_task(self, model, task: Task, gradients) -> dict[str, Tensor]:
        """The kept directions, grown by this task's."""
        state = {}
        for site, features in self._features(model, task):
            state |= self._kept[site].grown(features, self.config.energy_old).state(site)
        return state

    def _gradients(self, model, task: Task) -> Iterator[tuple[str, LoraLinear, Tensor]]:
        """Site, layer and G, a portion of the inputs at a time."""
        layers, found = sites(model), distinct_inputs(model)
        examples = task.sample(self.config.max_examples, self.seed)
        sizes = []
        for group in found:
            sizes.append(sum(layers[name].in_features * layers[name].out_features for name in group))
        for groups in portions(found, sizes, self.config.inputs_at_once):
            portion = {name: layers[name] for group in groups for name in group}
            for name, gradient in mean_gradients(model, portion, task, examples).items():
                yield name, layers[name], gradient

    def _features(self, model, task: Task) -> Iterator[tuple[str, Tensor]]:
        """For every site a matrix whose left singular vectors and values are those of what is to be kept."""
        if self.config.old == "gradients":
            for site, _, gradient in self._gradients(model, task):
                yield site, gradient.T
            return
        names = {layer: name for name, layer in sites(model).items()}
        for _, covariance, layers in input_covariances(self.config, model, task, self.seed):
            root = symmetric_root(covariance)
            for layer in layers:
                yield names[layer], root
