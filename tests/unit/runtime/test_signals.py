"""Ctrl-C: the first asks and says so, a second one ends the process; in processes of their own."""

import signal
import subprocess
import sys

from codyra_llm.runtime import signals

PROGRAM = """
import signal
from codyra_llm.runtime import signals

signals.listen()
assert not signals.asked()
signal.raise_signal(signal.SIGINT)
assert signals.asked()
signal.raise_signal(signal.SIGINT)  # the launcher passes the same one on
print("still here", flush=True)
signals._interrupted -= signals.AGAIN
signal.raise_signal(signal.SIGINT)
print("never", flush=True)
"""


def ended(program: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=environment or None
    )


def test_the_first_asks_and_the_second_ends():
    done = ended(PROGRAM)
    assert done.returncode == -signal.SIGINT
    assert done.stdout == "still here\n" and done.stderr == signals.MESSAGE
    assert "the same command resumes" in done.stderr and "again ends at once" in done.stderr


def test_of_several_processes_the_first_says_it(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert ended(PROGRAM).stderr == ""
