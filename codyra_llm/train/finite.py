"""Refuses losses and gradients that are not finite, before the optimizer takes a step with them."""

import math

import torch
from accelerate.utils import gather_object
from torch import Tensor

from codyra_llm.core.errors import Fault
from codyra_llm.data.batches import Batch


def require_finite_losses(
    where: str, totals: list[float], batches: list[Batch], losses: list[dict[str, Tensor]]
) -> None:
    """Raises Fault where one of the `totals` of the loss terms is not finite; it names the micro-batches of
    all ranks that caused it. Totals are the same on all ranks, so all raise together."""
    if all(map(math.isfinite, totals)):
        return
    own = []
    for batch, terms in zip(batches, losses, strict=True):
        if not torch.stack(list(terms.values())).isfinite().all():
            own.append(batch.examples)
    raise Fault(
        f"{where}: the loss is {sum(totals)}; the micro-batches of training examples {gather_object(own)} "
        "caused it (counted from 0 in train.json); look at them, or lower optim.lr"
    )


def require_finite_gradients(where: str, totals: list[float], norm: float | None) -> None:
    """Raises Fault where the gradients are not finite though their loss is. A `norm` of None is not known
    yet. A step with them would make all weights NaN: only the next loss would show it, and after a task's
    last step nothing would. ZeRO would skip the step."""
    if norm is not None and not math.isfinite(norm):
        raise Fault(
            f"{where}: the loss is {sum(totals):.6g} and the norm of its gradients {norm}, expected a finite "
            "one; lower optim.lr, or look at the derivatives of a loss term of your own"
        )
