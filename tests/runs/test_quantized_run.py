"""Packed bases: what a packed weight stands for, training on it against the same weights unpacked, and whole
runs.
"""

import json

import pytest
import torch
from launches import rows
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from codyra_llm.config.overrides import override
from codyra_llm.config.recipe import parse_recipe
from codyra_llm.core.errors import Fault
from codyra_llm.experiment import plan, run
from codyra_llm.experiment.setup import prepare
from codyra_llm.models.quantize import KINDS, quantize
from codyra_llm.runtime import launch


def recipe(model, stream, out, **changes):
    raw = {
        "model": {"path": str(model), "quantization": "nf4"},
        "output": str(out),
        "eval": {"max_new_tokens": 4},
        "data": {"root": str(stream), "tasks": ["ONE", "TWO"], "epochs": 2},
        "optim": {"lr": 1e-2, "batch_size": 8},
        "method": {"name": "codyra", "rank": 4, "importance_lr": 0.02},
    }
    overrides = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in changes.items()]
    return parse_recipe(override(raw, overrides))


def updates(folder):
    return {
        f"{f.name} {key}": t for f in (folder.path / "updates").iterdir() for key, t in load_file(f).items()
    }


def test_updates_go_to_the_original_weights_and_each_task_quantises_anew(
    tiny_llama, toy_stream, tmp_path, monkeypatch
):
    packed = []

    def spy(model, kind):
        packed.append(({k: v.clone() for k, v in model.state_dict().items()}, kind))
        quantize(model, kind)

    with monkeypatch.context() as patch:
        patch.setattr("codyra_llm.models.quantize.quantize", spy)
        folder = run.run(recipe(tiny_llama, toy_stream, tmp_path / "run"))
    assert [kind for _, kind in packed] == ["nf4", "nf4"] and "bitsandbytes" in folder.manifest
    plain = prepare(recipe(tiny_llama, toy_stream, tmp_path / "other", model__quantization=None))
    archive, stored = (
        folder.archive(),
        AutoModelForCausalLM.from_pretrained(folder.path / "checkpoint").state_dict(),
    )
    base = AutoModelForCausalLM.from_pretrained(tiny_llama).state_dict()
    for after, state in ((-1, packed[0][0]), (0, packed[1][0]), (1, stored)):
        assert all(torch.equal(state[k], v) for k, v in plain.model(archive, after).state_dict().items())
        for site in archive.load(0).adapters:
            terms = [archive.load(k).adapters[site].delta(1.0).double() for k in range(after + 1)]
            weight = f"{site}.weight"
            torch.testing.assert_close(
                state[weight].double(), base[weight].double() + sum(terms), rtol=1e-6, atol=1e-7
            )
    assert not torch.equal(packed[0][0][weight], packed[1][0][weight])

    again = recipe(tiny_llama, toy_stream, tmp_path / "restarted")
    learn = run.learn

    def dies(experiment, stage, peak):
        if stage.index == 1:
            raise KeyboardInterrupt
        learn(experiment, stage, peak)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run, "learn", dies)
        run.run(again)
    restarted = updates(run.run(again))
    assert (
        all(torch.equal(restarted[key], t) for key, t in updates(folder).items())
        and len(restarted) == 2 * 14 * 3
    )
    unpacked = run.run(
        recipe(tiny_llama, toy_stream, tmp_path / "plain", model__quantization=None, checkpoint=False)
    )
    losses = [[row["loss"] for row in rows(f.path / "log.jsonl")] for f in (folder, unpacked)]
    assert losses[0] == pytest.approx(losses[1], rel=0.2) and losses[0] != pytest.approx(losses[1], rel=1e-4)
    with pytest.raises(Fault, match="model.quantization was 'nf4', now 'int8'"):
        run.run(recipe(tiny_llama, toy_stream, folder.path, model__quantization="int8"))


def test_the_plan_counts_packed_weights(tiny_llama, toy_stream, tmp_path):
    for kind in KINDS:
        setup = prepare(recipe(tiny_llama, toy_stream, tmp_path / "run", model__quantization=kind))
        skeleton = plan.skeleton(setup)
        total = sum(p.numel() for p in skeleton.parameters() if not p.requires_grad)
        estimate = plan._weight_bytes(setup, skeleton, total)
        model = AutoModelForCausalLM.from_pretrained(tiny_llama)
        quantize(model, kind)
        tables = 14 * 1028 if kind == "nf4" else 0
        assert estimate == pytest.approx(sum(p.nbytes for p in model.parameters()) - tables, rel=0.05)


def test_what_can_not_be_is_refused_before_weights_load(tiny_llama, toy_stream, tmp_path, monkeypatch):
    monkeypatch.setattr("codyra_llm.models.loading.load", lambda *a, **k: pytest.fail("weights were loaded"))
    with monkeypatch.context() as patch, pytest.raises(Fault, match="ZeRO stage 2, this launch has stage 3"):
        patch.setattr(launch, "zero_stage", lambda acc: 3)
        run.run(recipe(tiny_llama, toy_stream, tmp_path / "run"))
    monkeypatch.setattr("codyra_llm.experiment.setup.find_spec", lambda name: None)
    with pytest.raises(Fault, match=r"'nf4' needs bitsandbytes.*codyra-llm\[bitsandbytes\]"):
        run.run(recipe(tiny_llama, toy_stream, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    prepare(recipe(tiny_llama, toy_stream, tmp_path / "run", model__quantization=None))
