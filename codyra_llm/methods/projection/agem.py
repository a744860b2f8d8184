"""A-GEM: GEM with one reference gradient for all earlier tasks."""

import torch

from codyra_llm.config.methods.projection import AGemConfig
from codyra_llm.core.tensors import flat
from codyra_llm.methods.projection.gem import EpisodicMemory, add


class AGem(EpisodicMemory):
    """g̃ = g - (g·r / r·r) r where g·r < 0, r the gradient on a batch drawn from the memories of all earlier
    tasks.

    Source: Chaudhry et al. (1812.00420). Ours: the dot products are taken in float64; r without dropout. Cost
    per step from the second task on: `batch` more examples forward and backward, two vectors of all
    parameters.
    """

    name, summary, Config = (
        "agem",
        "gem with one reference gradient, from a batch of all memories together",
        AGemConfig,
    )

    def edit_gradients(self, gradients) -> None:
        """Take out the part of the step that raises the loss on the memories' mean gradient."""
        if not self._memories:
            return
        reference = flat(gradients.mean(self.draw([e for examples in self._memories for e in examples])))
        grads = gradients.step
        along = flat(grads).double() @ reference.double()
        share = -along / reference.double().square().sum()
        share = torch.where(along < 0, share, 0.0)  # on the device, so that the host does not wait to choose
        add(grads, reference * share.to(reference))
