"""A merge that spares old inputs: of the same rank, close to the trained update on new inputs and small on
old ones, in closed form.
"""

import torch
from torch import Tensor

from codyra_llm.lora.update import Adapter
from codyra_llm.methods.parts.moments import SecondMoment, kept_columns


def spared(
    adapters: list[Adapter], new: SecondMoment, old: SecondMoment, weight: float, ridge: float
) -> list[Adapter]:
    """The adapters of one input with A* = A Σ_new (Σ_new + μ Σ_old + εI)⁻¹ in place of A, μ = `weight` and
    ε = `ridge` · tr(Σ_new)/in, or more where rounding of Σ_old asks for it; B and w as they are, so the rank
    too.

    ΔW* = B A* minimises E_new|(ΔW - X) x|² + μ E_old|X x|² + ε‖X‖_F² over all X: its gradient is zero where X
    (Σ_new + μ Σ_old + εI) = ΔW Σ_new. (RegMean, 2212.09849, weights two models in this way; here one of the
    two is the zero update.) float64; by Cholesky where both moments are whole, else by Woodbury's identity,
    with a system of the two sketches' widths. Where no input had any energy, A* is 0."""
    new, old = new.in_float64(), old.in_float64()
    rows = torch.cat([adapter.a for adapter in adapters]).double()
    energy = new.mean
    found = torch.zeros_like(rows)
    if energy > 0:
        epsilon = max(ridge * energy, weight * rounding(old))
        found = solved(new.times(rows), new, old, weight, epsilon)
    parts = found.float().split([len(adapter.a) for adapter in adapters])
    return [adapter._replace(a=part.contiguous()) for adapter, part in zip(adapters, parts, strict=True)]


def rounding(moment: SecondMoment) -> float:
    """How far below 0 rounding to float32 may have brought an eigenvalue of a moment: sums of products are
    exact up to a few units in the last place of its trace."""
    size = moment.factor.shape[-2]
    return 4 * torch.finfo(torch.float32).eps * size * moment.mean


def solved(rows: Tensor, new: SecondMoment, old: SecondMoment, weight: float, epsilon: float) -> Tensor:
    """rows (Σ_new + weight·Σ_old + epsilon·I)⁻¹, [r, in]."""
    if new.weights is None:
        matrix = new.factor + weight * old.factor
        matrix = (matrix + matrix.T) / 2
        matrix.diagonal().add_(epsilon)
        return torch.cholesky_solve(rows.T, torch.linalg.cholesky(matrix)).T
    diagonal = (new.rest + weight * old.rest + epsilon).item()
    sides = torch.cat([new.factor, old.factor], 1)
    weights = torch.cat([new.weights, weight * old.weights], 1)
    return woodbury(rows, sides, weights, diagonal)


def merge_operations(size: int, sketch: int, rows: int) -> int:
    """Operations of `spared` in float64 for one input of this size, whose layers have `rows` ranks in all."""
    columns = kept_columns(size, sketch)
    if columns == size:
        return size**3 // 3 + 4 * rows * size**2
    both = 2 * columns  # the sketches of new and old inputs side by side
    return 2 * size * both**2 + 2 * both**3 // 3 + rows * (6 * size * both + 2 * both**2)


def woodbury(rows: Tensor, sides: Tensor, weights: Tensor, diagonal: float) -> Tensor:
    """rows (d·I + V diag(w) Vᵀ)⁻¹ = (rows - rows V diag(w) (d·I + Vᵀ V diag(w))⁻¹ Vᵀ)/d.

    V [in, k] is `sides`; w [1, k] may have zeros and, while the sum is positive definite, negative entries.
    """
    inner = sides.T @ sides * weights
    inner.diagonal().add_(diagonal)
    read = torch.linalg.solve(inner, rows @ sides * weights, left=False)
    return (rows - read @ sides.T) / diagonal
