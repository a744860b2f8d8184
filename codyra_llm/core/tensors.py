"""Random numbers that are a function of a key alone: the same on every rank, device, process and restart."""

import hashlib

import torch
from torch import Tensor


def flat(tensors: list[Tensor]) -> Tensor:
    """One vector [n]."""
    return torch.cat([t.flatten() for t in tensors])


def unflatten(vector: Tensor, like: list[Tensor]) -> list[Tensor]:
    """The vector cut into the shapes of `like`."""
    return [part.view_as(t) for part, t in zip(vector.split([t.numel() for t in like]), like, strict=True)]


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by sha256 of the key."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
