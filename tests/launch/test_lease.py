"""One run at a time in a folder, and a dead owner keeps nobody out."""

import multiprocessing
import os
import signal
import time

import psutil
import pytest

from codyra_llm.core.errors import Fault
from codyra_llm.store import lock
from codyra_llm.store.lock import Lease


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.1)
    monkeypatch.setattr(lock, "DEAD", 0.4)


def hold(folder, ready):
    Lease(folder).take()
    ready.set()
    time.sleep(60)


@pytest.fixture
def owner(tmp_path):
    """Another process of this machine that holds the folder."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=hold, args=(tmp_path, ready))
    process.start()
    assert ready.wait(20)
    yield process
    process.kill()
    process.join()


def test_a_living_process_keeps_it_and_a_killed_one_does_not(tmp_path, owner):
    with pytest.raises(Fault, match=f"process {owner.pid} "):
        Lease(tmp_path).take()
    os.kill(owner.pid, signal.SIGKILL)
    psutil.Process(owner.pid).wait()
    began, mine = time.monotonic(), Lease(tmp_path)
    mine.take()
    assert time.monotonic() - began < lock.DEAD  # this machine knows that the process is gone
    mine.release()
