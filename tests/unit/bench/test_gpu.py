"""Stages of `bench gpu`: what they write, what the summary says of it, and parts that only a GPU runs, on
what stands in for one."""

import json
import warnings

import pytest
import torch
from rich.console import Console

from codyra_llm.bench.gpu import compared, context, targets, training
from codyra_llm.bench.gpu.context import Context, findings, record
from codyra_llm.bench.gpu.shapes import examples
from codyra_llm.cli import main
from codyra_llm.train.engine import Engine
from codyra_llm.train.task_data import TaskData

CPU = torch.device("cpu")


@pytest.fixture
def stage(tmp_path):
    return Context("train", tmp_path, CPU, tiny=True)


@pytest.fixture
def task(stage):
    return TaskData("T", 0, examples(stage, 4), [range(4)] * 6, [])


def test_an_error_is_a_finding_and_the_stage_goes_on(stage):
    assert stage.attempt("half", lambda: 0.5) == 0.5
    assert stage.attempt("none", lambda: 1 / 0) is None
    assert stage.on_gpu("kernels", lambda: 1 / 0) is None
    found = {row["key"]: row["value"] for row in findings(stage.out)}
    assert found == {
        "half": 0.5,
        "none": {"failed": "ZeroDivisionError: division by zero"},
        "kernels": "needs a GPU",
    }
    assert stage.failed == ["none"]


def test_a_target_is_measured_in_full_size_on_a_gpu_alone(tmp_path):
    for device, tiny in ((CPU, False), (torch.device("cuda"), True), (torch.device("cuda"), False)):
        Context("linear", tmp_path, device, tiny).target("linear layer", 1.2)
    assert [row["key"] for row in findings(tmp_path)] == ["target: linear layer"]


def test_the_summary_says_what_was_reached(tmp_path, capsys):
    record(tmp_path, "linear", targets.ENDED, {"how": "ok", "seconds": 3.0})
    record(tmp_path, "block", targets.ENDED, {"how": "over its 60 s, and stopped", "seconds": 60.0})
    for name, value in (("linear layer", 1.13), ("decoder layer", 1.11)):
        record(tmp_path, "linear", context.TARGET + name, value)
    for kind, value in (("long", 1.3), ("short", 1.29)):
        record(tmp_path, "step", f"{context.TARGET}step over PEFT, {kind} examples", value)
    targets.write_summary(tmp_path, Console(width=160))
    lines = (tmp_path / "summary.txt").read_text(encoding="utf-8").splitlines()
    assert capsys.readouterr().out.splitlines() == lines
    said = {line[1:45].strip(): line.split()[-1] for line in lines if line.strip()}
    assert said["linear layer"] == said["step over PEFT, long examples"] == "reached"
    assert said["decoder layer"] == said["step over PEFT, short examples"] == "missed"
    assert sum(line.rstrip().endswith("not measured here") for line in lines) == len(targets.TARGETS) - 4
    assert any("block" in line and "over its 60 s, and stopped" in line for line in lines)


def test_waits_are_counted_by_line_in_an_ordinary_step(stage, task, monkeypatch):
    """With a warning as PyTorch gives it on a GPU, where the engine reads and where adapters are copied."""
    waited = "called a synchronizing CUDA operation"
    read, adapters = Engine.read, Engine.adapters
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    monkeypatch.setattr(Engine, "read", lambda *args: warnings.warn(waited, stacklevel=1) or read(*args))
    monkeypatch.setattr(
        Engine, "adapters", lambda self: [warnings.warn(waited, stacklevel=1)] and adapters(self)
    )
    found = training.waits(training.trainer(stage, "auto", 4), task)
    assert len(found) == 1 and sum(found.values()) == 1
    assert next(iter(found)).startswith("train/trainer.py:")


def test_the_profile_is_of_the_last_two_steps(stage, task):
    """On a CPU no kernel of a GPU runs, and the table lists what the host did."""
    found = training.kernels(stage, training.trainer(stage, "auto", 4), task, "short")
    assert found["kernels of two steps"] == 0 and found["wall s of two steps, profiled"] > 0
    table = (stage.out / "profile-short.txt").read_text(encoding="utf-8")
    calls = [line.split()[-1] for line in table.splitlines() if line.split()[:1] == ["aten::embedding"]]
    assert calls == ["2"]


def test_where_peft_runs_out_of_memory_the_others_go_on(stage, monkeypatch):
    asked = []

    def steps(base, title, batches, pad, options):
        asked.append(options.arms)
        if "peft" in options.arms:
            raise torch.OutOfMemoryError("CUDA out of memory")
        row = {"milliseconds": {"median": 2.0}, "speedup": {"median": 1.0}, "over": "frozen"}
        row |= {"over_floor": 1.0, "peak_bytes": 1, "error": 0.0}
        return {"arms": dict.fromkeys(options.arms, row)}

    monkeypatch.setattr(compared, "steps", steps)
    found = compared.measure_steps(stage, "llama-3.2-1b", compared.STEP_ARMS, "short")
    assert list(found) == ["frozen", "peft-strong", "ours"] and len(asked) == 2
    first, second = findings(stage.out)
    assert "ran out of memory" in first["value"] and json.loads(json.dumps(found)) == second["value"]


@pytest.mark.parametrize(
    "args, message",
    [
        (["gpu", "--tiny"], "--out"),
        (["gpu", "--out", "found", "--stages", "linaer"], "Did you mean 'linear'?"),
        (["linear", "--tiny"], "--tiny"),
        (["head", "--out", "found"], "--out"),
    ],
)
def test_mistakes_are_one_sentence(args, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["bench", *args])
    said = capsys.readouterr().err
    assert caught.value.code == 2 and message in said and "Traceback" not in said
    assert not list(tmp_path.iterdir())
