"""The drift penalty, the merge and the priced parts against brute force in float64."""

from itertools import combinations

import pytest
import torch
from moments_cases import dense, inputs, moment, normal
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from codyra_llm.config.methods.sequential import CodyraDriftConfig
from codyra_llm.config.registry import METHODS
from codyra_llm.lora.layer import AdapterSpec, attach, sites
from codyra_llm.lora.update import Adapter
from codyra_llm.methods.base import Task
from codyra_llm.methods.parts.drift import DriftPenalty, penalty_operations, share
from codyra_llm.methods.parts.moments import SecondMoment
from codyra_llm.methods.parts.old_inputs import OldInputs
from codyra_llm.methods.parts.pricing import dropped, joint
from codyra_llm.methods.parts.sparing import solved, spared, woodbury
from codyra_llm.methods.sequential import codyra_drift

SIZES = {"q_proj": (40, 7), "k_proj": (40, 3), "v_proj": (40, 3), "o_proj": (24, 40), "down_proj": (24, 40)}


@pytest.fixture
def model():
    """Five adapted layers in float64, q, k and v reading one input; s = 2, weights w."""
    torch.manual_seed(0)
    block = nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in SIZES.items()}).double()
    block.config = LlamaConfig()  # whose names these are
    attach(block, list(SIZES), AdapterSpec(3, 2.0, importance="normal"))
    for i, layer in enumerate(sites(block).values()):
        layer.reset(i)
        with torch.no_grad():
            layer.lora_B.copy_(normal(*layer.lora_B.shape, seed=i))
    return block


