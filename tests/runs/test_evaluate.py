"""`codyra-llm evaluate`: a checkpoint's scores are those of its run, exactly; any other checkpoint; what is
refused.
"""

import json
import re
import shutil

import pytest
import torch
from helpers import call, export, learnt
from safetensors.torch import load_file, save_file

from codyra_llm.api import Run
from codyra_llm.checkpoints.evaluate import evaluate
from codyra_llm.checkpoints.generate import answer
from codyra_llm.checkpoints.source import Wanted
from codyra_llm.cli import main
from codyra_llm.core.errors import Fault
from codyra_llm.core.files import read_jsonl
from codyra_llm.evaluate import vllm
from codyra_llm.experiment.run import run
from codyra_llm.experiment.setup import Setup
from codyra_llm.store.folder import RunFolder


@pytest.fixture(scope="module")
def merging(tiny_llama, toy_stream, tmp_path_factory):
    return learnt(
        tiny_llama,
        toy_stream,
        tmp_path_factory.mktemp("runs") / "seqlora",
        {"name": "seqlora", "rank": 4},
        epochs=12,
    )


def last_row(run, step=2):
    return [row for row in run.scores if row.step == step]


def test_what_a_run_made_scores_as_in_the_run(merging, tmp_path):
    """From checkpoint/, from an export, from RUN and RUN@TASK: rows and predictions are the run's own."""
    export(merging, tmp_path / "merged"), export(merging, tmp_path / "one", "--after", "ONE")
    assert [row.score for row in last_row(merging)] != [row.score for row in last_row(merging, 1)] + [0]
    for number, (checkpoint, step) in enumerate(
        [
            (merging.path / "checkpoint", 2),
            (tmp_path / "merged", 2),
            (merging.path, 2),
            (f"{merging.path}@TWO", 2),
            (tmp_path / "one", 1),
            (f"{merging.path}@ONE", 1),
        ]
    ):
        out = evaluate(str(checkpoint), Wanted(out=tmp_path / str(number)))
        assert out.scores == last_row(merging, step), checkpoint
        for row in out.scores:
            where = row.stage, row.task
            assert (
                out.predictions(*where) == merging.predictions(*where) and len(out.predictions(*where)) == 5
            )


def test_a_method_that_does_not_merge_scores_as_in_its_run(tiny_llama, toy_stream, tmp_path):
    run = learnt(
        tiny_llama, toy_stream, tmp_path / "run", {"name": "l2p", "pool": 4, "length": 2, "chosen": 2}
    )
    for step, task in enumerate(("ONE", "TWO"), 1):
        out = evaluate(f"{run.path}@{task}", Wanted(out=tmp_path / task))
        assert out.scores == last_row(run, step)
    base = evaluate(f"{run.path}@base", Wanted(out=tmp_path / "base"))
    assert [(row.after, row.task) for row in base.scores] == [("base", "ONE"), ("base", "TWO")]


def test_a_peft_adapter_is_merged_into_its_base(merging, tiny_llama, toy_stream, tmp_path, monkeypatch):
    """The exported adapter's merged weights are the run's to rounding; a base that it names wrongly is
    replaced by --base.
    """
    from codyra_llm.checkpoints import evaluate as evaluation

    export(merging, tmp_path / "adapter", "--format", "peft")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "/gone"})
    )
    built, plain = [], evaluation._built
    monkeypatch.setattr(evaluation, "_built", lambda *a: built.append(plain(*a)) or built[-1])
    out = evaluate(str(tmp_path / "adapter"), Wanted(base=str(tiny_llama), out=tmp_path / "out"))
    from transformers import AutoModelForCausalLM

    own = AutoModelForCausalLM.from_pretrained(merging.path / "checkpoint").state_dict()
    merged = built[0].state_dict()
    assert merged.keys() == own.keys()
    for name, tensor in own.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-4, atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama).state_dict()
    assert any(not torch.allclose(base[name], tensor, atol=1e-3) for name, tensor in own.items())
    assert [row.task for row in out.scores] == ["ONE", "TWO"]
    with pytest.raises(Fault, match="/gone"):
        evaluate(str(tmp_path / "adapter"), Wanted(out=tmp_path / "other"))
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps(config | {"peft_type": "PROMPT_TUNING"})
    )
    with pytest.raises(Fault, match="peft_type PROMPT_TUNING, expected LORA"):
        evaluate(str(tmp_path / "adapter"), Wanted(out=tmp_path / "other"))


