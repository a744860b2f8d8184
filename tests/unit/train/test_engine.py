"""The engine of one task, in one process."""

import torch
from accelerate import Accelerator
from torch import nn

from codyra_llm.lora.layer import AdapterSpec, attach, sites
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
