"""A process that is asked to stop saves, ends with a code of its own, and the same command resumes it to the
same end.
"""

import os
import signal
import subprocess
import sys
import time

import pytest
from forked import Started
from helpers import like, tiny_recipe

from codyra_llm.cli import main
from codyra_llm.config.recipe import load_recipe
from codyra_llm.experiment import run
from codyra_llm.runtime import signals
from codyra_llm.store.folder import RunFolder


@pytest.fixture(scope="module")
def straight(tiny_llama, toy_stream, tmp_path_factory):
    """A run that nobody stops, and the recipe for others like it."""
    out = tmp_path_factory.mktemp("runs")
    asked = tiny_recipe(tiny_llama, toy_stream, out / "straight", data__epochs=6, checkpoint=False)
    return asked, run.run(asked)


def begin(forked, tmp_path, folder: RunFolder) -> Started:
    """The run of `like` in a process of its own, which has trained a step."""
    started = forked.alone(lambda rank: main(["run", str(tmp_path / "recipe.json")]))
    while not folder.log_rows:
        time.sleep(0.02)
        assert started.running()
    return started


def assert_saved(told: str, asked, other: RunFolder, folder: RunFolder) -> None:
    """The process said in one line that it stopped, and the same recipe goes on to the same end."""
    assert told.startswith("stopped (task ONE, step ") and told.count("\n") == 1
    assert not (folder.path / "lease.json").exists() and len(list((folder.path / "progress").iterdir())) == 1
    run.run(asked)
    assert (folder.path / "scores.jsonl").read_bytes() == (other.path / "scores.jsonl").read_bytes()
    assert [(r.task, r.step, r.loss) for r in folder.log_rows] == [
        (r.task, r.step, r.loss) for r in other.log_rows
    ]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=["SIGUSR1", "SIGTERM"])
def test_a_signal_while_it_trains(number, straight, tmp_path, forked):
    asked, other = straight
    folder = like(asked, tmp_path)
    started = begin(forked, tmp_path, folder)
    os.kill(started.processes[0], number)
    done = started.wait()
    assert done.returncode == signals.EXIT == 75
    assert_saved(done.stderr, load_recipe(tmp_path / "recipe.json"), other, folder)


def test_ctrl_c(straight, tmp_path):
    """`python -m codyra_llm run`, in a process that was started as users start it."""
    asked, other = straight
    folder = like(asked, tmp_path)
    words = [sys.executable, "-m", "codyra_llm", "run", tmp_path / "recipe.json"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL)
    while not folder.log_rows:
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == signals.EXIT
    assert told.startswith(signals.MESSAGE)
    assert_saved(told.removeprefix(signals.MESSAGE), load_recipe(tmp_path / "recipe.json"), other, folder)


def test_the_second_of_two_runs_is_refused(straight, tmp_path, forked):
    asked, _ = straight
    started = begin(forked, tmp_path, like(asked, tmp_path))
    first = started.processes[0]
    os.kill(first, signal.SIGSTOP)  # however long this test takes
    second = forked.alone(lambda rank: main(["run", str(tmp_path / "recipe.json")])).wait()
    assert second.returncode == 2 and f"worked on by process {first} on " in second.stderr
    assert "Traceback" not in second.stderr
