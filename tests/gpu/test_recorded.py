"""Recorded micro-batches on a GPU: the losses and adapters of training as it is without them."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from packed import examples, loaded

from codyra_llm.config.registry import METHODS
from codyra_llm.config.sections import OptimSection
from codyra_llm.lora.shared import share_inputs
from codyra_llm.train.trainer import TaskData, Trainer

LENGTHS = [(37, 4), (1, 2), (20, 3), (8, 9), (13, 3), (70, 2), (5, 5), (50, 2)]


def trained(folder, recorded: bool) -> tuple[list[float], dict, int]:
    """Losses and adapters after twelve steps, each of several micro-batches, and how many were recorded."""
    model = loaded(folder, torch.bfloat16).cuda().requires_grad_(False)
    method = METHODS["codyra"](METHODS["codyra"].Config(rank=4), 0)
    method.attach(model)
    share_inputs(model)
    method.begin_task(model, SimpleNamespace(index=0))
    optim = OptimSection(
        lr=1e-3,
        schedule="constant",
        batch_size=8,
        micro_batch_tokens=80,
        betas=(0.9, 0.99),
        loss_average="token",
    )
    trainer = Trainer(Accelerator(), method, model, optim, pad=0)
    assert trainer.packed and trainer.engine.recorder
    if not recorded:
        trainer.engine.recorder.stop()
    task = TaskData("T", 0, examples(LENGTHS), [range(len(LENGTHS))] * 12, [])
    losses = [row.loss for row in trainer.fit(task, 1)]
    return losses, trainer.adapters(), len(trainer.engine.recorder.recordings)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_training_is_what_it_is_without_recordings(tiny_llama):
    losses, adapters, count = trained(tiny_llama, recorded=True)
    expected, others, none = trained(tiny_llama, recorded=False)
    assert count >= 2 and none == 0
    torch.testing.assert_close(losses, expected, rtol=0.01, atol=0.01)
    for site, own in adapters.items():
        distance = (own.b - others[site].b).norm() / others[site].b.norm()
        assert distance < 0.1, (site, distance)
