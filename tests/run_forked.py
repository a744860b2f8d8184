"""Run recipes in two processes that are forked from this one, as a notebook's cell would: `run_forked.py
LAUNCHER PORT RECIPE ...`. Everything is imported here, before there are two."""

import os
import sys

from accelerate import debug_launcher, notebook_launcher
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from codyra_llm.config.recipe import load_recipe
from codyra_llm.experiment.run import run


def work(files: list[str]) -> int:
    """All recipes, one after the other; returns how many tasks were scored."""
    folders = [run(load_recipe(file)) for file in files]
    print(f"{os.getpid()} has run {len(folders)}", flush=True)
    return sum(len(folder.scores) for folder in folders)


def elastic(port: int, files: list[str]) -> None:
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


LAUNCHERS = {
    "elastic": elastic,
    "debug": lambda port, files: debug_launcher(work, (files,), num_processes=2),
    "notebook": lambda port, files: notebook_launcher(work, (files,), num_processes=2, use_port=str(port)),
}
launcher, port, *files = sys.argv[1:]
LAUNCHERS[launcher](int(port), files)
