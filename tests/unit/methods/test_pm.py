"""Perturb and merge: the coefficient against a search, and as the scalar case of the merge of a matrix."""

from types import SimpleNamespace

import adapters
import pytest
import torch
from adapters import a_task, attached
from torch import nn

from codyra_llm.lora.layer import AdapterSpec, LoraLinear, sites
from codyra_llm.lora.update import Adapter
from codyra_llm.methods.base import Task
from codyra_llm.methods.parts.moments import SecondMoment
from codyra_llm.methods.parts.sparing import spared
from codyra_llm.methods.sequential import pm
from codyra_llm.methods.sequential.pm import coefficient, optimum_terms, relative_energies


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_coefficient_is_the_minimum_of_the_quadratic_loss():
    """Three tasks with their own optima and Fishers; α of the third by a search over its whole line."""
    fishers, optima = drawn(3, 4, 5, seed=1).square(), 0.3 * drawn(3, 4, 5, seed=2)
    model, delta = 0.2 * drawn(4, 5, seed=3), drawn(4, 5, seed=4)
    optima[2] = model + delta

    def loss(alpha: torch.Tensor) -> torch.Tensor:
        return sum(
            (f * (model + alpha * delta - o).square()).sum() for f, o in zip(fishers, optima, strict=True)
        )

    line = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    best = line[torch.stack([loss(alpha) for alpha in line[::1000]]).argmin() * 1000]
    near = torch.linspace(best - 0.01, best + 0.01, 2001, dtype=torch.float64)
    best = near[torch.stack([loss(alpha) for alpha in near]).argmin()]
    old, aimed = fishers[:2].sum(0), (fishers * optima)[:2].sum(0)
    found = coefficient(*(t.item() for t in optimum_terms(fishers[2], delta, old, aimed, model)))
    assert 0.1 < found < 0.9
    assert found == pytest.approx(best.item(), abs=2e-5)


def test_where_old_tasks_are_at_their_optimum_it_is_a_share_of_the_costs():
    fisher, delta, old, model = (
        drawn(4, 5, seed=1).square(),
        drawn(4, 5, seed=2),
        drawn(4, 5, seed=3).square(),
        0.0,
    )
    found = coefficient(
        *(t.item() for t in optimum_terms(fisher, delta, old, old * model, torch.tensor(model)))
    )
    new, before = (fisher * delta.square()).sum(), (old * delta.square()).sum()
    assert found == pytest.approx((new / (new + before)).item(), rel=1e-12)


def test_bounds():
    assert coefficient(1.0, 0.0) == 1.0 and coefficient(-1.0, 2.0) == 0.0 and coefficient(3.0, 2.0) == 1.0


def layer(weight: torch.Tensor, adapter: Adapter) -> LoraLinear:
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64)
    plain.weight.data.copy_(weight)
    adapted = LoraLinear(plain, AdapterSpec(len(adapter.a), 1.5))
    adapted.lora_A.data.copy_(adapter.a)
    adapted.lora_B.data.copy_(adapter.b)
    return adapted


def test_by_inputs_it_is_the_scalar_case_of_the_merge_of_a_matrix():
    """With Σ_old = κ Σ_new the best matrix A* is a multiple of A, and that multiple is α."""
    x = drawn(6, 20, seed=1)
    new, kappa, weight = x @ x.T / 20, 2.5, 0.4
    adapter = Adapter(drawn(2, 6, seed=2), drawn(5, 2, seed=3), None)
    moments = SecondMoment(new), SecondMoment(kappa * new)
    q_new, q_old = relative_energies(layer(drawn(5, 6, seed=4), adapter), *moments)
    alpha = coefficient(q_new, q_new + weight * q_old)
    (merged,) = spared([adapter], *moments, weight, 1e-12)
    torch.testing.assert_close(merged.a.double(), alpha * adapter.a, rtol=1e-5, atol=1e-6)
    assert alpha == pytest.approx(1 / (1 + weight * kappa), rel=1e-12)


def test_by_inputs_it_minimises_what_that_merge_minimises_among_multiples_of_the_update():
    """E_new|(1-α) ΔW x|² + μ E_old|α ΔW x|², for any two moments: a parabola through three points."""
    x, y, weight = drawn(6, 20, seed=1), drawn(6, 20, seed=2), 0.7
    new, old = x @ x.T / 20, y @ y.T / 20
    adapter = Adapter(drawn(2, 6, seed=3), drawn(5, 2, seed=4), None)
    delta = adapter.b @ adapter.a

    def lost(alpha: float) -> float:
        left, moved = (1 - alpha) * delta, alpha * delta
        return ((left @ new * left).sum() + weight * (moved @ old * moved).sum()).item()

    at_zero, at_half, at_one = lost(0.0), lost(0.5), lost(1.0)
    bend = 2 * (at_zero + at_one - 2 * at_half)
    best = (at_zero - at_one + bend) / (2 * bend)
    q_new, q_old = relative_energies(
        layer(drawn(5, 6, seed=5), adapter), SecondMoment(new), SecondMoment(old)
    )
    assert coefficient(q_new, q_new + weight * q_old) == pytest.approx(best, rel=1e-9)


def test_steps_are_taken_at_a_perturbed_update_and_nothing_else_is():
    """(1 ± ε) ΔW with both signs, the same for a step whenever it is asked; ΔW itself after the step."""
    method, model = attached("pm", perturbation=0.25)
    method.begin_task(model, SimpleNamespace(index=1))
    adapted, *_ = sites(model).values()
    torch.nn.init.normal_(adapted.lora_B)
    x, plain = torch.randn(2, 6), adapted.spec.scale
    frozen = x @ adapted.weight.T
    update = adapted(x) - frozen
    factors = []
    for step in (*range(8), 3):
        method.before_step([], step, 8, "constant")
        factors.append(((adapted(x) - frozen) / update).mean().item())
        method.after_step(None)
        assert adapted.spec.scale == plain
    assert {round(factor, 3) for factor in factors} == {0.75, 1.25} and factors[3] == factors[-1]


def test_the_state_is_what_the_next_optimum_needs_and_takes_no_memory_of_the_device(monkeypatch):
    """Of the first task F and F ∘ ΔW; the Fisher information is let go of, site by site."""
    method, model = attached("pm", curvature="fisher")
    method.begin_task(model, a_task(0))
    adapters.drawn(model, 2)
    draw = torch.Generator().manual_seed(1)
    fisher = {site: torch.rand(out, wide, generator=draw) for site, (wide, out) in adapters.SIZES.items()}
    given = dict(fisher)
    monkeypatch.setattr(pm, "weight_fisher", lambda *_: given)
    monkeypatch.setattr(Task, "sample", lambda *_: [])
    state = method.end_task(model, a_task(0), None)
    assert given == {}
    for site, layer in sites(model).items():
        delta = layer.spec.scale * layer.lora_B @ layer.lora_A
        assert torch.equal(state[f"{site}.fisher"], fisher[site])
        torch.testing.assert_close(state[f"{site}.aimed"], (fisher[site] * delta).detach())
