"""What a plan counts: micro-batches as they reach the model, and what methods add to memory, time, disk."""

import math
import re
from io import StringIO
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_recipe
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from codyra_llm.core import files
from codyra_llm.core.errors import Fault
from codyra_llm.core.terminal import Terminal
from codyra_llm.experiment import plan as plans
from codyra_llm.experiment.plan import _work, plan, skeleton
from codyra_llm.experiment.run import run
from codyra_llm.experiment.setup import prepare
from codyra_llm.lora.layer import sites
from codyra_llm.methods import sizes
from codyra_llm.methods.parts.old_inputs import moments, reading
from codyra_llm.methods.parts.samples import TOGETHER, self_sampled
from codyra_llm.store.archive import Archive
from codyra_llm.train.estimate import outside_flops


@pytest.mark.parametrize(
    "method, front",
    [
        ({"name": "l2p", "pool": 5, "length": 4, "chosen": 3}, 12),
        ({"name": "pp", "length": 30, "mlp": False}, 60),
    ],
)
def test_prompts_before_a_text_count(method, front, tiny_llama, toy_stream, tmp_path):
    """Those of pp grow with the tasks, so the largest micro-batch is one of the last."""
    recipe = tiny_recipe(tiny_llama, toy_stream, tmp_path, method=method)
    setup = prepare(recipe)
    work = _work(setup, skeleton(setup))
    largest = work.pieces[-1]
    assert largest.front == front
    assert largest.tokens == work.biggest.ids.numel() + len(work.biggest.ids) * front
    text = StringIO()
    plan(recipe, Terminal(file=text, width=200))
    assert (
        f"prompts and Adam's moments 0.00, forward and backward of {largest.tokens} tokens" in text.getvalue()
    )


@pytest.mark.parametrize(
    "free, line",
    [
        (66 << 30, "41,295 tokens at once, 656 kB each"),  # weights joined once more: 3.2 GB
        (18 << 30, "4,460 tokens at once, 656 kB each"),  # not joined
    ],
)
def test_the_tokens_at_once_leave_room_for_what_recorded_steps_hold(free, line, monkeypatch):
    """LLaMA 2 7B, whose weights are 13.5 GB."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    monkeypatch.setattr(plans, "own_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(plans, "free_bytes", lambda device: free)
    recipe = SimpleNamespace(eval=SimpleNamespace(batch_tokens=None))
    setup = SimpleNamespace(recipe=recipe, dtype=torch.bfloat16)
    told = plans._answering(setup, SimpleNamespace(config=config), 6_738_415_616)
    assert told == f"answers: {line}, halved if memory runs out"


@pytest.mark.parametrize("method", ["seqft", "seqlora"])
def test_the_size_of_the_base_does_not_depend_on_what_trains(method, toy_stream, tmp_path):
    """The small LLaMA that is shipped has 0.41 million weights, whether they train or not."""
    text = StringIO()
    recipe = tiny_recipe("mini", toy_stream, tmp_path, method={"name": method})
    plan(recipe, Terminal(file=text, width=200))
    assert "mini (llama, 0.4 M parameters, " in text.getvalue()


DRIFT = {"name": "codyra_drift", "rank": 3, "samples": 70, "sample_tokens": 6, "sketch": 8, "max_examples": 5}


def planned(recipe):
    text = StringIO()
    plan(recipe, Terminal(file=text, width=1000))
    return text.getvalue()


PUBLISHED = {"name": "codyra", "rank": 4, "threshold": {"schedule": "published", "kappa_max": 9.0}}


@pytest.mark.parametrize(
    ("method", "epochs", "remark"),
    [
        (PUBLISHED, 2, "the threshold will prune nothing in 6 steps"),
        (PUBLISHED, 40, "the threshold will prune everything in 120 steps"),
        (DRIFT, 2, "second moments of 8 inputs: 0.00 GB of state"),
    ],
)
def test_what_a_method_foresees_is_said(method, epochs, remark, tiny_llama, toy_stream, tmp_path):
    assert remark in planned(
        tiny_recipe(tiny_llama, toy_stream, tmp_path, method=method, data__epochs=epochs)
    )


def test_what_is_done_before_and_after_the_steps_is_said(tiny_llama, toy_stream, tmp_path):
    """70 texts of six tokens that the base writes, and five examples of each of two tasks."""
    recipe = tiny_recipe(tiny_llama, toy_stream, tmp_path, method=DRIFT)
    setup = prepare(recipe)
    lengths = []
    for index in range(2):
        records = setup.stream.records(index, "train")
        lengths.append([len(example) for example in setup.encoder.encode(records)])
    tokens = 70 * 6 + sum(5 / len(own) * sum(own) for own in lengths)
    (found,) = [line for line in planned(recipe).splitlines() if line.startswith("of that before and after")]
    assert f"forward passes over {tokens:,.0f} tokens with " in found
    steps = 6 * math.ceil(70 / TOGETHER)
    assert f"; {steps} steps of generation, {min(70, TOGETHER)} texts at once; " in found
    operations = re.search(r"; (\S+) operations in float64 on the CPU", found)
    assert float(operations[1]) > 0
    plain = tiny_recipe(tiny_llama, toy_stream, tmp_path, method={"name": "seqlora"})
    assert "of that before" not in planned(plain)


def test_operations_of_a_pass_are_those_that_are_counted(tiny_llama, toy_stream, tmp_path):
    """Against torch's counter, which sees neither fused layers nor attention; moments leave out the first of
    a text's eight tokens."""
    recipe = tiny_recipe(
        tiny_llama, toy_stream, tmp_path, method=DRIFT, model__fused=False, model__attention="eager"
    )
    setup = prepare(recipe)
    model = skeleton(setup, device="cpu")
    for name, layer in sites(model).items():
        layer.reset(0, name)
    examples = self_sampled(model, 4, 6, 0)
    task = setup.task(model, Archive(tmp_path / "updates", "base"), 0, {})
    with FlopCounterMode(display=False) as counter:
        moments(setup.method.config, model, task, examples)
    found = reading(setup.method.config, model, 4, [len(example) for example in examples])
    expected = outside_flops(model, found) - found.products / 8
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-6)


