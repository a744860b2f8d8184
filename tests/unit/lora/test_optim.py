"""The proximal optimizer against the closed form, the schedules against their sums."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torch.utils._python_dispatch import TorchDispatchMode

from codyra_llm.lora.proximal import (
    ProximalAdamW,
    budget_kappa,
    lr_factor,
    published_kappa,
    released_threshold,
    soft_threshold,
    vanishing_rate,
)


def test_a_gradient_may_lie_in_memory_in_another_order():
    """As a method's own that it has transposed; the fused kernel reads memory as it lies."""
    torch.manual_seed(0)
    start, grad = torch.randn(5, 7), torch.randn(7, 5).T
    steps = []
    for gradient, kernel in ((grad, {"fused": True}), (grad.contiguous(), {"foreach": False})):
        parameter = start.clone().requires_grad_()
        optimizer = ProximalAdamW([parameter], lr=0.1, **kernel)
        for _ in range(3):
            parameter.grad = gradient
            optimizer.step()
        steps.append(parameter.detach())
    torch.testing.assert_close(*steps)


@given(st.floats(-3, 3), st.floats(0, 2))
def test_soft_threshold_is_the_proximal_operator(x, kappa):
    """prox_κ(x) = argmin_p ½(p - x)² + κ|p|, found by a search on both sides of 0."""

    def cost(p):
        return 0.5 * (p - x) ** 2 + kappa * abs(p)

    found = soft_threshold([torch.tensor(x, dtype=torch.float64)], kappa)[0].item()
    candidates = [0.0] + [minimize_scalar(cost, bounds=b, method="bounded").x for b in ((-3, 0), (0, 3))]
    assert cost(found) <= min(map(cost, candidates)) + 1e-9


def test_released_rule_is_the_three_sequential_lines():
    w, kappa = torch.linspace(-1, 1, 4001, dtype=torch.float64), 0.13
    expected = w.clone()
    expected[expected > kappa] -= kappa
    expected[expected < -kappa] += kappa
    expected[expected.abs() < kappa] = 0
    (found,), (soft,) = released_threshold([w], kappa), soft_threshold([w], kappa)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert (found == 0).sum() > (soft == 0).sum()


def test_step_is_adamw_then_prox():
    torch.manual_seed(0)
    start, grads = torch.randn(50, dtype=torch.float64), torch.randn(5, 50, dtype=torch.float64)
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    mine = ProximalAdamW([{"params": [ours], "kappa": 0.05, "operator": "soft"}], lr=0.01, weight_decay=0.1)
    other = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1)
    for g in grads:
        ours.grad, theirs.grad = g.clone(), g.clone()
        mine.step()
        other.step()
        with torch.no_grad():
            theirs.copy_(theirs.sign() * torch.clamp(theirs.abs() - 0.05, min=0))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-15)
    assert (ours == 0).any() and not (ours == 0).all()


def _one_at_a_time(kind, x, kappa, drop):
    """The three rules as formulas of one tensor."""
    if kind == "drop":
        return x * (1 - kappa * drop)
    shrunk = x.sign() * (x.abs() - kappa).clamp(min=0)
    return shrunk if kind == "soft" else shrunk * (shrunk.abs() >= kappa)


@pytest.mark.parametrize("kind", ["soft", "released", "drop"])
def test_all_parameters_at_once_are_each_alone_to_the_last_bit(kind):
    """Values on both sides of κ and of 2κ, and exactly there."""
    torch.manual_seed(0)
    kappa = 0.0137
    edges = torch.tensor([0.0, kappa, -kappa, 2 * kappa, -2 * kappa])
    starts = [torch.cat([edges, 0.03 * torch.randn(n)]) for n in (3, 40, 7)]
    params = [start.clone().requires_grad_() for start in starts]
    drop = [(torch.rand_like(start) < 0.5).float() for start in starts]
    group = {"params": params, "kappa": kappa, "operator": kind if kind != "drop" else "soft"}
    optimizer = ProximalAdamW([group | ({"drop": drop} if kind == "drop" else {})], lr=0.0)
    for p in params:
        p.grad = torch.zeros_like(p)
    versions = [p._version for p in params]
    optimizer.step()
    for p, start, mask in zip(params, starts, drop, strict=True):
        assert torch.equal(p.detach(), _one_at_a_time(kind, start, kappa, mask))
    assert all(p._version > version for p, version in zip(params, versions, strict=True))


def test_the_proximal_step_is_a_few_operations_however_many_parameters_there_are():
    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    counts = []
    for count in (2, 30):
        group = {"params": [torch.randn(5).requires_grad_() for _ in range(count)], "operator": "released"}
        with_kappa, seen = ProximalAdamW([group | {"kappa": 0.1}]), []
        with Count():
            with_kappa.step()  # no gradients, so that Adam has nothing to do
        counts.append(len(seen))
    assert counts[0] == counts[1] < 20


