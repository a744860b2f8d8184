"""Rank selection: a planted rank comes back, by the threshold and not at random."""

import math

import pytest
import torch
from torch import nn

from codyra_llm.config.registry import METHODS
from codyra_llm.lora.layer import LoraLinear, sites
from codyra_llm.lora.proximal import ProximalAdamW, lr_factor
from codyra_llm.lora.update import Adapter
from codyra_llm.methods.base import Task
from codyra_llm.methods.sequential.codyra import aligned, shrink

SIGMA = torch.tensor([1.0, 0.8, 0.6])


def planted(seed, steps=150, size=48, noise=0.1, **config):
    """Train one layer, rank 16, on a target that is the frozen one plus a matrix of rank 3; (ranks kept,
    relative error).
    """
    config.setdefault("threshold", {"budget": 0.1})  # finds a rank; the default, 0.6, is to forget less
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw)

    weight, u, v = (
        normal(size, size) / 7,
        torch.linalg.qr(normal(size, 3))[0],
        torch.linalg.qr(normal(size, 3))[0],
    )
    delta = u * SIGMA @ v.T
    codyra = METHODS["codyra"]
    method = codyra(codyra.Config(targets=["q_proj"], rank=16, **config), seed)
    linear = nn.Linear(size, size, bias=False)
    linear.weight.data = weight.clone()
    model = nn.ModuleDict({"q_proj": linear})
    method.attach(model)
    method.begin_task(model, Task(0, None, None, None, None, {}))
    layer: LoraLinear = sites(model)["q_proj"]
    optimizer = ProximalAdamW(method.param_groups(model, 1e-2), betas=(0.9, 0.95), weight_decay=0.0)
    rates = [group["lr"] for group in optimizer.param_groups]
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * lr_factor("cosine", step, steps)
        method.before_step(optimizer.param_groups, step, steps, "cosine")
        if function := method.rewrite(step, steps):
            with torch.no_grad():
                factors = layer.lora_A, layer.lora_B, layer.lora_w
                before = Adapter(*(factor.detach() for factor in factors))
                after = function({"q_proj": before})["q_proj"]
                for p, value in zip(factors, after, strict=True):
                    p.copy_(value)
            for state in optimizer.state.values():  # as Engine.rewrite does
                for kept in state.values():
                    kept.zero_()
        x = normal(32, size)
        loss = ((layer(x) - x @ (weight + delta).T - noise * normal(32, size)) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    adapter = Adapter(layer.lora_A.detach(), layer.lora_B.detach(), layer.lora_w.detach())
    found = method.consolidate({"q_proj": adapter}, 0).adapters["q_proj"]
    return len(found.a), ((found.delta(1.0) - delta).norm() / delta.norm()).item()


@pytest.mark.parametrize("init", ["constant", "normal"])
def test_planted_rank_is_recovered(init):
    dense = [planted(seed, importance_init=init, align=False, threshold={"budget": 0.0}) for seed in range(3)]
    sparse = [planted(seed, importance_init=init) for seed in range(3)]
    assert [kept for kept, _ in dense] == [16] * 3
    assert [kept for kept, _ in sparse] == [3] * 3
    assert sum(e for _, e in sparse) < sum(e for _, e in dense), "selecting must not cost accuracy"


def test_selection_beats_the_same_number_of_ranks_by_lot():
    chosen = [planted(seed) for seed in range(3)]
    lot = [planted(seed, align=False, selection="random", keep=3 / 16) for seed in range(3)]
    assert [kept for kept, _ in lot] == [kept for kept, _ in chosen] == [3] * 3
    assert all(by_lot > 1.5 * selected for (_, selected), (_, by_lot) in zip(chosen, lot, strict=True))


def test_without_alignment_the_planted_rank_is_not_found():
    """What `align` is for: at any budget that prunes at all, the parts lose alike and the update with
    them.
    """
    for budget in (0.3, 0.6, 1.0):
        kept, error = planted(0, align=False, threshold={"budget": budget})
        assert kept > 3 or error > 0.3


def test_published_rule_prunes_nothing_in_a_short_task():
    kept, _ = planted(
        0,
        steps=90,
        align=False,
        importance_init="normal",
        threshold={"schedule": "published", "operator": "released"},
    )
    assert kept == 16


def begun(**config):
    """The method and a model of one layer with its adapter."""
    codyra = METHODS["codyra"]
    method = codyra(codyra.Config(targets=["q_proj"], rank=4, **config), 0)
    model = nn.ModuleDict({"q_proj": nn.Linear(6, 5, bias=False)})
    method.attach(model)
    method.begin_task(model, Task(0, None, None, None, None, {}))
    return method, model


@pytest.mark.parametrize("own", [None, 0.25, 0.0])
def test_nothing_but_the_threshold_shrinks_importances(own):
    """The optimizer's weight decay shrinks A alone; w has its own rate where one is given."""
    method, model = begun(importance_lr=own)
    layer = sites(model)["q_proj"]
    a, w = layer.lora_A.detach().clone(), layer.lora_w.detach().clone()
    optimizer = ProximalAdamW(method.param_groups(model, 0.1), weight_decay=0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1 if own is None else own]
    for p in (layer.lora_A, layer.lora_B, layer.lora_w):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(layer.lora_A.detach(), a * (1 - 0.1 * 0.5))
    assert torch.equal(layer.lora_w.detach(), w)


@pytest.mark.parametrize("dense, steps", [(0.5, 39), (0.0, 7), (0.3, 10)])
def test_alignment_comes_once_before_the_first_shrink(dense, steps):
    method, _ = begun(threshold={"dense": dense})
    aligns = [step for step in range(steps) if method.rewrite(step, steps)]
    kappas = [shrink(method.config.threshold, step, steps, "constant") for step in range(steps)]
    assert aligns == [next(step for step, kappa in enumerate(kappas) if kappa)]


def test_alignment_keeps_the_update_and_orders_its_parts():
    draw = torch.Generator().manual_seed(0)
    adapter = Adapter(
        torch.randn(5, 9, generator=draw), torch.randn(7, 5, generator=draw), torch.randn(5, generator=draw)
    )
    found = aligned(adapter)
    torch.testing.assert_close(found.delta(1.0), adapter.delta(1.0), rtol=1e-4, atol=1e-5)
    singular = torch.linalg.svdvals(adapter.delta(1.0))[:5]
    torch.testing.assert_close(found.w, singular / singular[0])
    torch.testing.assert_close(found.a.norm(dim=1), torch.full((5,), 1 / math.sqrt(3)))
    gram = found.b.T @ found.b
    torch.testing.assert_close(gram, torch.diag(gram.diagonal()), rtol=1e-4, atol=1e-3)
    nothing = Adapter(adapter.a, torch.zeros(7, 5), adapter.w)
    assert aligned(nothing) is nothing


@pytest.mark.parametrize("out, wide", [(5, 9), (9, 5)])
def test_alignment_of_more_ranks_than_the_matrix_can_have(out, wide):
    """As of a model whose keys are narrower than its hidden size: the parts beyond are gone for good."""
    rank, most, draw = 7, 5, torch.Generator().manual_seed(0)
    a, b = torch.randn(rank, wide, generator=draw), torch.randn(out, rank, generator=draw)
    adapter = Adapter(a, b, torch.rand(rank, generator=draw))
    found = aligned(adapter)
    torch.testing.assert_close(found.delta(1.0), adapter.delta(1.0), rtol=1e-4, atol=1e-5)
    singular = torch.linalg.svdvals(adapter.delta(1.0))
    torch.testing.assert_close(found.w[:most], singular / singular[0])
    assert found.a.shape == adapter.a.shape and found.b.shape == adapter.b.shape
    gone = [found.a[most:], found.b[:, most:], found.w[most:]]
    assert not any(part.any() for part in gone)
