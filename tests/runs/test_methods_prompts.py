"""Prompt methods: gradients, the query, what is applied at test, prefixes in attention, restart, stages."""

import json

import pytest
import torch
from adapters import SECTIONS
from typer.testing import CliRunner

from codyra_llm.cli import app
from codyra_llm.config.overrides import override
from codyra_llm.config.recipe import parse_recipe
from codyra_llm.config.registry import METHODS
from codyra_llm.core.errors import Fault
from codyra_llm.experiment import run
from codyra_llm.experiment.export import write_merged
from codyra_llm.experiment.setup import prepare
from codyra_llm.store.archive import Archive

every_method = pytest.mark.parametrize("name", SECTIONS)


def recipe(model, stream, out, name, **changes):
    raw = {
        "model": {"path": str(model)},
        "data": {"root": str(stream), "tasks": ["ONE", "TWO", "THREE"], "epochs": 2},
        "method": dict(SECTIONS[name]),
        "optim": {"lr": 1e-2, "batch_size": 8},
        "eval": {"max_new_tokens": 4},
        "output": str(out),
    }
    return parse_recipe(
        override(raw, [f"{k.replace('__', '.')}={json.dumps(v)}" for k, v in changes.items()])
    )


def states(folder):
    return [folder.load_state(i) for i in range(3)]


@every_method
def test_a_state_of_each_task_and_a_stage_that_answers(name, tiny_llama, toy_stream, tmp_path):
    short = {"data__epochs": 1, "data__max_train_examples": 12}
    straight = run.run(recipe(tiny_llama, toy_stream, tmp_path / "straight", name, **short))
    grows = [sum(v.numel() for v in state.values()) for state in states(straight)]
    assert (
        grows[0]
        and METHODS[name].grows == (grows[0] < grows[1] < grows[2])
        and (METHODS[name].grows or len(set(grows)) == 1)
    )
    assert Archive(straight.path / "updates", straight.manifest["base"]).load(2).adapters == {}

    with pytest.raises(Fault, match=f"^a {name} run is not a plain model.*--format stage"):
        write_merged(prepare(straight.recipe), straight.archive(), 1, None, tmp_path / "merged")
    asked = CliRunner().invoke(
        app, ["export", str(straight.path), str(tmp_path / "stage"), "--format", "stage", "--after", "TWO"]
    )
    assert asked.exit_code == 0, asked.output
    lines = (straight.path / "predictions" / "02-TWO" / "ONE.jsonl").read_text().splitlines()
    for line in map(json.loads, lines[:2]):
        told = CliRunner().invoke(
            app, ["generate", f"{tmp_path / 'stage'}@TWO", line["prompt"], "--max-new-tokens", "4"]
        )
        assert told.output.rstrip("\n") == line["prediction"].rstrip("\n")


@every_method
def test_training_lowers_the_loss_and_keeps_what_was_learnt(name, tiny_llama, toy_stream, tmp_path):
    folder = run.run(
        recipe(
            tiny_llama,
            toy_stream,
            tmp_path / "run",
            name,
            data__epochs=8,
            data__tasks=["ONE", "TWO"],
            method__prompt_lr=0.5,
        )
    )
    rows = [json.loads(line) for line in (folder.path / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["task"] == "ONE"]
    assert sum(losses[-3:]) < 0.995 * sum(losses[:3])  # an epoch; a base of random weights listens little
    first, second = folder.load_state(0), folder.load_state(1)
    if name == "pp":  # the newest stands first, the older ones as they were
        assert torch.equal(second["prompts"][1:], first["prompts"])
    if name == "dualprompt":
        assert torch.equal(second["experts"][:1], first["experts"]) and torch.equal(
            second["matches"][:1], first["matches"]
        )
        assert not torch.equal(second["experts"][1], first["experts"][0])


def test_settings_that_do_not_go_together(tiny_llama, toy_stream, tmp_path):
    def faults(name, **changes):
        with pytest.raises(Fault) as caught:
            prepare(recipe(tiny_llama, toy_stream, tmp_path / "run", name, **changes))
        return "\n".join(caught.value.messages)

    assert "chosen" in faults("l2p", method__chosen=5)
    assert "name a layer twice" in faults("dualprompt", method__expert_layers=[0, 1])
    assert "method.expert_layers: [7] are not layers" in faults("dualprompt", method__expert_layers=[1, 7])
    assert "flash_attention_2 takes no prefix" in faults("dualprompt", model__attention="flash_attention_2")
    assert "so they can't be packed" in faults("pp", data__batching="packed")
