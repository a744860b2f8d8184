"""What holds for every method, and its declarations against what it does."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from contract import raw, rows
from rich.console import Console
from safetensors.torch import load_file
from trajectories import compare, trajectory
from transformers import AutoModelForCausalLM

from codyra_llm.cli import main
from codyra_llm.config.recipe import parse_recipe
from codyra_llm.config.registry import METHODS
from codyra_llm.core.errors import Fault
from codyra_llm.core.files import write_json, write_jsonl
from codyra_llm.experiment import run as runs
from codyra_llm.experiment.export import write_merged, write_stage
from codyra_llm.experiment.plan import plan, skeleton
from codyra_llm.experiment.setup import prepare
from codyra_llm.methods.base import Method
from codyra_llm.methods.parts.subspace import Subspace
from codyra_llm.models import loading
from codyra_llm.runtime import launch, signals
from codyra_llm.store.folder import RunFolder
from codyra_llm.store.rows import Stage


def tensors(folder: RunFolder) -> dict[str, torch.Tensor]:
    return {
        f"{part} {file.name} {key}": value
        for part in ("updates", "state")
        for file in sorted((folder.path / part).glob("*.safetensors"))
        for key, value in load_file(file).items()
    }


def predictions(folder: RunFolder) -> dict[str, str]:
    return {
        str(p.relative_to(folder.path)): p.read_text() for p in (folder.path / "predictions").rglob("*.jsonl")
    }


@pytest.mark.parametrize("name", METHODS)
def test_three_tasks_run(name, finished):
    folder, _ = finished(name)
    log, summary = rows(folder), json.loads((folder.path / "summary.json").read_text())
    assert bool(log) == bool(METHODS[name].trains)
    assert all(math.isfinite(row["loss"]) for row in log) and summary["op"] is not None
    for task in {row["task"] for row in log}:
        losses = [row["loss"] for row in log if row["task"] == task]
        assert min(losses[1:]) < losses[0], "nothing is learnt"


@pytest.mark.parametrize("name", METHODS)
def test_the_reference_trajectory(name, finished, pytestconfig):
    """Losses, scores and updates are those that are committed: a change of code shows here which methods it
    changed.
    """
    compare(name, trajectory(finished(name)[0]), rewrite=pytestconfig.getoption("rewrite_trajectories"))


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.trains])
def test_stopped_and_restarted_equals_straight_through(name, finished, tmp_path):
    """Stopped after the second task, and again inside the third: each time what is on disk is all that is
    needed.
    """
    folder, _ = finished(name)
    stopped = without_third_task(folder, tmp_path / "run")
    recipe = folder.recipe.model_copy(update={"output": str(stopped.path)})
    with pytest.MonkeyPatch.context() as patch, pytest.raises(signals.Stopped, match="step 3 of"):
        stop_inside(patch, "THREE", 2)
        runs.run(recipe)
    assert [path.name for path in (stopped.path / "progress").iterdir()] == ["02-THREE-00000003"]
    assert not list((stopped.path / "updates").glob("02-*"))
    again = runs.run(recipe)
    assert not (stopped.path / "progress").exists()
    one, two = tensors(folder), tensors(again)
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert predictions(folder) == predictions(again) and folder.scores == again.scores
    assert [(row["task"], row["step"], row["loss"]) for row in rows(folder)] == [
        (row["task"], row["step"], row["loss"]) for row in rows(again)
    ]


@pytest.mark.parametrize("name", ["inflora", "keeplora", "gainlora"])
def test_a_restart_goes_on_with_the_rows_that_were_chosen(name, finished, tmp_path):
    """A restart makes the passes over data again, and what it chooses may come out otherwise: a backward pass
    on a GPU does not add up in the same order twice, and the sign of a singular vector is nobody's."""
    folder, _ = finished(name)
    stopped = without_third_task(folder, tmp_path / "run")
    recipe = folder.recipe.model_copy(update={"output": str(stopped.path)})
    with pytest.MonkeyPatch.context() as patch, pytest.raises(signals.Stopped, match="step 3 of"):
        stop_inside(patch, "THREE", 2)
        runs.run(recipe)
    with pytest.MonkeyPatch.context() as patch:
        leading = Subspace.leading
        patch.setattr(Subspace, "leading", lambda *given: -leading(*given))
        again = runs.run(recipe)
    one, two = tensors(folder), tensors(again)
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def without_third_task(folder: RunFolder, path: Path) -> RunFolder:
    """A copy of a finished run as it was before its third task."""
    stopped = RunFolder(shutil.copytree(folder.path, path))
    for file in [*(path / "updates").glob("02-*"), *(path / "state").glob("02.*")]:
        file.unlink()
    write_json(
        path / "seals.json",
        {name: hashes for name, hashes in stopped.seals.noted.items() if "state/02" not in name},
    )
    with stopped.seals.replacing(path / "scores.jsonl") as temporary:
        write_jsonl(temporary, [row.as_json() for row in stopped.scores if row.step < 3])
    return stopped


def stop_inside(patch: pytest.MonkeyPatch, task: str, step: int) -> None:
    """The process is asked to stop when `step` of `task` has been logged, and sees it in the next one."""
    log = RunFolder.log

    def asking(folder, row):
        log(folder, row)
        if (row.task, row.step) == (task, step):
            signals.ask("a test")

    patch.setattr(signals, "_asked", [])
    patch.setattr(RunFolder, "log", asking)