def test_a_group_that_is_empty_is_passed_over():
    """ZeRO 3 empties all groups but that of the shards with which it steps."""
    weight = torch.nn.Parameter(torch.tensor([1.0, 0.05]))
    kinds = [{"operator": "soft"}, {"operator": "released"}, {"operator": "soft", "drop": [torch.ones(2)]}]
    optimizer = ProximalAdamW([{"params": [weight], "kappa": 0.1, **kind} for kind in kinds[:1]], lr=0.0)
    for kind in kinds:
        optimizer.param_groups.append({**optimizer.param_groups[0], **kind, "params": []})
    weight.grad = torch.zeros(2)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([0.9, 0.0]))


def test_no_kappa_is_adamw_bit_by_bit():
    start, g = torch.randn(20), torch.randn(20)
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    for p, optimizer in (
        (ours, ProximalAdamW([ours], lr=0.1)),
        (theirs, torch.optim.AdamW([theirs], lr=0.1)),
    ):
        p.grad = g.clone()
        optimizer.step()
    assert torch.equal(ours, theirs)


def test_dropped_elements_fall_on_a_straight_line_to_zero():
    p, steps = torch.ones(4).requires_grad_(), 10
    optimizer = ProximalAdamW([{"params": [p], "kappa": 0.0, "drop": [torch.tensor([1.0, 0, 1, 0])]}], lr=0.0)
    seen = []
    for step in range(steps):
        optimizer.param_groups[0]["kappa"] = vanishing_rate(step, steps, 0.5)
        p.grad = torch.zeros(4)
        optimizer.step()
        seen.append(p[0].item())
    np.testing.assert_allclose(seen, [1] * 5 + [2 / 3, 1 / 3, 0, 0, 0], atol=1e-6)
    assert p.tolist() == [0, 1, 0, 1]


@given(st.integers(1, 400), st.floats(0, 0.95), st.floats(0.01, 3), st.sampled_from(["constant", "cosine"]))
def test_budget_does_not_depend_on_the_number_of_steps(steps, dense, budget, schedule):
    kappas = [budget_kappa(step, steps, dense, budget, schedule) for step in range(steps)]
    assert sum(kappas) == pytest.approx(budget)
    assert all(k == 0 for k in kappas[: int(dense * steps)]) and all(
        k > 0 for k in kappas[int(dense * steps) :]
    )


def test_budget_is_spent_while_the_learning_rate_can_answer():
    ramp, humped = ([budget_kappa(t, 100, 0.5, 1.0, s) for t in range(100)] for s in ("constant", "cosine"))
    assert ramp == sorted(ramp) and ramp[-1] == max(ramp)
    np.testing.assert_allclose(
        np.array(humped) * sum(np.array(ramp) * [lr_factor("cosine", t, 100) for t in range(100)]),
        np.array(ramp) * [lr_factor("cosine", t, 100) for t in range(100)],
        rtol=1e-9,
    )


@pytest.mark.parametrize("steps, total, survivors", [(90, 0.0, 1.0), (500, 0.65, 0.52), (1000, 1.3, 0.19)])
def test_published_schedule_prunes_by_the_number_of_steps(steps, total, survivors):
    """Σκ and the share of N(0,1) weights that outlive it, against the loop of the released code."""
    kappas = [published_kappa(step, steps, 0.5, 0.005) for step in range(steps)]
    assert kappas == _released_loop(steps)
    assert sum(kappas) == pytest.approx(total, rel=0.03, abs=1e-9)
    w = torch.randn(20000, generator=torch.Generator().manual_seed(0))
    for kappa in kappas:
        (w,) = released_threshold([w], kappa)
    assert (w != 0).float().mean().item() == pytest.approx(survivors, abs=0.02)


@pytest.mark.parametrize("dense", [0.0, 0.3, 0.5, 0.75])
@pytest.mark.parametrize("steps", [1, 99, 100, 101, 199, 500, 501, 749])
def test_published_schedule_where_a_share_of_the_steps_is_no_whole_number(steps, dense):
    kappas = [published_kappa(step, steps, dense, 0.005) for step in range(steps)]
    assert kappas == _released_loop(steps, dense=dense)


def _released_loop(steps, kappa_max=0.005, stages=50, dense=0.5):
    """In the fraction of a step that the dense phase ends at, as the released code has it."""
    table, stage, kappa, out = np.linspace(0, kappa_max, stages), 0, 0.0, []
    end = dense * steps
    stride = int((steps - end) // stages)
    for it in range(steps):
        if stride > 0 and it >= end and it % stride == 0:
            stage += 1
            kappa = table[min(stages - 1, stage)]
        out.append(float(kappa) if it > end else 0.0)
    return pytest.approx(out)


def test_learning_rates():
    assert [lr_factor("constant", s, 10) for s in (0, 9)] == [1, 1]
    assert lr_factor("cosine", 0, 10) == 1 and lr_factor("cosine", 5, 10) == pytest.approx(0.5)
