"""launch.sh by what it finds. Most tests read --dry-run; python, nvidia-smi, srun and scontrol are stubs in
PATH.
"""

import os
import shlex
import shutil
import subprocess

import pytest
from helpers import ROOT
from launches import undecided
from stubbed import BATCH, shown, write_stubs

TORCHRUN = ["env", "python3", "-m", "torch.distributed.run"]
RUN = ["-m", "codyra_llm", "run", "x.yaml"]
STATIC = [
    "--nproc-per-node",
    "8",
    "--nnodes",
    "2",
    "--node-rank",
    "1",
    "--master-addr",
    "n7",
    "--master-port",
]
TWO = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "n7", "GPUS": "8"}
ALONE = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "GPUS": "4"}
STEP = {
    **BATCH,
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_NODEID": "1",
    "SLURMD_NODENAME": "n8",
}


pytestmark = pytest.mark.skipif(not (ROOT / "launch.sh").is_file(), reason="not a checkout")


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        ([], {}, ["python3", *RUN]),
        ([], {"GPUS": "1"}, ["python3", *RUN]),
        ([], {"GPUS": "8"}, [*TORCHRUN, "--nproc-per-node", "8", "--standalone", *RUN]),
        (
            [],
            {"GPUS": "8", "CUDA_VISIBLE_DEVICES": "2,5"},
            [*TORCHRUN, "--nproc-per-node", "2", "--standalone", *RUN],
        ),
        ([], {"GPUS": "8", "CUDA_VISIBLE_DEVICES": ""}, ["python3", *RUN]),
        ([], {"PROCESSES": "2"}, [*TORCHRUN, "--nproc-per-node", "2", "--standalone", *RUN]),
        ([], TWO, [*TORCHRUN, *STATIC, "29500", *RUN]),
        (
            ["--nodes", "2", "--rank", "1", "--master", "n7:77"],
            {"GPUS": "8"},
            [*TORCHRUN, *STATIC, "77", *RUN],
        ),
        (
            ["--rank", "1", "--master", "n7"],
            {**TWO, "NODE_RANK": "0", "MASTER_ADDR": "x"},
            [*TORCHRUN, *STATIC, "29500", *RUN],
        ),
        (
            [],
            {"GPUS": "8", "ACCELERATE_CONFIG": "z.yaml"},
            [
                "env",
                "python3",
                "-m",
                "accelerate.commands.launch",
                "--config_file",
                "z.yaml",
                "--num_processes",
                "8",
                "--num_machines",
                "1",
                "--machine_rank",
                "0",
                "--main_process_port",
                "0",
                *RUN,
            ],
        ),
        (
            [],
            {**TWO, "ACCELERATE_CONFIG": "z.yaml"},
            [
                "env",
                "python3",
                "-m",
                "accelerate.commands.launch",
                "--config_file",
                "z.yaml",
                "--num_processes",
                "16",
                "--num_machines",
                "2",
                "--machine_rank",
                "1",
                "--main_process_ip",
                "n7",
                "--main_process_port",
                "29500",
                "--deepspeed_multinode_launcher",
                "standard",
                *RUN,
            ],
        ),
        (
            [],
            {**BATCH, "SLURM_CPUS_PER_TASK": "12"},
            [
                "srun",
                "--nodes=2",
                "--ntasks=2",
                "--ntasks-per-node=1",
                "--cpus-per-task=12",
                str(ROOT / "launch.sh"),
                "x.yaml",
            ],
        ),
        (
            [],
            {**BATCH, "SLURM_STEP_NUM_NODES": "1"},
            ["srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", str(ROOT / "launch.sh"), "x.yaml"],
        ),  # in the step of an interactive salloc
        ([], STEP, [*TORCHRUN, *STATIC, "29821", *RUN]),
        (
            [],
            {**STEP, **TWO, "MASTER_PORT": "5"},
            [*TORCHRUN, *STATIC, "5", *RUN],
        ),  # who says NNODES needs no SLURM
        ([], {**ALONE, "SLURMD_NODENAME": "n7"}, [*TORCHRUN, "--nproc-per-node", "4", "--standalone", *RUN]),
        (
            [],
            ALONE,
            ["srun", "--nodes=1", "--ntasks=1", "--ntasks-per-node=1", str(ROOT / "launch.sh"), "x.yaml"],
        ),  # salloc's shell
    ],
)
def test_what_is_found_decides(arguments, environment, expected, launch):
    assert shown(launch("--dry-run", *arguments, "x.yaml", **environment)) == expected


