"""The stand-ins for kernels against PyTorch's own."""

import pytest
import torch
from pretended_kernels import KERNELS, attention
from torch.nn import functional

LENGTHS = [3, 1, 5]
ENDS = torch.tensor([0, 3, 4, 9], dtype=torch.int32)
FORWARD = KERNELS["torch_attn._varlen_attn.default"]
BACKWARD = KERNELS["torch_attn._varlen_attn_backward.default"]


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), requires_grad=True)


def causal(n: int, window: int) -> torch.Tensor:
    mask = torch.ones(n, n, dtype=torch.bool).tril()
    return mask if window < 0 else mask.triu(-window)


@pytest.mark.parametrize("window", [-1, 1])
def test_packed_attention(window):
    """Segment by segment, four heads that share two, both ways."""
    q, k, v = drawn(9, 4, 8), drawn(9, 2, 8), drawn(9, 2, 8)
    parts = zip(*(t.transpose(0, 1).split(LENGTHS, 1) for t in (q, k, v)), strict=True)
    expected = [
        functional.scaled_dot_product_attention(*part, causal(part[0].shape[1], window), enable_gqa=True)
        for part in parts
    ]
    expected = torch.cat(expected, 1).transpose(0, 1)
    dy = drawn(9, 4, 8).detach() + 1
    gradients = torch.autograd.grad(expected, (q, k, v), dy)
    options = {"scale": 8**-0.5, "window": [window, 0]}
    with torch.no_grad():
        out, lse, rng = FORWARD(q, k, v, ENDS, ENDS, 5, 5, True, **options)
        found = BACKWARD(dy, q, k, v, out, lse, ENDS, ENDS, 5, 5, True, rng, **options)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(found, gradients)


@pytest.mark.parametrize("how", ["causal", "mask", "added"])
def test_attention(how):
    q, k, v = drawn(2, 4, 6, 8), drawn(2, 2, 6, 8), drawn(2, 2, 6, 8)
    mask = causal(6, 2)
    added = torch.zeros(6, 6).masked_fill(~mask, -torch.inf)
    options = {"causal": {"is_causal": True}, "mask": {"attn_mask": mask}, "added": {"attn_mask": added}}[how]
    expected = functional.scaled_dot_product_attention(q, k, v, **options, enable_gqa=True)
    torch.testing.assert_close(attention(q, k, v, **options, enable_gqa=True), expected)
