"""Every method trains on a device that is not there: no devices are mixed, the host waits as seldom as it
may, and nothing of a model outlives its task.
"""

import json
import subprocess
import sys
from itertools import chain
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
    why: str = ""


# One wait of a step reads its losses and the norm of its gradients, for the log and to stop at a loss that is
# not finite. A method that needs more says so here.
ONE = Budget(1)
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
}
BUDGETS: dict[str, Budget] = {
    "gem": Budget(2, why="a quadratic program is solved on the host, from one tensor"),
    "treelora": Budget(2, why="a bandit on the host reads the distances"),
    "treelora_repo": Budget(3, why="two groups of sites, each with a drawn task that is read"),
    "sdft": Budget(
        2,
        13,
        "prompts go to the device, transformers asks at each of three drawn tokens whether there are pads, "
        "and each token is read to see whether it ends its answer",
    ),
    "codyra": Budget(85, why="once a task pruning reads 3 factors of 14 adapters and writes them back"),
}


def test_every_method(tiny_llama, toy_stream, tmp_path):
    """All of them in one call, since its imports take longer than a method's steps."""
    command = [sys.executable, SCRIPT, tiny_llama, toy_stream, tmp_path, *TRAINED]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"method"')]
    assert [row["method"] for row in rows] == TRAINED
    faults = [f"{row['method']}: {row['fault']}" for row in rows if row["fault"]]
    assert not faults, "\n".join(faults)
    for row in rows:
        if row["replays"]:  # rows in bfloat16 with and without pads
            assert row["trained"] == [pytest.approx(step, rel=0.02) for step in row["unrecorded"]], row
    assert {row["method"] for row in rows if row["replays"]} == set(TRAINED) - UNRECORDED
    off = list(chain.from_iterable(off_budget(row) for row in rows))
    assert not off, "\n".join(off)


def off_budget(row: dict) -> list[str]:
    """What is wrong with the waits of a method's steps, one sentence each."""
    name, steps = row["method"], row["steps"]
    allowed = BUDGETS.get(name, ONE)
    if len(steps) < 1 or max(step["micro_batches"] for step in steps) < 2:
        return [f"{name}: no step of two micro-batches was counted"]
    found = [sum(step["waits"].values()) - allowed.micro_batch * step["micro_batches"] for step in steps]
    if max(found) == allowed.step:
        return []
    return [f"{name}: {max(found)} waits of a step, not {allowed.step} as the table says: {steps}"]
