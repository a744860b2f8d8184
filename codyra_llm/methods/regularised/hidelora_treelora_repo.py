"""HideLoRA as TreeLoRA's repository has it: one LoRA whose rows of A are made unlike each other, and nothing
else.
"""

import torch
from torch import Tensor
from torch.nn import functional

from codyra_llm.config.methods.regularised import HideLoraRepoConfig
from codyra_llm.lora.layer import by_shape, sites
from codyra_llm.methods.sequential.seqlora import SeqLora


class HideLoraRepo(SeqLora):
    """L + 0.5 Σ_sites CE(A Aᵀ / 0.8, identity): each row of A is to be more like itself than like the other
    rows.

    Source: the code of TreeLoRA's HideLoRA row. It is not HiDe: it keeps no statistics of tasks, infers no
    task and has one LoRA for all of them, and its term does not depend on earlier tasks. It exists only for
    comparison with that row. As run there: rank 8, alpha 32, dropout 0.1, targets q_proj and v_proj. Ours:
    once per optimizer step. Cost: r²·in multiplications per site and step. With weight 0 it is seqlora."""

    name, Config = "hidelora_treelora_repo", HideLoraRepoConfig
    summary = "seqlora with rows of A pushed apart, as TreeLoRA's repository runs HideLoRA"
    config: HideLoraRepoConfig
    max_zero_stage = 2  # the penalty reads whole parameters

    def penalty(self, model) -> dict[str, Tensor]:
        """The contrastive term of the rows of A, summed over sites."""
        c = self.config
        if not c.weight:
            return {}
        total = 0.0
        for group in by_shape(sites(model)):
            a = torch.stack([layer.lora_A for layer in group.values()])
            total = total + contrast(a, c.temperature)
        return {"contrast": c.weight * total}


def contrast(a: Tensor, temperature: float) -> Tensor:
    """Σ over sites of the mean cross entropy of row i of A Aᵀ/τ with label i; a [n, r, in]."""
    labels = torch.arange(a.shape[1], device=a.device).repeat(len(a))
    return len(a) * functional.cross_entropy((a @ a.mT / temperature).flatten(0, 1), labels)
