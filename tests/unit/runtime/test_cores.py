"""Threads that leave room for others: a container's quota, and spinning only where cores are idle."""

import os
import subprocess
import sys

import pytest

from codyra_llm.runtime import cores

OWN = ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "RANK")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A function that makes a machine of three cores of these idle and busy ticks between two looks."""
    for name in OWN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cores, "QUOTAS", tmp_path)
    monkeypatch.setattr(cores, "own_cores", lambda: [0, 1, 3])
    (tmp_path / "stat").write_text(
        "cpu 1 2 3 4\n" + "".join(f"cpu{i} 5 0 5 90 0 0 0 0 0 0\n" for i in range(4))
    )
    monkeypatch.setattr(cores, "STAT", tmp_path / "stat")

    def made(*ticks):
        def look_again(seconds):
            lines = [f"cpu{i} {5 + busy} 0 5 {90 + idle} 0 0 0 0 0 0" for i, idle, busy in ticks]
            cores.STAT.write_text("\n".join(["cpu 9 9 9 9", *lines, "intr 7"]))

        monkeypatch.setattr(cores.time, "sleep", look_again)
        return tmp_path

    return made


def chosen():
    """What OpenMP is told, after the choice."""
    before = {name: os.environ.get(name) for name in OWN}
    try:
        cores.share()
        return {name: os.environ[name] for name in OWN if os.environ.get(name) != before[name]}
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def test_idle_cores_let_threads_spin(machine):
    machine((0, 10, 0), (1, 9, 1), (2, 0, 10), (3, 6, 4))  # core 2 is another process's
    assert chosen() == {"GOMP_SPINCOUNT": str(cores.SPINS_WHERE_IDLE)}


def test_one_busy_core_makes_threads_sleep_and_is_said(machine, caplog):
    machine((0, 10, 0), (1, 10, 0), (3, 4, 6))
    with caplog.at_level("INFO"):
        assert chosen() == {"GOMP_SPINCOUNT": str(cores.SPINS_WHERE_BUSY)}
    assert "1 of 3 cores busy" in caplog.text


@pytest.mark.parametrize(
    "given", [{"OMP_NUM_THREADS": "1"}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}]
)
def test_what_the_user_set_stays(machine, monkeypatch, given):
    machine((0, 0, 10), (1, 0, 10), (3, 0, 10))
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert chosen() == {}


@pytest.mark.parametrize(
    "files, threads",
    [
        ({"cpu.max": "200000 100000\n"}, "2"),
        ({"cpu.max": "50000 100000\n"}, "1"),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "800000 100000\n"}, None),  # more than there are
        ({"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n"}, "2"),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
    ],
)
def test_no_more_threads_than_a_containers_quota(machine, files, threads):
    folder = machine((0, 10, 0))
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    assert chosen().get("OMP_NUM_THREADS") == threads


def test_a_system_that_does_not_say_counts_as_idle(machine, monkeypatch, tmp_path):
    machine()
    monkeypatch.setattr(cores, "STAT", tmp_path / "nowhere")
    assert chosen() == {"GOMP_SPINCOUNT": str(cores.SPINS_WHERE_IDLE)}


@pytest.mark.skipif(sys.platform != "linux" or len(cores.own_cores()) < 2, reason="needs Linux and two cores")
def test_openmp_reads_what_was_set():
    """In a process of its own: the setting comes before torch, and OpenMP shows it when torch is loaded."""
    program = (
        "import os; from codyra_llm.runtime import cores; cores.share(0); "
        "print(os.environ['GOMP_SPINCOUNT']); import torch"
    )
    environment = {name: value for name, value in os.environ.items() if name not in OWN}
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env=environment | {"OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"GOMP_SPINCOUNT = '{ended.stdout.strip()}'" in ended.stderr
