"""The commands of docs/many_gpus.md, and a run in a Slurm allocation; stubs stand for srun and scontrol."""

import json
import os
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from stubbed import BATCH, shown, write_stubs

import codyra_llm.recipes

QUICKSTART = Path(codyra_llm.recipes.__path__[0]) / "quickstart.yaml"

pytestmark = pytest.mark.skipif(not (ROOT / "launch.sh").is_file(), reason="not a checkout")


@pytest.mark.distributed
def test_a_slurm_allocation(tiny_llama, toy_stream, launch, tmp_path):
    """Two nodes that are both this machine: srun starts launch.sh on each, and they find each other."""
    node = 'SLURM_STEP_NUM_NODES=2 SLURM_STEP_NUM_TASKS=2 SLURM_NODEID=$n "$@" &'
    srun = (
        f'shift 3\nfor n in 0 1; do {node} pids+=" $!"; done\nfor pid in $pids; do wait $pid || exit 1; done'
    )
    stubs = write_stubs(tmp_path / "slurm", {"srun": srun, "scontrol": "echo localhost"})
    done = launch(
        QUICKSTART,
        f"model.path={tiny_llama}",
        f"data.root={toy_stream}",
        "data.tasks=[ONE]",
        "data.epochs=1",
        "method.rank=2",
        "method.samples=8",
        "eval.max_new_tokens=2",
        "eval.max_examples=2",
        "general.data=null",
        f"output={tmp_path / 'run'}",
        PATH=f"{stubs}:{os.environ['PATH']}",
        PYTHON=sys.executable,
        timeout=240,
        OMP_NUM_THREADS="1",
        **BATCH | {"SLURM_JOB_ID": str(os.getpid())},
    )
    assert done.returncode == 0, done.stderr
    assert "2 processes on 1 machine (DDP) agree" in done.stdout
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["world_size"] == 2
    assert (tmp_path / "run" / "summary.json").is_file()
    assert (tmp_path / "run" / "checkpoint" / "model.safetensors").is_file()


def commands() -> list[str]:
    """What docs/many_gpus.md tells to type, of launch.sh and of sbatch."""
    text = (ROOT / "docs" / "many_gpus.md").read_text(encoding="utf-8") if (ROOT / "docs").is_dir() else ""
    return [c for c in text.split("`") if "./launch.sh " in c and "recipes/" in c or c.startswith("sbatch ")]


@pytest.mark.parametrize("command", commands())
def test_the_documented_commands(command, launch, tmp_path):
    """Each finds a launcher and names files that are there; a batch job's is run as sbatch would."""
    for word in command.split():
        path = word.partition("=")[2] or word
        assert "/" not in path or (ROOT / path).is_file(), path
    (tmp_path / "hosts").write_text("n7 slots=8\nn8 slots=8\n")
    (tmp_path / "sbatch").write_text(
        command.replace("sbatch ", f"cd {ROOT} && bash ", 1)
        if command.startswith("sbatch")
        else command.replace("./launch.sh", f"{ROOT}/launch.sh --dry-run")
    )
    python = write_stubs(tmp_path / "shell", {"srun": 'printf "srun "; printf "%s " "$@"; echo'})
    environment = BATCH if command.startswith("sbatch") else {"GPUS": "8"}
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    done = launch(
        tmp_path / "sbatch",
        script="bash",
        PATH=f"{python}:{tmp_path / 'bin'}:{os.environ['PATH']}",
        **environment,
    )
    found = shown(done)
    assert found[-1] == "recipes/quickstart.yaml"
    assert ("srun" in found) == command.startswith("sbatch") and ("--hostfile" in found) == (
        "hostfile" in command
    )
    assert ("accelerate.commands.launch" in found) == ("ACCELERATE_CONFIG" in command)
    assert ("--nnodes" in found) == ("NNODES" in command or "--nodes" in command)


def test_there_are_documented_commands():
    assert len(commands()) == 7
