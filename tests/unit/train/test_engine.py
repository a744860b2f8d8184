"""The engine of one task, in one process, or in one that takes itself for one of two."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from codyra_llm.lora.layer import AdapterSpec, attach, sites
from codyra_llm.runtime.memory import Meter
from codyra_llm.train import engine as engines
from codyra_llm.train.engine import Engine
from codyra_llm.train.trainer import Objective


class TwoLayers(nn.Module):
    """A model of which a batch may pass over one layer."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)


class SumOfOne:
    """A method whose loss reads one of the layers."""

    def loss(self, model, batch):
        return {"loss": model.q_proj(batch).sum()}

    def penalty(self, model):
        return {}


def test_adapters_are_rewritten_after_a_checkpoint_where_one_never_had_a_gradient():
    model = TwoLayers().requires_grad_(False)
    attach(model, ["q_proj", "v_proj"], AdapterSpec(2))
    for name, layer in sites(model).items():
        layer.reset(0, name)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    engine = Engine(Accelerator(cpu=True), Objective(model, SumOfOne()), optimizer, 1.0)
    engine.accumulate(torch.ones(2, 4), first=True, last=True)
    engine.step()
    saved = {key for key, _ in engine.state()}
    assert "exp_avg.q_proj.lora_B" in saved and "exp_avg.v_proj.lora_B" not in saved
    engine.rewrite(lambda adapters: {site: one._replace(b=one.b + 1) for site, one in adapters.items()})
    assert all(layer.lora_B.mean() > 0.5 for layer in sites(model).values())
    for state in optimizer.state.values():
        assert not (state["exp_avg"].any() or state["exp_avg_sq"].any() or state["step"].any())


def test_a_loss_without_a_gradient_is_refused():
    """Else a model in which nothing trains would train to its end."""
    model = TwoLayers().requires_grad_(False)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    engine = Engine(Accelerator(cpu=True), Objective(model, SumOfOne()), optimizer, 1.0)
    with pytest.raises(RuntimeError, match="does not require grad"):
        engine.accumulate(torch.ones(2, 4), first=True, last=True)


@pytest.mark.parametrize("large", [1, 100, 10_000])
def test_gradients_are_summed_over_ranks_whatever_their_size(monkeypatch, large):
    """Another rank with the same gradients doubles them. A large one is not copied together with the
    others, which for all weights of a model would take twice their memory."""
    model = nn.ModuleList([nn.Linear(40, 50), nn.Linear(40, 50), nn.Linear(3, 2)])
    model.q_proj, parameters = model[0], list(model.parameters())
    engine = Engine(Accelerator(cpu=True), Objective(model, SumOfOne()), torch.optim.SGD(parameters), 1.0)
    for number, p in enumerate(parameters[:-1]):  # the last got none
        p.grad = torch.full_like(p, number + 1.0)
    monkeypatch.setattr(engines, "LARGE", large)
    monkeypatch.setattr(type(engine.acc), "num_processes", 2)
    monkeypatch.setattr(type(engine.acc), "reduce", lambda acc, tensor, how: 2 * tensor)
    with Meter() as meter:
        read = engine.reduce(torch.tensor([3.0]), [1.0, 0.0])
    assert read.tolist() == [6.0, 2.0, 0.0]
    for number, p in enumerate(parameters[:-1]):
        assert torch.equal(p.grad, torch.full_like(p, 2 * (number + 1.0)))
    assert not parameters[-1].grad.any()
    whole = sum(p.nbytes for p in parameters)
    assert meter.peak < (1.6 * whole if large <= 100 else 3.1 * whole)