def test_anybodys_checkpoint_and_what_is_missing(tiny_llama, toy_stream, tmp_path, monkeypatch):
    """Zero-shot scores equal those of a run of method none; a second call asks the model nothing, a third the
    new task.
    """
    none = learnt(tiny_llama, toy_stream, tmp_path / "none", "none")
    lengths = ["data.max_prompt_tokens=12", "eval.max_new_tokens=3", "eval.max_examples=5"]
    wanted = Wanted(data=str(toy_stream), tasks=["ONE"], out=tmp_path / "out", overrides=lengths)
    out = evaluate(str(tiny_llama), wanted)
    expected = {row.task: row.score for row in none.scores}
    assert [(row.task, row.after, row.score) for row in out.scores] == [
        ("ONE", "checkpoint", expected["ONE"])
    ]
    with monkeypatch.context() as patch:
        patch.setattr("codyra_llm.models.loading.load", lambda *a, **k: pytest.fail("weights were loaded"))
        assert len(evaluate(str(tiny_llama), wanted).scores) == 1
    both = evaluate(
        str(tiny_llama),
        Wanted(data=str(toy_stream), tasks=["ONE", "TWO"], out=tmp_path / "out", overrides=lengths),
    )
    assert [row.task for row in both.scores] == ["ONE", "TWO"] and both.scores[0] == out.scores[0]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["mean"] == pytest.approx(sum(expected.values()) / 2)
    files = sorted((tmp_path / "out" / "lm_eval" / "01-checkpoint").glob("results_*.json"))
    results = json.loads(files[-1].read_text())["results"]
    assert len(files) == 2 and results["TWO"]["exact_match,none"] == expected["TWO"] / 100
    with pytest.raises(Fault, match="was started with eval.max_new_tokens 3, now it is 4"):
        evaluate(
            str(tiny_llama),
            Wanted(
                data=str(toy_stream),
                tasks=["ONE"],
                out=tmp_path / "out",
                overrides=[*lengths[:1], "eval.max_new_tokens=4", lengths[2]],
            ),
        )


def test_general_ability_alone_against_the_base(merging, tiny_llama, toy_stream, tmp_path):
    """No tasks, a merged model and its base: rows of both, ΔR by hand, both in the harness's files."""
    (tmp_path / "boolq").mkdir()
    (tmp_path / "boolq" / "test.json").write_text(
        json.dumps(
            [
                {
                    "instruction": f"Please answer, question: is {i} even?\n\nAnswer format: true/false",
                    "answer": answer,
                }
                for i, answer in enumerate(["true", "false"] * 4)
            ]
        )
    )
    (merging.path / "checkpoint" / "codyra_llm.json").rename(
        tmp_path / "carried.json"
    )  # as anybody's checkpoint
    try:
        with pytest.raises(Fault, match="carries no recipe, so there is nothing to score it on"):
            evaluate(str(merging.path / "checkpoint"), Wanted(out=tmp_path / "out"))
        with pytest.raises(Fault, match="no folder or file 'no/where', and a model of the hub carries no"):
            evaluate("no/where", Wanted(out=tmp_path / "out"))
        out = evaluate(
            str(merging.path / "checkpoint"),
            Wanted(general=str(tmp_path), base=str(tiny_llama), out=tmp_path / "out"),
        )
    finally:
        (tmp_path / "carried.json").rename(merging.path / "checkpoint" / "codyra_llm.json")
    assert [(row.step, row.after, row.task, row.kind) for row in out.scores] == [
        (0, "base", "boolq_closed_book", "general"),
        (1, "checkpoint", "boolq_closed_book", "general"),
    ]
    before, after = (row.score for row in out.scores)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["delta_r"] == {"value": after - before, "members": ["boolq_closed_book"]}
    assert len(read_jsonl(out.path / "predictions" / "01-checkpoint" / "boolq_closed_book.jsonl")) == 8
    assert [p.parent.name for p in sorted(out.path.rglob("results_*.json"))] == ["00-base", "01-checkpoint"]


