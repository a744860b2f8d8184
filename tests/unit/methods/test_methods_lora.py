"""Methods that constrain a LoRA adapter: each against its definition, against seqlora."""

import pytest
import torch
from adapters import SIZES, TASKS, a_task, attached, drawn

from codyra_llm.config.registry import METHODS
from codyra_llm.lora.layer import sites
from codyra_llm.lora.proximal import released_threshold
from codyra_llm.lora.update import Adapter, Update
from codyra_llm.methods.regularised.hidelora_treelora_repo import contrast
from codyra_llm.store.archive import Archive

# --- on single layers
# -------------------------------------------------------------------------------------------------


@pytest.fixture
def two_updates(tmp_path):
    draw = torch.Generator().manual_seed(1)
    archive = Archive(tmp_path / "updates", "base")
    for task in TASKS[:2]:
        factors = {
            site: (torch.randn(3, i, generator=draw), torch.randn(o, 3, generator=draw))
            for site, (i, o) in SIZES.items()
        }
        archive.append(task, Update({site: Adapter(a, b, None) for site, (a, b) in factors.items()}, 2.0))
    return archive


@pytest.mark.parametrize("kind", ["abs", "squared"])
def test_olora_penalty_and_its_gradient(kind, two_updates):
    method, model = attached("olora", overlap=kind, lambda_orthogonal=0.3, lambda_norm=0.2)
    method.begin_task(model, a_task(0))
    assert "orthogonal" not in method.penalty(model)
    method.begin_task(model, a_task(1, two_updates))
    assert method.penalty(model)["orthogonal"] > 0
    sum(method.penalty(model).values()).backward()
    assert all(layer.lora_B.grad.eq(0).all() for layer in sites(model).values()), (
        "B = 0 has a norm but no slope"
    )
    method.begin_task(model, a_task(2, two_updates))
    drawn(model, 2)
    model.zero_grad()
    found = method.penalty(model)
    sum(found.values()).backward()
    value, norms = 0.0, 0.0
    for site, layer in sites(model).items():
        old = torch.cat([two_updates.load(k).adapters[site].a for k in range(2)]).double()
        a, b = layer.lora_A.detach().double(), layer.lora_B.detach().double()
        products = old @ a.T
        value += (products.abs() if kind == "abs" else products**2).sum()
        norms += a.norm() + b.norm()
        slope = products.sign().T @ old if kind == "abs" else 2 * products.T @ old
        torch.testing.assert_close(
            layer.lora_A.grad.double(), 0.3 / 27 * slope + 0.2 * a / a.norm(), rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(layer.lora_B.grad.double(), 0.2 * b / b.norm(), rtol=1e-5, atol=1e-6)
    assert found["orthogonal"].item() == pytest.approx(0.3 / 27 * value.item())  # 3 sites of 3 x 3 pairs
    assert found["norm"].item() == pytest.approx(0.2 * norms.item())


def test_merged_old_adapters_equal_concatenated_ones(two_updates):
    """y = W x + s·[B_0 B_1][A_0; A_1] x + s·B A x, the form of the paper, is the merged W with the new
    adapter.
    """
    method, model = attached("olora", alpha=6.0)
    method.begin_task(model, a_task(2, two_updates))
    drawn(model, 3)
    for site, layer in sites(model).items():
        x = torch.randn(4, layer.in_features)
        parts = [two_updates.load(k).adapters[site] for k in range(2)]
        a, b = (
            torch.cat([p.a for p in parts] + [layer.lora_A]),
            torch.cat([p.b for p in parts] + [layer.lora_B], 1),
        )
        whole = x @ layer.weight.T + 2.0 * x @ a.T @ b.T
        with torch.no_grad():
            layer.weight += sum(p.delta(2.0) for p in parts)
        torch.testing.assert_close(layer(x), whole, rtol=1e-4, atol=1e-4)


def test_sora_threshold_is_the_three_lines():
    grid, kappa = torch.linspace(-3, 3, 600), 0.7  # meets no multiple of κ
    expected = grid.clone()
    expected[expected > kappa] -= kappa
    expected[expected < -kappa] += kappa
    expected[expected.abs() < kappa] = 0
    torch.testing.assert_close(released_threshold([grid], kappa)[0], expected)
    assert (expected[grid.abs() < 2 * kappa] == 0).all()


def test_gates_without_a_gradient_are_not_for_zero():
    """Its shards want a gradient of each parameter in them."""
    sora = METHODS["sora"]
    assert [sora(sora.Config(gate_lr=lr), 0).max_zero_stage for lr in (None, 1e-3, 0.0)] == [2, 2, 0]


def test_clora_is_the_dense_formula_and_keeps_what_is_old():
    method, model = attached("clora", alpha=6.0, weight=0.4, factor_lr=0.1)
    method.begin_task(model, a_task(0))
    layer = sites(model)["q_proj"]
    x = torch.randn(4, 6)
    torch.testing.assert_close(layer(x), x @ layer.weight.T)
    assert layer.lora_B.any() and not method.penalty(model)
    with torch.no_grad():
        layer.lora_w.normal_()  # no forget(): another version of R must make another product
    a, b, r = (t.detach().double().requires_grad_() for t in (layer.lora_A, layer.lora_B, layer.lora_w))
    y = x.double() @ (layer.weight.double() + 2.0 * b @ r @ a).T
    torch.testing.assert_close(layer(x), y.float(), rtol=1e-5, atol=1e-5)
    layer(x).square().sum().backward()
    y.square().sum().backward()
    for own, dense in zip((layer.lora_A, layer.lora_B, layer.lora_w), (a, b, r), strict=True):
        torch.testing.assert_close(own.grad, dense.grad.float(), rtol=1e-4, atol=1e-4)
    state = method.end_task(model, a_task(0), None)
    method.begin_task(model, a_task(1, state=state))
    groups = method.param_groups(model, 1.0)
    assert [g["lr"] for g in groups] == [1.0, 0.1]
    before = state["q_proj.lora_w"].clone()
    with torch.no_grad():
        layer.lora_w.add_(0.1)
    expected = 0.4 * (before.double().T @ torch.full((3, 3), 0.1, dtype=torch.float64)).square().sum()
    assert method.penalty(model)["routing"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert torch.equal(state["q_proj.lora_w"], before) and not torch.equal(layer.lora_w, before)
    adapter = Adapter(layer.lora_A.detach(), layer.lora_B.detach(), layer.lora_w.detach())
    plain = method.consolidate({"q_proj": adapter}, 1).adapters["q_proj"]
    torch.testing.assert_close(plain.delta(2.0), 2.0 * adapter.b @ adapter.w @ adapter.a)


def test_hidelora_contrast():
    a = torch.randn(2, 4, 6)
    expected = sum(-torch.log_softmax(m.double() @ m.double().T / 0.8, 1).diagonal().mean() for m in a)
    assert contrast(a, 0.8).item() == pytest.approx(expected.item(), rel=1e-5)


def test_hidelora_as_its_repository_runs_it_weights_the_sum_over_sites():
    method, model = attached("hidelora_treelora_repo", weight=0.3, temperature=0.7)
    drawn(model, 4)
    expected = 0.0
    for layer in sites(model).values():
        products = layer.lora_A.detach().double() @ layer.lora_A.detach().double().T
        expected += 0.3 * -torch.log_softmax(products / 0.7, 1).diagonal().mean().item()
    assert method.penalty(model)["contrast"].item() == pytest.approx(expected, rel=1e-5)


# --- InfLoRA
# ----------------------------------------------------------------------------------------------------------
