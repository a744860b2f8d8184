"""Where a run stands, as its folder says it at every moment; what it would go on with is what it then
does.
"""

import json
import os
import subprocess
import sys
import time
from io import StringIO

import pytest
from rich.console import Console
from test_run import recipe

from codyra_llm.cli import main
from codyra_llm.core.errors import Fault
from codyra_llm.experiment import run
from codyra_llm.report.status import look, show
from codyra_llm.runtime import signals
from codyra_llm.store.folder import RunFolder
from codyra_llm.store.lock import Lease


def said(found: dict) -> list[str]:
    out = StringIO()
    show(found, Console(file=out, width=40))
    return out.getvalue().splitlines()


def ended(asked, monkeypatch, name: str, then) -> None:
    """Run, `then(folder, row)` behind each row of that kind; it ends the run."""
    method = getattr(RunFolder, name)

    def acting(folder, *given):
        method(folder, *given)
        then(folder, given[0])

    with monkeypatch.context() as patch, pytest.raises((signals.Stopped, KeyboardInterrupt)):
        patch.setattr(signals, "_asked", [])
        patch.setattr(RunFolder, name, acting)
        run.run(asked)


def test_a_run_at_every_moment(tiny_llama, toy_stream, tmp_path, monkeypatch, capsys):
    asked, seen = recipe(tiny_llama, toy_stream, tmp_path / "run", eval__zero_shot=True, checkpoint=False), []

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

    def fourth(folder, row):  # all processes agree behind the next
        if (row["task"], row["step"]) == ("TWO", 4):
            seen.append(look(folder.path))
            signals.ask("a test")

    ended(asked, monkeypatch, "log", fourth)
    now, after = seen[1], look(tmp_path / "run")
    assert now["next"] == "task 2/2 TWO, from its start" and now["learnt"] == ["ONE"]
    assert (now["last"]["task"], now["last"]["step"], now["last"]["steps"]) == ("TWO", 4, 6) and after[
        "last"
    ]["step"] == 5
    assert after["next"] == "task 2/2 TWO, behind step 5" and after["state"] == "stopped"
    lines = said(after)
    assert lines[0].startswith(f"{tmp_path / 'run'}: stopped; last written ") and lines[0].endswith(" s ago")
    assert lines[1] == "method codyra, 1 of 2 tasks learnt: ONE"
    assert lines[-1].endswith("goes on with: task 2/2 TWO, behind step 5")
    assert lines[2].startswith(f"last step: task 2/2 TWO, step 5/6, loss {after['last']['loss']:.3f}, ")
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path / "run")])
    assert (tmp_path / "run" / "report.md").is_file() and not (tmp_path / "run" / "summary.json").is_file()
    assert look(tmp_path / "run")["state"] == "stopped"  # a report on the way finishes nothing
    capsys.readouterr()

    ended(asked, monkeypatch, "add_scores", first)
    assert "TWO: going on behind step 5" in capsys.readouterr().out
    assert look(tmp_path / "run")["next"] == "TWO after TWO, 1 of 2 scored there"
    folder = run.run(asked)
    done = look(folder.path)
    assert (done["state"], done["next"], done["learnt"]) == ("finished", None, ["ONE", "TWO"])
    assert done["scores"] == {
        stage: {row["task"]: row["score"] for row in folder.scores if row["after"] == stage}
        for stage in ("base", "ONE", "TWO")
    }
    newest = max(p.stat().st_mtime for p in folder.path.rglob("*") if p.is_file())
    assert done["written"] == newest


def test_the_order_of_a_joint_method(tiny_llama, toy_stream, tmp_path, monkeypatch):
    asked = recipe(tiny_llama, toy_stream, tmp_path / "run", method="mtl", checkpoint=False)

    def second(folder, row):
        if row["step"] == 2:
            signals.ask("a test")

    ended(asked, monkeypatch, "log", second)
    assert look(tmp_path / "run")["next"] == "task 2/2 TWO, behind step 3"


