"""`run` in processes that a launcher forks from one that has imported everything, as a notebook's cell would,
equals `run` in one process.
"""

import os
import sys
from pathlib import Path

import pytest
import yaml
from accelerate import debug_launcher, notebook_launcher
from launches import assert_same_run, free_port, sections
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from codyra_llm.config.recipe import load_recipe
from codyra_llm.experiment.run import run


def recipe_file(model, stream, file: Path, output: Path) -> Path:
    made = {**sections(model, stream, "codyra"), "output": str(output)}
    file.write_text(yaml.safe_dump(made), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def one_process(tiny_llama, toy_stream, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    return run(load_recipe(recipe_file(tiny_llama, toy_stream, folder / "recipe.yaml", folder / "run"))).path


def work(files: list[Path]) -> int:
    """All recipes, one after the other; returns how many tasks were scored."""
    folders = [run(load_recipe(file)) for file in files]
    print(f"{os.getpid()} has run {len(folders)}", flush=True)
    return sum(len(folder.scores) for folder in folders)


def elastic(port: int, files: list[Path]) -> None:
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id="test",
        rdzv_backend="c10d",
        rdzv_endpoint=f"127.0.0.1:{port}",
        max_restarts=0,
        start_method="fork",
    )
    scored = elastic_launch(config, work)(files)
    assert len(set(scored.values())) == 1 and sorted(scored) == [0, 1], scored


def notebook(port: int, files: list[str]) -> None:
    # It refuses to fork where bitsandbytes was imported, as other tests of this process may have done.
    sys.modules.pop("bitsandbytes", None)
    notebook_launcher(work, (files,), num_processes=2, use_port=str(port))


LAUNCHERS = {
    "elastic": elastic,
    "debug": lambda port, files: debug_launcher(work, (files,), num_processes=2),
    "notebook": notebook,
}


@pytest.mark.distributed
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_recipe_runs_in_forked_processes(launcher, one_process, tiny_llama, toy_stream, tmp_path, forked):
    """Twice, so that what the first run leaves in a process must not reach the second."""
    files = [
        recipe_file(tiny_llama, toy_stream, tmp_path / f"{name}.yaml", tmp_path / name)
        for name in ("first", "second")
    ]
    port = free_port()
    done = forked.alone(lambda rank: LAUNCHERS[launcher](port, files)).wait(300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("has run 2") == 2
    for name in ("first", "second"):
        assert_same_run(one_process, tmp_path / name, 0)
