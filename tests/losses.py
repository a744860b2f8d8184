"""The loss in chunks against PyTorch's and transformers' own, to the gradient; no tensor of all logits is
made.
"""

from unittest import mock

import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from codyra_llm.models import head_loss as loss


def chunks_of(rows, vocabulary):
    return mock.patch.multiple(loss, MIN_ROWS=1, CHUNK=rows * vocabulary)


def problem(m, h, v, bias=False, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    head = nn.Linear(h, v, bias, dtype=dtype)
    return torch.randn(m, h, dtype=dtype, requires_grad=True), head, torch.randint(v, (m,)), torch.rand(m)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max(
            [self.elements, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))]
        )
        return out


def distillation_by_definition(z, taught, share, temperature, reverse=False):
    own, other = (z / temperature).log_softmax(1), (taught / temperature).log_softmax(1)
    given, aim = (other, own) if reverse else (own, other)
    kl = functional.kl_div(given, aim, reduction="none", log_target=True)
    return temperature**2 * (share * kl.sum(1)).sum()
