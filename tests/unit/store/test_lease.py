"""One run at a time in a folder, and a dead owner keeps nobody out."""

import json
import logging
import os
import subprocess
import threading
import time

import psutil
import pytest

from codyra_llm.core.errors import Fault
from codyra_llm.store import lock
from codyra_llm.store.lock import Lease, holder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.1)
    monkeypatch.setattr(lock, "DEAD", 0.4)


def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path):
    first = Lease(tmp_path / "run")
    first.take()
    with pytest.raises(Fault, match=f"worked on by process {os.getpid()} on .*give another output"):
        Lease(tmp_path / "run").take()
    first.release()
    second = Lease(tmp_path / "run")
    second.take()
    first.release()  # again, and it takes nothing from the second
    assert json.loads((tmp_path / "run" / "lease.json").read_text())["token"] == second.token
    second.release()
    assert not any((tmp_path / "run").iterdir())


def elsewhere(folder, beat: int) -> None:
    """The lease of a process on another machine, with whose numbers nothing can be looked up here."""
    own = {"token": "x", "host": "far", "pid": os.getpid(), "place": "far 0", "started": 0.0, "beat": beat}
    (folder / "lease.json").write_text(json.dumps(own))


def test_another_machines_silence_is_waited_for(tmp_path, caplog):
    caplog.set_level(logging.INFO, "codyra_llm")
    elsewhere(tmp_path, 1)
    mine = Lease(tmp_path)
    mine.take()
    assert "was held by process" in caplog.text
    mine.release()


def test_another_machines_sign_of_life_is_seen(tmp_path):
    elsewhere(tmp_path, 1)
    threading.Timer(0.2, elsewhere, (tmp_path, 2)).start()
    with pytest.raises(Fault, match="worked on by process .* on far"):
        Lease(tmp_path).take()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"[1, 2]"])
def test_a_file_that_names_nobody_is_a_dead_owners(content, tmp_path):
    """It was only begun, or is what a loss of power left."""
    (tmp_path / "lease.json").write_bytes(content)
    assert holder(tmp_path) == {"pid": None, "host": None, "alive": True}  # it is young
    mine = Lease(tmp_path)
    mine.take()
    assert json.loads((tmp_path / "lease.json").read_text())["token"] == mine.token
    mine.release()
    assert not list(tmp_path.iterdir())


def test_of_two_that_find_a_dead_owner_one_gets_it(tmp_path):
    """At the same moment, many times: never both, and nothing is left over."""
    for round_ in range(5):
        elsewhere(tmp_path, round_)
        got, refused = [], []

        def attempt(got=got, refused=refused):
            mine = Lease(tmp_path)
            try:
                mine.take()
                got.append(mine)
            except Fault as error:
                refused.append(error)

        threads = [threading.Thread(target=attempt) for _ in range(2)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert len(got) == 1 and len(refused) == 1
        got[0].release()


def test_who_was_taken_over_stops(tmp_path):
    suspended = Lease(tmp_path)
    suspended.take()
    suspended.check()
    elsewhere(tmp_path, 1)  # by one that saw no sign of life of it
    time.sleep(0.5)
    with pytest.raises(Fault, match="taken over by process .* on far"):
        suspended.check()


def here(folder, pid: int, started: float) -> None:
    """The lease of a process of this machine."""
    own = {"token": "x", "host": "here", "pid": pid, "place": lock._place(), "started": started, "beat": 1}
    (folder / "lease.json").write_text(json.dumps(own))


def test_a_process_that_has_a_dead_owner_s_number_is_not_the_owner(tmp_path):
    """Process ids are used again: the owner is who began when the lease says."""
    began = psutil.Process().create_time()
    here(tmp_path, os.getpid(), began - 3600)
    assert not holder(tmp_path)["alive"]
    mine = Lease(tmp_path)
    mine.take()  # at once, without waiting for a beat
    mine.release()
    here(tmp_path, os.getpid(), began + 1)  # clocks differ a little
    assert holder(tmp_path)["alive"]
    with pytest.raises(Fault, match="is being worked on by process"):
        Lease(tmp_path).take()


def test_an_owner_that_nobody_has_waited_for_is_dead(tmp_path):
    """It has ended, and its parent has not asked how: a zombie, which still has its number."""
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    here(tmp_path, child.pid, psutil.Process(child.pid).create_time())
    assert not holder(tmp_path)["alive"]
    child.wait()
    assert not holder(tmp_path)["alive"]


def test_a_lease_that_cannot_be_opened_is_left_to_its_owner(tmp_path, monkeypatch):
    """Another process may have made the file just before a network file system refused this one."""
    (tmp_path / "lease.json").write_text("theirs")

    def refuses(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuses)
    with pytest.raises(Fault):
        Lease(tmp_path)._create("mine")
    monkeypatch.undo()
    assert (tmp_path / "lease.json").read_text() == "theirs"
