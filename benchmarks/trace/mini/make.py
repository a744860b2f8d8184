"""Writes mini-TRACE and keeps it, with its small LLaMA, in the user's cache."""

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from codyra_llm.files import replacing, write_json

from .skills import PROBES, held_out
from .tasks import TASKS, Pair

VERSION = 1  # part of the cached folders' names: raise it when what the generator or the pretraining makes changes
LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_", "FSDP_")


def make_mini(out: Path, seed: int = 0, train: int = 400, eval: int = 50, test: int = 200) -> None:
    """Write `<out>/<task>/{train,eval,test}.json` and the probes of general ability `<out>/general/<probe>/test.json`.

    Each file is a JSON list of `{"prompt", "answer"}`. Equal arguments give equal bytes. No prompt occurs twice in a
    task, so its splits are disjoint.
    """
    for name, task in TASKS.items():
        records = distinct(task, random.Random(f"{name} {seed}"), train + eval + test)
        splits = {"train": records[:train], "eval": records[train:train + eval], "test": records[train + eval:]}
        for split, part in splits.items():
            write_json(Path(out) / name / f"{split}.json", part)
    for name, probe in PROBES.items():
        records = distinct(probe, random.Random(f"{name} {seed}"), 100, held_out)
        write_json(Path(out) / "general" / name / "test.json", records)


def distinct(make: Callable[[random.Random], Pair], rng: random.Random, count: int,
             keep: Callable[[str], bool] = lambda prompt: True) -> list[dict[str, str]]:
    """`count` records with pairwise different prompts that `keep` admits."""
    answers: dict[str, str] = {}
    while len(answers) < count:
        prompt, answer = make(rng)
        if keep(prompt):
            assert answers.setdefault(prompt, answer) == answer, f"two answers to {prompt!r}"
    return [{"prompt": prompt, "answer": answer} for prompt, answer in answers.items()]


def mini_data(seed: int = 0) -> Path:
    """The cached folder of `make_mini(seed)`, written on first use."""
    return _cached(f"mini-data-v{VERSION}-{seed}", lambda out: make_mini(out, seed))


def mini_model(seed: int = 0) -> Path:
    """The cached folder of `pretrain_mini(seed)`, trained on first use."""
    return _cached(f"mini-model-v{VERSION}-{seed}", lambda out: _pretrain_apart(out, seed))


def _cached(name: str, make: Callable[[Path], None]) -> Path:
    """`<cache>/<name>`; where it is absent, one process makes it and any other waits for that one."""
    cache = Path(os.environ.get("CODYRA_CACHE") or "~/.cache/codyra_llm").expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    if not (cache / name).is_dir():
        with FileLock(cache / f".{name}.lock"):
            if not (cache / name).is_dir():
                with replacing(cache / name) as scratch:
                    make(scratch)
    return cache / name


def _pretrain_apart(out: Path, seed: int) -> None:
    """Pretrain in a process of its own: the caller's random state and the launcher's process group stay untouched."""
    print("Making the small LLaMA of mini-TRACE: once, about a minute on two free cores.", file=sys.stderr, flush=True)
    alone = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCH)}
    alone |= {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-m", f"{__package__}.pretrain", str(out), str(seed)], check=True, env=alone,
                   stdout=subprocess.DEVNULL)