@pytest.mark.parametrize("name", METHODS)
def test_declared_old_data_is_what_it_reads(name, finished):
    _, read = finished(name)
    if not METHODS[name].trains:
        return  # icl reads training examples when it is asked, not when it learns
    past = {(now, index) for now, index, split in read if index < now and split == "train"}
    assert bool(past) == METHODS[name].old_data
    assert not [entry for entry in read if entry[2] == "test"], (
        "a method must not see test examples while it learns"
    )


@pytest.mark.parametrize("name", METHODS)
def test_declared_merge_is_a_plain_model(name, finished, tmp_path, capsys):
    folder, _ = finished(name)
    setup, method = prepare(folder.recipe), METHODS[name]
    if not method.trains:
        return
    model, conditions = setup.load_stage(folder, Stage.of(folder.recipe.tasks, 2), torch.device("cpu"))
    assert (conditions is None) == method.merges
    if method.merges:
        write_merged(setup, folder.archive(), 2, None, tmp_path / "out")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert plain.state_dict().keys() == loading.load(setup.base, setup.dtype).state_dict().keys()
        assert all(torch.equal(model.state_dict()[key], value) for key, value in plain.state_dict().items())
        return
    with pytest.raises(Fault, match="not a plain model"):
        write_merged(setup, folder.archive(), 2, None, tmp_path / "out")
    write_stage(folder, 2, tmp_path / "stage")
    prompt = setup.test(0)[0]["prompt"]
    for source in (folder.path, tmp_path / "stage"):
        assert run_cli(capsys, "generate", f"{source}@THREE", prompt, "--max-new-tokens", "3")


@pytest.mark.parametrize("name", METHODS)
def test_the_state_is_no_larger_than_declared(name, finished):
    """Some kilobytes of tokens and numbers may go undeclared: here that is less than any factor's size."""
    folder, _ = finished(name)
    setup = prepare(folder.recipe)
    model = skeleton(setup)
    for index in range(3 if METHODS[name].trains else 0):
        written = sum(tensor.nbytes for tensor in folder.load_state(index).values())
        assert written <= setup.method.state_bytes(model, index + 1) + 200


@pytest.mark.parametrize("name", METHODS)
def test_declared_growth(name, finished):
    folder, _ = finished(name)
    method = METHODS[name]
    sizes = [sum(t.numel() for t in folder.load_state(i).values()) for i in range(3)]
    files = folder.archive().files
    apart = (
        bool(files) and folder.archive().load(2).mode == "apart" and bool(folder.archive().load(2).adapters)
    )
    examples = method.old_data and bool(method.trains) and not method.joint  # kept for later tasks
    assert method.grows == (sizes[0] < sizes[1] < sizes[2] or examples or apart)


@pytest.mark.parametrize("name", METHODS)
def test_the_task_is_told_only_where_that_is_declared(name, finished, monkeypatch):
    folder, _ = finished(name)
    if METHODS[name].merges:
        return
    told = []
    condition = METHODS[name].condition
    monkeypatch.setattr(
        METHODS[name],
        "condition",
        lambda self, model, prompts, task: told.append(task) or condition(self, model, prompts, task),
    )
    setup = prepare(folder.recipe)
    _, conditions = setup.load_stage(folder, Stage.of(folder.recipe.tasks, 2), torch.device("cpu"))
    conditions([setup.encoder.prompt(setup.test(1)[0]["prompt"])[0]], 1)
    assert told == [1 if METHODS[name].task_id else None]


@pytest.mark.parametrize(
    "name", [name for name, method in METHODS.items() if method.trains and method.zero_stages() < 3]
)
def test_an_undeclared_launch_is_refused(name, tiny_llama, toy_stream, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "zero_stage", lambda acc: METHODS[name].zero_stages() + 1)
    monkeypatch.setattr("codyra_llm.models.loading.load", lambda *a, **k: pytest.fail("weights were loaded"))
    with pytest.raises(Fault, match=f"method {name} .*ZeRO stage") as fault:
        runs.run(parse_recipe(raw(tiny_llama, toy_stream, tmp_path / "run", name)))
    assert len(fault.value.messages) == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", METHODS)
def test_it_can_be_planned(name, tiny_llama, toy_stream, tmp_path, capsys):
    plan(parse_recipe(raw(tiny_llama, toy_stream, tmp_path / "run", name)), Console(width=200))
    shown = capsys.readouterr().out
    assert f"method {name} trains" in shown
    assert "memory, estimated" in shown and ("time to train" in shown) == bool(METHODS[name].trains)


def test_a_sample_of_methods_on_gemma(tiny_gemma3, toy_stream, tmp_path):
    for name in ("codyra", "ewc", "olora", "inflora"):
        folder = runs.run(parse_recipe(raw(tiny_gemma3, toy_stream, tmp_path / name, name)))
        assert all(math.isfinite(row["loss"]) for row in rows(folder))


def test_methods_are_listed(capsys):
    main_methods = json.loads(run_cli(capsys, "methods", "--json"))
    assert [m["name"] for m in main_methods] == list(METHODS)
    assert all(m["summary"] and len(m["summary"]) < 90 for m in main_methods)
    assert issubclass(METHODS["codyra"], Method)


def run_cli(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    assert not end.value.code
    return capsys.readouterr().out