def test_disk_and_memory_have_the_state(tiny_llama, toy_stream, tmp_path):
    """What was planned is what is there afterwards, but for headers."""
    recipe = tiny_recipe(
        tiny_llama, toy_stream, tmp_path / "run", method=DRIFT | {"max_examples": 256}, checkpoint=False
    )
    setup = prepare(recipe)
    model = skeleton(setup)
    said = sizes.disk_bytes(recipe, setup.base, setup.method, model)
    assert "what codyra_drift holds 0.00" in planned(recipe)
    assert setup.method.held_bytes(model, 1) == 4 * 2 * (3 * 32 * 32 + 64 * 8)
    folder = run(recipe)
    written = 0
    for part in ("updates", "state"):
        files = list((folder.path / part).glob("*.safetensors"))
        assert len(files) == 2
        written += sum(file.stat().st_size for file in files)
    assert said <= written < said + 20_000


def test_a_disk_without_room_for_the_states(tiny_llama, toy_stream, tmp_path, monkeypatch):
    """Room for what is missing is enough: an evaluation writes no states, and a run that goes on has some."""
    asked = tiny_recipe(tiny_llama, toy_stream, tmp_path / "run", method=DRIFT, checkpoint=False)
    setup = prepare(asked)
    whole = sizes.disk_bytes(asked, setup.base, setup.method, skeleton(setup))

    def free(more):
        found = SimpleNamespace(free=(64 << 20) + more)
        monkeypatch.setattr(files.shutil, "disk_usage", lambda place: found)

    free(whole)
    prepare(asked)
    free(whole - 1)
    with pytest.raises(Fault, match="^output: .* free some, or choose another output$"):
        prepare(asked)
    prepare(asked, learns=False)
    (tmp_path / "run" / "state").mkdir(parents=True)
    (tmp_path / "run" / "state" / "00.safetensors").write_bytes(bytes(100))
    prepare(asked)
