"""The cost and gain of a trained update's parts: rank-one parts without cross terms on old and new inputs,
and the choice among the parts of all layers."""

import torch
from torch import Tensor

from codyra_llm.lora.update import Adapter
from codyra_llm.methods.parts.moments import SecondMoment

Priced = tuple[Adapter, Tensor, Tensor]  # the parts, their costs [r], their gains [r]
ROW_NORM = 3**-0.5  # of a fresh adapter's rows


def joint(adapter: Adapter, new: SecondMoment, old: SecondMoment, share: float, ridge: float) -> Priced:
    """The same ΔW = B diag(w) A by parts ΔW = Σ b'_i a'_iᵀ with A' O A'ᵀ = I and A' N A'ᵀ = diag(ρ), O and N
    old and new second moments: E_old|ΔW x|² = Σ|b'_i|² and E_new|ΔW x|² = Σ ρ_i|b'_i|², without cross terms.

    Costs are share·|b'_i|², gains ρ_i times them; parts come in ascending ρ. `ridge`·(mean of A O Aᵀ's
    diagonal) is added to that diagonal, so that rows which are orthogonal to old inputs have a cost too. With
    L Lᵀ = A O Aᵀ and V diag(ρ) Vᵀ = L⁻¹ (A N Aᵀ) L⁻ᵀ: A' = Vᵀ L⁻¹ A, B' = B diag(w) L V. A's rows are then
    scaled to the norm of fresh ones, B's columns by the inverse, w = 1. float64 inside."""
    new, old = new.in_float64(), old.in_float64()
    a, b = adapter.a.double(), adapter.b.double()
    b = b if adapter.w is None else b * adapter.w.double()
    core = old.between(a)
    core.diagonal().add_(ridge * core.diagonal().mean() + torch.finfo(core.dtype).tiny)
    lower = torch.linalg.cholesky((core + core.T) / 2)
    half = torch.linalg.solve_triangular(lower, new.between(a), upper=False)
    both = torch.linalg.solve_triangular(lower, half.T, upper=False)
    ratios, vectors = torch.linalg.eigh((both + both.T) / 2)
    rows = vectors.T @ torch.linalg.solve_triangular(lower, a, upper=False)
    columns = b @ lower @ vectors
    costs = share * columns.square().sum(0)
    norms = rows.norm(dim=1) / ROW_NORM
    parts = Adapter((rows / norms[:, None]).float(), (columns * norms).float(), torch.ones(len(a)))
    return parts, costs, costs * ratios.clamp_min(0)


def dropped(priced: dict[str, Priced], keep_drift: float) -> dict[str, Tensor]:
    """Masks [r] by site, 1 where a part is dropped: over all sites together the parts with the least gain per
    cost go first, until at most `keep_drift` of all costs is left. That is the greedy choice of the
    fractional knapsack: no other parts of as little cost keep more gain, up to the one part at the edge."""
    costs = torch.cat([cost for _, cost, _ in priced.values()])
    gains = torch.cat([gain for _, _, gain in priced.values()])
    order = (gains / costs.clamp_min(torch.finfo(costs.dtype).tiny)).argsort()
    left = costs.sum() - costs[order].cumsum(0)  # after each of them went
    count = int((left > keep_drift * costs.sum()).sum()) + 1 if keep_drift < 1 else 0
    masks = torch.zeros(len(costs))
    masks[order[:count]] = 1
    sizes = [len(cost) for _, cost, _ in priced.values()]
    return dict(zip(priced, masks.split(sizes), strict=True))
