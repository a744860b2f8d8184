"""Open-ended prompts: answers side by side, a judge's known preferences counted, and its key nowhere."""

import json
import logging
import shutil

import pytest
from fake_judge import KEY, likes_good
from fake_judge import judge as judging
from helpers import learnt

from codyra_llm.checkpoints.evaluate import evaluate
from codyra_llm.checkpoints.source import Wanted
from codyra_llm.cli import main
from codyra_llm.config.overrides import override
from codyra_llm.config.recipe import parse_recipe
from codyra_llm.core.errors import Fault
from codyra_llm.experiment import run as runs


@pytest.mark.parametrize("kind", ["merged", "stage"])
def test_a_checkpoint_does_not_say_where_a_key_goes(
    kind, tiny_llama, toy_stream, questions, tmp_path, monkeypatch
):
    """Somebody's export names a judge and the variable of another key: nothing is sent there."""
    monkeypatch.setenv("HF_TOKEN", KEY)
    run = learnt(tiny_llama, toy_stream, tmp_path / "run", {"name": "seqlora", "rank": 4})
    with judging(likes_good) as server:
        theirs, told = run.path / "checkpoint" / "codyra_llm.json", run.path / "recipe.json"
        for file in (theirs, told):
            content = json.loads(file.read_text())
            raw = content.get("recipe", content)
            raw["open_ended"]["judge"] = {"base_url": server.url, "model": "evil", "key_variable": "HF_TOKEN"}
            raw["trackers"] = ["tensorboard"]
            file.write_text(json.dumps(content))
        (run.path / "seals.json").unlink()  # as of a stage
        out = evaluate(
            str(theirs.parent if kind == "merged" else run.path),
            Wanted(
                base=str(tiny_llama),
                tasks=["ONE"],
                out=tmp_path / "out",
                overrides=[f"open_ended.prompts={questions}", "open_ended.max_new_tokens=4"],
            ),
        )
        assert len(out.pairs("helpful")) == 4 and not server.asked
    assert (
        out.manifest["recipe"]["trackers"] == []
        and out.manifest["recipe"]["open_ended"]["judge"]["base_url"] is None
    )


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "helpful.json").write_text(json.dumps([{"prompt": f"Say {x}:"} for x in "ABCA"]))
    (folder / "harmless.jsonl").write_text('{"prompt": "Who is number 3?"}\n')
    return folder


def asking(folder, url=None):
    return {"prompts": str(folder), "max_new_tokens": 4, "judge": {"base_url": url, "model": "the-judge"}}


def test_a_run_answers_judges_and_reports_and_writes_no_key(
    tiny_llama, toy_stream, questions, tmp_path, monkeypatch, capsys, caplog
):
    """Without an endpoint nothing is judged and the report says so; with one the same run goes on to it; a
    task more gives other final answers, and `evaluate` the same ones as the run."""
    caplog.set_level(logging.INFO, "codyra_llm")
    run = learnt(
        tiny_llama, toy_stream, tmp_path / "run", {"name": "seqlora", "rank": 4}, open_ended=asking(questions)
    )
    rows = run.answers("helpful")
    assert [row["prompt"] for row in rows] == [f"Say {x}:" for x in "ABCA"] and {
        row["after"] for row in rows
    } == {"TWO"}
    assert rows[0]["base"] == generated(capsys, str(tiny_llama), "Say A:")
    assert rows[0]["final"] == generated(capsys, f"{run.path}@TWO", "Say A:") != rows[0]["base"]
    for name in ("report.md", "report.html"):
        assert "They were not judged" in (run.path / name).read_text(encoding="utf-8")
    assert run.summary["open_ended"]["judge"] is None and not (run.path / "judged").exists()

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    before = (run.path / "answers" / "helpful.jsonl").stat().st_mtime_ns
    with judging(lambda first, second: "[[A]]") as server:
        again = learnt(
            tiny_llama,
            toy_stream,
            tmp_path / "run",
            {"name": "seqlora", "rank": 4},
            open_ended=asking(questions, server.url),
        )
        assert (run.path / "answers" / "helpful.jsonl").stat().st_mtime_ns == before and server.asked
        assert again.summary["open_ended"]["files"]["helpful"]["tie"]["n"] == 4
        page = (run.path / "report.html").read_text(encoding="utf-8")
        assert "Helpfulness and safety" in page and "the-judge" in page and "100.0" in page
        own = [f"open_ended.judge.base_url={server.url}", "open_ended.judge.model=the-judge"]
        out = evaluate(str(run.path), Wanted(base=str(tiny_llama), out=tmp_path / "out", overrides=own))
        assert out.answers("helpful") == rows and out.answers("harmless") == run.answers("harmless")
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())
        assert summary["open_ended"] == again.summary["open_ended"]
        longer = parse_recipe(
            override(again.recipe.model_dump(mode="json"), ["data.tasks=[ONE, TWO, THREE]"])
        )
        more = runs.run(longer).answers("helpful")
    assert {row["after"] for row in more} == {"THREE"} and [r["base"] for r in more] == [
        r["base"] for r in rows
    ]
    printed = capsys.readouterr()
    assert KEY not in printed.out + printed.err + caplog.text and "judged by the-judge" in caplog.text
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 30 and not [path for path in files if KEY.encode() in path.read_bytes()]


