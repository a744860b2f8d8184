"""Work that a GPU does again without the host, from a recording (a CUDA graph)."""

from collections.abc import Callable
from typing import Any

import torch

Work = Callable[[], None]


def recorded(work: Work, stream: torch.cuda.Stream, pool: Any = None) -> torch.cuda.CUDAGraph:
    """A recording of what `work` does on the GPU; `work` itself is not done yet. Intermediate tensors lie in
    the memory of `pool`, or in its own.

    All that live at once on one `stream` must have the same owner, who lets go of them together: products
    share memory by stream, which PyTorch (2.13) frees with any recording that was made there.
    """
    graph = torch.cuda.CUDAGraph()
    before = torch.cuda.current_stream(stream.device)
    with (
        torch.cuda.stream(before),  # where its end fails, torch.cuda.graph leaves its own the current one
        # Other threads may call CUDA meanwhile: autograd's own do.
        torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
    ):
        work()
    return graph
