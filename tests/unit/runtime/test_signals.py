"""Ctrl-C: the first asks and says so, a second one ends the process; in processes of their own."""

import os
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


def test_a_second_one_that_torchrun_passes_on_as_sigterm():
    """SIGTERM right after the first, or not from torchrun, asks."""
    program = PROGRAM.replace(
        "signal.raise_signal(signal.SIGINT)  # the", "signal.raise_signal(signal.SIGTERM)  # the"
    )
    program = program.replace(
        "AGAIN\nsignal.raise_signal(signal.SIGINT)", "AGAIN\nsignal.raise_signal(signal.SIGTERM)"
    )
    assert program.count("SIGTERM") == 2
    done = ended(program, **os.environ, TORCHELASTIC_RUN_ID="x")
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "still here\n"), done.stderr
    done = ended(program)
    assert (done.returncode, done.stdout) == (0, "still here\nnever\n"), done.stderr


def test_of_several_processes_the_first_says_it(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert ended(PROGRAM).stderr == ""