def test_general_ability_in_a_run(tiny_llama, toy_stream, tmp_path):
    """`when: each`: after every task; the report shows before, after and ΔR; a method that doesn't merge as
    well.
    """
    (tmp_path / "boolq").mkdir()
    (tmp_path / "boolq" / "test.json").write_text(
        json.dumps(
            [
                {
                    "instruction": f"Please answer, question: is {i} even?\n\nAnswer format: true/false",
                    "answer": "true",
                }
                for i in range(9)
            ]
        )
    )
    for method in ({"name": "seqlora", "rank": 4}, {"name": "l2p", "pool": 4, "length": 2, "chosen": 2}):
        run = learnt(
            tiny_llama,
            toy_stream,
            tmp_path / method["name"],
            method,
            general={"data": str(tmp_path), "limit": 4, "when": "each"},
        )
        rows = [row for row in run.scores if row.kind == "general"]
        assert [row.after for row in rows] == ["base", "ONE", "TWO"]
        assert {row.metrics["acc,none"]["n"] for row in rows} == {4}
        prompts = [[p["prompt"] for p in run.predictions(row.stage, row.task)] for row in rows]
        assert prompts[0] == prompts[1] == prompts[2] and len(set(prompts[0])) == 4
        summary = json.loads((run.path / "summary.json").read_text())
        change = summary["delta_r"]
        assert change["value"] == rows[2].score - rows[0].score
        assert change["members"] == ["boolq_closed_book"]
        assert change["low"] <= change["value"] <= change["high"]
        said = f"ΔR {change['value']:+.2f} (95 % interval over test examples: {change['low']:+.2f} to "
        assert said in (run.path / "report.md").read_text()
        page = (run.path / "report.html").read_text()
        assert "acc,none, 0-shot" in page and "ΔR" in page


def test_the_command_and_its_refusals(merging, tmp_path, capsys):
    def call(*args):
        with pytest.raises(SystemExit) as caught:
            main(["evaluate", *map(str, args)])
        return caught.value.code, "".join(capsys.readouterr())

    code, told = call(merging.path / "checkpoint", "--tasks", "TWO", "--out", tmp_path / "out")
    assert code == 0 and "after TWO: TWO" in told
    assert [row["task"] for row in read_jsonl(tmp_path / "out" / "scores.jsonl")] == ["TWO"]
    for args, message in [
        (("--tasks", "TOW"), "'TOW' is not a task of the recipe"),
        (("--benchmark", "glue"), "is neither one of trace, olora, superni nor a folder"),
        (("x",), "'x' is neither an option nor an override"),
        (("eval.max_new_tokens=9", "--out", tmp_path / "out"), "was started with eval.max_new_tokens"),
    ]:
        code, told = call(merging.path / "checkpoint", *args)
        assert code == 2 and message in told and "Traceback" not in told
    assert "is not a finished task" in call(f"{merging.path}@FOUR")[1]
    assert "nowhere" in call("nowhere")[1]


@pytest.mark.parametrize(
    "content, message",
    [
        ({"recipe": "x"}, "'recipe' is 'x', expected a run's recipe"),
        ({}, "'recipe' is None"),
        ({"recipe": {"data": 3}}, "data: 3 is not a section"),
        ({"after": "FOUR"}, "'after' is 'FOUR', expected one of ONE, TWO"),
        ({"after": []}, "'after' is "),
        ({"recipe": {"data": {"benchmark": 3}}}, "data.benchmark"),
    ],
)
def test_what_an_export_says_of_itself_may_be_wrong(content, message, merging, tmp_path):
    carried = (
        json.loads((merging.path / "checkpoint" / "codyra_llm.json").read_text())
        if "after" in content
        else {}
    )
    (tmp_path / "codyra_llm.json").write_text(json.dumps(carried | content))
    with pytest.raises(Fault, match=message) as caught:
        evaluate(str(tmp_path), Wanted(out=tmp_path / "out"))
    assert all(str(tmp_path) in told for told in caught.value.messages)


