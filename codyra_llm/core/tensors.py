"""Helpers for tensors: this process's device, many tensors as one vector, safetensors files that are equal
byte for byte wherever they are written, and random generators seeded by a key."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

LENGTH = 8  # bytes of a safetensors file that say how long its header is


def own_device() -> torch.device:
    """The device of this process: its GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def flat(tensors: list[Tensor]) -> Tensor:
    """All elements of all tensors, in order, as one vector [n]."""
    return torch.cat([t.flatten() for t in tensors])


def unflatten(vector: Tensor, like: list[Tensor]) -> list[Tensor]:
    """The vector cut into the shapes of `like`."""
    parts = vector.split([tensor.numel() for tensor in like])
    return [part.view_as(tensor) for part, tensor in zip(parts, like, strict=True)]


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by sha256 of the key: the same on every rank, device, process and restart."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file. Equal tensors and metadata give equal bytes, so files can be compared by
    checksum: `save_file` orders the tensors, but writes the metadata in an order that changes from call to
    call."""
    save_file(tensors, path, metadata)
    if metadata:
        _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(LENGTH), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(ordered) > length:
            raise ValueError(
                f"{path}: its header grew from {length} to {len(ordered)} bytes when it was sorted"
            )
        file.seek(LENGTH)
        file.write(ordered.ljust(length))
