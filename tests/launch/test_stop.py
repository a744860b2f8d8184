"""A process that is asked to stop saves, ends with a code of its own, and the same command goes on to the
same end.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import like, tiny_recipe

from codyra_llm.config.recipe import load_recipe
from codyra_llm.experiment import run
from codyra_llm.runtime import signals


def command(folder: Path) -> list:
    return [sys.executable, "-m", "codyra_llm", "run", folder / "recipe.json"]


@pytest.fixture(scope="module")
def straight(tiny_llama, toy_stream, tmp_path_factory):
    """A run that nobody stops, and the recipe for others like it."""
    out = tmp_path_factory.mktemp("runs")
    asked = tiny_recipe(tiny_llama, toy_stream, out / "straight", data__epochs=6, checkpoint=False)
    return asked, run.run(asked)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_while_it_trains(number, straight, tmp_path):
    asked, other = straight
    folder = like(asked, tmp_path)
    process = subprocess.Popen(
        command(tmp_path), stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL
    )
    while not folder.log_rows:
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(number)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == signals.EXIT == 75
    assert told.startswith("stopped (task ONE, step ") and told.count("\n") == 1
    assert not (folder.path / "lease.json").exists() and len(list((folder.path / "progress").iterdir())) == 1
    run.run(load_recipe(tmp_path / "recipe.json"))
    assert (folder.path / "scores.jsonl").read_bytes() == (other.path / "scores.jsonl").read_bytes()
    assert [(r["task"], r["step"], r["loss"]) for r in folder.log_rows] == [
        (r["task"], r["step"], r["loss"]) for r in other.log_rows
    ]


def test_the_second_of_two_runs_is_refused(straight, tmp_path):
    asked, _ = straight
    folder = like(asked, tmp_path)
    process = subprocess.Popen(command(tmp_path), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not folder.log_rows:
        time.sleep(0.02)
        assert process.poll() is None
    os.kill(process.pid, signal.SIGSTOP)  # however long this test takes
    second = subprocess.run(command(tmp_path), capture_output=True, text=True, timeout=300)
    process.kill()
    process.wait()
    assert second.returncode == 2 and f"worked on by process {process.pid} on " in second.stderr
    assert "Traceback" not in second.stderr