def test_a_checkpoint_does_not_bring_its_own_code(merging, tmp_path):
    """The harness's task files can name Python functions; the user may give the folder all the same."""
    pytest.importorskip("lm_eval", reason="needs codyra-llm[general]")
    theirs = tmp_path / "theirs"
    shutil.copytree(merging.path / "checkpoint", theirs)
    (theirs / "utils.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n\n\ndef f(doc):\n    return doc\n"
    )
    (theirs / "evil.yaml").write_text(
        "task: evil\ndataset_path: json\nprocess_docs: !function utils.f\n"
        "dataset_kwargs: {data_files: {test: gone.json}}\n"
    )
    carried = json.loads((theirs / "codyra_llm.json").read_text())
    carried["recipe"]["general"]["data"] = str(theirs)
    (theirs / "codyra_llm.json").write_text(json.dumps(carried))
    with pytest.raises(Fault, match="a folder of the checkpoint itself, whose task files can run code"):
        evaluate(str(theirs), Wanted(out=tmp_path / "out"))
    assert not (tmp_path / "ran").exists()
    out = evaluate(str(theirs), Wanted(tasks=["ONE"], out=tmp_path / "out", overrides=["general.data=null"]))
    assert [row.task for row in out.scores] == ["ONE"]


def changed(merging, tmp_path):
    """A copy of the run whose base is a copy too, and the base's folder."""
    base = shutil.copytree(merging.recipe.model.path, tmp_path / "base")
    recipe = merging.recipe.model_copy(update={"output": str(tmp_path / "own")})
    moved = recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": str(base)})})
    run(moved)
    return tmp_path / "own", base


@pytest.mark.parametrize("what", ["base weights", "tokenizer files"])
def test_a_run_whose_base_has_changed_is_not_scored(what, merging, tmp_path, capsys):
    """Its updates would be added to weights that they were not made on."""
    own, base = changed(merging, tmp_path)
    if what == "base weights":
        file = base / "model.safetensors"
        save_file({key: 2 * value for key, value in load_file(file).items()}, file, {"format": "pt"})
    else:
        with open(base / "tokenizer.json", "a", encoding="utf-8") as tokenizer:
            tokenizer.write("\n")
    for command in (["evaluate", "--out", tmp_path / "e"], ["generate"], ["export"]):
        more = {"generate": ["Say A:"], "export": [tmp_path / "x"]}.get(command[0], [])
        target = own if command[0] == "export" else f"{own}@ONE"
        code, _, err = call(capsys, command[0], target, *more, *command[1:])
        assert code == 2 and f"was made on other {what} (" in err
    assert not (tmp_path / "e" / "scores.jsonl").exists() and not (tmp_path / "x").exists()


def test_a_run_and_an_evaluation_have_folders_of_their_own(merging, tmp_path, capsys):
    code, _, err = call(capsys, "evaluate", merging.path, "--out", merging.path)
    assert (code, err) == (2, f"error: --out: {merging.path} is the folder of a run; give another one\n")
    out = evaluate(f"{merging.path}@ONE", Wanted(out=tmp_path / "evaluation")).path
    with pytest.raises(Fault, match="^output: .*evaluation is the folder of an evaluation; give another one"):
        run(merging.recipe.model_copy(update={"output": str(out)}))
    with pytest.raises(Fault, match="evaluation is not a run folder"):
        RunFolder(out).recipe  # noqa: B018


