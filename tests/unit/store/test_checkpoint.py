"""Checkpoints inside a task: the last ones stay, and a damaged one is reported once."""

import logging

import pytest
import torch

from codyra_llm.config.sections import SaveSection
from codyra_llm.store.checkpoint import Progress, small, tensors


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
