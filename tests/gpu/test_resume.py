"""Adam's state on a GPU, read back as a checkpoint holds it: on the CPU."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional

from codyra_llm.config.sections import OptimSection
from codyra_llm.data.encoding import Encoded
from codyra_llm.lora.layer import AdapterSpec, attach, sites
from codyra_llm.methods.base import Method
from codyra_llm.train.task_data import TaskData
from codyra_llm.train.trainer import Trainer

EXAMPLES = [Encoded([1], [2], False), Encoded([3], [1, 2], False), Encoded([1, 2], [3], False)]


class SumOfFirstTokens(Method):
    """Its loss reads the layer: the sum of squares of what it makes of each example's first token."""

    packs = False

    def loss(self, model, batch):
        first = functional.one_hot(batch.ids[:, 0], 4).float()
        return {"loss": model["q_proj"](first).square().sum()}


def trained(stops: bool) -> torch.Tensor:
    """B after six steps; `stops`: with the state read back between them, as after a restart."""
    torch.manual_seed(0)
    acc = Accelerator()
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 3, bias=False)}).requires_grad_(False)
    attach(model, ["q_proj"], AdapterSpec(2, 1.5, 0.0))
    for name, layer in sites(model).items():
        layer.reset(0, name)
    section = OptimSection(lr=0.1, schedule="constant", batch_size=4, betas=(0.9, 0.99), loss_average="token")
    trainer = Trainer(acc, SumOfFirstTokens(None, 0), model.to(acc.device), section, pad=0)
    for row in trainer.fit(TaskData("T", 0, EXAMPLES, [range(3)] * 6, []), 1):
        if stops and row.step == 3:
            kept = {key: tensor.cpu().clone() for key, tensor in trainer.engine.state()}
            trainer.engine.load_state(iter(kept.items()))
    return trainer.adapters()["q_proj"].b


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_a_checkpoint_holds_goes_on_as_if_nothing_had_been():
    assert torch.equal(trained(stops=True), trained(stops=False))