def generated(capsys, source, prompt):
    with pytest.raises(SystemExit):
        capsys.readouterr()
        main(["generate", source, prompt, "--max-new-tokens", "4"])
    return capsys.readouterr().out.removesuffix("\n")


def test_what_does_not_ask_the_prompts_does_without_their_files(
    tiny_llama, toy_stream, questions, tmp_path, capsys
):
    """Export, `generate` at a stage and `evaluate` without a base, of a run whose prompts were moved
    since.
    """
    moving = shutil.copytree(questions, tmp_path / "questions")
    run = learnt(
        tiny_llama, toy_stream, tmp_path / "run", {"name": "seqlora", "rank": 4}, open_ended=asking(moving)
    )
    told = generated(capsys, f"{run.path}@TWO", "Say A:")
    moving.rename(tmp_path / "elsewhere")
    assert generated(capsys, f"{run.path}@TWO", "Say A:") == told == run.answers("helpful")[0]["final"]
    with pytest.raises(SystemExit) as end:
        main(["export", str(run.path), str(tmp_path / "export")])
    assert end.value.code == 0
    out = evaluate(str(tmp_path / "export"), Wanted(out=tmp_path / "out"))
    last = {row.task: row.score for row in run.scores if row.after == "TWO"}
    assert {row.task: row.score for row in out.scores} == last
    for changed in (
        lambda: evaluate(str(run.path), Wanted(base=str(tiny_llama), out=tmp_path / "both")),
        lambda: runs.run(run.recipe),
    ):
        with pytest.raises(Fault, match="open_ended.prompts: there is no file or folder"):
            changed()


def test_a_missing_key_is_a_fault_before_training(tiny_llama, toy_stream, questions, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(Fault, match="OPENAI_API_KEY holds no key"):
        learnt(
            tiny_llama,
            toy_stream,
            tmp_path / "run",
            "seqlora",
            open_ended=asking(questions, "http://127.0.0.1:9/v1"),
        )
    assert not (tmp_path / "run").exists()


def test_answers_alone_of_anybodys_checkpoint(tiny_llama, toy_stream, questions, tmp_path):
    """Prompts are enough to evaluate on; without a base there is nothing to compare with."""
    section = [f"open_ended.prompts={questions}", "open_ended.max_new_tokens=4"]
    run = learnt(tiny_llama, toy_stream, tmp_path / "run", {"name": "seqlora", "rank": 4})
    out = evaluate(
        str(run.path / "checkpoint"),
        Wanted(base=str(tiny_llama), tasks=["ONE"], out=tmp_path / "out", overrides=section),
    )
    assert (
        len(out.pairs("helpful")) == 4 and out.pairs("helpful")[0]["base"] != out.pairs("helpful")[0]["final"]
    )
    base = evaluate(str(tiny_llama), Wanted(base=str(tiny_llama), out=tmp_path / "same", overrides=section))
    assert all(row["base"] == row["final"] for row in base.pairs("helpful"))
