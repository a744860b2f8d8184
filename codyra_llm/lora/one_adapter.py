"""The sum of several updates as one low-rank adapter, of one rank at every site."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from codyra_llm.lora.update import Update


@dataclass(frozen=True)
class OneAdapter:
    """ΔW = B·A at each site, A [rank, in] and B [out, rank], float32; `rank` is the same everywhere, so that
    a reader can scale by alpha / rank without knowing the ranks of single sites.

    `parts`: how many updates were summed. `whole`: the largest rank of any site before ranks were cut.
    `errors`: where the rank was cut, ‖ΔW - B·A‖_F by site; `norms` are the ‖ΔW‖_F that they compare with.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    rank: int
    whole: int
    parts: int
    errors: dict[str, float] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """√Σ‖ΔW - B·A‖² / √Σ‖ΔW‖² over all sites; 0 where nothing was cut."""
        lost = sum(error**2 for error in self.errors.values())
        held = sum(norm**2 for norm in self.norms.values())
        return (lost / held) ** 0.5 if held else 0.0

    def relative(self) -> dict[str, float]:
        """‖ΔW - B·A‖ / ‖ΔW‖ by site, the largest first."""
        found = {site: error / self.norms[site] for site, error in self.errors.items() if self.norms[site]}
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def one_adapter(terms: list[Update], rank: int | None = None) -> OneAdapter | None:
    """ΔW = [s₁B₁ diag(w₁) | s₂B₂ diag(w₂) | …]·[A₁; A₂; …] of all updates, padded with zeros to the largest
    rank of any site, or cut to `rank`. None where no site has a rank left.

    The cut is the best one of that rank in the Frobenius norm (Eckart and Young), by the SVD of R_B·R_Aᵀ
    from the QR decompositions of B and Aᵀ, in float64; its error is the norm of the singular values left out.
    """
    factors = _concatenated(terms)
    if not factors:
        return None
    whole = max(len(a) for a, _ in factors.values())
    if rank is None or rank >= whole:
        padded = {site: _padded(a, b, whole) for site, (a, b) in factors.items()}
        return OneAdapter(padded, whole, whole, len(terms))
    cut, errors, norms = {}, {}, {}
    for site, (a, b) in factors.items():
        a, b, errors[site], norms[site] = _truncated(a, b, rank)
        cut[site] = _padded(a, b, rank)
    return OneAdapter(cut, rank, whole, len(terms), errors, norms)


def _concatenated(terms: list[Update]) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, s·B·diag(w)) of all updates by site, in float32; sites without a rank are left out."""
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for update in terms:
        for site, (a, b, w) in update.adapters.items():
            if len(a):
                parts.setdefault(site, []).append((a, update.scale * (b if w is None else b * w)))
    joined = {}
    for site, pairs in parts.items():
        rows, columns = zip(*pairs, strict=True)
        joined[site] = torch.cat(rows), torch.cat(columns, 1)
    return joined


def _padded(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] with zeros for the ranks that the site lacks."""
    more = rank - len(a)
    return (
        torch.cat([a, a.new_zeros(more, a.shape[1])]),
        torch.cat([b, b.new_zeros(b.shape[0], more)], 1),
    )


def _truncated(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """The factors of the best approximation of B·A of at most that rank, its error and ‖B·A‖_F."""
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = s[:rank].sqrt()
    cut_a = (root[:, None] * v[:rank]) @ q_a.T
    cut_b = (q_b @ u[:, :rank]) * root
    return cut_a.float(), cut_b.float(), s[rank:].norm().item(), s.norm().item()
