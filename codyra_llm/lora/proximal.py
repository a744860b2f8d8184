"""AdamW whose step ends with the proximal operator of an ℓ1 penalty, and the schedules of learning rate and
threshold.
"""

import math

import torch
from torch import Tensor


def soft_threshold(values: list[Tensor], kappa: float) -> list[Tensor]:
    """sign(x)·max(|x| - κ, 0) for x in `values`: the proximal operator of κ‖x‖₁, element by element. All
    tensors are handled in a few operations, since there are hundreds of small ones."""
    shrunk = torch._foreach_abs(values)
    torch._foreach_sub_(shrunk, kappa)
    torch._foreach_clamp_min_(shrunk, 0)
    torch._foreach_mul_(shrunk, torch._foreach_sign(values))
    return shrunk


def released_threshold(values: list[Tensor], kappa: float) -> list[Tensor]:
    """The rule of CoDyRA's released code: shrink by κ, then zero what is now below κ, a dead zone of 2κ
    instead of κ.
    """
    shrunk = soft_threshold(values, kappa)
    kept = torch._foreach_abs(shrunk)
    torch._foreach_sub_(kept, kappa)
    torch._foreach_sign_(kept)  # -1 where the value is to be zeroed, else 0 or 1
    torch._foreach_add_(kept, 1)
    torch._foreach_clamp_max_(kept, 1)
    torch._foreach_mul_(shrunk, kept)
    return shrunk


OPERATORS = {"soft": soft_threshold, "released": released_threshold}


def _shrink_dropped(values: list[Tensor], drop: list[Tensor], kappa: float) -> list[Tensor]:
    """x·(1 - κ·d) for x in `values` and their masks d."""
    factors = torch._foreach_mul(drop, -kappa)
    torch._foreach_add_(factors, 1)
    return torch._foreach_mul(values, factors)


def _lay_out_as_parameters(parameters: list[Tensor]) -> None:
    """Copy gradients that lie in memory in another order than their parameters, as a transposed one does: the
    fused kernel reads both as they lie, on a CPU without an error."""
    for p in parameters:
        if p.grad is not None and p.grad.stride() != p.stride():
            p.grad = torch.empty_like(p).copy_(p.grad)


class ProximalAdamW(torch.optim.AdamW):
    """AdamW, then x ← prox_κ(x) on the parameter groups that carry a `kappa` above zero (key `operator` names
    the rule).

    The operator is element-wise and runs inside the step: right on ZeRO's flat float32 shards, and before
    their low-precision copy is made. A group with `drop` (one 0/1 mask per parameter, for the random control)
    instead has its masked elements multiplied by 1 - κ.
    """

    @torch.no_grad()
    def step(self, closure=None):
        """AdamW's step, then the operator or the masks on the groups that carry them."""
        for group in self.param_groups:
            _lay_out_as_parameters(group["params"])
        loss = super().step(closure)
        for group in self.param_groups:
            kappa, drop, values = group.get("kappa", 0.0), group.get("drop"), group["params"]
            if not kappa or not values:  # in a step of ZeRO 3 only some groups have shards
                continue
            if drop:
                torch._foreach_copy_(values, _shrink_dropped(values, drop, kappa))
            else:
                torch._foreach_copy_(values, OPERATORS[group["operator"]](values, kappa))
        return loss


def lr_factor(schedule: str, step: int, steps: int) -> float:
    """The factor on the learning rate at `step` of 0 .. steps - 1: 1, or cosine from 1 towards 0."""
    return 1.0 if schedule == "constant" else 0.5 * (1 + math.cos(math.pi * step / steps))


def warmup_steps(warmup: float, steps: int) -> int:
    """How many of `steps` are warm-up: `warmup` itself, or if below 1 that share of them, rounded up."""
    return math.ceil(warmup * steps) if warmup < 1 else int(warmup)


def rate_factor(schedule: str, step: int, steps: int, warmup: float) -> float:
    """The factor on the learning rate at `step`: (t + 1) / (W + 1) at step t of W steps of warm-up, so that
    it is never 0, then `lr_factor` over the steps that are left."""
    first = warmup_steps(warmup, steps)
    if step < first:
        return (step + 1) / (first + 1)
    return lr_factor(schedule, step - first, steps - first)


def budget_kappa(step: int, steps: int, dense: float, budget: float, schedule: str) -> float:
    """κ at `step`: a linear ramp over the sparse phase, times the factor of the learning rate's schedule,
    scaled so that all steps' κ sum to `budget`, whatever their number.

    With D = ⌊dense·steps⌋: κ_t ∝ (t - D + 1)·lr_factor(t) for t ≥ D, and 0 before. If values were shrunk when
    the learning rate is near zero, training could not raise them again, and all that survives would be too
    small.
    Warm-up is left out: the learning rate's own factor, which begins its fall later when there is warm-up,
    is never below this one after it.
    """
    first = int(dense * steps)
    shares = [(t - first + 1) * lr_factor(schedule, t, steps) for t in range(first, steps)]
    return budget * shares[step - first] / sum(shares) if step >= first else 0.0


def vanishing_rate(step: int, steps: int, dense: float) -> float:
    """The share by which to reduce a value at `step` so that it falls linearly to exactly 0 in the first half
    of the sparse phase; in the second half the remaining ranks train on."""
    first = int(dense * steps)
    last = first + (steps - first - 1) // 2
    if step < first:
        return 0.0
    return 1.0 if step >= last else 1 / (last - step + 1)


def published_kappa(step: int, steps: int, dense: float, kappa_max: float, stages: int = 50) -> float:
    """CoDyRA's released schedule: `stages` values from 0 to κ_max, one every ⌊sparse/stages⌋ steps, sparse =
    steps - dense·steps, which need not be whole.

    It prunes nothing in fewer than `stages` sparse steps, and the longer the task, the more it prunes.
    """
    end = dense * steps
    stride = int((steps - end) // stages)
    if stride == 0 or step <= end:
        return 0.0
    advances = step // stride - (math.ceil(end) - 1) // stride  # multiples of stride in ⌈end⌉ .. step
    return kappa_max * min(stages - 1, advances) / (stages - 1)
