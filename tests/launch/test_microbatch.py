"""Out of memory halves the micro-batch and changes nothing else; what can't be halved is a Fault; all ranks
agree.
"""

import pytest
import yaml
from launches import PROGRAM, assert_same_run, free_port, launched, refused, sections

from codyra_llm.config.recipe import load_recipe
from codyra_llm.core.files import read_jsonl
from codyra_llm.experiment import run

ON_RANK_1 = """
import os, sys
import torch
from codyra_llm.cli import main
from codyra_llm.data import Batch

plain, calls = Batch.cross_entropy, []

def cross_entropy(self, model):
    loss = plain(self, model)
    if os.environ["RANK"] == "1":
        calls.append(self.ids.numel())
        if {condition}:
            raise torch.OutOfMemoryError("CUDA out of memory.")
    return loss

Batch.cross_entropy = cross_entropy
main(["run", *sys.argv[1:]])
"""


@pytest.fixture
def two_ranks(tiny_llama, toy_stream, tmp_path):
    file = tmp_path / "codyra.yaml"
    file.write_text(
        PROGRAM.format(yaml.safe_dump(sections(tiny_llama, toy_stream, "codyra"))), encoding="utf-8"
    )

    def launch(condition: str):
        (tmp_path / "program.py").write_text(ON_RANK_1.format(condition=condition), encoding="utf-8")
        return launched(
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "--master-port",
            str(free_port()),
            tmp_path / "program.py",
            file,
            f"output={tmp_path / 'two'}",
            timeout=120,
        )

    return file, launch


@pytest.mark.distributed
def test_one_of_two_ranks_runs_out(two_ranks, tmp_path):
    """The second rank, in the midst of its fifth micro-batch; the first has no trouble and does not wait for
    ever.
    """
    file, launch = two_ranks
    one = run.run(load_recipe(file, [f"output={tmp_path / 'one'}"])).path
    done = launch("len(calls) == 5")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("out of memory, going on with optim.micro_batch_tokens at") == 1
    assert_same_run(one, tmp_path / "two", 0)
    tokens = [
        row["micro_batch_tokens"]
        for row in read_jsonl(tmp_path / "two" / "log.jsonl")
        if row["task"] == "ONE"
    ]
    assert tokens[0] == 60 > tokens[-1]


@pytest.mark.distributed
def test_one_of_two_ranks_can_not_go_on(two_ranks, tmp_path):
    refused(two_ranks[1]("True"), "tokens alone does not fit")
    assert not (tmp_path / "two" / "updates").exists()
