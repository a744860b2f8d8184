"""`run` in processes that a launcher forks from one that has imported everything equals `run` in one
process.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import TESTS
from launches import assert_same_run, free_port, sections

from codyra_llm.config.recipe import load_recipe
from codyra_llm.experiment.run import run

OF_LAUNCHERS = ("ACCELERATE_", "DS_", "TORCHELASTIC_", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_")


def recipe_file(model, stream, file: Path, output: Path) -> Path:
    made = {**sections(model, stream, "codyra"), "output": str(output)}
    file.write_text(yaml.safe_dump(made), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def one_process(tiny_llama, toy_stream, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    return run(load_recipe(recipe_file(tiny_llama, toy_stream, folder / "recipe.yaml", folder / "run"))).path


@pytest.mark.distributed
@pytest.mark.parametrize("launcher", ["elastic", "debug", "notebook"])
def test_a_recipe_runs_in_forked_processes(launcher, one_process, tiny_llama, toy_stream, tmp_path):
    """Twice, so that what the first run leaves in a process must not reach the second."""
    files = [
        recipe_file(tiny_llama, toy_stream, tmp_path / f"{name}.yaml", tmp_path / name)
        for name in ("first", "second")
    ]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(OF_LAUNCHERS)}
    done = subprocess.run(
        [sys.executable, TESTS / "run_forked.py", launcher, str(free_port()), *files],
        capture_output=True,
        text=True,
        timeout=300,
        env={**clean, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("has run 2") == 2
    for name in ("first", "second"):
        assert_same_run(one_process, tmp_path / name, 0)
