"""`codyra-llm bench gpu`: every stage in small shapes on this machine, and stages that end badly."""

import multiprocessing
import os
import signal
import subprocess
import time

from codyra_llm.bench.gpu import stages
from codyra_llm.bench.gpu.context import findings
from codyra_llm.bench.gpu.targets import ENDED


def test_every_stage_ends_well_in_small_shapes(tmp_path, forked):
    """From a server of its own, which is a fresh process."""
    words = ["bench", "gpu", "--tiny", "--out", tmp_path / "found", "--seconds", 3600]
    done = forked.module("codyra_llm", *words).wait(3600)
    assert done.returncode == 0, done.stderr
    rows = findings(tmp_path / "found")
    ended = {row["stage"]: row["value"]["how"] for row in rows if row["key"] == ENDED}
    assert ended == dict.fromkeys(stages.STAGES, "ok"), (tmp_path / "found/log.txt").read_text()
    found = {row["stage"] for row in rows if row["key"] != ENDED}
    assert found == set(stages.STAGES), "a stage found nothing"
    assert "needs a GPU" in {row["value"] for row in rows if row["stage"] == "oom" and row["key"] != ENDED}
    summary = (tmp_path / "found/summary.txt").read_text(encoding="utf-8")
    assert summary.count("not measured here") == 12 and "reached" not in summary and "missed" not in summary


def _nothing():
    pass


def _error():
    raise SystemExit(1)


def _killed():
    os.kill(os.getpid(), signal.SIGKILL)


def _hang():
    """As a stage may: deaf to SIGTERM, with a child of its own."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    subprocess.Popen(["sleep", "600"])
    time.sleep(600)


def _leave():
    os.setsid()
    subprocess.Popen(["sleep", "600"])


def test_how_a_stage_ended():
    forked = multiprocessing.get_context("fork")
    said = [stages.run_process(forked.Process(target=f), 60) for f in (_nothing, _error, _killed)]
    assert said == ["ok", "failed, see log.txt", "killed by signal 9"]


def test_a_stage_that_hangs_ends_with_all_that_it_started():
    process = multiprocessing.get_context("fork").Process(target=_hang)
    assert stages.run_process(process, 5) == "over its 5 s, and stopped"
    assert not process.is_alive()
    _gone(process.pid)


def test_what_a_stage_leaves_is_ended_with_it():
    process = multiprocessing.get_context("fork").Process(target=_leave)
    assert stages.run_process(process, 60) == "ok"
    _gone(process.pid)


def _gone(session: int) -> None:
    """Wait until all that were killed have ended, which takes a moment on a busy machine."""
    ends = time.monotonic() + 30
    while _running(session):
        assert time.monotonic() < ends
        time.sleep(0.05)


def _running(session: int) -> list[str]:
    """The states of a session's processes, without those that are only not collected yet."""
    asked = subprocess.run(["ps", "-o", "stat=", "-g", str(session)], capture_output=True, text=True)
    return [state for state in asked.stdout.split() if not state.startswith("Z")]
