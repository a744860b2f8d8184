"""Training with recorded micro-batches against the same training without: on a GPU, and on the device that is
not there."""

from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from packed import examples, loaded

from codyra_llm.config.registry import METHODS
from codyra_llm.config.sections import OptimSection
from codyra_llm.lora.shared import share_inputs
from codyra_llm.train.task_data import TaskData
from codyra_llm.train.trainer import Trainer

# The longest makes a micro-batch by itself, of more tokens than the smallest shape has; all others together
# make several of that shape.
LENGTHS = [(37, 4), (1, 2), (20, 3), (8, 9), (13, 3), (70, 2), (5, 5), (50, 2), (290, 5)]
SHAPES = 2


def trained(folder: Path, recorded: bool, steps: int) -> tuple[list[float], dict, int]:
    """Losses and adapters after so many steps, each of several micro-batches, and how many shapes were
    recorded."""
    acc = Accelerator()
    model = loaded(folder, torch.bfloat16).to(acc.device).requires_grad_(False)
    method = METHODS["codyra"](METHODS["codyra"].Config(rank=4), 0)
    method.attach(model)
    share_inputs(model)
    method.begin_task(model, SimpleNamespace(index=0))
    optim = OptimSection(
        lr=1e-3,
        schedule="constant",
        batch_size=len(LENGTHS),
        micro_batch_tokens=80,
        betas=(0.9, 0.99),
        loss_average="token",
    )
    trainer = Trainer(acc, method, model, optim, pad=0)
    recorder = trainer.engine.recorder
    assert trainer.packed and recorder
    if not recorded:
        recorder.stop()
    task = TaskData("T", 0, examples(LENGTHS), [range(len(LENGTHS))] * steps, [])
    losses = [row.loss for row in trainer.fit(task, 1)]
    return losses, trainer.adapters(), recorder.made


def assert_the_same(folder: Path, steps: int) -> None:
    """Losses and adapters, up to the rounding of bfloat16."""
    losses, adapters, count = trained(folder, True, steps)
    expected, others, none = trained(folder, False, steps)
    assert (count, none) == (SHAPES, 0)
    torch.testing.assert_close(losses, expected, rtol=0.01, atol=0.01)
    for site, own in adapters.items():
        distance = (own.b - others[site].b).norm() / others[site].b.norm()
        assert distance < 0.1, (site, distance)
