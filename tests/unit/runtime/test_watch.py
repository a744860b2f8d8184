"""None waits for long for a process that is gone or stands still, and the message says which, where, and how
far it was.
"""

import math
import time
from itertools import count
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from codyra_llm import cli
from codyra_llm.runtime import heartbeat, signals
from codyra_llm.runtime.heartbeat import Watch


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(heartbeat, "BEAT", 0.05)
    monkeypatch.setattr(heartbeat, "SILENT", 0.5)
    monkeypatch.setattr(heartbeat, "BROKEN", 0.3)
    monkeypatch.setattr(signals, "_asked", [])


@pytest.fixture
def ended(monkeypatch) -> list[str]:
    """What processes would have ended with, in order."""
    found: list[str] = []
    monkeypatch.setattr(heartbeat, "end", found.append)
    return found


@pytest.fixture
def two(ended):
    """Two processes of a launch, as two objects here, alive."""
    store = dist.HashStore()
    made = [Watch(store, rank, 2, hung=60) for rank in range(2)]
    yield made
    for one in made:
        one.own.code = 0


def until(condition, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def test_the_living_are_left_alone(two, ended, monkeypatch):
    monkeypatch.setattr(heartbeat, "SILENT", 1.0)  # twenty times BEAT: some come late on a busy machine
    monkeypatch.setattr(heartbeat, "BROKEN", 1.0)
    for step in range(20):
        time.sleep(0.1)
        two[1].at(f"task ONE, step {step}")
    assert not ended


def test_a_process_that_falls_silent(two, ended):
    two[1].at("task ONE, step 7")
    time.sleep(0.2)
    two[1].tell = lambda: None  # as a process that is killed sends nothing more
    until(lambda: ended)
    assert "rank 1 on " in ended[0] and "gone or stopped, last seen at task ONE, step 7" in ended[0]


@pytest.fixture
def patient(monkeypatch):
    """Nobody is missed: on a busy machine a heartbeat comes late."""
    monkeypatch.setattr(heartbeat, "SILENT", 60.0)
    monkeypatch.setattr(heartbeat, "BROKEN", 60.0)


def test_a_process_that_ends_badly_says_so_itself(patient, two, ended):
    two[1].own.code = 2
    two[1].tell()
    until(lambda: ended)
    assert "rank 1 on " in ended[0] and "ended with exit code 2" in ended[0]


def test_a_process_that_ends_well_is_not_missed(two, ended):
    two[1].own.code = 0
    two[1].tell()
    time.sleep(1)
    assert not ended


def test_what_stands_still_is_named_and_what_waits_for_it_is_not(two, ended):
    two[0].at("task ONE, step 3")
    two[1].at("task ONE, step 3")
    two[0].own.waits = True
    time.sleep(0.3)
    assert not ended
    two[0].hung = 0.2
    until(lambda: ended)
    verdict = ended[0]
    assert "no process has made progress" in verdict and "rank 1 on " in verdict and "rank 0" not in verdict
    assert "is at task ONE, step 3" in verdict


def test_what_has_never_said_anything_is_named(ended):
    """As a process does that ends between joining the group and its first heartbeat."""
    lone = Watch(dist.HashStore(), 0, 3, hung=0.2)
    lone.own.waits = True
    until(lambda: ended)
    lone.own.code = 0
    assert "rank 1 on a machine that has not told its name is at its start, rank 2 on" in ended[0]
    assert "rank 0" not in ended[0]


def test_without_a_limit_nothing_hangs(patient, two, ended, monkeypatch):
    """Before it is set a model may be downloaded for hours; what was before does not count."""
    two[0].hung, two[0].moved = math.inf, 0.0
    time.sleep(0.3)
    assert not ended
    monkeypatch.setattr(heartbeat, "_watch", two[0])
    heartbeat.limit(1)
    time.sleep(0.3)
    assert not ended
    heartbeat.limit(0.1 / 60)
    until(lambda: ended)


def test_a_broken_connection_asks_who_is_gone(two, monkeypatch):
    monkeypatch.setattr(heartbeat, "_watch", two[0])
    assert heartbeat.lost(2) == ""
    two[1].tell = lambda: None
    time.sleep(0.1)
    assert "rank 1 on " in heartbeat.lost(2)


def test_a_process_that_stops_is_given_the_time_to_end(two, ended, monkeypatch):
    """The other has left, as it has nothing to close; this one may be sending a tracker's last files."""
    gone: list[int] = []
    monkeypatch.setattr(heartbeat.os, "_exit", gone.append)
    monkeypatch.setattr(heartbeat, "_watch", two[0])
    with pytest.raises(signals.Stopped), heartbeat.until_stopped():
        raise signals.Stopped("a test")
    two[1].own.code = signals.EXIT
    two[1].tell()
    beats = two[0].own.beats
    until(lambda: two[0].own.beats > beats + 4)
    assert not gone and not ended and two[0].own.code is None


@pytest.fixture
def exits(monkeypatch) -> list[int]:
    """The codes with which the first of the two would have been ended at once."""
    found: list[int] = []
    monkeypatch.setattr(heartbeat.os, "_exit", found.append)
    return found


def stop(one: Watch) -> None:
    """As that process does which is asked first."""
    one.own.code = signals.EXIT
    one.tell()


def test_the_first_process_is_asked_to_stop_where_another_has(patient, two, ended, exits, monkeypatch):
    monkeypatch.setattr(heartbeat, "_watch", two[0])
    stop(two[1])
    until(signals.asked)
    with pytest.raises(signals.Stopped, match="rank 1 on .* has stopped"), heartbeat.until_stopped():
        signals.check()
    beats = two[0].own.beats
    until(lambda: two[0].own.beats > beats + 4)
    assert not exits and not ended


@pytest.mark.parametrize("waits", [False, True])
def test_a_process_that_can_not_stop_by_itself_is_ended(waits, two, ended, exits, monkeypatch, capsys):
    """One that waits for the process that has stopped waits in vain: it is not given as long."""
    monkeypatch.setattr(heartbeat, "BROKEN", 60.0 if waits else 0.3)
    monkeypatch.setattr(heartbeat, "_watch", two[0])
    two[0].own.waits = waits
    stop(two[1])
    until(lambda: exits)
    assert exits == [signals.EXIT] and two[0].own.code == signals.EXIT and not ended
    assert capsys.readouterr().err.count("has stopped), all is saved; run the same command to resume") == 1


def test_a_connection_that_breaks_where_another_has_stopped(patient, two, monkeypatch):
    """Not where none has: then it is an error as any other."""
    monkeypatch.setattr(heartbeat, "_watch", two[1])
    with pytest.raises(RuntimeError, match="closed by peer"), heartbeat.until_stopped():
        raise RuntimeError("Connection closed by peer")
    two[0].own.code = signals.EXIT
    two[0].tell()
    with pytest.raises(signals.Stopped, match="rank 0 on .* has stopped"), heartbeat.until_stopped():
        raise RuntimeError("Connection closed by peer")


def test_the_keeper_of_the_store_ends_last(two, monkeypatch):
    """It waits until the other has ended, but not for long."""
    first, other = two
    monkeypatch.setattr(heartbeat, "_watch", first)
    monkeypatch.setattr(other, "_judge", lambda: None)  # it would end on seeing that the first has
    clock = time.monotonic()
    heartbeat.leave_stopped()
    assert time.monotonic() - clock > heartbeat.BROKEN
    stop(other)
    monkeypatch.setattr(heartbeat, "BROKEN", 60.0)
    clock = time.monotonic()
    heartbeat.leave_stopped()
    assert time.monotonic() - clock < 30


def test_one_process_has_none():
    heartbeat.at("anywhere")
    with heartbeat.waiting():
        pass
    heartbeat.leave(0)
    assert heartbeat.lost(1) == ""


def test_a_fault_that_the_first_process_tells_is_not_told_again(two, ended, monkeypatch):
    """Also where the launcher's request to end came before this process asked; a first process that says
    nothing is not waited for any longer."""
    monkeypatch.setattr(heartbeat, "_watch", two[1])
    signals.ask("SIGTERM")
    clock = count()
    monkeypatch.setattr(
        cli, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda seconds: None)
    )
    assert not cli._first_reports_it() and next(clock) > 15
    two[0].own.code = 2
    two[0].tell()
    assert cli._first_reports_it()