@pytest.mark.parametrize(
    ("lines", "local"), [("# two\n\nn7 slots=8\nn8 slots=8\n", False), ("#n6 slots=8\nn7 slots=8\n", True)]
)
def test_a_hostfile(lines, local, launch, tmp_path):
    """DeepSpeed's own place for it counts last, after --hostfile, NNODES and SLURM."""
    (tmp_path / "hosts").write_text(lines)
    alone = ["--no_ssh_check", "--master_addr", "127.0.0.1"] * local
    expected = ["python3", "-m", "deepspeed.launcher.runner", "--hostfile", str(tmp_path / "hosts")]
    code = ["--module", "--no_local_rank", "codyra_llm", "run", "x.yaml"]
    asked = ["--dry-run", "--hostfile", tmp_path / "hosts", "x.yaml"]
    assert shown(launch(*asked)) == [*expected, *alone, *code]
    assert shown(launch(*asked, **STEP)) == [*expected, *alone, *code]
    assert shown(launch(*asked, PROCESSES="4", MASTER_PORT="5")) == [
        *expected,
        "--num_gpus",
        "4",
        "--master_port",
        "5",
        *alone,
        *code,
    ]
    text = (ROOT / "launch.sh").read_text(encoding="utf-8")
    assert "/job/hostfile" in text
    copy = tmp_path / "launch.sh"
    copy.write_text(text.replace("/job/hostfile", str(tmp_path / "hosts")), encoding="utf-8")
    copy.chmod(0o755)
    assert shown(launch("--dry-run", "x.yaml", script=copy)) == [*expected, *alone, *code]
    assert shown(launch("--dry-run", "x.yaml", script=copy, **TWO)) == [*TORCHRUN, *STATIC, "29500", *RUN]
    assert shown(launch("--dry-run", "x.yaml", script=copy, **STEP)) == [*TORCHRUN, *STATIC, "29821", *RUN]


def test_threads_are_shared_out(launch):
    for environment, threads in (
        ({"GPUS": "8"}, 4),
        ({"PROCESSES": "64"}, 1),
        ({"GPUS": "8", "OMP_NUM_THREADS": "3"}, 3),
    ):
        assert f"OMP_NUM_THREADS={threads} " in launch("--dry-run", "x.yaml", **environment).stdout


BROKEN_DRIVER = """
NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest NVIDIA
driver is installed and running.

"""
CUT_UP = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)
  MIG 3g.40gb     Device  0: (UUID: MIG-1)
  MIG 3g.40gb     Device  1: (UUID: MIG-2)
