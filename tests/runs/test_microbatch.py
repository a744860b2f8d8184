"""Out of memory halves the micro-batch and changes nothing else; what can't be halved is a Fault; all ranks
agree.
"""

import logging
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_recipe, weights

from codyra_llm.core.errors import Fault
from codyra_llm.core.files import read_jsonl
from codyra_llm.data.batches import Batch
from codyra_llm.experiment import run
from codyra_llm.lora.layer import AdapterSpec, attach, sites
from codyra_llm.lora.proximal import ProximalAdamW
from codyra_llm.lora.shared import share_inputs
from codyra_llm.models.loading import load
from codyra_llm.runtime.launch import accelerator
from codyra_llm.train.engine import Engine

ONE_TASK = {"data__tasks": ["THREE"], "checkpoint": False}
PLAIN = Batch.cross_entropy


def out_of_memory(where):
    """Batch.cross_entropy that runs out of memory, with its graph made, where `where(batch)` says so."""

    def cross_entropy(self, model):
        loss = PLAIN(self, model)
        if torch.is_grad_enabled() and where(self):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss

    return cross_entropy


def assert_same_weights(one, two, **tolerance):
    for name, tensors in weights(two).items():
        for key, tensor in tensors.items():
            torch.testing.assert_close(weights(one)[name][key], tensor, **tolerance)


@pytest.mark.parametrize("batching", ["buckets", "packed"])
def test_the_run_is_that_of_a_small_micro_batch(
    batching, tiny_llama, toy_stream, tmp_path, monkeypatch, caplog
):
    """Dropout is on: a step begun again has the random numbers of its beginning. The halved value stays."""
    caplog.set_level(logging.INFO, "codyra_llm")
    changes = {**ONE_TASK, "data__batching": batching, "method__dropout": 0.3}
    monkeypatch.setattr(Batch, "cross_entropy", out_of_memory(lambda batch: batch.ids.numel() > 150))
    fitted = run.run(tiny_recipe(tiny_llama, toy_stream, tmp_path / "fitted", **changes))
    tokens = [row["micro_batch_tokens"] for row in read_jsonl(fitted.path / "log.jsonl")]
    assert len(set(tokens)) == 1 and 75 <= tokens[0] <= 150
    told = [line for line in caplog.messages if "out of memory" in line]
    line = "task THREE, step 1: out of memory, going on with optim.micro_batch_tokens at"
    assert told and all(line in x for x in told)
    monkeypatch.setattr(Batch, "cross_entropy", PLAIN)
    small, large = (
        run.run(
            tiny_recipe(tiny_llama, toy_stream, tmp_path / str(n), **changes, optim__micro_batch_tokens=n)
        )
        for n in (tokens[0], 4096)
    )
    assert_same_weights(fitted, small, rtol=0, atol=0)
    with pytest.raises(AssertionError):  # other masks
        assert_same_weights(fitted, large, rtol=2e-3, atol=2e-4)


def test_what_a_method_does_at_the_end_fits_as_training_did(tiny_llama, toy_stream, tmp_path, monkeypatch):
    """ewclora goes back through the task's examples then; a micro-batch of the recipe's size would run out
    of memory again, with the whole task learnt and no way on but another recipe."""
    largest = []

    def full(batch):
        largest.append(batch.ids.numel())
        return batch.ids.numel() > 150

    monkeypatch.setattr(Batch, "cross_entropy", out_of_memory(full))
    changes = {**ONE_TASK, "method": {"name": "ewclora", "rank": 2, "examples": 20}}
    done = run.run(tiny_recipe(tiny_llama, toy_stream, tmp_path / "run", **changes))
    (tokens,) = {row["micro_batch_tokens"] for row in read_jsonl(done.path / "log.jsonl")}
    assert max(largest) > 150 and 75 < largest[-1] <= tokens <= 150


