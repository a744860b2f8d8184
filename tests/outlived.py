"""Whether autograd's graph of an earlier micro-batch is alive: its nodes remember the stream on which they
were made, and a CUDA graph may not wait for that stream while it is recorded.
"""

import pytest
import torch
from torch import nn

from codyra_llm.data.batches import Batch
from codyra_llm.train.recorded import Recorder

MARK = "of an earlier micro-batch"


def _node(p: nn.Parameter):
    """The node that adds to a parameter's gradient: the same one as long as a graph has it, then another."""
    with torch.enable_grad():
        return p.view_as(p).grad_fn.next_functions[0][0]


def mark(p: nn.Parameter) -> None:
    """Mark the node of a parameter, of which a graph is alive."""
    _node(p).metadata[MARK] = True


def is_left(p: nn.Parameter) -> bool:
    """Whether the node is there that was marked."""
    return MARK in _node(p).metadata


def counted(patch: pytest.MonkeyPatch) -> list[int]:
    """Of each micro-batch that may be recorded, the number of factors whose nodes are there already; filled
    while the patch holds."""
    found: list[int] = []
    loss, run = Batch.cross_entropy, Recorder.run

    def marking(batch: Batch, model: nn.Module, *others) -> torch.Tensor:
        value = loss(batch, model, *others)
        for p in model.parameters():
            if p.requires_grad and value.requires_grad:
                mark(p)
        return value

    def counting(recorder: Recorder, batch: Batch) -> torch.Tensor | None:
        factors = {id(p): p for group in recorder.shared for p in group.masters() if p is not None}
        found.append(sum(is_left(p) for p in factors.values() if p.requires_grad))
        return run(recorder, batch)

    patch.setattr(Batch, "cross_entropy", marking)
    patch.setattr(Recorder, "run", counting)
    return found
