"""Processes that are about to do different things say so before any weights load, all of them, and none
hangs.
"""

import hashlib
import json
import shutil
import socket
import sys
from pathlib import Path

import pytest

from codyra_llm.cli import main
from codyra_llm.config.recipe import load_recipe
from codyra_llm.core.errors import Fault
from codyra_llm.experiment.run import run
from codyra_llm.models import loading


@pytest.fixture
def sections(tiny_llama, toy_stream, tmp_path) -> dict:
    return {
        "model": {"path": str(tiny_llama)},
        "data": {"root": str(toy_stream), "tasks": ["ONE", "TWO"], "epochs": 1},
        "method": "seqlora",
        "optim": {"lr": 1e-2, "batch_size": 7, "micro_batch_tokens": 60},
        "output": str(tmp_path / "run"),
    }


@pytest.fixture
def other_data(toy_stream, tmp_path) -> Path:
    """The same stream in another folder, one training file with one letter changed."""
    root = shutil.copytree(toy_stream, tmp_path / "other")
    file = root / "TWO" / "train.json"
    file.write_text(file.read_text(encoding="utf-8").replace("next", "nexT", 1), encoding="utf-8")
    return root


@pytest.mark.distributed
def test_a_second_process_that_differs_ends_both(sections, other_data, tmp_path, monkeypatch, forked):
    monkeypatch.setattr(loading, "load", lambda *arguments: sys.exit("weights were loaded"))
    (tmp_path / "recipe.yaml").write_text(json.dumps(sections), encoding="utf-8")

    def work(rank: int) -> None:
        socket.gethostname = lambda: f"node{rank + 1}"
        others = [f"data.root={other_data}", "seed=5"] if rank else []
        with pytest.raises(Fault) as caught:
            run(load_recipe(tmp_path / "recipe.yaml", others))
        (tmp_path / f"fault {rank}").write_text(str(caught.value), encoding="utf-8")
        main(["run", str(tmp_path / "recipe.yaml"), *others])

    done = forked.ranks(work)
    assert done.codes == [2, 2], done.stderr
    told = [(tmp_path / f"fault {rank}").read_text(encoding="utf-8") for rank in range(2)]
    assert told[0] == told[1]
    lines = told[0].splitlines()
    assert len(lines) == 2
    seeds = "recipe seed differs between processes: 1234 on node1 (rank 0), 5 on node2 (rank 1); start every"
    assert lines[0].startswith(seeds)
    assert done.stderr.count(f"error: {seeds}") == done.stderr.count(seeds) == 1, done.stderr
    digests = [
        hashlib.sha256((root / "TWO" / "train.json").read_bytes()).hexdigest()[:16]
        for root in (Path(sections["data"]["root"]), other_data)
    ]
    assert (
        f"data TWO/train.json differs between processes: {digests[0]} on node1 (rank 0), {digests[1]}"
        in lines[1]
    )
    assert not (tmp_path / "run").exists()