@pytest.fixture
def folder(tmp_path):
    """A run's folder as it is shortly after its begin."""
    resolved = {"data": {"tasks": ["ONE"]}, "method": {"name": "codyra"}}
    (tmp_path / "recipe.json").write_text(json.dumps(resolved))
    (tmp_path / "manifest.json").write_text(json.dumps({"stages": {"base": [], "ONE": ["ONE"]}}))
    return tmp_path


def test_who_holds_it(folder):
    assert look(folder)["state"] == "stopped"
    lease = Lease(folder)
    lease.take()
    assert look(folder)["state"] == "running"
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    own = json.loads(lease.file.read_text())
    lease.release()
    lease.file.write_text(json.dumps(own | {"pid": child.pid}))  # killed: nobody removed it
    found = look(folder)
    assert found["state"] == "died" and said(found)[0].startswith(
        f"{folder}: died, by process {child.pid} on {own['host']}; "
    )
    lease.file.write_text(json.dumps(own | {"place": "far", "host": "far"}))
    assert look(folder)["state"] == "running"  # renewed a moment ago
    os.utime(lease.file, (time.time() - 100,) * 2)
    assert look(folder)["state"] == "died"
    lease.file.write_text("")  # after a loss of power
    os.utime(lease.file, (time.time() - 100,) * 2)
    assert look(folder)["state"] == "died"


def test_it_reads_only(folder):
    def everything():
        return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}

    (folder / "log.jsonl").write_text(
        '{"task": "ONE", "step": 1, "steps": 2, "loss": 0.5, "tokens": 10, "seconds": 2}\n{"task": "O'
    )
    before = everything()
    assert said(look(folder))[2] == "last step: task 1/1 ONE, step 1/2, loss 0.500, 5 tokens/s"
    assert everything() == before


def test_what_is_no_run(tmp_path, capsys):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(Fault, match="is not a run folder"):
            look(path)
    lease = Lease(tmp_path)
    lease.take()
    with pytest.raises(Fault, match=f"process {os.getpid()} on .* is about to begin"):
        look(tmp_path)
    lease.release()
    with pytest.raises(SystemExit) as ending:
        main(["status", str(tmp_path)])
    assert ending.value.code == 2 and capsys.readouterr().err.startswith(
        f"error: {tmp_path} is not a run folder"
    )


@pytest.mark.parametrize(
    "raw",
    [
        {"model": "m"},
        {"data": {"tasks": [1]}, "method": {"name": "codyra"}},
        {"data": {"tasks": ["ONE"]}, "method": "codyra"},
        {"data": 3, "method": {"name": "codyra"}},
    ],
)
def test_a_recipe_that_is_not_a_runs(folder, raw):
    (folder / "recipe.json").write_text(json.dumps(raw))
    with pytest.raises(Fault, match="recipe.json is not a run's"):
        look(folder)


@pytest.mark.parametrize("at", [1, 2])
def test_a_folder_that_goes_while_it_is_looked_at(folder, monkeypatch, tmp_path_factory, at):
    """Checkpoints inside a task are removed when the next one is whole: here between being listed by its
    parent and read, the first time or the second."""
    (folder / "progress" / "00-ONE-00000004").mkdir(parents=True)
    (folder / "progress" / "00-ONE-00000004" / "complete.json").write_text("{}")
    assert look(folder)["next"] == "task 1/1 ONE, behind step 4"
    plain, seen = os.scandir, []

    def scandir(path):
        seen.extend([path] * (os.path.basename(path) == "progress"))
        if len(seen) == at and os.path.exists(folder / "progress"):
            os.rename(folder / "progress", tmp_path_factory.mktemp("gone") / "progress")
        return plain(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = look(folder)
    assert found["next"] == "task 1/1 ONE, from its start" and found["written"] > 0


def test_the_command_is_quick_and_speaks_json(folder):
    code = (
        "import sys; from codyra_llm.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, "status", str(folder), "--json"], capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    assert json.loads(out.stdout) == look(folder)
