"""A signal to launch.sh reaches every process of a run."""

import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers import ROOT
from launches import undecided, write_stand_in

import codyra_llm.recipes

QUICKSTART = Path(codyra_llm.recipes.__path__[0]) / "quickstart.yaml"

pytestmark = pytest.mark.skipif(not (ROOT / "launch.sh").is_file(), reason="not a checkout")


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("environment", "name", "code"),
    [
        ({}, "SIGUSR1", 75),
        ({"PROCESSES": "2"}, "SIGUSR1", 1),
        ({"PROCESSES": "2"}, "SIGTERM", 1),
        (
            {"PROCESSES": "2", "ACCELERATE_CONFIG": str(QUICKSTART.parent / "accelerate" / "zero2.yaml")},
            "SIGUSR1",
            1,
        ),
    ],
)
def test_a_warning_reaches_every_process(environment, name, code, tmp_path):
    """Each process gets the signal of launch.sh's, and time to save; the launchers' codes are those of the
    documentation.
    """
    clean = undecided()
    running = subprocess.Popen(
        [ROOT / "launch.sh", "x.yaml"],
        env={**clean, **write_stand_in(tmp_path), **environment},
        cwd=tmp_path,
        stderr=subprocess.PIPE,
    )
    ranks, seen, until = (
        range(int(environment.get("PROCESSES", 1))),
        tmp_path / "seen",
        time.monotonic() + 120,
    )
    while seen.read_text().count("ready") < len(ranks) and time.monotonic() < until:
        time.sleep(0.1)
    running.send_signal(getattr(signal, name))
    told = running.communicate(timeout=60)[1]
    assert running.returncode == code, told
    lines = [line.split(maxsplit=1)[1] for line in seen.read_text().splitlines()]
    assert sorted(lines) == sorted(f"{rank} {text}" for rank in ranks for text in ("ready", name, "saved"))