"""


@pytest.mark.parametrize("said", [BROKEN_DRIVER, CUT_UP], ids=["no driver", "parts of a GPU"])
def test_lines_that_are_no_gpus_start_no_processes(launch, tmp_path, said):
    """nvidia-smi says that it has failed on standard output, and lists the parts of a GPU below it."""
    (tmp_path / "said").write_text(said)
    write_stubs(tmp_path / "other", {"nvidia-smi": f"cat {shlex.quote(str(tmp_path / 'said'))}"})
    path = f"{tmp_path / 'other'}:{tmp_path / 'bin'}:{undecided()['PATH']}"
    assert shown(launch("--dry-run", "x.yaml", PATH=path)) == ["python3", *RUN]


@pytest.mark.parametrize("environment", [{}, {"GPUS": "2"}], ids=["one process", "torchrun"])
def test_what_is_printed_can_be_pasted(environment, launch, tmp_path):
    awkward = ["my recipe.yaml", "data.tasks=[ONE, TWO]", "output=it's $HOME/`x`;*", "general.data="]
    printed, ran = launch("--dry-run", *awkward, **environment), launch(*awkward, **environment)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    pasted = subprocess.run(
        ["bash", "-c", printed.stdout], env={"PATH": path}, capture_output=True, text=True, cwd="/"
    )
    assert pasted.stdout == ran.stdout and ran.stdout.endswith(
        "".join(f"<{word}>" for word in awkward) + "\n"
    )


def test_the_tests_and_other_commands(launch):
    assert shown(launch("--dry-run", "plan", "x.yaml", GPUS="8")) == [
        "python3",
        "-m",
        "codyra_llm",
        "plan",
        "x.yaml",
    ]
    assert shown(launch("--dry-run", "test", "-k", "a b")) == [
        "cd",
        str(ROOT),
        "&&",
        "env",
        "HF_HUB_OFFLINE=1",
        "python3",
        "-m",
        "pytest",
        "--numprocesses",
        "33",
        "--maxprocesses",
        "8",
        "--dist",
        "worksteal",
        "-k",
        "a b",
    ]
    one_process = ["python3", "-m", "codyra_llm", "run", "--help"]
    assert shown(launch("--dry-run", "run", "--help", GPUS="8")) == one_process
    assert launch().stdout == launch("--help").stdout == launch("-h").stdout
    assert "usage: ./launch.sh" in launch().stdout


@pytest.mark.parametrize("recipe", ["x.yaml", "quickstart"])
def test_the_command_run_is_launched_like_its_recipe(recipe, launch):
    """In a single process, as other commands are, it would leave all GPUs but one idle."""
    run = ["-m", "codyra_llm", "run", recipe, "seed=1"]
    words = shown(launch("--dry-run", "run", recipe, "seed=1", GPUS="8"))
    assert words == [*TORCHRUN, "--nproc-per-node", "8", "--standalone", *run]
    words = shown(launch("--dry-run", "--nodes", "2", "--rank", "1", "--master", "n7", "run", recipe))
    assert words[:3] == ["env", "python3", "-m"] and words[-2:] == ["run", recipe]
    words = shown(launch("--dry-run", "run", recipe, **{**BATCH, "SLURM_STEP_NUM_NODES": "1"}))
    assert words[0] == "srun" and words[-3:] == [str(ROOT / "launch.sh"), "run", recipe]


def test_a_python_may_be_named_by_a_relative_path(launch, tmp_path):
    """It is asked from another folder whether it has codyra_llm."""
    own = str(tmp_path / "bin" / "python3")
    assert shown(launch("--dry-run", "x.yaml", PYTHON="bin/python3")) == [own, *RUN]


@pytest.mark.parametrize(
    ("arguments", "environment", "told"),
    [
        (["x.yaml"], {"PYTHON": "nowhere/python"}, "PYTHON: there is no program '"),
        (["--node", "2", "x.yaml"], {}, "unknown flag '--node'"),
        (["--dry-run"], {}, "there is no recipe"),
        (["--nodes"], {}, "--nodes needs a value"),
        (["x.yaml"], {"ACCELERATE_CONFIG": "nowhere.yaml"}, "there is no file 'nowhere.yaml'"),
        (["--nodes", "two", "x.yaml"], {}, "'two' is not a whole number from 1 on"),
        (["x.yaml"], {"NNODES": "0"}, "'0' is not a whole number from 1 on"),
        (["x.yaml"], {"PROCESSES": "0"}, "PROCESSES: '0'"),
        (["--nodes", "2", "--rank", "1", "x.yaml"], {}, "give --master HOST[:PORT]"),
        (
            ["--nodes", "2", "--master", "n7", "x.yaml"],
            {},
            "--rank (NODE_RANK; 0 on the first of 2 machines): ''",
        ),
        (
            ["--nodes", "2", "--master", "n7:", "--rank", "2", "x.yaml"],
            {},
            "2 is not below the number of machines, 2",
        ),
        (
            ["--nodes", "2", "--master", "n7:x", "--rank", "0", "x.yaml"],
            {},
            "--master: 'x' is not a whole number",
        ),
        (["--rank", "1", "x.yaml"], {}, "--rank without --nodes has no meaning"),
        (["--nodes", "2", "plan", "x.yaml"], {}, "'plan' is none"),
        (["--hostfile", "nowhere", "x.yaml"], {}, "there is no file 'nowhere'"),
        (["--hostfile", "bin/nproc", "--nodes", "2", "x.yaml"], {}, "exclude each other"),
        (["--hostfile", "bin/nproc", "x.yaml"], {"NNODES": "2"}, "exclude each other"),
        (["--hostfile", "bin/nproc", "--rank", "1", "x.yaml"], {}, "leave them out"),
        (
            ["--hostfile", "bin/nproc", "x.yaml"],
            {"ACCELERATE_CONFIG": "z.yaml"},
            "--deepspeed_config FILE.json",
        ),
        (["x.yaml"], {**STEP, "SLURM_STEP_NUM_TASKS": "16"}, "16 tasks on 2 nodes"),
    ],
)
def test_what_can_not_be_meant_is_refused(arguments, environment, told, launch):
    done = launch(*arguments, **environment)
    assert done.returncode == 2 and done.stdout == "" and told in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_dry_run_installs_nothing(launch, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in ("launch.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    (tmp_path / "bin" / "python3").write_text(
        "#!/bin/sh\nexit 1\n"
    )  # knows no codyra_llm, and can't make a .venv
    done = launch("--dry-run", "x.yaml", script=folder / "launch.sh")
    assert (
        shown(done) == [str(folder / ".venv" / "bin" / "python"), *RUN]
        and ".venv is made first" in done.stderr
    )
    assert sorted(path.name for path in folder.iterdir()) == [
        "constraints.txt",
        "launch.sh",
        "pyproject.toml",
    ]
