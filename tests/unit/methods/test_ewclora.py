"""EWC-LoRA: the penalty and its gradient against the formula written out."""

import torch
from torch import nn

from codyra_llm.lora.layer import AdapterSpec, LoraLinear
from codyra_llm.methods.regularised.ewclora import held_back


def test_the_penalty_and_its_gradient_in_closed_form():
    """Σ F (s B A)² and its gradients 2 s (F ∘ s B A) Aᵀ by B, 2 s Bᵀ (F ∘ s B A) by A."""
    draw = torch.Generator().manual_seed(1)
    layer = LoraLinear(nn.Linear(5, 4, bias=False, dtype=torch.float64), AdapterSpec(2, 1.5))
    layer.lora_A.data = torch.randn(2, 5, dtype=torch.float64, generator=draw)
    layer.lora_B.data = torch.randn(4, 2, dtype=torch.float64, generator=draw)
    fisher = torch.rand(4, 5, dtype=torch.float64, generator=draw)
    a, b = layer.lora_A.detach(), layer.lora_B.detach()
    total, weighted = 0.0, torch.zeros(4, 5, dtype=torch.float64)
    for i in range(4):
        for j in range(5):
            delta = 1.5 * sum(b[i, k] * a[k, j] for k in range(2))
            total = total + fisher[i, j] * delta**2
            weighted[i, j] = fisher[i, j] * delta
    found = held_back(layer, fisher)
    by_a, by_b = torch.autograd.grad(found, [layer.lora_A, layer.lora_B])
    torch.testing.assert_close(found.detach(), total, rtol=1e-12, atol=0)
    torch.testing.assert_close(by_b, 2 * 1.5 * weighted @ a.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(by_a, 2 * 1.5 * b.T @ weighted, rtol=1e-12, atol=1e-12)
