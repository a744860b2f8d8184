"""Inputs with a decaying spectrum and their second moments, for tests of what is made from them."""

import torch

from codyra_llm.methods.parts.moments import recovered, sketching


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs(count, size, decay=0.9, seed=0):
    """Inputs whose energies fall by `decay` from direction to direction, turned at random."""
    turn = torch.linalg.qr(normal(size, size, seed=seed + 1))[0]
    return normal(count, size, seed=seed) * decay ** torch.arange(size) @ turn.T


def dense(moment):
    """Σ as a matrix."""
    return moment.times(torch.eye(moment.factor.shape[-2], dtype=moment.factor.dtype))


def moment(x, width):
    """What is recovered from the sketch of the inputs x [n, in]."""
    omega = sketching(x.shape[1], width)
    whole = x.T @ x / len(x)
    return recovered(whole if omega is None else whole @ omega, whole.trace(), omega), whole
