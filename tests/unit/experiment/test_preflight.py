"""Processes that are about to do different things say so before any weights load, all of them, and none
hangs.
"""

import hashlib
import shutil
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from codyra_llm.config.overrides import override
from codyra_llm.config.recipe import parse_recipe
from codyra_llm.core.errors import Fault
from codyra_llm.experiment.preflight import Row, disagreements, preflight, summary, values
from codyra_llm.experiment.setup import prepare
from codyra_llm.models.weights import fingerprint
from codyra_llm.runtime.launch import accelerator


@pytest.fixture
def sections(tiny_llama, toy_stream, tmp_path) -> dict:
    return {
        "model": {"path": str(tiny_llama)},
        "data": {"root": str(toy_stream), "tasks": ["ONE", "TWO"], "epochs": 1},
        "method": "seqlora",
        "optim": {"lr": 1e-2, "batch_size": 7, "micro_batch_tokens": 60},
        "output": str(tmp_path / "run"),
    }


@pytest.fixture
def other_data(toy_stream, tmp_path) -> Path:
    """The same stream in another folder, one training file with one letter changed."""
    root = shutil.copytree(toy_stream, tmp_path / "other")
    file = root / "TWO" / "train.json"
    file.write_text(file.read_text(encoding="utf-8").replace("next", "nexT", 1), encoding="utf-8")
    return root


def of(sections: dict, *overrides: str) -> dict[str, str]:
    setup = prepare(parse_recipe(override(yaml.safe_load(yaml.safe_dump(sections)), list(overrides))))
    return values(setup, fingerprint(setup.base), "here")


def test_equal_processes_agree():
    assert disagreements([]) == []
    assert (
        disagreements(
            [
                Row("a", 0, {"recipe seed": "1", "base weights": "x"}),
                Row("a", 1, {"recipe seed": "1"}),
                Row("b", 2, {"recipe seed": "1", "base weights": "x"}),
            ]
        )
        == []
    )


def test_each_value_is_told_with_who_has_it():
    rows = [
        Row("a", 0, {"recipe seed": "1", "version torch": "2.9", "base weights": "x"}),
        Row("a", 1, {"recipe seed": "1", "version torch": "2.9"}),
        Row("b", 2, {"recipe seed": "5", "version torch": "2.9", "base weights": "y"}),
        Row("b", 3, {"recipe seed": "1", "version torch": "2.8"}),
    ]
    assert disagreements(rows) == [
        "recipe seed differs between processes: 1 on a (ranks 0 to 1) and b (rank 3), 5 on b (rank 2); "
        "start every process with the same recipe and overrides",
        "version torch differs between processes: 2.9 on a (ranks 0 to 1) and b (rank 2), 2.8 on b (rank "
        "3); install the same versions on every machine",
        "base weights differs between processes: x on a (rank 0), y on b (rank 2); give every machine the "
        "same weights",
    ]
    assert (
        "2.8 on b (ranks 0, 2)"
        in disagreements(
            [
                Row("b", 2, {"version x": "2.8"}),
                Row("a", 1, {"version x": "1"}),
                Row("b", 0, {"version x": "2.8"}),
            ]
        )[0]
    )


def test_what_is_compared(sections, toy_stream, tiny_llama):
    found = of(sections)
    assert (
        found["recipe seed"] == "1234"
        and found["recipe data.epochs"] == "1"
        and found["recipe method.name"] == "seqlora"
    )
    assert found["version torch"] == torch.__version__ and found["version python"] == ".".join(
        map(str, sys.version_info[:3])
    )
    for task in ("ONE", "TWO"):
        for split in ("train", "eval", "test"):
            digest = hashlib.sha256((toy_stream / task / f"{split}.json").read_bytes()).hexdigest()
            assert (
                digest.startswith(found[f"data {task}/{split}.json"])
                and len(found[f"data {task}/{split}.json"]) == 16
            )
    assert not any("THREE" in key for key in found)
    weights = hashlib.sha256((tiny_llama / "model.safetensors").read_bytes()).hexdigest()
    assert weights.startswith(found["base weights"])
    assert found["recipe optim.validate_every"] == "None"  # what is off on one and on on the other is seen


def test_open_ended_prompts_are_compared(sections, tmp_path):
    (tmp_path / "asked.json").write_text('[{"prompt": "one"}]')
    first = of(sections, f"open_ended.prompts={tmp_path / 'asked.json'}")
    (tmp_path / "else").mkdir()
    elsewhere = shutil.copy(tmp_path / "asked.json", tmp_path / "else")
    assert (
        disagreements([Row("a", 0, first), Row("b", 1, of(sections, f"open_ended.prompts={elsewhere}"))])
        == []
    )
    (tmp_path / "asked.json").write_text('[{"prompt": "two"}]')
    (fault,) = disagreements(
        [Row("a", 0, first), Row("b", 1, of(sections, f"open_ended.prompts={tmp_path / 'asked.json'}"))]
    )
    assert fault.startswith("data of general differs")


def test_places_may_differ_and_what_lies_there_may_not(sections, toy_stream, other_data, tmp_path):
    copied = shutil.copytree(toy_stream, tmp_path / "copied")
    rows = [Row("a", 0, of(sections)), Row("b", 1, of(sections, f"data.root={copied}"))]
    assert disagreements(rows) == []
    faults = disagreements(
        [rows[0], Row("b", 1, of(sections, f"data.root={other_data}", "data.epochs={TWO: 2}"))]
    )
    assert sorted(fault.split(" differs")[0] for fault in faults) == [
        "data TWO/train.json",
        "recipe data.epochs",
    ]
    (copied / "ONE" / "eval.json").unlink()
    (lacking,) = disagreements([rows[0], Row("b", 1, of(sections, f"data.root={copied}"))])
    assert "no file on b (rank 1)" in lacking


def test_one_machine_has_one_base(sections, tiny_llama, tmp_path):
    """Only one process of a machine hashes the weights: the others must mean the same folder."""
    copied = shutil.copytree(tiny_llama, tmp_path / "model")
    one, two = of(sections), of(sections, f"model.path={copied}")
    (fault,) = disagreements([Row("here", 0, one), Row("here", 1, two)])
    assert str(tiny_llama) in fault and str(copied) in fault


def test_an_all_reduce_that_misses_a_process_is_a_fault(sections, monkeypatch):
    acc, setup = accelerator(), prepare(parse_recipe(sections))
    assert preflight(acc, setup, None) == (
        "1 processes on 1 machine (DDP) agree; 7 examples per optimizer step over all, "
        "up to 60 tokens per forward in each"
    )
    many = SimpleNamespace(num_processes=16, state=acc.state, device=acc.device)
    assert "7 examples per optimizer step over all, so that 9 processes have none in a step, up" in summary(
        many, setup, 2
    )
    monkeypatch.setattr(acc, "reduce", lambda tensor, how: tensor * 3)
    with pytest.raises(Fault, match="over 1 processes counts 3 .* between " + socket.gethostname()):
        preflight(acc, setup, None)
