"""Second moments Σ = E[x xᵀ] of inputs: whole for small inputs, as a sketch for large ones. The sketch is
linear, so moments can be summed over ranks and tasks."""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from codyra_llm.core.tensors import generator

EXACT_UP_TO = 4  # times the sketch's width: a smaller input is kept whole


class SecondMoment(NamedTuple):
    """Σ [in, in] as `factor` itself (`weights` None), or as F diag(weights) Fᵀ + rest·I.

    factor [..., in, k], weights [..., 1, k], rest [..., 1, 1]; leading dimensions are a batch of moments.
    """

    factor: Tensor
    weights: Tensor | None = None
    rest: Tensor | None = None

    def times(self, rows: Tensor) -> Tensor:
        """rows Σ, [..., r, in]."""
        read = rows @ self.factor
        if self.weights is None:
            return read
        return (read * self.weights) @ self.factor.mT + self.rest * rows

    def between(self, rows: Tensor) -> Tensor:
        """rows Σ rowsᵀ, [..., r, r]."""
        if self.weights is None:
            return _Between.apply(rows, self.factor)
        read = rows @ self.factor
        return (read * self.weights) @ read.mT + self.rest * (rows @ rows.mT)

    def energy(self, matrix: Tensor) -> Tensor:
        """E|M x|² = tr(M Σ Mᵀ) of M [out, in], a scalar."""
        read = matrix @ self.factor
        if self.weights is None:
            return (read * matrix).sum()
        return (read.square() * self.weights).sum() + self.rest.sum() * matrix.square().sum()

    def to(self, kind: Tensor) -> "SecondMoment":
        """On the device and in the dtype of `kind`."""
        return SecondMoment(*(None if part is None else part.to(kind) for part in self))

    def in_float64(self) -> "SecondMoment":
        """On the CPU in float64, for solves."""
        return self.to(torch.zeros((), dtype=torch.float64))

    @property
    def mean(self) -> float:
        """tr(Σ)/in, the mean energy of a direction."""
        if self.weights is None:
            return self.factor.diagonal().mean().item()
        size = self.factor.shape[-2]
        squares = self.factor.square().sum(-2, keepdim=True)
        return ((squares * self.weights).sum() / size + self.rest.sum()).item()


class _Between(torch.autograd.Function):
    """M = X Σ Xᵀ with Σ symmetric and fixed. With G = dL/dM, dL/dX = (G + Gᵀ) X Σ, and X Σ is there from
    forward; plain autograd would multiply by Σ again."""

    @staticmethod
    def forward(ctx, rows: Tensor, sigma: Tensor) -> Tensor:
        """rows [..., r, in] and Σ [..., in, in] to M [..., r, r]."""
        read = rows @ sigma
        ctx.save_for_backward(read)
        return read @ rows.mT

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        """dL/dX from dL/dM."""
        (read,) = ctx.saved_tensors
        return (grad + grad.mT) @ read, None


def stacked(moments: list[SecondMoment]) -> SecondMoment:
    """Moments of one shape as a batch."""
    if moments[0].weights is None:
        return SecondMoment(torch.stack([moment.factor for moment in moments]))
    return SecondMoment(*(torch.stack(parts) for parts in zip(*moments, strict=True)))


def kept_columns(size: int, width: int) -> int:
    """How many columns are kept of the moment of an input of this size: `width` of a sketch, else all."""
    return width if size > EXACT_UP_TO * width else size


def recovery_operations(size: int, width: int) -> int:
    """Operations of `recovered` in float64: none for a moment that is kept whole."""
    if kept_columns(size, width) == size:
        return 0
    products = 7 * size * width**2  # ΩᵀY, the triangular solve, the root's Gram matrix and its rotation
    return products + 10 * width**3  # Cholesky, and the eigenvectors, which take about nine times k³


@lru_cache(8)  # a model has few sizes of inputs, and many inputs of each
def sketching(size: int, width: int) -> Tensor | None:
    """Ω [in, width], orthonormal columns drawn by the size alone, float64; None where Σ itself is kept."""
    if size <= EXACT_UP_TO * width:
        return None
    drawn = torch.randn(size, width, dtype=torch.float64, generator=generator("sketch", size, width))
    return torch.linalg.qr(drawn)[0]


def recovered(product: Tensor, trace: Tensor, omega: Tensor | None) -> SecondMoment:
    """Σ from Y = Σ Ω [in, k] and its trace, float64; from Σ itself where `omega` is None.

    Nyström's approximation Y (Ωᵀ Y)⁻¹ Yᵀ, which is never above Σ. Against rounding it is shifted, as in
    Tropp, Yurtsever, Udell and Cevher (1706.05736, algorithm 3), by an amount for float32, since Y is a sum
    of products in float32. If there were fewer tokens than Ω has columns, Ωᵀ Y would be singular without the
    shift. The rest of the trace is spread evenly over the directions that the approximation does not span."""
    if omega is None:
        return SecondMoment(product)
    size, width = product.shape
    shift = math.sqrt(size) * torch.finfo(torch.float32).eps * product.norm()
    if not shift > 0:
        return SecondMoment(omega, omega.new_zeros(1, width), omega.new_zeros(1, 1))
    shifted = product + shift * omega
    core = omega.T @ shifted
    lower = torch.linalg.cholesky((core + core.T) / 2)
    root = torch.linalg.solve_triangular(lower, shifted.T, upper=False).T
    # The singular values of `root` are at least √shift, so the eigenvectors of its Gram matrix, which take
    # half of the time, are accurate.
    squares, rotation = torch.linalg.eigh(root.T @ root)
    vectors = root @ (rotation / squares.sqrt())
    values = (squares - shift).clamp_min(0)
    rest = ((trace - values.sum()) / (size - width)).clamp_min(0)
    # `rest`·I also covers the directions of F, whose values are complete: subtract it there.
    return SecondMoment(vectors, (values - rest)[None], rest.reshape(1, 1))
