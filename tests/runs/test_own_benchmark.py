"""A stream of one's own: every source gives the same examples, splits don't leak, faults come together, and a
benchmark that isn't TRACE goes the whole way. Oracles: the rows that were written, splits recomputed,
texts written out by hand."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import call
from own_benchmark import PROTOCOL, faults, folder
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, TokenizersBackend

from codyra_llm.config.benchmark import benchmark_folder, load_benchmark
from codyra_llm.config.recipe import load_recipe
from codyra_llm.core.files import read_jsonl
from codyra_llm.experiment import run as runs
from codyra_llm.experiment.setup import prepare
from codyra_llm.store.folder import RunFolder
from codyra_llm.store.rows import Stage


@pytest.fixture(scope="module")
def made(tiny_llama, tmp_path_factory):
    """The folder of `benchmark new`, and a run of its recipe on a tiny model."""
    from codyra_llm.benchmarks.starter import start

    place = tmp_path_factory.mktemp("own") / "mine"
    start(place)
    settings = [
        f"model.path={tiny_llama}",
        f"output={place.parent / 'run'}",
        "data.epochs=1",
        "eval.zero_shot=true",
    ]
    return place, settings, runs.run(load_recipe(place / "recipe.yaml", settings))


def test_a_new_benchmark_is_checked_and_planned(made, capsys, tmp_path):
    place, settings, _ = made
    code, out, _ = call(capsys, "benchmark", "new", tmp_path / "again")
    assert (
        code == 0
        and (tmp_path / "again" / "letters.jsonl").read_bytes() == (place / "letters.jsonl").read_bytes()
    )
    code, _, err = call(capsys, "benchmark", "new", place)
    assert code == 2 and "exists already" in err
    code, out, _ = call(capsys, "data", "check", place, "--json")
    found = json.loads(out)
    tasks = found["variants"]["mine"]
    assert code == 0 and not found["faults"] + found["warnings"]
    assert {name: [part["records"] for part in of["splits"].values()] for name, of in tasks.items()} == {
        "letters": [140, 20, 40],
        "replies": [144, 16, 40],
    }
    code, out, _ = call(capsys, "plan", place / "recipe.yaml", *settings)
    assert code == 0 and "default protocol, batch 8" in out and "letters" in out and "Desk:" in out


@pytest.mark.parametrize("name", ["RUNS", "trace", "olora"])
def test_a_new_benchmark_of_any_name_is_its_recipes(tmp_path, monkeypatch, name):
    from codyra_llm.benchmarks.starter import start

    monkeypatch.chdir(tmp_path)
    start(Path(name))
    found = load_recipe(f"{name}/recipe.yaml")
    assert found.tasks == ["letters", "replies"] and found.output == f"runs/{name}"
    assert benchmark_folder(found.data.benchmark).resolve() == tmp_path / name


def test_a_new_benchmark_is_run_and_reported(made, capsys, tmp_path):
    place, _, run = made
    assert run.summary["tasks"] == ["letters", "replies"] and run.summary["protocol"] == "default"
    assert run.summary["metrics"] == ["exact_match@1", "exact_match@1"] and len(run.summary["matrix"]) == 2
    assert [list(row.metrics) for row in run.scores if row.task == "replies"][0] == [
        "rouge_l",
        "exact_match",
    ]
    page, markdown = (
        (run.path / "report.html").read_text("utf-8"),
        (run.path / "report.md").read_text("utf-8"),
    )
    assert "letters" in page and "replies" in markdown
    assert not [name for name in load_benchmark("trace").tasks if name in page + markdown]
    copy = shutil.copytree(run.path, tmp_path / "copy")
    assert call(capsys, "report", copy)[0] == 0 and (copy / "report.html").read_text("utf-8") == page
    assert call(capsys, "report", run.path, run.path, "--out", tmp_path / "r.md")[0] == 0


def test_a_run_goes_on_with_the_data_it_began_with_and_no_other(made, tmp_path):
    place, settings, run = made
    rows = [json.loads(line) for line in (place / "letters.jsonl").read_text().splitlines()]
    assert set(run.manifest["data"]) == {
        f"{task}/{split}" for task in run.recipe.tasks for split in ("train", "eval", "test")
    }
    other, out = shutil.copytree(place, tmp_path / "other"), shutil.copytree(run.path, tmp_path / "out")
    again = load_recipe(
        other / "recipe.yaml", [*settings, f"output={out}", f"data.benchmark={place}", f"data.root={place}"]
    )
    assert runs.run(again).summary == run.summary
    (place / "letters.jsonl").write_text("".join(json.dumps(row | {"note": 1}) + "\n" for row in rows))
    assert runs.run(again).summary == run.summary  # a field that is not read
    try:
        rows[0]["desk"] = "elsewhere"
        (place / "letters.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (message,) = faults(runs.run, again)
        assert "letters/" in message and "belongs to another recipe" in message
    finally:
        shutil.copy(other / "letters.jsonl", place)


def test_a_run_goes_on_with_the_metrics_it_began_with(made, tmp_path):
    """Rows scored by two metrics would meet in one matrix."""
    place, settings, run = made
    other, out = shutil.copytree(place, tmp_path / "other"), shutil.copytree(run.path, tmp_path / "out")
    again = load_recipe(other / "recipe.yaml", [*settings, f"output={out}", f"data.benchmark={place}"])
    text = (other / "benchmark.yaml").read_text()
    try:
        (place / "benchmark.yaml").write_text(
            text.replace("metrics: [exact_match] ", "metrics: [rouge_l, exact_match] ")
        )
        (message,) = faults(runs.run, again)
        assert (
            "letters was ['exact_match', 'exact_match'], and is ['rouge_l', 'rouge_l', 'exact_match'] now"
            in message
        )
    finally:
        shutil.copy(other / "benchmark.yaml", place)


def test_evaluate_and_score_on_the_new_benchmark(made, capsys, tmp_path, tiny_llama):
    place, _, run = made
    assert call(capsys, "evaluate", run.path / "checkpoint", "--out", tmp_path / "a")[0] == 0
    own = {row.task: row.metrics for row in run.scores if row.step == 2}
    assert {row.task: row.metrics for row in RunFolder(tmp_path / "a").scores} == own
    assert call(capsys, "evaluate", tiny_llama, "--benchmark", place, "--out", tmp_path / "b")[0] == 0
    base = {row.task: row.metrics for row in run.scores if row.step == 0}
    assert {row.task: row.metrics for row in RunFolder(tmp_path / "b").scores} == base
    code, _, err = call(
        capsys, "evaluate", f"{run.path}@letters", "--benchmark", "trace", "--out", tmp_path / "c"
    )
    assert code == 2 and "is a stage of a run on" in err
    rows = [{"prompt": "p", "prediction": "The dog is old.", "answer": "The dog is new."}]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    code, out, _ = call(capsys, "score", "replies", tmp_path / "p.json", "--benchmark", place)
    assert (
        code == 0
        and json.loads(out)["exact_match"]["mean"] == 0
        and json.loads(out)["rouge_l"]["mean"] == pytest.approx(75)
    )
    code, _, err = call(capsys, "score", "replise", tmp_path / "p.json", "--benchmark", place)
    assert code == 2 and "Did you mean 'replies'?" in err


def test_an_export_is_scored_on_its_benchmark_at_another_place(made, capsys, tmp_path):
    """By its own recipe, with the data that lies there."""
    place, _, run = made
    moved = shutil.copytree(place, tmp_path / "moved")
    checkpoint = shutil.copytree(run.path / "checkpoint", tmp_path / "checkpoint")
    carried = json.loads((checkpoint / "codyra_llm.json").read_text())
    carried["recipe"]["data"] |= dict.fromkeys(("benchmark", "root"), str(tmp_path / "gone"))
    carried["recipe"]["eval"]["max_examples"] = 3
    (checkpoint / "codyra_llm.json").write_text(json.dumps(carried))
    code, told, _ = call(capsys, "evaluate", checkpoint, "--benchmark", moved, "--out", tmp_path / "out")
    assert code == 0 and "another benchmark" not in told
    out = RunFolder(tmp_path / "out")
    assert [(row.after, len(out.predictions(row.stage, row.task))) for row in out.scores] == [
        ("replies", 3)
    ] * 2
    assert out.manifest["recipe"]["data"]["root"] == str(moved)


def test_a_run_goes_on_and_is_scored_with_base_data_and_benchmark_at_other_places(
    made, capsys, tmp_path, tiny_llama
):
    place, settings, run = made
    moved, base = shutil.copytree(place, tmp_path / "moved"), shutil.copytree(tiny_llama, tmp_path / "base")
    out = shutil.copytree(run.path, tmp_path / "run")
    (out / "summary.json").unlink()
    places = [f"data.benchmark={moved}", f"data.root={moved}", f"model.path={base}"]
    again = load_recipe(moved / "recipe.yaml", [*settings, *places, f"output={out}"])
    assert runs.run(again).summary == run.summary
    assert RunFolder(out).recipe.data.root == str(moved) and RunFolder(out).recipe.model.path == str(base)
    code, told, _ = call(
        capsys, "evaluate", f"{run.path}@letters", "--benchmark", moved, "--out", tmp_path / "out"
    )
    assert code == 0 and "another benchmark" not in told
    scores = [
        [row for row in folder.scores if row.step == 1] for folder in (run, RunFolder(tmp_path / "out"))
    ]
    assert scores[0] == scores[1] and RunFolder(tmp_path / "out").manifest["recipe"]["data"]["root"] == str(
        moved
    )
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["truncation"] = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    (message,) = faults(runs.run, again)
    assert "belongs to another recipe: the tokenizer was " in message


def test_an_export_of_another_benchmark_is_scored_on_this_one(made, capsys, tmp_path):
    place, _, run = made
    other = folder(
        tmp_path / "other",
        tasks={"letters": {"metrics": ["first_char"], "files": "one.csv"}},
        protocols={"short": PROTOCOL},
    )
    code, told, _ = call(
        capsys, "evaluate", run.path / "checkpoint", "--benchmark", other, "--out", tmp_path / "out"
    )
    assert code == 0 and f"scored by the protocol of {other}, not by its run's recipe" in told
    (row,) = RunFolder(tmp_path / "out").scores
    assert (row.task, list(row.metrics), row.metrics["first_char"]["n"]) == (
        "letters",
        ["first_char"],
        4,
    )


def test_data_as_people_have_it_is_planned_and_run(capsys, tmp_path, tiny_llama):
    """A semicolon CSV under a template, and Alpaca's records in lines: shown by `plan`, learnt by `run`."""
    place = tmp_path / "mixed"
    name = folder(
        place,
        tasks={
            "sort": {
                "metrics": ["exact_match"],
                "files": "sort.csv",
                "prompt": "Sort: {text}\n{hint}\n{labels}:",
                "labels": ["no", "yes"],
                "columns": {"answer": "label"},
            },
            "follow": {"metrics": ["rouge_l"], "files": "follow.json", "format": "alpaca"},
        },
        protocols={"short": {**PROTOCOL, "max_prompt_tokens": 96, "batch_size": 4}},
    )
    rows = [f"t{i};{'' if i % 2 else 'h'};{i % 2}" for i in range(12)]
    (place / "sort.csv").write_text("\n".join(["text;hint;label", *rows]))
    records = [{"instruction": f"Say {i}", "input": "", "output": "AB"[i % 2]} for i in range(12)]
    (place / "follow.json").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "recipe.yaml").write_text(
        json.dumps(
            {
                "model": {"path": str(tiny_llama)},
                "data": {"benchmark": name},
                "method": {"name": "seqlora", "rank": 2},
                "output": str(tmp_path / "run"),
            }
        )
    )
    code, out, _ = call(capsys, "plan", tmp_path / "recipe.yaml")
    assert code == 0
    assert "has semicolons between its columns" in out and "has one record in each line" in out
    run = runs.run(load_recipe(tmp_path / "recipe.yaml"))
    assert run.summary["tasks"] == ["sort", "follow"] and len(run.summary["matrix"]) == 2
    answered = {row["prompt"]: row["answer"] for row in run.predictions(Stage(1, "sort"), "sort")}
    assert len(answered) == 2 and all(
        prompt in (f"Sort: t{i}\nno, yes:" if i % 2 else f"Sort: t{i}\nh\nno, yes:" for i in range(12))
        and answer == ("no" if "\nh\n" in prompt else "yes")
        for prompt, answer in answered.items()
    )


