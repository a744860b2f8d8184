"""launch.sh where stubs in PATH stand for python, nvidia-smi, srun and scontrol."""

import re
import shlex
import subprocess
from pathlib import Path

from helpers import ROOT
from launches import undecided

STUBS = {
    "python3": '[ "$1" != -c ] || exit 0\nprintf "<%s>" "$@"; echo',
    "nproc": "echo 32",
    "nvidia-smi": 'for i in $(seq "${GPUS:-0}"); do echo "GPU $i: of a test"; done',
    "scontrol": '[ "$*" = "show hostnames n[7-8]" ] && printf "n7\\nn8\\n"',
}
BATCH = {
    "SLURM_JOB_ID": "4321",
    "SLURM_NNODES": "2",
    "SLURM_JOB_NODELIST": "n[7-8]",
    "SLURM_NODEID": "0",
    "GPUS": "8",
    "SLURMD_NODENAME": "n7",
}


def write_stubs(folder: Path, stubs: dict[str, str]) -> Path:
    folder.mkdir()
    for name, text in stubs.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)
    return folder


def starter(folder: Path):
    """Function `(*arguments, **environment)` that starts launch.sh, or the copy given, in `folder`, where
    that environment alone decides.
    """
    stubs = write_stubs(folder / "bin", STUBS)
    (folder / "z.yaml").touch()
    clean = undecided()

    def start(
        *arguments, script=ROOT / "launch.sh", timeout=60, **environment
    ) -> subprocess.CompletedProcess:
        env = {**clean, "PATH": f"{stubs}:{clean['PATH']}", **environment}
        return subprocess.run(
            [script, *map(str, arguments)],
            env=env,
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=folder,
        )

    return start


def shown(done: subprocess.CompletedProcess) -> list[str]:
    """The words of what --dry-run printed, without the variables that are set."""
    assert done.returncode == 0, done.stderr
    return [word for word in shlex.split(done.stdout) if not re.match("(OMP|PET|TORCH)_[A-Z_]*=", word)]
