"""What a computation keeps in memory: bytes allocated at its peak, and bytes that forward leaves for
backward; and whether it fits.
"""

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from codyra_llm.core.errors import is_out_of_memory

T = TypeVar("T")


def if_it_fits(work: Callable[[], T]) -> T | None:
    """What `work` gives, None where a GPU's memory ran out. Then nothing refers any more to the tensors that
    it had made, as the exception did, so that the caller can free their memory."""
    try:
        return work()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    return None


class Meter(TorchDispatchMode):
    """Bytes of the storages that operations make while it is on: `live` now, and `peak`.

    It sees all that runs, hand-written functions and backward included, and a storage counts until the last
    tensor, or autograd, lets go of it. What was there before does not count, nor does scratch memory inside a
    kernel.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._held: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        fresh = {id(s): s for s in _storages(out) if id(s) not in self._held}
        if fresh:  # a view of an argument is not new memory
            for storage in _storages((args, kwargs)):
                fresh.pop(id(storage), None)
        for key, storage in fresh.items():
            size = storage.nbytes()
            self._held[key] = weakref.ref(storage, partial(self._freed, key, size))
            self.live += size
        self.peak = max(self.peak, self.live)
        return out

    def _freed(self, key: int, size: int, _: weakref.ref) -> None:
        del self._held[key]
        self.live -= size


def _storages(tree: object) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def peak_bytes(action: Callable[[], object], device: torch.device) -> int:
    """The peak of what `action` allocates, without what was there before: from the allocator on a GPU, else
    metered.
    """
    if device.type != "cuda":
        with Meter() as meter:
            action()
        return meter.peak
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    action()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


class ProcessPeak:
    """The most memory that this process holds, in bytes: from the allocator on a GPU; on a CPU the resident
    set (known on Linux) above what was there when this object was made, which leaves the libraries out."""

    STATUS = Path("/proc/self/status")

    def __init__(self, device: torch.device):
        self.device = device
        self.before = 0 if device.type == "cuda" else self._resident("VmRSS")

    def restart(self) -> None:
        """Begin a new measurement."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.before is not None:
            try:
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM, see proc(5)
            except OSError:  # a container may forbid it; then the peak is not known
                self.before = None

    def read(self) -> int | None:
        """The peak since `restart`, in bytes; None where the system doesn't report it."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return None if self.before is None else self._resident("VmHWM") - self.before

    def _resident(self, name: str) -> int | None:
        """A value of /proc/self/status, which has it in KiB, in bytes; None where it is not there."""
        if not self.STATUS.is_file():
            return None
        lines = self.STATUS.read_text(encoding="ascii").splitlines()
        return next((int(line.split()[1]) << 10 for line in lines if line.startswith(name)), None)


def saved_bytes(forward: Callable[[], object], held: Iterable[Tensor]) -> int:
    """What `forward` leaves for backward, each storage once, without the storages of the tensors `held`."""
    known = {id(s) for s in _storages(list(held))}
    saved: dict[int, torch.UntypedStorage] = {}  # the storages themselves, so that no id is used again

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[id(storage)] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for key, storage in saved.items() if key not in known)
