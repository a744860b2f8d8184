"""OGD: sequential LoRA that moves only orthogonally to the directions in which earlier tasks' logits
change.
"""

import torch
from torch import Tensor, nn

from codyra_llm.config.methods.projection import OgdConfig
from codyra_llm.core.errors import Fault
from codyra_llm.core.tensors import flat, unflatten
from codyra_llm.data.batches import Batch
from codyra_llm.methods.base import Task, trained_bytes
from codyra_llm.methods.sequential.seqlora import SeqLora
from codyra_llm.models import families

NEW = 1e-4  # a direction is added if more than this share of its norm lies outside of the basis


class Ogd(SeqLora):
    """g̃ = g - Uᵀ(U g), and the same for the step that AdamW takes; rows of U: an orthonormal basis of ∂/∂θ Σ
    (logit of the true token) over drawn examples of each finished task (the variant OGD-GTL).

    Source: Farajtabar et al. (1910.07104). TRACE's code names a limit of 150 directions for each task, which
    it never uses; the default here is 20, since each takes as much memory as the adapter. Ours: the
    optimizer's step (momentum, preconditioning, weight decay) is projected as well, since it leaves the
    complement in which the gradient is; logits summed over the answer, without dropout. Cost per step: eight
    products of U with a vector, as each projection is done twice against rounding. Memory: 4 bytes ·
    parameters · (tasks · `examples` + 3); each task's state on disk holds the basis so far."""

    name, summary, Config = (
        "ogd",
        "seqlora whose steps are orthogonal to earlier tasks' logit gradients",
        OgdConfig,
    )
    config: OgdConfig
    grows = True
    max_zero_stage = 0

    def begin_task(self, model, task: Task) -> None:
        """Read the kept directions. Raises Fault where they would not fit."""
        super().begin_task(model, task)
        trained = [p for p in model.parameters() if p.requires_grad]
        size, rows = sum(p.numel() for p in trained), len(task.stream.tasks) * self.config.examples
        needed = 4e-9 * size * rows  # float32, in GB
        if needed > self.config.max_gigabytes:
            raise Fault(
                f"method.examples: {self.config.examples} directions of {size / 1e6:.1f} M parameters for "
                f"each of {len(task.stream.tasks)} tasks take {needed:.1f} GB, more than "
                f"method.max_gigabytes ({self.config.max_gigabytes:g}); lower the first or raise the second"
            )
        self._basis = task.state.get("basis", torch.zeros(0, size)).to(trained[0])

    def edit_gradients(self, gradients) -> None:
        """Project the step's gradient off the kept directions."""
        if len(self._basis):
            self._before = [p.detach().clone() for p in gradients.parameters]
            _write(gradients.step, project(flat(gradients.step), self._basis))

    @torch.no_grad()
    def after_step(self, gradients) -> None:
        """Project the step itself, which Adam has scaled."""
        if len(self._basis):
            before = flat(self._before)
            moved = flat(gradients.parameters) - before
            _write(gradients.parameters, before + project(moved, self._basis))

    def state_bytes(self, model, tasks: int) -> int:
        """The basis: `examples` directions of each task."""
        return tasks * self.config.examples * trained_bytes(model)

    def held_bytes(self, model, tasks: int) -> int:
        """The basis again."""
        return self.state_bytes(model, tasks)

    def end_task(self, model, task: Task, gradients) -> dict[str, Tensor]:
        """The directions with this task's logit gradients, orthonormal rows [k, n]."""
        examples = task.sample(self.config.examples, self.seed) if self.config.examples else []
        directions = map(flat, gradients.each(examples, true_logits))
        return {"basis": extended(self._basis, directions, len(examples))}


def true_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Σ of the labelled tokens' own logits, without those of the rest of the vocabulary."""
    head, hidden = families.head(model), batch.hidden(model)
    logits = (hidden.float() * head.weight[batch.targets].float()).sum(1)
    logits = logits if head.bias is None else logits + head.bias[batch.targets]
    cap = families.softcap(model)
    return (cap * torch.tanh(logits / cap) if cap else logits).sum()


def project(vector: Tensor, basis: Tensor) -> Tensor:
    """The part of `vector` [n] that is orthogonal to the rows of `basis` [k, n]; projected twice, since the
    first time rounding leaves some of the basis in it.
    """
    for _ in range(2):
        vector = vector - (basis @ vector) @ basis
    return vector


def extended(basis: Tensor, directions, most: int) -> Tensor:
    """The orthonormal `basis` [k, n] and up to `most` further rows, by Gram-Schmidt with
    reorthogonalisation.
    """
    rows = torch.cat([basis, basis.new_empty(most, basis.shape[1])])
    used = len(basis)
    for direction in directions:
        outside = project(direction, rows[:used])
        if outside.norm() > NEW * direction.norm():
            rows[used] = outside / outside.norm()
            used += 1
    return rows[:used]


@torch.no_grad()
def _write(tensors: list[Tensor], vector: Tensor) -> None:
    for tensor, part in zip(tensors, unflatten(vector, tensors), strict=True):
        tensor.copy_(part)
