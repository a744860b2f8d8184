"""Recorded decoding steps on a device that is not there: nothing in them makes the host wait, and replays
give the answers of the CPU.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pretended_hooks import environment

SCRIPT = Path(__file__).parents[1] / "run_recorded.py"
KINDS = ("linear", "llama3", "yarn", "longrope")  # of RoPE, whose frequencies the device can choose
RECORDED = {"llama", "llama with biases", "gemma", "qwen2", "qwen3", *(f"llama, {kind}" for kind in KINDS)}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    """What was found of each model."""
    known = environment(tmp_path_factory.mktemp("hooks"))
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, env=known)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"model"')]


def test_recorded_steps_answer_as_the_cpu_does(rows):
    faults = [f"{row['model']}: {row['fault']}" for row in rows if row["fault"]]
    assert not faults, "\n".join(faults)
    assert [row["model"] for row in rows if not row["same"]] == []


def test_steps_are_recorded_where_nothing_asks_the_host(rows):
    """Not where layers have windows, or RoPE asks how long the longest row is."""
    assert {row["model"] for row in rows if row["replays"]} == RECORDED
    assert {row["model"] for row in rows if row["early"]} == RECORDED
    assert "llama, dynamic" in {row["model"] for row in rows} - RECORDED
