"""Two machines, each a network namespace of this one: what they compute is what one process computes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, TESTS
from launches import SHIPPED, assert_same_run, write_stand_in

from codyra_llm.config.recipe import load_recipe
from codyra_llm.experiment import run

SCRIPT = TESTS / "two_nodes.sh"
LAUNCH = ROOT / "launch.sh"

ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "SLURM", "MASTER_"))},
    "PYTHON": sys.executable,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PROCESSES": "1",
}


def lacking() -> str:
    """Why two namespaces can't be joined here; empty where they can."""
    if not LAUNCH.is_file():
        return "not a checkout"
    for tool, package in (
        ("ip", "iproute2"),
        ("unshare", "util-linux"),
        ("nsenter", "util-linux"),
        ("hostname", "hostname"),
    ):
        if not shutil.which(tool):
            return f"no `{tool}`; install {package}"
    mapped = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    tried = subprocess.run(
        [
            "unshare",
            *mapped,
            "--net",
            "--uts",
            "--pid",
            "--fork",
            "--mount-proc",
            "ip",
            "link",
            "add",
            "eth0",
            "type",
            "veth",
            "peer",
            "name",
            "eth1",
        ],
        capture_output=True,
        text=True,
    )
    return f"no namespaces: {tried.stderr.strip()}" if tried.returncode else ""


WHY = lacking()
pytestmark = [pytest.mark.distributed, pytest.mark.skipif(bool(WHY), reason=WHY)]


def two_nodes(recipe: Path, *settings: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [SCRIPT, recipe, *settings],
        capture_output=True,
        text=True,
        timeout=280,
        env={**ENVIRONMENT, **environment},
    )


@pytest.fixture(scope="module")
def one_process(recipe_files, tmp_path_factory) -> Path:
    """The run that two nodes must equal."""
    output = tmp_path_factory.mktemp("one") / "run"
    return run.run(load_recipe(recipe_files / "codyra.yaml", [f"output={output}"])).path


def test_two_nodes_equal_one_process(one_process, recipe_files, tmp_path):
    """Under ZeRO 3, which asks the most of them: each holds half of the weights."""
    done = two_nodes(
        recipe_files / "codyra.yaml",
        f"output={tmp_path / 'run'}",
        ACCELERATE_CONFIG=str(SHIPPED / "accelerate" / "zero3.yaml"),
    )
    assert done.returncode == 0, done.stderr
    told = "2 processes on 2 machines (ZeRO stage 3) agree; 7 examples per optimizer step over all"
    assert told in done.stdout
    assert_same_run(one_process, tmp_path / "run", 3)


@pytest.fixture
def cluster(tmp_path):
    """Function from a command, and more environment, to what it did on the first of two nodes under SLURM."""
    absent = [tool for tool in ("slurmctld", "slurmd", "sbatch") if not shutil.which(tool)]
    if absent or os.geteuid():
        pytest.skip(f"no `{absent[0]}`; install slurm-wlm" if absent else "SLURM's daemons need root")
    (tmp_path / "slurm").mkdir()
    settings = {"SBATCH_OUTPUT": str(tmp_path / "log"), "SBATCH_GPUS_PER_NODE": "0"}
    return lambda *command, **more: subprocess.run(
        [SCRIPT, "--slurm", tmp_path / "slurm", *command],
        cwd=LAUNCH.parent,
        capture_output=True,
        text=True,
        timeout=280,
        env={**ENVIRONMENT, **settings, **more},
    )


def test_a_job_on_two_nodes(cluster, one_process, recipe_files, tmp_path):
    done = cluster(
        "sbatch", "--wait", "docs/slurm.sbatch", recipe_files / "codyra.yaml", f"output={tmp_path / 'run'}"
    )
    assert done.returncode == 0, done.stderr + (tmp_path / "log").read_text()
    assert "2 processes on 2 machines (DDP) agree" in (tmp_path / "log").read_text()
    assert_same_run(one_process, tmp_path / "run", 0)


def test_a_job_that_is_warned_saves_and_queues_again(cluster, tmp_path):
    watch = """job=$(sbatch --parsable docs/slurm.sbatch x.yaml)
    until [ "$(grep -c ready $SEEN)" -eq 2 ]; do sleep 0.2; done
    scancel --batch --signal=USR1 $job
    until scontrol show job $job | grep -q "JobState=PENDING Reason=BeginTime"; do sleep 0.2; done
    scontrol show job $job"""
    done = cluster(
        "timeout", "120", "bash", "-c", watch, SAVING="5", **write_stand_in(tmp_path)
    )  # both warned meanwhile
    assert done.returncode == 0 and "Restarts=1" in done.stdout, done.stdout + done.stderr
    assert sorted((tmp_path / "seen").read_text().splitlines()) == [
        f"node{rank + 1} {rank} {text}" for rank in (0, 1) for text in ("SIGUSR1", "ready", "saved")
    ], done.stdout
