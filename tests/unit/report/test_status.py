"""Where a run stands, as its folder says it at every moment; what it would go on with is what it then
does.
"""

import json
import os
import subprocess
import sys
import time

import pytest
from helpers import said

from codyra_llm.cli import main
from codyra_llm.core.errors import Fault
from codyra_llm.report.status import look
from codyra_llm.store.lock import Lease


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
    assert look(folder)["next"] == "task 1/1 ONE, after step 4"
    plain, seen = os.scandir, []

    def scandir(path):
        seen.extend([path] * (os.path.basename(path) == "progress"))
        if len(seen) == at and os.path.exists(folder / "progress"):
            os.rename(folder / "progress", tmp_path_factory.mktemp("gone") / "progress")
        return plain(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = look(folder)
    assert found["next"] == "task 1/1 ONE, from its start" and found["written"] > 0
