"""The head's loss on a GPU, where log softmax overwrites its input: PyTorch has a kernel for short rows, one
for rows that fit into shared memory, and one for all others."""

import pytest
import torch
from losses import chunks_of, problem

from codyra_llm.models.head_loss import head_loss


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("vocabulary", [1000, 5000, 5001, 50_000])
@pytest.mark.parametrize("cap", [None, 30.0])
def test_it_is_the_cpu_s_in_float64(vocabulary, cap):
    hidden, head, targets, weights = problem(40, 16, vocabulary)
    expected = head_loss(head, hidden, targets, weights, cap)
    (gradient,) = torch.autograd.grad(expected, hidden)
    head, there = head.float().cuda(), hidden.detach().float().cuda().requires_grad_()
    with chunks_of(16, vocabulary):
        found = head_loss(head, there, targets.cuda(), weights.cuda(), cap)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-5, atol=0)
    (own,) = torch.autograd.grad(found, there)
    torch.testing.assert_close(own.cpu().double(), gradient, rtol=1e-3, atol=1e-5)
