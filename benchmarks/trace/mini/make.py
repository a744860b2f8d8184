"""Writes mini-TRACE, keeps it in the user's cache, and names the small LLaMAs that are shipped."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

from codyra_llm.benchmarks.trace.mini.skills import PROBES, held_out
from codyra_llm.benchmarks.trace.mini.tasks import TASKS, Pair
from codyra_llm.config.methods.sequential import REASONING_VARIANT
from codyra_llm.core.files import replacing, write_json
from codyra_llm.data.reasoning import reasoned_answer, reasoned_prompt

# Part of the cached folder's name: raise it when what the generator makes changes.
DATA_VERSION = 2
# Bases that `pretrain.py` made with the seeds 0, 1 and 2; results over bases need more than one.
BASES = ("mini", "mini-1", "mini-2")
BASES_VERSION = 1  # part of their cached folders' names: raise it when what is in `bases/` changes
Made = TypeVar("Made", bound=tuple[str, ...])


def make_mini(out: Path, seed: int = 0, train: int = 400, eval: int = 50, test: int = 200) -> None:
    """Write `<out>/<task>/{train,eval,test}.json`, the same training examples with reasoning
    `<out>/LLM-CL-Benchmark_Reasoning/<task>/train.json`, and the probes of general ability
    `<out>/general/<probe>/test.json`.

    Each file is a JSON list of `{"prompt", "answer"}`. Equal arguments give equal bytes. No prompt occurs
    twice in a task, so its splits are disjoint.
    """
    out = Path(out)
    for name, task in TASKS.items():
        examples = distinct(task, random.Random(f"{name} {seed}"), train + eval + test)
        splits = {
            "train": examples[:train],
            "eval": examples[train : train + eval],
            "test": examples[train + eval :],
        }
        for split, part in splits.items():
            _write(out / name / f"{split}.json", [(prompt, answer) for prompt, answer, _ in part])
        _write(
            out / REASONING_VARIANT / name / "train.json",
            [
                (reasoned_prompt(name, prompt), reasoned_answer(name, reasoning, answer))
                for prompt, answer, reasoning in splits["train"]
            ],
        )
    for name, probe in PROBES.items():
        _write(
            out / "general" / name / "test.json",
            distinct(probe, random.Random(f"{name} {seed}"), 100, held_out),
        )


def _write(path: Path, pairs: list[Pair]) -> None:
    write_json(path, [{"prompt": prompt, "answer": answer} for prompt, answer in pairs])


def distinct(
    make: Callable[[random.Random], Made],
    rng: random.Random,
    count: int,
    keep: Callable[[str], bool] = lambda prompt: True,
) -> list[Made]:
    """`count` results of `make` whose prompts, their first items, all differ and are admitted by `keep`."""
    made: dict[str, Made] = {}
    while len(made) < count:
        example = make(rng)
        prompt = example[0]
        if keep(prompt):
            assert made.setdefault(prompt, example) == example, f"two answers to {prompt!r}"
    return list(made.values())


def mini_data(seed: int = 0) -> Path:
    """The cached folder of `make_mini(seed)`, written on first use."""
    return _cached(f"mini-data-v{DATA_VERSION}-{seed}", lambda out: make_mini(out, seed))


def mini_model(name: str = "mini") -> Path:
    """The cached folder of a small LLaMA of `BASES`, in float32, written on first use.

    It is shipped in bfloat16, which holds its weights exactly at half the size. Runs get it in float32, so
    that `model.dtype: auto` and the dtype of exports are the same on every CPU.
    """
    shipped = Path(__file__).parent / "bases" / name
    return _cached(f"{name}-v{BASES_VERSION}", lambda out: _widen(shipped, out))


def _widen(base: Path, out: Path) -> None:
    import torch  # slow to import, and making data does without it

    from codyra_llm.models.saved import copy_model

    copy_model(base, out, lambda name, weight: weight, torch.float32)


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