def test_all_turns_of_chats_are_learnt(capsys, tmp_path, tiny_llama, monkeypatch):
    """The first step's loss is the base's mean over the tokens of all turns, each predicted from what the
    template writes before it; in transformers' logits. The last turn is what is asked for."""
    base, place = shutil.copytree(tiny_llama, tmp_path / "base"), tmp_path / "chats"
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    (base / "chat_template.jinja").write_text(
        template + "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    said = [["a", "yes", "b", "no, never"], ["c", "d"], ["e", "one", "f", "two", "g", "three"]]
    roles = ["user", "assistant"] * 3
    chats = [[{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)] for texts in said]
    name = folder(
        place,
        tasks={
            "talk": {
                "metrics": ["exact_match"],
                "files": dict.fromkeys(("train", "eval", "test"), "chats.jsonl"),
                "format": "openai",
                "train_on": "assistant",
            }
        },
        protocols={"short": {**PROTOCOL, "max_prompt_tokens": 300, "max_answer_tokens": 50}},
    )
    (place / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {{path: {base}, dtype: float32}}\ndata: {{benchmark: {name}}}\n"
        f"method: {{name: seqlora, rank: 2}}\ncheckpoint: false\noutput: {tmp_path / 'run'}\n"
    )
    code, out, err = call(capsys, "plan", recipe)
    assert code == 0 and "[user]a<eos>[assistant]yes<eos>" in out, err
    with monkeypatch.context() as patch:
        patch.setattr(TokenizersBackend, "is_fast", False)
        (message,) = faults(prepare, load_recipe(recipe))
        assert message.startswith("tasks.talk.train_on: the tokenizer of ") and "set it to last" in message
    run = runs.run(load_recipe(recipe))

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    losses = []
    for chat in chats:
        for place, message in enumerate(chat):
            if message["role"] == "assistant":
                written = tokenizer.apply_chat_template(
                    chat[:place], tokenize=False, add_generation_prompt=True
                )
                prompt = [tokenizer.bos_token_id, *tokenizer(written, add_special_tokens=False).input_ids]
                answer = tokenizer(message["content"] + "<eos>", add_special_tokens=False).input_ids
                logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
                losses += cross_entropy(logits, torch.tensor(answer), reduction="none").tolist()
    (row,) = read_jsonl(run.path / "log.jsonl")
    assert row["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    answers = [row["answer"] for row in run.predictions(Stage(1, "talk"), "talk")]
    assert answers == [texts[-1] for texts in said]
