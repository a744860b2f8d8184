"""What a trainer that goes on from a checkpoint knows of the process before it."""

import math

import pytest
from accelerate import Accelerator
from torch import nn

from codyra_llm.config.sections import OptimSection, SaveSection
from codyra_llm.lora.layer import AdapterSpec, attach, sites
from codyra_llm.store.checkpoint import Progress, small
from codyra_llm.train.trainer import Trainer


class OneAdapter:
    """A method without state of its own."""

    packs = False
    resumed = None

    def param_groups(self, model, lr):
        return [{"params": [p for p in model.parameters() if p.requires_grad], "lr": lr}]

    def progress(self):
        return {}

    def resume(self, progress):
        self.resumed = progress


def begun(**optim) -> Trainer:
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 3, bias=False)}).requires_grad_(False)
    attach(model, ["q_proj"], AdapterSpec(2))
    sites(model)["q_proj"].reset(0)
    section = OptimSection(lr=0.1, schedule="constant", batch_size=2, betas=(0.9, 0.99), **optim)
    return Trainer(Accelerator(cpu=True), OneAdapter(), model, section, pad=0)


@pytest.fixture
def saves(tmp_path):
    return Progress(tmp_path, 0, "ONE", "parent", SaveSection(), lambda: None)


def test_a_micro_batch_that_did_not_fit_is_not_tried_again(saves):
    """Nor is a smaller one that the recipe asks for now made larger."""
    stopped = begun(micro_batch_tokens=256)
    stopped.tokens = 64  # after it was halved twice
    stopped.save(saves, 3)
    for asked, expected in ((256, 64), (32, 32)):
        again = begun(micro_batch_tokens=asked)
        assert again.resume(saves.newest()) == 3 and again.tokens == expected


def test_seconds_add_up_over_all_processes_of_a_task(saves):
    stopped = begun()
    stopped.earlier = 100.0
    stopped.save(saves, 3)
    again = begun()
    again.resume(saves.newest())
    assert 100.0 <= again.earlier < 160.0
    again.save(saves, 4)
    assert small(saves.newest())["seconds"] > again.earlier


@pytest.mark.parametrize("best", [0.25, math.inf])
def test_the_best_loss_so_far_is_kept_where_there_was_one(best, saves):
    stopped = begun()
    stopped.best = best
    stopped.save(saves, 3)
    again = begun()
    again.resume(saves.newest())
    assert again.best == best and again.kept is None and again.method.resumed == {}
