"""SLAO: one adapter that starts every task from the last one, and a slowly merged copy of it that answers."""

import math

import torch
from torch import Tensor

from codyra_llm.config.methods.sequential import SlaoConfig
from codyra_llm.lora.layer import sites
from codyra_llm.lora.update import Adapter, Update
from codyra_llm.methods.base import Task
from codyra_llm.methods.sequential.seqlora import SeqLora


class Slao(SeqLora):
    """Task t starts from A = Qᵀ, Q R = QR(A_{t-1}ᵀ), and B = B_{t-1}, trained as in seqlora; the model after
    it is W₀ + s·B^m_t A_t with B^m_t = B^m_{t-1} + (B_t - B^m_{t-1})/√t, B^m_1 = B_1.

    Source: Qiao and Mahdavi (2512.23017), by its abstract, reviews and a summary; no code of theirs was
    found. The scale 1/√t and R's positive diagonal are as a review and another implementation (Backpropagate)
    quote them: the starting rows are those of A_{t-1} after Gram-Schmidt, and none of them flips its sign.
    Ours: A and B both train. Since A is not averaged, old columns of B^m are combined with a newer A. Cost:
    none per step; one QR of rank r per site and task; state: B of the last task. Training takes as long as
    seqlora's on the quickstart."""

    name, summary, Config = (
        "slao",
        "one LoRA with orthonormal restarts and an asymmetric merge by 1/√t",
        SlaoConfig,
    )
    config: SlaoConfig
    max_zero_stage = 2  # `end_task` reads whole parameters

    @torch.no_grad()
    def begin_task(self, model, task: Task) -> None:
        """Begin with an orthonormal basis of the last A, and with B as it was trained last."""
        if not task.index:
            super().begin_task(model, task)
            self._merged: dict[str, Tensor] = {}
            return
        last = task.archive.load(task.index - 1).adapters
        self._merged = {site: adapter.b for site, adapter in last.items()}
        for site, layer in sites(model).items():
            layer.lora_A.copy_(orthonormal_rows(last[site].a))
            layer.lora_B.copy_(task.state[site])

    def state_bytes(self, model, tasks: int) -> int:
        """B of every site."""
        return sum(layer.lora_B.nbytes for layer in sites(model).values())

    def end_task(self, model, task: Task, gradients) -> dict[str, Tensor]:
        """B as trained, since the archive holds the merged one."""
        return {site: layer.lora_B.detach().clone() for site, layer in sites(model).items()}

    def consolidate(self, adapters: dict[str, Adapter], index: int) -> Update:
        """The trained A with B^m, into which the trained B is merged by 1/√t."""
        merged = {
            site: adapter._replace(b=merged_columns(self._merged.get(site), adapter.b, index + 1))
            for site, adapter in adapters.items()
        }
        return Update(merged, self.spec().scale, self.mode)


def orthonormal_rows(a: Tensor) -> Tensor:
    """Qᵀ [r, in] of Aᵀ = Q R with a positive diagonal of R; float64 inside."""
    q, r = torch.linalg.qr(a.double().T)
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0)
    return (q * signs).T.to(a)


def merged_columns(before: Tensor | None, trained: Tensor, count: int) -> Tensor:
    """B^m of `count` tasks, from that of the tasks before and the B [out, r] that the last one left."""
    return trained if before is None else torch.lerp(before, trained, 1 / math.sqrt(count))