def test_gradients_of_the_failed_attempt_are_dropped(tiny_llama, toy_stream, tmp_path, monkeypatch):
    """Memory runs out once, in step 2 and after a micro-batch that fitted."""
    seen = []

    def once_in_step_two(batch):
        if len(seen) == 5:
            assert 8 < sum(seen) < 16, "step 2, and not its first micro-batch"
        seen.append(len(batch.examples))
        return len(seen) == 6

    straight = run.run(
        tiny_recipe(tiny_llama, toy_stream, tmp_path / "a", **ONE_TASK, optim__micro_batch_tokens=100)
    )
    monkeypatch.setattr(Batch, "cross_entropy", out_of_memory(once_in_step_two))
    halved = run.run(
        tiny_recipe(tiny_llama, toy_stream, tmp_path / "b", **ONE_TASK, optim__micro_batch_tokens=100)
    )
    rows = [read_jsonl(folder.path / "log.jsonl") for folder in (straight, halved)]
    assert [row["micro_batch_tokens"] < 100 for row in rows[1]] == [False] + [True] * 5
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in rows[1]] == pytest.approx([row[key] for row in rows[0]], rel=1e-3)
    assert_same_weights(halved, straight, rtol=2e-3, atol=2e-4)


def test_an_example_that_alone_does_not_fit(tiny_llama, toy_stream, tmp_path, monkeypatch):
    monkeypatch.setattr(Batch, "cross_entropy", out_of_memory(lambda batch: True))
    with pytest.raises(Fault) as caught:
        run.run(tiny_recipe(tiny_llama, toy_stream, tmp_path / "run", **ONE_TASK))
    (message,) = caught.value.messages
    for part in (
        "task THREE, step 1",
        "tokens alone",
        "optim.micro_batch_tokens",
        "model.gradient_checkpointing",
        "data.max_prompt_tokens",
    ):
        assert part in message
    assert not (tmp_path / "run" / "updates").exists()


def test_deepspeed_says_what_to_lower():
    def fails(batch, penalty):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    engine = Engine.__new__(Engine)
    engine.acc = SimpleNamespace(num_processes=2, device=torch.device("cpu"))
    engine.deepspeed, engine.module, engine.whole = True, fails, []
    batch = SimpleNamespace(ids=torch.zeros(3, 24), to=lambda device: batch)
    with pytest.raises(Fault, match=r"72 tokens .*DeepSpeed.*optim.micro_batch_tokens"):
        engine.accumulate(batch, first=True, last=True)


def test_after_a_rewrite_adam_steps_as_at_the_start(tiny_llama):
    """Moments begin at zero again, and so must the count of steps that corrects them: under a constant
    gradient every step of Adam is the learning rate."""
    model = load(tiny_llama, torch.float32)
    attach(model, ["q_proj"], AdapterSpec(2))
    objective = torch.nn.Module()
    objective.model = model
    trained = [layer.lora_A for layer in sites(model).values()]
    optimizer = ProximalAdamW([{"params": trained, "lr": 1e-3}], betas=(0.9, 0.999), weight_decay=0.0)
    engine = Engine(accelerator(), objective, optimizer, float("inf"))
    for factor in trained:
        torch.nn.init.zeros_(factor)

    def moved():
        before = trained[0].detach().clone()
        for factor in trained:
            factor.grad = torch.ones_like(factor)
        engine.step()
        return (before - trained[0].detach()).mean().item()

    for _ in range(50):
        assert moved() == pytest.approx(1e-3, rel=1e-3)
    engine.rewrite(lambda adapters: adapters)
    for _ in range(20):
        assert moved() == pytest.approx(1e-3, rel=1e-3)
    engine.free()


def test_what_a_failed_forward_kept_is_dropped(tiny_llama):
    """q was called, so k and v are waiting, with their input; memory ran out before they were asked for."""
    model = load(tiny_llama, torch.float32)
    attach(model, ["q_proj", "k_proj", "v_proj"], AdapterSpec(2))
    share_inputs(model)
    objective = torch.nn.Module()
    objective.model = model
    trained = [layer.lora_A for layer in sites(model).values()]
    engine = Engine(accelerator(), objective, ProximalAdamW([{"params": trained}]), 1.0)
    attention = model.model.layers[0].self_attn
    attention.q_proj(torch.ones(1, 2, 32))
    assert attention.q_proj.shared._outputs and attention.q_proj.shared._input
    engine.discard()
    assert not attention.q_proj.shared._outputs and not attention.q_proj.shared._input
    engine.free()
