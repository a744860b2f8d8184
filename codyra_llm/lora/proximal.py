"""AdamW whose step ends with the proximal operator of an ℓ1 penalty, and the schedules of learning rate and
threshold.
"""

import math

import torch
from torch import Tensor


def soft_threshold(x: Tensor, kappa: float) -> Tensor:
    """sign(x)·max(|x| - κ, 0): the proximal operator of κ‖x‖₁, element by element."""
    return x.sign() * (x.abs() - kappa).clamp_(min=0)


def released_threshold(x: Tensor, kappa: float) -> Tensor:
    """The rule of CoDyRA's released code: shrink by κ, then zero what is now below κ, a dead zone of 2κ
    instead of κ.
    """
    shrunk = soft_threshold(x, kappa)
    return shrunk * (shrunk.abs() >= kappa)


OPERATORS = {"soft": soft_threshold, "released": released_threshold}


class ProximalAdamW(torch.optim.AdamW):
    """AdamW, then x ← prox_κ(x) on the parameter groups that carry a `kappa` above zero (key `operator` names
    the rule).

    The operator is element-wise and runs inside the step: right on ZeRO's flat float32 shards, and before
    their low-precision copy is made. A group with `drop` (one 0/1 mask per parameter, for the random control)
    instead has its masked elements multiplied by 1 - κ.
    """

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            kappa, drop = group.get("kappa", 0.0), group.get("drop")
            for i, p in enumerate(group["params"] if kappa else ()):
                p.copy_(p * (1 - kappa * drop[i]) if drop else OPERATORS[group["operator"]](p, kappa))
        return loss


def lr_factor(schedule: str, step: int, steps: int) -> float:
    """The factor on the learning rate at `step` of 0 .. steps - 1: 1, or cosine from 1 towards 0."""
    return 1.0 if schedule == "constant" else 0.5 * (1 + math.cos(math.pi * step / steps))


def budget_kappa(step: int, steps: int, dense: float, budget: float, schedule: str) -> float:
    """A linear ramp over the sparse phase times the learning rate's factor, scaled to the sum `budget` for
    any `steps`.

    With D = ⌊dense·steps⌋: κ_t ∝ (t - D + 1)·lr_factor(t) for t ≥ D. A shrink that comes when the learning
    rate is gone can no longer be answered by the loss, and then all that survives is left too small.
    """
    first = int(dense * steps)
    shares = [(t - first + 1) * lr_factor(schedule, t, steps) for t in range(first, steps)]
    return budget * shares[step - first] / sum(shares) if step >= first else 0.0


def vanishing_rate(step: int, steps: int, dense: float) -> float:
    """The share to take off at `step` so that a value falls on a straight line to exactly 0 in the first half
    of the sparse phase; the second half is left to what stays."""
    first = int(dense * steps)
    last = first + (steps - first - 1) // 2
    return 0.0 if step < first else 1.0 if step >= last else 1 / (last - step + 1)


def published_kappa(step: int, steps: int, dense: float, kappa_max: float, stages: int = 50) -> float:
    """CoDyRA's released schedule: `stages` values from 0 to κ_max, one every ⌊sparse/stages⌋ steps.

    It prunes nothing in fewer than `stages` sparse steps, and more the longer the task is.
    """
    first = int(dense * steps)
    stride = (steps - first) // stages
    if stride == 0 or step <= first:
        return 0.0
    advances = step // stride - (first - 1) // stride  # multiples of stride in first .. step
    return kappa_max * min(stages - 1, advances) / (stages - 1)
