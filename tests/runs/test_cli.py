"""The command line as a user meets it: in-process, exit codes and output."""

import json
import re
import shutil
from pathlib import Path

import pytest
from full_memory import ERRORS
from helpers import call

from codyra_llm.cli import main
from codyra_llm.config.recipe import parse_recipe
from codyra_llm.experiment import run


@pytest.fixture(scope="module")
def folder(tiny_llama, toy_stream, tmp_path_factory):
    raw = {
        "model": {"path": str(tiny_llama)},
        "data": {"root": str(toy_stream), "tasks": ["ONE", "TWO"], "epochs": 1},
        "method": {"name": "codyra", "rank": 4},
        "optim": {"lr": 1e-2, "batch_size": 8},
        "eval": {"max_new_tokens": 4},
        "output": str(tmp_path_factory.mktemp("runs") / "cli"),
        "checkpoint": False,
    }
    return run.run(parse_recipe(raw)).path


def test_generate_and_export_any_stage(capsys, folder, tmp_path):
    code, out, _ = call(capsys, "generate", f"{folder}@ONE", "Say A:", "--max-new-tokens", 3)
    assert code == 0
    code, _, _ = call(capsys, "export", folder, tmp_path / "one", "--after", "ONE")
    assert code == 0 and (tmp_path / "one" / "model.safetensors").is_file()
    assert call(capsys, "generate", tmp_path / "one", "Say A:", "--max-new-tokens", 3)[1] == out
    assert call(capsys, "export", folder, tmp_path / "peft", "--format", "peft", "--without", "ONE")[0] == 0
    assert (tmp_path / "peft" / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    "args, message",
    [
        (["generate", "{folder}@TREE", "x"], "'TREE' is not a finished task"),
        (["generate", "", "x"], "CHECKPOINT: expected a folder, a hub id or RUN@TASK, got nothing"),
        (["export", "{folder}", "out", "--after", "ON"], "Did you mean 'ONE'?"),
        (["export", "{folder}", "out", "--format", "onnx"], "'onnx' is not a format"),
        (["export", "{folder}", "{folder}"], "exists already"),
        (["report", "nowhere"], "is not a run folder"),
        (["run", "quickstart", "method.rnk=3"], "unknown key 'method.rnk' (value 3). Did you mean 'rank'?"),
        (["plan", "quikstart"], "Did you mean"),
        (["score", "FOMC", "nowhere.json"], "nowhere.json can't be read (No such file or directory)"),
        (["model", "get", "smollm", "out"], "smollm2-135m"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_2(args, message, capsys, folder):
    code, _, err = call(capsys, *(a.format(folder=folder) for a in args))
    assert code == 2 and message in err and "Traceback" not in err


def test_report_rebuilds_the_summary(capsys, folder):
    summary = (folder / "summary.json").read_text()
    (folder / "summary.json").write_text(json.dumps({"tasks": json.loads(summary)["tasks"]}))
    code, out, _ = call(capsys, "report", folder)
    assert code == 0 and "ONE" in out and (folder / "summary.json").read_text() == summary


@pytest.mark.parametrize("command", ["run", "report", "status"])
def test_a_damaged_prediction_of_the_last_task_is_named(capsys, folder, tmp_path, command):
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))
    file = copied / "predictions" / "02-TWO" / "TWO.jsonl"
    file.write_text(file.read_text().replace("next", "nexT", 1))
    recipe = json.loads((copied / "recipe.json").read_text()) | {"output": str(copied)}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    code, _, err = call(capsys, command, tmp_path / "recipe.json" if command == "run" else copied)
    assert code == 2 and err.count("\n") == 1 and f"{file} was changed or damaged" in err


def test_plan_shows_the_label_mask_and_trains_nothing(capsys, tiny_llama, toy_stream, tmp_path):
    code, out, _ = call(
        capsys,
        "plan",
        "quickstart",
        f"model.path={tiny_llama}",
        f"data.root={toy_stream}",
        "data.tasks=[ONE,THREE]",
        "general.data=null",
        "data.max_prompt_tokens=24",
        f"output={tmp_path / 'run'}",
    )
    assert code == 0 and not (tmp_path / "run").exists()
    assert (
        "Say" in out
        and "labelled" in out
        and "THREE" in out
        and "100%" in out
        and "memory" in out
        and "disk" in out
    )


def test_a_plan_says_which_tasks_are_cut(capsys, tiny_llama, toy_stream, tmp_path):
    words = [
        "plan",
        "quickstart",
        f"model.path={tiny_llama}",
        f"data.root={toy_stream}",
        "data.tasks=[THREE]",
    ]
    words += ["general.data=null", f"output={tmp_path / 'run'}"]
    code, out, _ = call(capsys, *words, "data.max_prompt_tokens=24")
    cut = r"note: THREE: (\d+) of \1 training examples are cut, prompts to data.max_prompt_tokens \(24\)"
    assert code == 0 and re.search(cut, out)
    code, out, _ = call(capsys, *words, "data.max_prompt_tokens=100")
    assert code == 0 and "are cut" not in out


def test_data_check(capsys, toy_stream, tmp_path):
    assert call(capsys, "data", "check", toy_stream)[0] == 0
    (tmp_path / "T").mkdir()
    (tmp_path / "T" / "train.json").write_text('[{"prompt": "x", "answer": ""}]')
    code, out, err = call(capsys, "data", "check", tmp_path)
    assert code == 1 and "answer" in out + err


@pytest.mark.parametrize("made", [*ERRORS, MemoryError])
def test_memory_that_runs_out_is_one_sentence(made, folder, capsys, monkeypatch):
    """Wherever it does: training alone can make its batches smaller by itself."""

    def full(*arguments):
        raise made()

    monkeypatch.setattr("codyra_llm.models.loading.load", full)
    code, _, err = call(capsys, "generate", f"{folder}@ONE", "Say A:")
    assert (
        code == 2
        and err.count("\n") == 1
        and err.startswith("error: memory ran out (")
        and "lower optim" in err
    )
    monkeypatch.setattr("codyra_llm.models.loading.load", lambda *arguments: [][1])
    with pytest.raises(IndexError):
        main(["generate", f"{folder}@ONE", "Say A:"])
