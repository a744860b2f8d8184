"""A CUDA graph on the device that is not there: what its operators did is done again at every replay.

As on a device, recording does nothing yet, and replaying runs no Python: a number that changes from step to
step must be in a tensor. The host may not wait while it records.
"""

from contextlib import nullcontext
from types import TracebackType
from weakref import WeakSet

import pretended
import torch
from pretended import OnDevice
from torch import Tensor

replays = 0  # of all graphs
recordings = 0


class NotRecorded(RuntimeError):
    """What CUDA says of a call that can't be recorded."""


class Lost(RuntimeError):
    """A graph would read memory that it doesn't have any more, or take some that was given back."""


class Stream:
    """Stands in for `torch.cuda.Stream`; `graphs`: those that were recorded on it and are still there."""

    def __init__(self, device: torch.device = pretended.DEVICE) -> None:
        self.device, self.graphs = device, WeakSet()


class Pool:
    """Stands in for a handle of a graph's memory, which is given back with the last of its `graphs`."""

    def __init__(self) -> None:
        self.used, self.graphs = False, WeakSet()


class Graph:
    """Stands in for `torch.cuda.CUDAGraph`. One that goes takes the memory of cuBLAS from the others that
    were recorded on its stream."""

    stream: Stream | None = None
    is_lost = False

    def __del__(self) -> None:
        for other in self.stream.graphs if self.stream else ():
            other.is_lost = True

    def __init__(self) -> None:
        self.calls: list[tuple] = []  # operator, its arguments, and its result
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # what was written into, and what it held

    def take(self, func, args: tuple, kwargs: dict, result) -> None:
        """Record one operator that ran on the device."""
        self.calls.append((func, args, kwargs, result))

    def keep(self, written: Tensor) -> None:
        """Remember what a tensor's memory holds before it is first written into."""
        memory = written.held.untyped_storage()
        if memory.data_ptr() not in self.before:
            whole = torch.empty(0, dtype=torch.uint8).set_(memory)
            self.before[memory.data_ptr()] = whole, whole.clone()

    def replay(self) -> None:
        """Run what was recorded, into the same memory."""
        global replays
        if self.is_lost:
            raise Lost("another graph that was recorded on this one's stream is gone")
        replays += 1
        for func, args, kwargs, result in self.calls:
            again = pretended.computed(func, args, kwargs)
            _copy(result, again)


def _copy(result, again) -> None:
    """Put what a replayed operator gave where its result was; of views and operators in place it is there."""
    if isinstance(result, (list, tuple)):
        for part, new in zip(result, again, strict=True):
            _copy(part, new)
    elif isinstance(result, OnDevice) and result.held.data_ptr() != again.data_ptr():
        result.held.copy_(again)


class Recording:
    """Stands in for `torch.cuda.graph`."""

    usual = Stream()  # where no other is given

    def __init__(
        self,
        graph: Graph,
        pool: Pool | None = None,
        stream: Stream | None = None,
        capture_error_mode: str = "global",
    ):
        self.graph, self.pool, self.stream = graph, pool or Pool(), stream or self.usual

    def __enter__(self) -> None:
        global recordings
        recordings += 1
        if self.pool.used and not self.pool.graphs:
            raise Lost("this memory was given back")
        self.pool.used, self.graph.stream = True, self.stream
        self.pool.graphs.add(self.graph)
        self.stream.graphs.add(self.graph)
        for asked in ("synchronize", "empty_cache"):  # by PyTorch's own
            pretended.wait(asked)
        pretended.recording = self.graph
        self.waits = pretended.waits.total()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pretended.recording = None
        for memory, held in self.graph.before.values():
            memory.copy_(held)
        if kind is None and pretended.waits.total() > self.waits:
            raise NotRecorded(f"the host waited while it recorded: {dict(pretended.waits)}")


NAMES = {  # in torch.cuda
    "CUDAGraph": Graph,
    "graph": Recording,
    "graph_pool_handle": Pool,
    "Stream": Stream,
    "current_stream": Stream,
    "stream": nullcontext,
    "mem_get_info": lambda device: (80 << 30, 80 << 30),
}


def install() -> None:
    """Let torch's own names mean these, for good."""
    for name, own in NAMES.items():
        setattr(torch.cuda, name, own)
