"""The part of an input space that earlier tasks use, kept as its basis or as that of its complement
(DualGPM).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from codyra_llm.core.tensors import own_device
from codyra_llm.runtime.memory import if_it_fits


class Subspace(NamedTuple):
    """Orthonormal columns `basis` [in, k], float64 on the CPU. They span what is used, or with `complement`
    what is free, so that k is at most in/2."""

    basis: Tensor
    complement: bool = False

    @classmethod
    def nothing(cls, size: int) -> "Subspace":
        """All of the space is free."""
        return cls(torch.zeros(size, 0, dtype=torch.float64))

    def state(self, name: str) -> dict[str, Tensor]:
        """What a method saves of it, in float32, under `name` and what the basis spans."""
        return {f"{name}.{'free' if self.complement else 'old'}": self.basis.float()}

    def to(self, kind: Tensor) -> "Subspace":
        """On the device and in the dtype of `kind`."""
        return Subspace(self.basis.to(kind), self.complement)

    def free(self, x: Tensor) -> Tensor:
        """P x: the part of the columns of x [in, n] that lies in the free space."""
        inside = self.basis @ (self.basis.T @ x)
        return inside if self.complement else x - inside

    def leading(self, covariance: Tensor, count: int) -> Tensor:
        """The first `count` left singular vectors of P C, [in, count]; zero where the free space has no
        more.
        """
        vectors, squares = self._singular(covariance)
        kept = squares[:count] > 1e-12 * squares.sum().clamp_min(torch.finfo(squares.dtype).tiny)
        return self.free(vectors[:, :count] * kept)

    def grown(self, covariance: Tensor, energy: float) -> "Subspace":
        """The subspace with the fewest further directions, leading left singular vectors of P C, with which
        it holds the share `energy` of ‖C‖_F²."""
        vectors, squares = self._singular(covariance)
        total = covariance.square().sum()
        # The share held by the basis as it is, with one more direction, with two more, …
        more = torch.cat([squares.new_zeros(1), (squares / total).cumsum(0)])
        held = (total - squares.sum()) / total + more
        count = min(int((held < energy - 1e-12).sum()), self._free_size)
        return self._using(vectors[:, :count])

    @property
    def _free_size(self) -> int:
        size, k = self.basis.shape
        return k if self.complement else size - k

    def _singular(self, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """Left singular vectors of P C, and the squares of its singular values in descending order. P C is
        not symmetric: its left singular vectors are the eigenvectors of (P C)(P C)ᵀ, not those of P C P."""
        projected = self.free(covariance)
        squares, vectors = eigen(projected @ projected.T)
        return vectors.flip(1), squares.flip(0).clamp_min(0)

    def _using(self, more: Tensor) -> "Subspace":
        """The space that also uses `more` [in, n], orthonormal columns of the free space."""
        if not more.shape[1]:
            return self
        if self.complement:
            left = self.basis - more @ (more.T @ self.basis)
            vectors = torch.linalg.svd(left, full_matrices=False)[0]
            return Subspace(vectors[:, : self._free_size - more.shape[1]], True)
        used = torch.cat([self.basis, more], 1)  # [in, k]
        size, k = used.shape
        if k <= size / 2:
            return Subspace(torch.linalg.qr(used)[0])
        # The complement is smaller now: the columns of Q after the first k span it.
        return Subspace(torch.linalg.qr(used, mode="complete")[0][:, k:], True)


def most_bytes(size: int) -> int:
    """The most bytes that a subspace of a space of this size takes in a state."""
    return 4 * size * (size // 2)


def symmetric_root(covariance: Tensor) -> Tensor:
    """C^½ [in, in]: its singular values are those of the inputs themselves, as a matrix of one per column."""
    values, vectors = eigen(covariance)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues in ascending order, and eigenvectors, of a symmetric matrix on the CPU. They are computed
    on the GPU if there is one that has room: processes share the cores, and each has a GPU."""
    device = own_device()
    if device.type != "cpu":
        # The model, and sums over inputs, are there too.
        found = if_it_fits(lambda: torch.linalg.eigh(matrix.to(device)))
        if found is not None:
            return found[0].cpu(), found[1].cpu()
    return torch.linalg.eigh(matrix)
