"""optim.warmup, schedules and method.layers in whole runs: what is logged, and which weights change."""

from io import StringIO

import contract
import pytest
import torch
from helpers import learnt, tiny_recipe, weights
from rich.console import Console
from tiny import save_tiny
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from codyra_llm.config.methods.base import LoraConfig
from codyra_llm.config.recipe import load_recipe, parse_recipe
from codyra_llm.config.registry import METHODS
from codyra_llm.core.errors import Fault
from codyra_llm.experiment import plan
from codyra_llm.experiment.run import run
from codyra_llm.experiment.setup import prepare
from codyra_llm.lora.layer import block_number
from codyra_llm.lora.proximal import lr_factor
from codyra_llm.train import estimate

LORA = [name for name in METHODS if issubclass(METHODS.settings(name), LoraConfig)]


def test_the_learning_rate_that_is_logged(tiny_llama, toy_stream, tmp_path):
    """6 steps a task, 2 of them warm-up: thirds, then a cosine over the other 4; the same in every task."""
    changes = {"method": {"name": "seqlora", "rank": 2}, "optim__warmup": 2, "optim__schedule": "cosine"}
    folder = run(tiny_recipe(tiny_llama, toy_stream, tmp_path / "run", checkpoint=False, **changes))
    cosine = [1, 0.5 + 0.5 * 2**-0.5, 0.5, 0.5 - 0.5 * 2**-0.5]
    for task in ("ONE", "TWO"):
        rates = [row.lr for row in folder.log_rows if row.task == task]
        assert rates == pytest.approx([1e-2 * f for f in (1 / 3, 2 / 3, *cosine)])


def test_the_memory_epoch_has_a_cosine_of_its_own(tiny_llama, toy_stream, tmp_path):
    """At the tail of the task's cosine its rates would be next to none, and replay would be off."""
    changes = {"method": {"name": "replay", "rank": 2, "when": "after", "ratio": 0.5, "general": None}}
    folder = run(
        tiny_recipe(
            tiny_llama, toy_stream, tmp_path / "run", checkpoint=False, optim__schedule="cosine", **changes
        )
    )
    rates = {task: [row.lr for row in folder.log_rows if row.task == task] for task in ("ONE", "TWO")}
    own, memory = rates["TWO"][:6], rates["TWO"][6:]
    assert own == rates["ONE"] and own[0] == 1e-2 and memory
    assert memory == pytest.approx(
        [1e-2 * lr_factor("cosine", step, len(memory)) for step in range(len(memory))]
    )


def test_layers_are_written_as_lists_or_ranges():
    def layers(text):
        return load_recipe("quickstart", ["method=seqlora", f"method.layers={text}"]).method.layers

    assert layers("[2, 0]") == [0, 2] and layers("4-6") == [4, 5, 6] and layers("0-1,8") == [0, 1, 8]
    assert layers("3") == [3] and layers("null") is None and layers("'3 - 4'") == [3, 4]
    for text, told in (
        ("6-4", "names no layers"),
        ("last", "names no layers"),
        ("[0, 0]", "named twice"),
        ("0-2,1", "named twice"),
        ("[-1]", "greater than or equal to 0"),
        ("[]", "at least 1 item"),
        ("[true]", "true is not a number"),
    ):
        with pytest.raises(Fault, match=f"method.layers.*{told}"):
            layers(text)


def test_a_layer_past_the_last_is_told_before_weights_load(tiny_llama, toy_stream, tmp_path):
    asked = tiny_recipe(tiny_llama, toy_stream, tmp_path / "run", method__layers=[1, 2, 7])
    with pytest.raises(Fault, match="method.layers: 2, 7 is past the model's last layer, 1"):
        prepare(asked)


@pytest.mark.parametrize("name", LORA)
def test_only_these_layers_are_adapted(name, tiny_llama, toy_stream, tmp_path):
    asked = contract.raw(tiny_llama, toy_stream, tmp_path / "run", name)
    asked["method"]["layers"] = "1"
    asked["data"] |= {"tasks": ["ONE", "TWO"], "epochs": 1}
    folder = run(parse_recipe(asked))
    found = {block_number(row.site) for row in folder.updates}
    held = {block_number(key) for update in weights(folder).values() for key in update}
    assert found == {1} and held - {None} == {1}
    assert folder.summary["op"] is not None


def test_the_other_layers_of_the_merged_model_are_the_bases(tiny_llama, toy_stream, tmp_path):
    method = {"name": "seqlora", "rank": 2, "layers": [0]}
    folder = learnt(tiny_llama, toy_stream, tmp_path / "run", method)
    base, merged = (
        AutoModelForCausalLM.from_pretrained(path).state_dict()
        for path in (tiny_llama, folder.path / "checkpoint")
    )
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert {block_number(name) for name in changed} == {0} and len(changed) == 7


def test_a_plan_counts_what_is_adapted(tiny_llama, toy_stream, tmp_path, monkeypatch):
    """Of a model of which only a few layers are timed, with operations for seconds: what is estimated is what
    PyTorch counts in the whole model."""

    def counted(model, batch, front=0, method=None):
        assert front == 0
        with FlopCounterMode(display=False) as counter:
            batch.cross_entropy(model).backward()
        return counter.get_total_flops()

    monkeypatch.setattr(estimate, "_seconds", counted)
    config = LlamaConfig.from_pretrained(tiny_llama, num_hidden_layers=6)
    base = save_tiny(tmp_path / "deep", LlamaForCausalLM, config)
    for layers in ("1,4",):
        changes = {"method__layers": layers, "model__fused": False, "data__max_train_examples": 8}
        asked = tiny_recipe(base, toy_stream, tmp_path / "run", **changes)
        setup = prepare(asked)
        model = plan.skeleton(setup, 6, "cpu")
        work = plan._work(setup, model)
        whole = sum(counted(model, plan._batch(setup, work, piece, packed=False)) for piece in work.pieces)
        found = plan.training(asked)
        assert found.steps == 4 and found.seconds == pytest.approx(whole, rel=0.02)
        console = Console(file=StringIO(), width=300)
        plan.plan(asked, console)
        assert "memory, estimated" in console.file.getvalue()


def test_threshold_and_schedule_reach_the_optimizer(tiny_llama, toy_stream, tmp_path):
    """An overwhelming threshold leaves no rank; a cosine schedule ends elsewhere than a constant rate."""
    one = {"data__tasks": ["ONE"], "checkpoint": False}
    gone = run(tiny_recipe(tiny_llama, toy_stream, tmp_path / "gone", method__threshold__budget=50.0, **one))
    assert all(row.kept == 0 and row.update_norm == 0 for row in gone.updates)
    ends = [
        run(
            tiny_recipe(tiny_llama, toy_stream, tmp_path / s, method="seqlora", optim__schedule=s, **one)
        ).updates
        for s in ("constant", "cosine")
    ]
    assert ends[0][0].update_norm > 1.2 * ends[1][0].update_norm
