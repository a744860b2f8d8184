"""The trainer in one process: what it takes over from a checkpoint, its validation, and what it refuses."""

import math

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional

from codyra_llm.config.sections import OptimSection, SaveSection
from codyra_llm.core.errors import Fault
from codyra_llm.data.encoding import Encoded
from codyra_llm.lora.layer import AdapterSpec, attach, sites
from codyra_llm.methods.base import Method
from codyra_llm.runtime.memory import Meter
from codyra_llm.store.checkpoint import Progress, small
from codyra_llm.train.task_data import TaskData
from codyra_llm.train.trainer import Trainer

EXAMPLES = [Encoded([1], [2], False), Encoded([3], [1, 2], False), Encoded([1, 2], [3], False)]


class Remembers(Method):
    """Saves one tensor inside a task, and asks for another since a later version."""

    def progress(self):
        return {"old": torch.ones(1)}

    def resume(self, progress):
        assert torch.equal(progress["old"], torch.ones(1))
        progress["new"]


class SumOfFirstTokens(Method):
    """Its loss reads one of the layers: the sum of what it makes of each example's first token."""

    packs = False

    def loss(self, model, batch):
        first = functional.one_hot(batch.ids[:, 0], 4).float()
        return {"loss": model["q_proj"](first).sum()}


def begun(sites_=("q_proj",), dropout=0.0, **optim) -> Trainer:
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(4, 3, bias=False) for name in sites_}).requires_grad_(False)
    attach(model, list(sites_), AdapterSpec(2, 1.5, dropout))
    for name, layer in sites(model).items():
        layer.reset(0, name)
    section = OptimSection(
        lr=0.1, schedule="constant", batch_size=4, betas=(0.9, 0.99), loss_average="token", **optim
    )
    return Trainer(Accelerator(cpu=True), SumOfFirstTokens(None, 0), model, section, pad=0)


@pytest.fixture
def saves(tmp_path):
    return Progress(tmp_path, 0, "ONE", "parent", SaveSection(), lambda: None)


def test_a_checkpoint_of_an_earlier_version_is_refused(saves):
    trainer = begun()
    trainer.method = Remembers(None, 0)
    trainer.save(saves, 1)
    with pytest.raises(Fault, match="lacks 'new', .* resume with the version that wrote it"):
        trainer.resume(saves.newest())


def test_a_parameter_within_a_larger_tensor_is_refused(monkeypatch):
    whole = torch.zeros(3, 4)
    groups = [{"params": [nn.Parameter(whole[:, :2])], "lr": 0.1}]
    monkeypatch.setattr(SumOfFirstTokens, "param_groups", lambda *_: groups)
    with pytest.raises(Fault, match=r"\(3, 2\) of the method is a view .* train a contiguous copy"):
        begun()


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
    assert again.best == best and again.kept is None


def test_validation_is_without_dropout_and_training_goes_on_with_it():
    trainer = begun(dropout=0.5, micro_batch_tokens=16)
    layer = sites(trainer.engine.model)["q_proj"]
    nn.init.normal_(layer.lora_B)
    trainer.engine.module.train()
    whole = (layer.weight + 1.5 * layer.lora_B @ layer.lora_A).detach()
    expected = sum(whole[:, example.prompt[0]].sum().item() for example in EXAMPLES)
    assert trainer.validate(EXAMPLES) == pytest.approx(expected, rel=1e-5)
    assert all(module.training for module in trainer.engine.module.modules())
    assert not layer.lora_A.grad and not layer.lora_B.grad


@pytest.mark.parametrize("names, refused", [(("q_proj",), False), (("q_proj", "v_proj"), True)])
def test_an_adapter_without_a_gradient_is_refused_after_the_first_step(names, refused):
    task = TaskData("ONE", 0, EXAMPLES, [range(3)], [])
    steps = begun(names).fit(task, seed=0)
    if not refused:
        assert [row.step for row in steps] == [1]
        return
    with pytest.raises(Fault, match="^1 adapters got no gradient in the first step, v_proj among them"):
        next(steps)


def test_the_next_step_is_collated_before_ranks_wait_for_each_other(monkeypatch):
    """Whether memory ran out on any rank is known once the device is done, which must have the next step
    then."""
    trainer, collated = begun(), []

    def anywhere(mine: bool) -> bool:
        ahead, _, batches = trainer._ahead
        collated.append((ahead, sum(len(batch.examples) for batch in batches)))
        return mine

    monkeypatch.setattr(trainer.engine, "anywhere", anywhere)
    task = TaskData("T", 0, EXAMPLES, [range(3)] * 3, [])
    assert len(list(trainer.fit(task, 1))) == 3
    _, second, third = task.batches(1, 4)
    assert collated == [(second, 3), (third, 3), (None, 0)]


def test_an_optimizer_step_takes_no_memory_beyond_parameters_and_moments():
    trainer = begun([f"{kind}_proj" for kind in "qkvo"])
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    for p in parameters:
        p.grad = torch.ones_like(p)
    trainer.optimizer.step()  # which makes the moments
    with Meter() as meter:
        trainer.optimizer.step()
    held = sum(p.nbytes for p in parameters)
    assert meter.peak < held / 20
