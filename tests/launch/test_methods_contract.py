"""What holds for every method, and its declarations against what it does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from contract import raw, rows
from helpers import TESTS

import codyra_llm.recipes
from codyra_llm.config.registry import METHODS
from codyra_llm.store.folder import RunFolder


def files(names: list[str], model, stream, folder: Path) -> list[Path]:
    folder.mkdir(exist_ok=True)
    for name in names:
        recipe = {**raw(model, stream, folder / name, name), "eval": {"max_new_tokens": 3, "max_examples": 2}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return [folder / f"{name}.yaml" for name in names]


def launched(command: list, recipe_files: list[Path]) -> None:
    clean = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("ACCELERATE_", "DS_"))
        and k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    }
    script = TESTS / "run_many.py"
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command), str(script), *map(str, recipe_files)],
        timeout=900,
        capture_output=True,
        text=True,
        env={**clean, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]


def left(folder: RunFolder) -> dict[str, torch.Tensor]:
    """What every task changed, as whole matrices (factors may differ in sign where they come from singular
    vectors); the state of the last one where that is nothing."""
    archive = folder.archive()
    updates = {
        (i, site): adapter.delta(update.scale)
        for i in range(3)
        for update in [archive.load(i)]
        for site, adapter in update.adapters.items()
    }
    dense = {(i, name): whole for i in range(3) for name, whole in archive.load(i).dense.items()}
    return {**updates, **dense} or folder.load_state(2)


def assert_same(name: str, one: RunFolder, two: RunFolder) -> None:
    """Losses and what is left, to rounding."""
    for a, b in zip(rows(one), rows(two), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5), (name, a["task"], a["step"])
    old, new = left(one), left(two)
    assert old and old.keys() == new.keys()
    for key, value in old.items():
        assert (new[key] - value).norm() <= 1e-3 * value.norm(), (name, key)


@pytest.mark.distributed
def test_two_processes_equal_one(finished, tiny_llama, toy_stream, tmp_path):
    """Data parallel, all methods in one pair of processes."""
    names = [name for name, method in METHODS.items() if method.trains]
    launched(
        ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
        files(names, tiny_llama, toy_stream, tmp_path / "two"),
    )
    for name in names:
        assert_same(name, finished(name)[0], RunFolder(tmp_path / "two" / name))


@pytest.mark.distributed
def test_zero_2_equals_one_process(finished, tiny_llama, toy_stream, tmp_path):
    """Every method that declares it, in one pair of processes."""
    names = [name for name, method in METHODS.items() if method.trains and method.zero_stages() >= 2]
    config = Path(codyra_llm.recipes.__path__[0]) / "accelerate" / "zero2.yaml"
    launched(
        ["accelerate.commands.launch", "--config_file", config, "--main_process_port", "0"],
        files(names, tiny_llama, toy_stream, tmp_path / "two"),
    )
    for name in names:
        assert_same(name, finished(name)[0], RunFolder(tmp_path / "two" / name))
