"""Every method trains on a device that is not there: no devices are mixed, the host waits as seldom as it
may, and nothing of a model outlives its task.
"""

import json
import shutil
import subprocess
import sys
from collections import Counter
from itertools import chain, groupby
from pathlib import Path
from typing import NamedTuple

import pytest
from pretended_hooks import environment
from run_pretended import VARIANTS

from codyra_llm.config.registry import METHODS

SCRIPT = Path(__file__).parents[1] / "run_pretended.py"
TRAINED = [*(name for name, method in METHODS.items() if method.trains), *VARIANTS]


class Budget(NamedTuple):
    """How often the host may wait for the device."""

    step: int  # waits of an optimizer step, whatever its micro-batches
    micro_batch: int = 0  # and for each of these
    once: int = 0  # and in one step of a task
    why: str = ""


# One wait of a step reads its losses and the norm of its gradients, for the log and to stop at a loss that is
# not finite. A method that needs more says so here. The first step of a task also reads all adapters, to see
# that they move, and is left out.
ONE = Budget(1)
# Besides, in any step, for each shape that is recorded: the allocator's memory is given back before the
# device is asked how much is free, and PyTorch does so again, and waits for all that runs, before it records.
RECORDING = {"empty_cache": 2, "synchronize": 1}
# Methods whose micro-batches are never recorded: their loss is their own, or it reads more than the batch.
UNRECORDED = {
    "seqft",
    "ilora",
    "ilora_mixed",
    "lwf",
    "dualprompt",
    "pp",
    "l2p",
    "treelora_repo",
    "hidelora",
    "sapt",
    "duallora",
    "gainlora",
    "clora",
    "sdft",
    # Families that are not recorded.
    "seqlora, gemma2",
    "codyra_drift, gemma2",
    "lwf, gemma2",
    "seqlora, gemma3",
    "l2p, gemma3",
}
BUDGETS: dict[str, Budget] = {
    "gem": Budget(2, why="a quadratic program is solved on the host, from one tensor"),
    "treelora": Budget(2, why="a bandit on the host reads the distances"),
    "treelora_repo": Budget(3, why="two groups of sites, each with a drawn task that is read"),
    "sdft": Budget(
        2,
        13,
        why="prompts go to the device, transformers asks at each of three drawn tokens whether there are "
        "pads, and each token is read to see whether it ends its answer",
    ),
    "codyra": Budget(1, once=84, why="3 factors of 14 adapters are read, aligned and written back"),
    "codyra_drift by ratio": Budget(
        1,
        once=124,
        why="3 factors of 14 adapters are read and written back, 14 shares are read, and 12 tensors of "
        "moments and 14 masks are put on the device",
    ),
}


@pytest.fixture
def models(tiny_llama, tiny_gemma2, tiny_gemma3, tmp_path) -> Path:
    """A folder of models, the Gemmas with a window shorter than the stream's rows."""
    folder = tmp_path / "models"
    for name, model in (("llama", tiny_llama), ("gemma2", tiny_gemma2), ("gemma3", tiny_gemma3)):
        shutil.copytree(model, folder / name)
        file = folder / name / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        if "sliding_window" in config:
            file.write_text(json.dumps(config | {"sliding_window": 4}), encoding="utf-8")
    return folder


def test_every_method(models, toy_stream, tmp_path):
    """All of them in one call, since its imports take longer than a method's steps."""
    command = [sys.executable, SCRIPT, models, toy_stream, tmp_path, *TRAINED]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"method"')]
    assert [row["method"] for row in rows] == TRAINED
    faults = [f"{row['method']}: {row['fault']}" for row in rows if row["fault"]]
    assert not faults, "\n".join(faults)
    for row in rows:
        if row["replays"]:
            assert row["outlived"] and not any(row["outlived"]), row
            # Rows in bfloat16 with and without pads.
            assert row["trained"] == [pytest.approx(step, rel=0.02) for step in row["unrecorded"]], row
    assert {row["method"] for row in rows if row["replays"]} == set(TRAINED) - UNRECORDED
    off = list(chain.from_iterable(off_budget(row) for row in rows))
    assert not off, "\n".join(off)


def off_budget(row: dict) -> list[str]:
    """What is wrong with the waits of a method's steps, one sentence each."""
    name, later = row["method"], [step for step in row["steps"] if step["step"] > 1]
    allowed = BUDGETS.get(name, ONE)
    if max((step["micro_batches"] for step in later), default=0) < 2:
        return [f"{name}: no step of two micro-batches was counted"]
    others = [step for step in row["steps"] if not as_told(step)]
    off = [f"{name}: other waits for recordings than {RECORDING}: {step}" for step in others]
    usual, most = [], []
    for _, steps in groupby(later, lambda step: step["task"]):
        found = sorted(own_waits(step) - allowed.micro_batch * step["micro_batches"] for step in steps)
        most.append(found[-1])
        usual += found[:-1] if allowed.once else found
    if (max(usual, default=0), max(most)) != (allowed.step, allowed.step + allowed.once):
        off.append(f"{name}: {usual} waits of a step and {most} of one in a task, not {allowed}: {later}")
    return off


def as_told(step: dict) -> bool:
    """Whether the waits for recordings are those of the table."""
    waits = by_kind(step)
    return all(waits[kind] == number * step["recordings"] for kind, number in RECORDING.items())


def by_kind(step: dict) -> Counter[str]:
    """How often each thing was asked for."""
    found = Counter()
    for kind, _, number in step["waits"]:
        found[kind] += number
    return found


def own_waits(step: dict) -> int:
    """Waits of a step other than those of its recordings."""
    return sum(number for kind, number in by_kind(step).items() if kind not in RECORDING)
