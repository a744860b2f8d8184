"""Two processes on this machine equal one: DDP under torchrun, DeepSpeed under accelerate launch; faults end
both.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import codyra_llm.recipes

OF_LAUNCHERS = ("ACCELERATE_", "DS_", "TORCHELASTIC_", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_")
SHIPPED = Path(codyra_llm.recipes.__path__[0])


PROGRAM = (
    '_: r"""\n{}\nlaunch: python """; import sys; from codyra_llm.cli import main; main(["run", *sys.argv])\n'
)


# Rank 5 and a batch of 7 divide by two nowhere; 60 tokens leave one rank with fewer micro-batches.
METHODS = {
    "codyra": {"name": "codyra", "rank": 5, "importance_lr": 0.05, "threshold": {"budget": 0.3}},
    "seqlora": {"name": "seqlora", "rank": 5},
    "gem": {"name": "gem", "rank": 5, "memory": 7},
    "ewc": {"name": "ewc", "rank": 5, "weight": 1e3, "examples": 7},
}


def sections(model, stream, method) -> dict:
    return {
        "model": {"path": str(model)},
        "data": {"root": str(stream), "tasks": ["ONE", "THREE"], "epochs": 2},
        "method": METHODS[method],
        "optim": {"lr": 1e-2, "schedule": "cosine", "batch_size": 7, "micro_batch_tokens": 60},
        "eval": {"max_new_tokens": 4, "batch_tokens": 60},
        "output": "given by each test",
        "checkpoint": False,
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def assert_same_run(one: Path, two: Path, stage: int) -> None:
    """Losses, learning rates, thresholds, weights, ranks kept, predictions and scores, to rounding."""
    manifest = json.loads((two / "manifest.json").read_text())
    assert manifest["world_size"] == 2 and manifest["zero_stage"] == stage
    for a, b in zip(rows(one / "log.jsonl"), rows(two / "log.jsonl"), strict=True):
        for key in ("loss", "grad_norm", "lr", "kappa"):
            assert b[key] == pytest.approx(a[key], rel=2e-5), (a["task"], a["step"], key)
        assert (a["task"], a["step"], a["tokens"]) == (b["task"], b["step"], b["tokens"])
    files = sorted(p.name for p in (one / "updates").iterdir())
    assert files == sorted(p.name for p in (two / "updates").iterdir()) and len(files) == 2
    for name in files:
        a, b = load_file(one / "updates" / name), load_file(two / "updates" / name)
        assert {key: t.shape for key, t in a.items()} == {key: t.shape for key, t in b.items()}
        for key in a:
            torch.testing.assert_close(
                b[key], a[key], rtol=1e-3, atol=1e-4, msg=lambda m, at=f"{name} {key}": f"{at}: {m}"
            )
    flips = flipped(one, two)
    print(f"{len(flips)} predictions differ", *flips, sep="\n")
    assert (
        len(flips) <= 2
    )  # of 26; a token that was as likely as another in one process may be the other in two
    timeless = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in rows(run / "scores.jsonl")]
        for run in (one, two)
    ]
    assert flips or timeless[0] == timeless[1]


def flipped(one: Path, two: Path) -> list[str]:
    """The lines of predictions that differ, with where they stand."""
    found = [
        {str(p.relative_to(run)): rows(p) for p in (run / "predictions").rglob("*.jsonl")}
        for run in (one, two)
    ]
    assert found[0] and {file: len(lines) for file, lines in found[0].items()} == {
        file: len(lines) for file, lines in found[1].items()
    }
    return [
        f"{file}: {a} {b}"
        for file, lines in sorted(found[0].items())
        for a, b in zip(lines, found[1][file], strict=True)
        if a != b
    ]


def refused(done: subprocess.CompletedProcess, *sentences: str) -> None:
    """Each sentence once, no traceback of ours, and the launcher says that it failed."""
    assert done.returncode != 0
    for sentence in sentences:
        assert done.stderr.count(sentence) == 1, done.stderr
    assert "codyra_llm/" not in done.stderr and "[rank" not in done.stderr, done.stderr


# In place of the package: each process writes what happens to it into a line of $SEEN, and takes a second to
# save.
STAND_IN = """
import os, pathlib, signal, sys, threading
asked = threading.Event()
def see(text):
    line = f"{os.uname().nodename} {os.environ.get('RANK', 0)} {text}\\n"
    with open(os.environ["SEEN"], "a") as file: file.write(line)
def stop(number, frame):
    if not asked.is_set(): see(signal.Signals(number).name)
    asked.set()
for number in (signal.SIGTERM, signal.SIGUSR1): signal.signal(number, stop)
see("ready")
while not asked.wait(0.1): pass
threading.Event().wait(float(os.environ.get("SAVING", 1)))
see("saved")
sys.exit(75)
"""


def write_stand_in(folder: Path) -> dict[str, str]:
    """The environment in which launch.sh starts STAND_IN; its lines are in folder/seen."""
    (folder / "codyra_llm").mkdir()
    (folder / "codyra_llm" / "__init__.py").touch()
    (folder / "codyra_llm" / "__main__.py").write_text(STAND_IN)
    (folder / "seen").touch()
    return {
        "PYTHONPATH": str(folder),
        "PYTHONSAFEPATH": "1",
        "SEEN": str(folder / "seen"),
        "PYTHON": sys.executable,
    }


DECIDING = (
    "NNODES",
    "NODE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "PROCESSES",
    "ACCELERATE_CONFIG",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "PYTHON",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
)


def undecided() -> dict[str, str]:
    """This environment, without what decides how launch.sh starts a run."""
    kept = {}
    for name, value in os.environ.items():
        if name not in DECIDING and not name.startswith(("SLURM", "ACCELERATE_")):
            kept[name] = value
    return kept
