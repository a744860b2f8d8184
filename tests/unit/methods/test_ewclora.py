"""EWC-LoRA: the penalty and its gradient against the formula written out."""

import torch
from adapters import SIZES, a_task, attached, drawn
from torch import nn

from codyra_llm.lora.layer import AdapterSpec, LoraLinear, sites
from codyra_llm.methods.base import Task
from codyra_llm.methods.regularised import ewclora
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


def fishers(seed):
    draw = torch.Generator().manual_seed(seed)
    return {site: torch.rand(out, wide, generator=draw) for site, (wide, out) in SIZES.items()}


def test_the_method_s_penalty_is_half_of_its_weight():
    """λ/2 Σ_sites Σ F (s B A)², none in the first task."""
    method, model = attached("ewclora", alpha=6.0, weight=3.0)
    method.begin_task(model, a_task(0))
    assert method.penalty(model) == {}
    held = fishers(1)
    method.begin_task(model, a_task(1, state=held))
    drawn(model, 2)
    expected = 0.0
    for site, layer in sites(model).items():
        delta = 2.0 * layer.lora_B.double() @ layer.lora_A.double()
        expected = expected + 3.0 / 2 * (held[site] * delta**2).sum()
    torch.testing.assert_close(method.penalty(model)["ewc"].double(), expected, rtol=1e-5, atol=0)


def test_fishers_are_summed_and_old_ones_fade(monkeypatch):
    """γ F + F_new, after a first task F_new itself."""
    method, model = attached("ewclora", decay=0.25)
    old, new = fishers(1), fishers(2)
    given = []

    def found(*_):
        given.append(dict(new))
        return given[-1]

    monkeypatch.setattr(ewclora, "weight_fisher", found)
    monkeypatch.setattr(Task, "sample", lambda *_: [])
    first = method.end_task(model, a_task(0), None)
    later = method.end_task(model, a_task(1, state=old), None)
    assert given == [{}, {}], "what is on the device is let go of, site by site"
    for site in SIZES:
        assert torch.equal(first[site], new[site])
        torch.testing.assert_close(later[site], 0.25 * old[site] + new[site])
