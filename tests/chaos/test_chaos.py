"""Runs that are killed at random moments, and a disk that is full, end as one that nothing happened to."""

import multiprocessing
import os
import shutil
import subprocess

import pytest
from chaos import Chaos, quiet
from helpers import tiny_recipe

from codyra_llm.experiment import setup


def asked(tiny_llama, toy_stream, out, **changes):
    return tiny_recipe(
        tiny_llama, toy_stream, out, data__epochs=6, checkpoint=False, save__minutes=1e-9, **changes
    )


def test_ten_kills(tiny_llama, toy_stream, tmp_path):
    chaos = Chaos(asked(tiny_llama, toy_stream, tmp_path), tmp_path, seed=1)
    chaos.go(10)
    assert sum(chaos.hits.values()) == 10


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 40 kB, or a skip."""
    place = tmp_path / "small"
    place.mkdir()
    if os.geteuid() or not shutil.which("mount"):
        pytest.skip("only root can mount a small file system")
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40k", "none", place], capture_output=True
    ).returncode:
        pytest.skip("this machine mounts no tmpfs")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk(tiny_llama, toy_stream, tmp_path, small_disk, monkeypatch):
    """One sentence, nothing half written, and the same command resumes when there is room. That so little is
    free is reported before anything begins, which is left out here."""
    monkeypatch.setattr(setup, "room_faults", lambda output, needed: [])
    chaos = Chaos(asked(tiny_llama, toy_stream, tmp_path), tmp_path, seed=1)
    straight, file = chaos.scores("straight"), tmp_path / "small.json"
    for full in range(20):
        file.write_text(asked(tiny_llama, toy_stream, small_disk / "run").model_dump_json())
        child = multiprocessing.get_context("fork").Process(
            target=quiet, args=(["run", str(file)], tmp_path / "log")
        )
        child.start()
        child.join(300)
        if not child.exitcode:
            break
        assert child.exitcode == 2 and not list((small_disk / "run").rglob(".*.*"))
        subprocess.run(["mount", "-o", f"remount,size={70 + 30 * full}k", small_disk], check=True)
    told = (tmp_path / "log").read_text()
    assert full > 2 and told.count("No space left on device") == full and "Traceback" not in told
    chaos.out = small_disk
    assert chaos.scores("run") == straight
