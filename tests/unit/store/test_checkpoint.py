"""Checkpoints inside a task: the last ones stay, and a damaged one is reported once."""

import logging
from pathlib import Path

import pytest
import torch

from codyra_llm.config.sections import SaveSection
from codyra_llm.core.errors import Fault
from codyra_llm.core.files import write_json
from codyra_llm.store import checkpoint
from codyra_llm.store.checkpoint import MARK, Progress, small, tensors


@pytest.fixture
def progress(tmp_path):
    return Progress(tmp_path, 1, "TASK", "parent", SaveSection(keep=2), lambda: None)


def save(progress: Progress, step: int) -> None:
    progress.save(step, [("weight", torch.full((2,), float(step)))], {"note": step})


def names(progress: Progress) -> list[str]:
    return [path.name for path in progress._paths()]


def test_the_last_ones_stay(progress):
    for step in (1, 2, 3):
        save(progress, step)
    assert names(progress) == ["01-TASK-00000002", "01-TASK-00000003"]
    newest = progress.newest()
    assert small(newest)["note"] == 3
    assert dict(tensors(newest, "weight"))["weight"].tolist() == [3.0, 3.0]


def test_a_damaged_one_is_told_of_until_the_run_has_gone_on(progress, caplog):
    caplog.set_level(logging.INFO, "codyra_llm")
    for step in (2, 4):
        save(progress, step)
    file = progress.folder / "01-TASK-00000004" / "000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert progress.newest().name == "01-TASK-00000002" and "is damaged or missing" in caplog.text
    caplog.clear()
    save(progress, 3)
    assert names(progress) == ["01-TASK-00000002", "01-TASK-00000003"]
    assert progress.newest().name == "01-TASK-00000003" and not caplog.text


def test_one_that_was_made_on_other_updates_is_not_gone_on_with(tmp_path, progress):
    save(progress, 2)
    other = Progress(tmp_path, 1, "TASK", "another parent", SaveSection(), lambda: None)
    assert other.newest() is None
    with pytest.raises(Fault, match="was made on other updates than those"):
        other.check(progress.newest())


def test_a_mark_that_was_changed_is_damaged(progress):
    save(progress, 2)
    path = progress.newest()
    write_json(path / MARK, small(path) | {"step": 3})
    with pytest.raises(Fault, match="complete.json is damaged"):
        progress.check(path)


@pytest.mark.parametrize("minutes, seconds, at_the_end", [(10.0, 600, 60), (0.5, 30, 30), (None, None, None)])
def test_when_one_is_due(minutes, seconds, at_the_end, tmp_path, monkeypatch):
    """The time after which one is due, inside a task and after its last step; counted from the last one."""
    now = [1000.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    progress = Progress(tmp_path, 0, "TASK", "parent", SaveSection(minutes=minutes), lambda: None)

    def first(last):
        begun = now[0]
        for passed in range(1000):
            now[0] = begun + passed
            if progress.due(last):
                return passed
        return None

    assert first(False) == seconds
    save(progress, 1)
    assert first(True) == at_the_end


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="needs Linux")
def test_what_was_read_does_not_depend_on_the_file(progress):
    """It may be removed while a run goes on from it, also by a process of another machine."""
    save(progress, 1)
    path = progress.newest()
    read = dict(tensors(path, ""))
    assert read
    assert str(path) not in Path("/proc/self/maps").read_text(encoding="utf-8")
