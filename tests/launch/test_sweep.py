"""Sweeps: which runs a file asks for, that each is run once, how settings are chosen, and the intervals of
the comparison.
"""

import json
import subprocess
import sys

import pytest
from commands import plugin
from made_plugins import FILE

from codyra_llm.cli import main
from codyra_llm.core.errors import Fault
from codyra_llm.experiment import run as runs
from codyra_llm.sweep import runner
from codyra_llm.sweep.spec import load_sweep


def test_one_sweep_at_a_time_and_no_run_outlives_an_interrupt(sweep_file, monkeypatch):
    asked = load_sweep(sweep_file())
    started = []

    def launch(run, place, launcher, lock):
        started.append(
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=(lock,))
        )
        if len(started) == 2:
            with pytest.raises(Fault, match="is at work in"):
                runner.execute(asked, 1, None, lambda: None)
            raise KeyboardInterrupt
        return started[-1]

    monkeypatch.setattr(runner, "_launch", launch)
    with pytest.raises(KeyboardInterrupt):
        runner.execute(asked, 2, None, lambda: None)
    assert len(started) == 2 and started[0].returncode < 0
    with pytest.raises(Fault, match="a run that it left"):  # the second, which the sweep never got to know
        runner.execute(asked, 1, None, lambda: None)
    started[1].kill()
    started[1].wait()


def test_from_the_command_line(sweep_file, capsys, tmp_path):
    """Two processes of their own, which know the sweep's plug-ins, then the comparison alone. Oracle of the
    plug-in's method: the same by its shipped name."""
    shipped = load_sweep(sweep_file(arms={"mine": {}}, grid={"seed": [1]}, output=str(tmp_path / "shipped")))
    expected = runs.run(shipped.runs()[0].recipe)
    (tmp_path / "mine.py").write_text(FILE)
    mine = {"method": "mine", "method.rank": 2}
    path = sweep_file(arms={"none": {"method": "none"}, "mine": mine}, grid={"seed": [1]}, baseline="none")
    with plugin(), pytest.raises(SystemExit) as end:
        main(["sweep", str(path), "--jobs", "2", "--plugin", str(tmp_path / "mine.py")])
    assert not end.value.code, capsys.readouterr().err
    out = path.parent / "out"
    found = json.loads((out / "sweep.json").read_text())
    assert [row["arm"] for row in found["rows"]] == ["none", "mine"] and len(found["runs"]) == 2
    assert found["rows"][1]["costs"]["trained"] > 0 and found["rows"][0]["costs"] is None
    assert found["runs"][1]["matrix"] == expected.summary["matrix"] != found["runs"][0]["matrix"]
    assert "after TWO: ONE" in (out / "mine" / "seed=1.log").read_text()
    (out / "sweep.md").unlink()
    with plugin(), pytest.raises(SystemExit):
        main(["sweep", str(path), "--report", "--plugin", str(tmp_path / "mine.py")])
    assert "| mine | " in (out / "sweep.md").read_text() and "mine" in capsys.readouterr().out
