"""Where a run stands, as its folder says it at every moment; what it would go on with is what it then
does.
"""

import logging
import os

import pytest
from helpers import said, tiny_recipe

from codyra_llm.cli import main
from codyra_llm.experiment import run
from codyra_llm.report.status import look
from codyra_llm.runtime import signals
from codyra_llm.store.folder import RunFolder


def ended(asked, monkeypatch, name: str, then) -> None:
    """Run, with `then(folder, row)` after each row of that kind; it ends the run."""
    method = getattr(RunFolder, name)

    def acting(folder, *given):
        method(folder, *given)
        then(folder, given[0])

    with monkeypatch.context() as patch, pytest.raises((signals.Stopped, KeyboardInterrupt)):
        patch.setattr(signals, "_asked", [])
        patch.setattr(RunFolder, name, acting)
        run.run(asked)


def test_a_run_at_every_moment(tiny_llama, toy_stream, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "codyra_llm")
    asked, seen = (
        tiny_recipe(tiny_llama, toy_stream, tmp_path / "run", eval__zero_shot=True, checkpoint=False),
        [],
    )

    def first(folder, row):
        seen.append(look(folder.path))
        raise KeyboardInterrupt

    ended(asked, monkeypatch, "add_scores", first)
    [now], after = seen, look(tmp_path / "run")
    assert now["state"] == "running" and now["holder"]["pid"] == os.getpid() and now["holder"]["alive"]
    assert (now["learnt"], now["last"], now["method"], now["tasks"]) == ([], None, "codyra", ["ONE", "TWO"])
    assert now["scores"] == {"base": {"ONE": after["scores"]["base"]["ONE"]}}
    assert now["next"] == after["next"] == "TWO after base, 1 of 2 scored there"
    assert after["state"] == "stopped" and after["holder"] is None

    def fourth(folder, row):  # all processes agree after the next
        if (row.task, row.step) == ("TWO", 4):
            seen.append(look(folder.path))
            signals.ask("a test")

    ended(asked, monkeypatch, "log", fourth)
    now, after = seen[1], look(tmp_path / "run")
    assert now["next"] == "task 2/2 TWO, from its start" and now["learnt"] == ["ONE"]
    assert (now["last"]["task"], now["last"]["step"], now["last"]["steps"]) == ("TWO", 4, 6) and after[
        "last"
    ]["step"] == 5
    assert after["next"] == "task 2/2 TWO, after step 5" and after["state"] == "stopped"
    lines = said(after)
    assert lines[0].startswith(f"{tmp_path / 'run'}: stopped; last written ") and lines[0].endswith(" s ago")
    assert lines[1] == "method codyra, 1 of 2 tasks learnt: ONE"
    assert lines[-1].endswith("run the same command; next: task 2/2 TWO, after step 5")
    assert lines[2].startswith(f"last step: task 2/2 TWO, step 5/6, loss {after['last']['loss']:.3f}, ")
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path / "run")])
    assert (tmp_path / "run" / "report.md").is_file() and not (tmp_path / "run" / "summary.json").is_file()
    assert look(tmp_path / "run")["state"] == "stopped"  # a report on the way finishes nothing
    caplog.clear()

    ended(asked, monkeypatch, "add_scores", first)
    assert "TWO: going on after step 5" in caplog.text
    assert look(tmp_path / "run")["next"] == "TWO after TWO, 1 of 2 scored there"
    folder = run.run(asked)
    done = look(folder.path)
    assert (done["state"], done["next"], done["learnt"]) == ("finished", None, ["ONE", "TWO"])
    assert done["scores"] == {
        stage: {row.task: row.score for row in folder.scores if row.after == stage}
        for stage in ("base", "ONE", "TWO")
    }
    newest = max(p.stat().st_mtime for p in folder.path.rglob("*") if p.is_file())
    assert done["written"] == newest


def test_the_order_of_a_joint_method(tiny_llama, toy_stream, tmp_path, monkeypatch):
    asked = tiny_recipe(tiny_llama, toy_stream, tmp_path / "run", method="mtl", checkpoint=False)

    def second(folder, row):
        if row.step == 2:
            signals.ask("a test")

    ended(asked, monkeypatch, "log", second)
    assert look(tmp_path / "run")["next"] == "task 2/2 TWO, after step 3"
