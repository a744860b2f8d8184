"""Processes that are about to do different things say so before any weights load, all of them, and none
hangs.
"""

import hashlib
import json
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from forked import zero

from codyra_llm.cli import main
from codyra_llm.config.recipe import load_recipe
from codyra_llm.core.errors import Fault
from codyra_llm.experiment import run as runs
from codyra_llm.experiment.run import run
from codyra_llm.models import loading
from codyra_llm.runtime import launch
from codyra_llm.store import lock


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


@pytest.mark.distributed
@pytest.mark.parametrize("place", ["prepare", "fingerprint"])
def test_a_process_that_fails_before_it_is_compared_is_named(place, sections, tmp_path, monkeypatch, forked):
    """On another machine, by a mistake that is not a Fault: nothing that waits for it may wait on."""
    monkeypatch.setattr(loading, "load", lambda *arguments: sys.exit("weights were loaded"))
    (tmp_path / "recipe.yaml").write_text(json.dumps(sections), encoding="utf-8")

    def fail(*arguments, **settings):
        time.sleep(3)  # the other waits already
        raise RuntimeError("of the second process")

    def work(rank: int) -> None:
        os.environ["LOCAL_RANK"] = "0"
        if rank:
            setattr(runs, place, fail)
        else:
            signal.signal(signal.SIGALRM, lambda number, frame: os._exit(99))
            signal.alarm(60)
        main(["run", str(tmp_path / "recipe.yaml")])

    done = forked.ranks(work)
    assert done.codes == [76, 1], done.stderr
    assert "error (rank 0): rank 1 on " in done.stderr
    assert done.stderr.count("RuntimeError: of the second process") == done.stderr.count("Traceback") == 1, (
        done.stderr
    )


@pytest.mark.distributed
def test_weights_that_one_machine_can_not_read_end_all(sections, tmp_path, forked):
    (tmp_path / "recipe.yaml").write_text(json.dumps(sections), encoding="utf-8")

    def unreadable(base: Path) -> str:
        raise Fault("model.path: no weights on this machine")

    def work(rank: int) -> None:
        os.environ["LOCAL_RANK"] = "0"
        if rank:
            runs.fingerprint = unreadable
        main(["run", str(tmp_path / "recipe.yaml")])

    done = forked.ranks(work)
    assert done.codes == [2, 2], done.stderr
    assert done.stderr == "error: model.path: no weights on this machine\n"


@pytest.mark.distributed
@pytest.mark.parametrize("command", ["run", "evaluate"])
def test_a_folder_that_each_machine_has_for_itself_ends_both(
    command, sections, tmp_path, monkeypatch, forked
):
    """Also where both have one of an earlier run: the second would go on from what is in its own."""
    if command == "run":
        words = ["run", str(tmp_path / "recipe.yaml"), "output=out"]
    else:
        words = ["evaluate", sections["model"]["path"], "--data", sections["data"]["root"]]
        words += ["--tasks", "ONE", "--out", "out"]
    (tmp_path / "recipe.yaml").write_text(json.dumps(sections | {"optim": {"lr": 1e-3}}), encoding="utf-8")
    for rank in range(2):
        (tmp_path / f"machine {rank}").mkdir()

    def work(rank: int) -> None:
        os.chdir(tmp_path / f"machine {rank}")
        lock.SEEN = 2.0
        main(words)

    assert forked.alone(lambda rank: work(1)).wait().returncode == 0
    done = forked.ranks(work)
    assert done.codes == [2, 2], done.stderr
    assert done.stderr.count("on a file system that all nodes share") == 1, done.stderr
    assert not (tmp_path / "machine 0" / "out" / "updates").exists()


@pytest.mark.distributed
def test_updates_that_one_machine_sees_late(sections, tmp_path, forked):
    """Network file systems cache what is in a folder; a run that resumes on them waits."""
    short = {**sections, "data": {**sections["data"], "tasks": ["ONE"]}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(short), encoding="utf-8")
    one = forked.alone(lambda rank: main(["run", str(tmp_path / "recipe.yaml")]))
    assert one.wait().returncode == 0
    (tmp_path / "recipe.yaml").write_text(json.dumps(sections), encoding="utf-8")

    def work(rank: int) -> None:
        looks, plain = [], Path.glob

        def glob(folder: Path, pattern: str):
            if folder.name != "updates" or not rank:
                return plain(folder, pattern)
            looks.append(pattern)
            return plain(folder, pattern) if len(looks) > 2 else []

        Path.glob = glob
        main(["run", str(tmp_path / "recipe.yaml")])
        assert rank == 0 or len(looks) > 2

    done = forked.ranks(work)
    assert done.codes == [0, 0], done.stderr


@pytest.mark.distributed
def test_two_machines_do_not_convert_into_one_folder_at_once(tmp_path, forked):
    """Home folders are often shared, and with them the cache of converted models."""

    def work(rank: int) -> None:
        os.environ["LOCAL_RANK"] = str(rank % 2)  # two processes on each of two machines
        launch.accelerator()

        def convert() -> int:
            with open(tmp_path / "times", "a", encoding="utf-8") as file:
                file.write(f"{rank} begins\n")
                file.flush()
                time.sleep(0.5)
                file.write(f"{rank} ends\n")
            return rank

        assert launch.by_machine(convert) == rank

    done = forked.ranks(work, processes=4)
    assert done.codes == [0] * 4, done.stderr
    lines = (tmp_path / "times").read_text(encoding="utf-8").splitlines()
    assert lines[:4] == ["0 begins", "0 ends", "2 begins", "2 ends"]
    assert sorted(lines[4:6]) == ["1 begins", "3 begins"]  # the others at the same time


@pytest.mark.distributed
@pytest.mark.parametrize("first", [None, {"reduce_bucket_size": 1000}])
def test_machines_with_different_engines_end_both(first, sections, tmp_path, monkeypatch, forked):
    """As where ACCELERATE_CONFIG is forgotten on one of them, or names another file."""
    monkeypatch.setattr(loading, "load", lambda *arguments: sys.exit("weights were loaded"))
    (tmp_path / "recipe.yaml").write_text(json.dumps(sections), encoding="utf-8")
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 2, **(first or {})}}))
    (tmp_path / "zero_2.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    zero("zero2")  # imports DeepSpeed here

    def work(rank: int) -> None:
        file = tmp_path / ("zero_2.json" if rank else "zero.json")
        words = ["--deepspeed_config", str(file)] if rank or first else []
        main(["run", str(tmp_path / "recipe.yaml"), *words])

    done = forked.ranks(work)
    assert done.codes == [2, 2], done.stderr
    setting, was, now = "engine", "DDP", "ZeRO stage 2"
    if first:
        setting, was, now = "zero_optimization.reduce_bucket_size", 1000, "not set"
    host = socket.gethostname()
    told = f"launch {setting} differs between processes: {was} on {host} (rank 0), {now} on {host} (rank 1);"
    assert done.stderr.count("error: ") == done.stderr.count(told) == 1, done.stderr