def test_a_backend_that_is_not_installed_is_told_before_weights_load(merging, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm, "find_spec", lambda name: None)
    monkeypatch.setattr(Setup, "load_stage", None)
    with pytest.raises(Fault, match="eval.backend: vllm is not installed"):
        evaluate(str(merging.path), Wanted(out=tmp_path / "out", overrides=["eval.backend=vllm"]))


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("data.tasks=[TWO, ONE]", "data.tasks: .* learns ONE, TWO in this order; .* with --tasks"),
        ("data.tasks=[ONE]", "data.tasks: .* learns ONE, TWO in this order"),
        ("method=l2p", "method: .* was made by seqlora with settings of its own"),
        ("method.rank=2", "method: .* was made by seqlora"),
    ],
)
@pytest.mark.parametrize("checkpoint", ["", "@ONE", "/checkpoint"])
def test_no_setting_makes_another_run_of_it(checkpoint, setting, told, merging, tmp_path):
    """Its rows would be those of another task, or of a model without its updates."""
    with pytest.raises(Fault, match=told):
        evaluate(f"{merging.path}{checkpoint}", Wanted(out=tmp_path / "out", overrides=[setting]))


def test_an_option_that_nothing_uses_is_refused(merging, tiny_llama, tmp_path, capsys):
    for command, option, told in (
        ("evaluate", ["--base", tiny_llama], "--base: .* nothing is measured on the base"),
        ("evaluate", ["--general-tasks", "piqa"], "--general-tasks: no general ability is measured"),
        ("generate", ["Say A:", "--base", tiny_llama], "--base: .* is not a PEFT adapter"),
    ):
        code, out, err = call(capsys, command, merging.path, *option)
        assert code == 2 and not out and re.search(told, err)


def test_names_may_have_spaces_between_them(merging, tmp_path, capsys):
    out = tmp_path / "out"
    code, _, err = call(capsys, "evaluate", merging.path, "--tasks", "ONE, TWO, ONE,", "--out", out)
    assert code == 0, err
    assert [row.task for row in RunFolder(out).scores] == ["ONE", "TWO"]


def test_no_stage_is_made_up(merging, tiny_llama, toy_stream, tmp_path, capsys):
    """A task that a joint method had not learnt yet, and an update that is not part of the model."""
    joint = learnt(tiny_llama, toy_stream, tmp_path / "mtl", {"name": "mtl", "rank": 2}, epochs=1).path
    for command in (
        ["export", joint, tmp_path / "x", "--after", "ONE"],
        ["generate", f"{joint}@ONE", "Say A:"],
        ["evaluate", f"{joint}@ONE", "--out", tmp_path / "e"],
    ):
        code, _, err = call(capsys, *command)
        assert code == 2 and "mtl learns all tasks at the last, so the run has no model after ONE" in err
    command = ["export", merging.path, tmp_path / "x", "--after", "ONE", "--without", "TWO"]
    code, _, err = call(capsys, *command)
    assert code == 2 and "--without: the model after ONE has no update of 'TWO'; choose one of ONE" in err
    assert not (tmp_path / "x").exists()


def test_a_finished_run_that_was_moved_needs_neither_its_data_nor_its_old_place(
    tiny_llama, toy_stream, tmp_path, capsys
):
    """As after a copy from a cluster, where neither the data nor the output's path is the same."""
    (tmp_path / "there").mkdir()
    data = shutil.copytree(toy_stream, tmp_path / "data")
    kept = learnt(tiny_llama, data, tmp_path / "there" / "run", {"name": "seqlora", "rank": 2}, epochs=1)
    said = answer(f"{kept.path}@ONE", "Say A:", 3)
    shutil.copytree(kept.path, tmp_path / "here")
    shutil.rmtree(tmp_path / "there"), shutil.rmtree(data)
    (tmp_path / "there").touch()  # nothing can be written below it
    assert answer(f"{tmp_path / 'here'}@ONE", "Say A:", 3) == said
    code, _, err = call(capsys, "export", tmp_path / "here", tmp_path / "merged")
    assert code == 0, err
    model, _ = Run(tmp_path / "here").load()
    own = model.state_dict()
    assert all(torch.equal(own[key], value) for key, value in weights_in(tmp_path / "merged").items())
    with pytest.raises(Fault, match="data.root: there is no folder"):  # to score it, its data are needed
        evaluate(f"{tmp_path / 'here'}@ONE", Wanted(out=tmp_path / "scores"))


def weights_in(folder):
    return load_file(folder / "model.safetensors")
