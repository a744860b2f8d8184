"""GEM: sequential LoRA whose gradient is changed where it would raise the loss on stored examples of earlier
tasks.
"""

import numpy as np
import torch
from scipy.linalg import solve_triangular
from scipy.optimize import nnls
from torch import Tensor

from codyra_llm.config.methods.projection import GemConfig, MemoryConfig
from codyra_llm.core.tensors import flat, generator, unflatten
from codyra_llm.data.batches import in_one_copy
from codyra_llm.methods.base import Task
from codyra_llm.methods.sequential.seqlora import SeqLora


class EpisodicMemory(SeqLora):
    """What GEM and A-GEM share: `memory` examples of each earlier task, a function of (seed, task): no
    state.
    """

    config: MemoryConfig
    old_data = grows = True
    max_zero_stage = 0

    def begin_task(self, model, task: Task) -> None:
        """Draw the memory of every earlier task."""
        super().begin_task(model, task)
        kept = range(task.index) if self.config.memory else ()
        self._memories = [task.sample(self.config.memory, self.seed, past) for past in kept]
        self._index = task.index

    def before_step(self, groups, step: int, steps: int, schedule: str) -> None:
        """Remember the step, by which batches of the memory are drawn."""
        self._step = step

    def draw(self, examples: list, *key: int) -> list:
        """`batch` of the examples for this step."""
        order = torch.randperm(
            len(examples), generator=generator("memory", self.seed, self._index, self._step, *key)
        )
        return [examples[i] for i in order[: self.config.batch].tolist()]


class Gem(EpisodicMemory):
    """g̃ = argmin ½‖g̃ - g‖² with g̃·g_k ≥ 0 for every earlier task k, g_k the gradient on its memory at the
    current θ.

    Source: Lopez-Paz and Ranzato (1706.08840). Where any g·g_k < 0, the dual: v = argmin_{v ≥ γ} ½ vᵀ(G Gᵀ +
    εI)v + (G g)ᵀ v, g̃ = g + Gᵀ v, over the vector of all parameters, in float64 by non-negative least
    squares. γ = 0.5 and ε = 1e-3 as TRACE, whose code stores a single gradient per task, projects tensor by
    tensor and has both signs of the quadratic program flipped. Ours: ε is relative, since adapters' gradients
    are small compared with 1e-3; a batch is drawn from the memory in each step, where the original uses all
    of it. The bound holds for the gradient, not for Adam's step. Cost per step in task t: t · `batch` more
    examples forward and backward, and t + 1 vectors of all parameters."""

    name, summary, Config = (
        "gem",
        "seqlora whose gradient must not raise the loss on earlier tasks' memory",
        GemConfig,
    )
    config: GemConfig

    def edit_gradients(self, gradients) -> None:
        """Add what keeps the step from raising any earlier task's loss, to first order."""
        if not self._memories:
            return
        earlier = [
            flat(gradients.mean(self.draw(examples, past))) for past, examples in enumerate(self._memories)
        ]
        matrix, grads = torch.stack(earlier), gradients.step  # G [t, n]
        products, gram = matrix @ flat(grads), matrix @ matrix.T  # G g [t], G Gᵀ [t, t]
        read = torch.cat([gram, products[:, None]], 1).double().cpu().numpy()
        v = multipliers(read[:, :-1], read[:, -1], self.config.margin, self.config.epsilon)
        (shares,) = in_one_copy([torch.from_numpy(v).to(matrix.dtype)], matrix.device)
        add(grads, shares @ matrix)


def multipliers(gram: np.ndarray, products: np.ndarray, margin: float, epsilon: float) -> np.ndarray:
    """v [t] of g̃ = g + Gᵀ v, from G Gᵀ [t, t] and G g [t]. Zeros where no product is negative, and where a
    number is not finite: the training loop stops at the loss of such a step.

    With u = v - γ ≥ 0 and P = G Gᵀ + ε·mean(diag) I = L Lᵀ (Cholesky) the dual is min ‖Lᵀu + L⁻¹(G g + γ P
    1)‖.
    """
    scale = gram.diagonal().mean()
    finite = np.isfinite(gram).all() and np.isfinite(products).all()
    if not finite or scale == 0 or products.min() >= 0:
        return np.zeros_like(products)
    ridged = gram / scale + epsilon * np.eye(len(gram))
    lower = np.linalg.cholesky(ridged)
    target = solve_triangular(lower, products / scale + margin * ridged.sum(1), lower=True)
    return nnls(lower.T, -target)[0] + margin


def add(grads: list[Tensor], vector: Tensor) -> None:
    """Add the parts of a vector [n] to the gradients, in place."""
    for grad, part in zip(grads, unflatten(vector, grads), strict=True):
        grad += part