@pytest.mark.parametrize("width", [16, 4])
def test_the_penalty_is_the_drift_of_sampled_inputs(model, width):
    """Against outputs, summed over sites; its gradient against autograd through the outputs."""
    x = {"q_proj": inputs(400, 40, seed=1), "o_proj": inputs(400, 24, seed=2)}
    x["down_proj"] = inputs(400, 24, seed=3)
    old = {name: moment(rows, width)[0] for name, rows in x.items()}
    found = DriftPenalty(model, old)()
    expected = 0.0
    for site, layer in sites(model).items():
        name = "q_proj" if site in ("k_proj", "v_proj") else site
        delta = 2.0 * (layer.lora_B * layer.lora_w) @ layer.lora_A
        if old[name].weights is None:
            expected = expected + ratio(x[name] @ delta.T, x[name] @ layer.weight.T)
        else:  # what the sketch says of the inputs is measured in test_moments
            root = torch.linalg.cholesky(dense(old[name])).T
            expected = expected + ratio(root @ delta.T, root @ layer.weight.T)
    torch.testing.assert_close(found, expected)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for one, two in zip(
        torch.autograd.grad(found, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("sketch", [16, 8, 4])
def test_the_penalty_s_operations_are_counted(model, sketch):
    """Against torch's counter, over all inputs whole, one of three sketched, and all sketched."""
    x = {"q_proj": inputs(100, 40, seed=1), "o_proj": inputs(100, 24, seed=2)}
    x["down_proj"] = inputs(100, 24, seed=3)
    penalty = DriftPenalty(model, {name: moment(rows, sketch)[0] for name, rows in x.items()})
    with FlopCounterMode(display=False) as counter:
        penalty().backward()
    assert penalty_operations(model, sketch) == counter.get_total_flops()


def ratio(change, output):
    return change.square().sum() / output.square().sum()


def test_the_penalty_of_some_inputs_leaves_the_others_out(model):
    old = {"o_proj": moment(inputs(100, 24), 16)[0]}
    DriftPenalty(model, old)().backward()
    assert model["o_proj"].lora_B.grad is not None and model["q_proj"].lora_B.grad is None


@pytest.mark.parametrize("width", [16, 4])
def test_the_merge_is_the_minimiser(width):
    """A* against a numerical minimiser (L-BFGS on ΔW's own entries), of the same rank."""
    new, old = (moment(inputs(300, 20, seed=s), width)[0] for s in (1, 2))
    adapter = Adapter(normal(2, 20, seed=3).float(), normal(6, 2, seed=4).float(), None)
    weight, ridge = 0.7, 1e-2
    (found,) = spared([adapter], new, old, weight, ridge)
    delta = (adapter.b @ adapter.a).double()
    x = delta.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([x], max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-16)

    def loss():
        optimizer.zero_grad()
        value = new.energy(delta - x) + weight * old.energy(x) + ridge * new.mean * x.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    torch.testing.assert_close(found.delta(1.0).double(), x.detach(), rtol=1e-4, atol=1e-5)
    assert torch.equal(found.b, adapter.b) and torch.linalg.matrix_rank(x.detach(), atol=1e-4) == 2


def test_the_merge_of_one_input_s_sites_is_that_of_each():
    new, old = (moment(inputs(300, 20, seed=s), 20)[0] for s in (1, 2))
    adapters = [Adapter(normal(2, 20, seed=s).float(), normal(6, 2, seed=s).float(), None) for s in (5, 6)]
    together = spared(adapters, new, old, 1.0, 1e-4)
    for adapter, found in zip(adapters, together, strict=True):
        torch.testing.assert_close(found.a, spared([adapter], new, old, 1.0, 1e-4)[0].a)


def test_woodbury_against_the_inverse():
    new, old = (moment(inputs(300, 60, seed=s), 8)[0] for s in (1, 2))
    rows = normal(3, 60, seed=3)
    matrix = dense(new) + 0.5 * dense(old) + 1e-3 * torch.eye(60).double()
    torch.testing.assert_close(solved(rows, new, old, 0.5, 1e-3), rows @ torch.linalg.inv(matrix))
    sides, weights = normal(60, 5, seed=4), torch.tensor([[3.0, 0.0, 1.0, 1e-9, 2.0]]).double()
    inverse = torch.linalg.inv(0.1 * torch.eye(60).double() + sides * weights @ sides.T)
    torch.testing.assert_close(woodbury(rows, sides, weights, 0.1), rows @ inverse)


@pytest.mark.parametrize("weight", [1.0, 1e3, 1e6])
def test_the_merge_stands_rounding_of_the_old_moment(weight):
    """Fewer tokens than dimensions, one of them an outlier: stored in float32, the moment has eigenvalues
    below 0, which a large weight raises above the ridge."""
    new, old = (moment(inputs(50, 300, seed=s), 300)[0] for s in (1, 2))
    old.factor[0, 0] += 1e4
    stored = SecondMoment(old.factor.float())
    assert torch.linalg.eigvalsh(stored.factor.double()).min() < 0
    adapter = Adapter(normal(2, 300, seed=3).float(), normal(6, 2, seed=4).float(), None)
    (found,) = spared([adapter], new, stored, weight, 1e-6)
    (plain,) = spared([adapter], new, stored, 0.0, 1e-6)
    assert found.a.isfinite().all() and found.a.any()
    assert old.energy(found.delta(1.0).double()) < old.energy(plain.delta(1.0).double())


def test_the_merge_of_an_input_without_energy_is_nothing():
    """As a layer's that every task leaves at zero."""
    adapter = Adapter(normal(2, 20, seed=3).float(), normal(6, 2, seed=4).float(), None)
    for width in (20, 4):
        none = moment(torch.zeros(30, 20).double(), width)[0]
        for old in (none, moment(inputs(300, 20, seed=2), width)[0]):
            (found,) = spared([adapter], none, old, 1.0, 1e-3)
            assert not found.a.any() and torch.equal(found.b, adapter.b)


@pytest.mark.parametrize("width", [20, 4])
def test_parts_have_no_cross_terms(width):
    """The parts give ΔW; on old and on new inputs their energies add up, whichever of them are taken."""
    new, old = (moment(inputs(300, 20, seed=s), width)[0] for s in (1, 2))
    adapter = Adapter(normal(4, 20, seed=3).float(), normal(6, 4, seed=4).float(), normal(4, seed=5).float())
    parts, costs, gains = joint(adapter, new, old, 0.25, 1e-12)
    torch.testing.assert_close(parts.delta(1.0), adapter.delta(1.0), rtol=1e-4, atol=1e-4)
    assert (gains / costs).diff().min() >= 0
    for taken in [(0,), (1, 3), (0, 1, 2, 3)]:
        kept = list(taken)
        delta = (parts.b[:, kept] @ parts.a[kept]).double()
        assert 0.25 * old.energy(delta) == pytest.approx(costs[kept].sum().item(), rel=1e-4)
        assert 0.25 * new.energy(delta) == pytest.approx(gains[kept].sum().item(), rel=1e-4)
    torch.testing.assert_close(parts.a.norm(dim=1), torch.full((4,), 3**-0.5))


def test_no_other_choice_of_as_little_cost_gains_more():
    """All 2⁸ choices of the parts of two sites, up to the part at the edge."""
    draw = torch.rand(2, 8, generator=torch.Generator().manual_seed(0)).double()
    costs, gains = draw[0], draw[1]
    priced = {"one": (None, costs[:3], gains[:3]), "two": (None, costs[3:], gains[3:])}
    for keep in (0.0, 0.1, 0.4, 0.8, 1.0):
        kept = 1 - torch.cat(list(dropped(priced, keep).values()))
        spent, gained = (costs * kept).sum(), (gains * kept).sum()
        assert spent <= keep * costs.sum() + 1e-12
        choices = (list(c) for n in range(9) for c in combinations(range(8), n))
        assert max(gains[c].sum() for c in choices if costs[c].sum() <= spent) <= gained + 1e-12
    assert kept.all()


def test_the_share_is_that_of_the_layer_s_output(model):
    found, whole = moment(inputs(100, 24), 16)
    layer = model["o_proj"]
    said = (layer.weight.double() @ whole @ layer.weight.double().T).trace()
    torch.testing.assert_close(share(layer, found), 4.0 / said)
    with torch.no_grad():
        layer.weight.zero_()
    assert share(layer, found) == 0


READ = {"q_proj": ("q_proj", "k_proj", "v_proj"), "o_proj": ("o_proj",), "down_proj": ("down_proj",)}


def seconds(seed):
    """By an input's first site: Σ and its trace, of inputs that differ with the seed."""
    found = {}
    for place, name in enumerate(READ):
        whole = moment(inputs(300, SIZES[name][0], seed=seed + place), 16)[1]
        found[name] = whole, whole.trace()
    return found


def begun(model, monkeypatch, **config):
    """The method in its second task, the second moments of the first, and those of this one."""
    old, new, asked = seconds(10), seconds(20), []

    def read(config, model, task, seed, answer_share):
        asked.append(answer_share)
        return new

    monkeypatch.setattr(codyra_drift, "task_moments", read)
    settings = CodyraDriftConfig(
        targets=list(SIZES), rank=3, scale=2.0, sketch=16, answer_share=0.4, **config
    )
    method = METHODS["codyra_drift"](settings, 0)
    task = Task(1, None, None, None, None, OldInputs(settings, {}).state_with(old))
    method.begin_task(model, task)
    for i, layer in enumerate(sites(model).values()):
        with torch.no_grad():
            layer.lora_B.copy_(normal(*layer.lora_B.shape, seed=i))
    return method, task, old, new, asked


def test_the_method_weights_its_penalty(model, monkeypatch):
    method, _, old, _, _ = begun(model, monkeypatch, drift_weight=0.3)
    expected = 0.0
    for name, own in READ.items():
        for site in own:
            layer, whole = sites(model)[site], old[name][0]
            delta = 2.0 * (layer.lora_B * layer.lora_w) @ layer.lora_A
            change, output = delta @ whole @ delta.T, layer.weight @ whole @ layer.weight.T
            expected += 0.3 * (change.trace() / output.trace()).item()
    assert method.penalty(model)["drift"].item() == pytest.approx(expected, rel=1e-5)


def test_the_method_merges_the_task_s_own_inputs_against_those_before_it(model, monkeypatch):
    """A* = A N (N + μ_m O + εI)⁻¹; afterwards the task's moments are one source of the old ones."""
    method, task, old, new, asked = begun(model, monkeypatch, merge_weight=0.7, ridge=1e-2)
    state = method.end_task(model, task, None)
    assert asked == [0.4] and state["sources"] == 2
    adapters = {}
    for site, layer in sites(model).items():
        factors = layer.lora_A, layer.lora_B, layer.lora_w
        adapters[site] = Adapter(*(factor.detach().float() for factor in factors))
    update = method.consolidate(adapters, 1)
    assert update.scale == 2.0 and list(update.adapters) == list(adapters)
    for name, own in READ.items():
        n, o = new[name][0], old[name][0]
        torch.testing.assert_close(state[f"{name}.product"].double(), n + o, rtol=1e-6, atol=1e-6)
        ridge = 1e-2 * n.trace() / len(n) * torch.eye(len(n)).double()
        for site in own:
            expected = adapters[site].a.double() @ n @ torch.linalg.inv(n + 0.7 * o + ridge)
            torch.testing.assert_close(update.adapters[site].a.double(), expected, rtol=1e-4, atol=1e-5)
            assert torch.equal(update.adapters[site].b, adapters[site].b)


def test_the_method_drops_the_parts_with_the_least_gain_per_drift(model, monkeypatch):
    """Costs and gains of the rewritten parts by their dense ΔW, as shares of the outputs on old inputs, which
    differ between layers."""
    with torch.no_grad():
        for size, layer in enumerate(sites(model).values(), start=1):
            layer.weight.mul_(size)
    method, _, old, new, _ = begun(model, monkeypatch, selection="ratio", keep_drift=0.5)
    adapters = {}
    for site, layer in sites(model).items():
        factors = layer.lora_A, layer.lora_B, layer.lora_w
        adapters[site] = Adapter(*(factor.detach().float() for factor in factors))
    parts = method.rewrite(5, 10)(adapters)
    costs, gains, gone = [], [], []
    for name, own in READ.items():
        for site in own:
            torch.testing.assert_close(
                parts[site].delta(1.0), adapters[site].delta(1.0), rtol=1e-3, atol=1e-3
            )
            weight = sites(model)[site].weight
            output = (weight @ old[name][0] @ weight.T).trace()
            for k in range(3):
                delta = 2.0 * torch.outer(parts[site].b[:, k], parts[site].a[k]).double()
                costs.append((delta @ old[name][0] @ delta.T).trace().item() / output.item())
                gains.append((delta @ new[name][0] @ delta.T).trace().item() / output.item())
                gone.append(bool(method.progress()[site][k]))
    order = sorted(range(len(costs)), key=lambda i: gains[i] / costs[i])
    left, count = sum(costs), 0
    while left > 0.5 * sum(costs):
        left, count = left - costs[order[count]], count + 1
    assert [i for i in range(len(costs)) if gone[i]] == sorted(order[:count]) and 0 < count < len(costs)
