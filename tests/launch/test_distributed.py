"""Two processes on this machine equal one, as DDP and under ZeRO; faults end both; each launcher once."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import run_stopped
import torch
import yaml
from forked import Ended, set_by_accelerate, zero
from helpers import TESTS
from launches import (
    METHODS,
    SHIPPED,
    assert_same_run,
    free_port,
    refused,
    rows,
)
from run_weighed import weighed
from safetensors.torch import load_file

from codyra_llm.cli import main
from codyra_llm.config.recipe import load_recipe
from codyra_llm.core.errors import Fault
from codyra_llm.core.files import await_file
from codyra_llm.data.batches import Batch, micro_batches
from codyra_llm.experiment import run as runs
from codyra_llm.experiment.setup import prepare
from codyra_llm.lora.layer import sites
from codyra_llm.lora.proximal import ProximalAdamW
from codyra_llm.methods.sequential.seqlora import SeqLora
from codyra_llm.runtime import launch, signals
from codyra_llm.runtime.launch import accelerator
from codyra_llm.train.engine import Engine


@pytest.fixture(scope="module")
def one_process(recipe_files, tmp_path_factory):
    """The runs that two processes must equal."""
    out = tmp_path_factory.mktemp("one")
    return {
        method: runs.run(load_recipe(recipe_files / f"{method}.yaml", [f"output={out / method}"])).path
        for method in METHODS
    }


def test_the_oracle_prunes_and_moves(one_process, recipe_files):
    """What the other tests compare with is not an idle run: some ranks are gone, some are left, B has moved,
    and two processes do not get the same number of micro-batches."""
    setup = prepare(load_recipe(recipe_files / "codyra.yaml", []))
    lengths = [len(e) for e in setup.encoder.encode(setup.stream.records(1, "train"))][:7]
    shares = micro_batches(lengths, 2, setup.recipe.optim.micro_batch_tokens)
    assert sum(not chosen for chosen in shares[1]) == 1 and all(shares[0])
    for name in ("00-ONE", "01-THREE"):
        tensors = load_file(one_process["codyra"] / "updates" / f"{name}.safetensors")
        kept = [len(t) for key, t in tensors.items() if key.endswith(".a")]
        assert 0 < sum(kept) < 5 * len(kept)
        assert all(t.abs().max() > 1e-3 for key, t in tensors.items() if key.endswith(".b") and t.numel())


def test_what_the_loop_sets_is_what_the_optimizer_reads():
    """Accelerate replaces the optimizer's group dictionaries when it prepares it, and so does
    load_state_dict.
    """
    model = torch.nn.Module()
    model.model = torch.nn.Linear(2, 2, bias=False)
    group = {"params": [model.model.weight], "lr": 1.0, "kappa": 0.0, "operator": "soft"}
    optimizer = ProximalAdamW([group], weight_decay=0.0)
    engine = Engine(accelerator(), model, optimizer, 1.0)
    optimizer.load_state_dict(optimizer.state_dict())
    with torch.no_grad():
        model.model.weight.copy_(torch.tensor([[1.0, -0.2], [0.05, 0.5]]))
    engine.groups[0].update(lr=0.0, kappa=0.1)
    model.model.weight.grad = torch.ones(2, 2)
    engine.step()
    torch.testing.assert_close(model.model.weight.detach(), torch.tensor([[0.9, -0.1], [0.0, 0.4]]))
    engine.free()


@pytest.mark.distributed
@pytest.mark.parametrize("method", ["codyra", "gem"])
def test_ddp(method, one_process, recipe_files, tmp_path, forked):
    """Processes that get ranks and nothing else, as by torchrun and by DeepSpeed's launcher."""
    done = forked.command("run", recipe_files / f"{method}.yaml", f"output={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert (
        "2 processes on 1 machine (DDP) agree; 7 examples per optimizer step over all, up to 60 tokens"
        in done.stdout
    )
    assert_same_run(one_process[method], tmp_path / "run", 0)


@pytest.mark.distributed
def test_processes_begin_with_the_first_ones_factors(one_process, recipe_files, tmp_path, forked):
    """Where a method computes them, as from a singular value decomposition or a backward pass on a GPU, they
    may come out otherwise on another process, by a sign or by far more than rounding."""

    def work(rank: int) -> int | None:
        begin = SeqLora.begin_task

        def otherwise(method, model, task):
            begin(method, model, task)
            for layer in sites(model).values():
                layer.lora_A.data.neg_()

        if rank:
            SeqLora.begin_task = otherwise
        return main(["run", str(recipe_files / "seqlora.yaml"), f"output={tmp_path / 'run'}"])

    done = forked.ranks(work)
    assert done.returncode == 0, done.stderr
    assert_same_run(one_process["seqlora"], tmp_path / "run", 0)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("config", "method"),
    [("zero1", "seqlora"), ("zero2", "codyra"), ("zero2", "ewc"), ("zero3_offload", "codyra")],
)
def test_zero(config, method, one_process, recipe_files, tmp_path, forked):
    words = ["run", recipe_files / f"{method}.yaml", f"output={tmp_path / 'run'}"]
    done = forked.command(*words, environment=zero(config))
    assert done.returncode == 0, done.stderr
    assert "built successfully" not in done.stdout  # nothing was compiled
    assert_same_run(one_process[method], tmp_path / "run", int(config[4]))


@pytest.mark.distributed
def test_deepspeeds_own_launcher(one_process, recipe_files, tmp_path, forked):
    """It says ranks and nothing else, so the recipe's command names a DeepSpeed file. With one host it starts
    the processes here, whatever its name; only its checks would use ssh."""
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    done = forked.module(
        "deepspeed.launcher.runner",
        "--hostfile",
        tmp_path / "hosts",
        "--no_ssh_check",
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        free_port(),
        recipe_files / "codyra.yaml",
        "--deepspeed_config",
        tmp_path / "zero.json",
        f"output={tmp_path / 'run'}",
    ).wait()
    assert done.returncode == 0, done.stderr
    assert_same_run(one_process["codyra"], tmp_path / "run", 2)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{}", "zero_optimization.stage of .* is None, expected 1, 2 or 3"),
        ("[1]", "holds a list"),
        ("{", "invalid JSON"),
        ('{"zero_optimization": {"stage": 0}}', "is 0, expected 1, 2 or 3"),
        (None, "can't be read"),
        ('{"zero_optimization": {"stage": 2}}', "needs a launcher"),
    ],
)
def test_a_deepspeed_file_that_asks_for_nothing_is_refused(text, told, tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    if told != "needs a launcher":
        monkeypatch.setenv("RANK", "0")
    if text:
        (tmp_path / "zero.json").write_text(text)
    with pytest.raises(Fault, match=told):
        launch.ask_deepspeed(tmp_path / "zero.json")
    assert "ACCELERATE_DEEPSPEED_CONFIG_FILE" not in os.environ


@pytest.mark.distributed
def test_zero_3_with_every_parameter_in_shards(one_process, recipe_files, tmp_path, forked):
    """The shipped config would keep parameters as small as these whole; a DeepSpeed file of the user's says
    otherwise, and its request for bfloat16 is not followed. Checkpointing gathers the shards a second time.
    No task leaves its model in memory, which DeepSpeed would."""
    config = yaml.safe_load((SHIPPED / "accelerate" / "zero3.yaml").read_text())
    (tmp_path / "deepspeed.json").write_text(
        json.dumps(
            {
                "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
                "bf16": {"enabled": True},
                "train_batch_size": "auto",
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_accumulation_steps": "auto",
            }
        )
    )
    config["deepspeed_config"] = {
        "deepspeed_config_file": str(tmp_path / "deepspeed.json"),
        "zero3_init_flag": False,
    }
    (tmp_path / "zero3.yaml").write_text(yaml.safe_dump(config))
    words = ["run", recipe_files / "codyra.yaml", f"output={tmp_path / 'run'}"]
    words = [*map(str, words), "model.gradient_checkpointing=true"]
    done = forked.ranks(lambda rank: weighed(words), set_by_accelerate(tmp_path / "zero3.yaml"))
    assert done.returncode == 0, done.stderr
    assert_same_run(one_process["codyra"], tmp_path / "run", 3)
    left = {
        (int(task), int(size))
        for task, size in re.findall(r"after task (\d): (\d+) bytes of tensors", done.stdout)
    }
    assert {task for task, _ in left} == {0, 1} and max(
        size for _, size in left
    ) < 1000  # 130,000 a task, else


@pytest.mark.distributed
def test_a_fault_of_the_first_process_ends_both(recipe_files, tmp_path, forked):
    """Only the first process opens the run folder; the second must not wait for it."""
    (tmp_path / "thesis.tex").write_text("x")
    began = time.monotonic()
    done = forked.command("run", recipe_files / "codyra.yaml", f"output={tmp_path}")
    refused(done, "holds files of something else")
    assert all(done.codes)
    assert time.monotonic() - began < 60
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.distributed
def test_a_loss_that_is_not_finite_ends_both(recipe_files, tmp_path, forked):
    words = [recipe_files / "seqlora.yaml", f"output={tmp_path / 'run'}", "optim.lr=1e30"]
    done = forked.command("run", *words)
    refused(done, "task ONE, step 2: the loss is nan")
    assert all(done.codes)
    assert not (tmp_path / "run" / "updates").exists()


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [None, "zero2", "zero3"])
def test_a_gradient_that_is_not_finite_ends_both(stage, recipe_files, tmp_path, forked):
    """DeepSpeed calls any such norm infinite, and would go on without the step."""
    plain = Batch.cross_entropy

    def with_a_root_at_zero(batch, model):
        loss = plain(batch, model)
        return loss + (loss - loss.detach()).abs().sqrt()  # 0, and its derivative is none

    def work(rank: int) -> None:
        Batch.cross_entropy = with_a_root_at_zero
        main(["run", str(recipe_files / "seqlora.yaml"), f"output={tmp_path / 'run'}"])

    done = forked.ranks(work, zero(stage) if stage else None)
    refused(done, "task ONE, step 1: the loss is ")
    norm = "inf" if stage else "nan"
    assert f"and the norm of its gradients {norm}" in done.stderr and all(done.codes)
    assert not (tmp_path / "run" / "updates").exists()


@pytest.mark.parametrize(
    "settings",
    [["method.selection=random", "method.keep=0.5"], ["method=seqlora", "method.carry_optimizer=true"]],
)
def test_what_zero_can_not_do_is_refused(settings, recipe_files, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "zero_stage", lambda acc: 2)
    monkeypatch.setattr("codyra_llm.models.loading.load", lambda *a, **k: pytest.fail("weights were loaded"))
    with pytest.raises(Fault, match="DeepSpeed"):
        runs.run(load_recipe(recipe_files / "codyra.yaml", [f"output={tmp_path / 'run'}", *settings]))
    assert not (tmp_path / "run").exists()


def test_a_file_that_another_node_can_not_see(tmp_path):
    with pytest.raises(Fault, match="all nodes share"):
        await_file(tmp_path / "nowhere" / "x", seconds=0)
    (tmp_path / "x").touch()
    await_file(tmp_path / "x", seconds=0)


def test_a_process_of_a_group_ends_at_once():
    """With what it printed, its exit code, and without the interpreter's own end; alone it goes on. Each code
    in a fork of a process that has imported torch."""
    script = """
import atexit, os, torch
from codyra_llm.runtime.launch import leave
for code in (0, 2):
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    atexit.register(print, "finalised")
    leave(code)
    print("alone")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    leave(code)
    print("left")
    break
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "alone\n0\nalone\n2\n"), done.stderr


def interrupted(forked, launcher: str, *words: str | Path) -> Ended:
    """`run_stopped.py` under DDP, in one process, or under a shipped accelerate config."""

    def work(rank: int) -> None:
        run_stopped.run([str(word) for word in words])

    if launcher == "one":
        return forked.alone(work).wait()
    return forked.ranks(work, environment=environment(launcher))


def environment(launcher: str) -> dict[str, str]:
    return {} if launcher == "ddp" else zero(launcher)


@pytest.mark.distributed
def test_a_run_goes_on_under_another_launch(one_process, recipe_files, tmp_path, forked):
    """Only the first process is asked to stop; all agree on the step. What it left is of no number of
    processes.
    """
    command = ["run", recipe_files / "codyra.yaml", f"output={tmp_path / 'run'}"]
    for launcher, task, step in (("one", "ONE", 2), ("zero2", "THREE", 2), ("zero3", "THREE", 4)):
        stopped = interrupted(forked, launcher, task, str(step), *command)
        assert set(stopped.codes) == {75}, stopped.stderr
        assert f"stopped (task {task}, step {step + 1} of " in stopped.stderr, stopped.stderr
        [left] = (tmp_path / "run" / "progress").iterdir()
        assert left.name == f"{['ONE', 'THREE'].index(task):02d}-{task}-{step + 1:08d}"
    assert "THREE: going on after step 3" in stopped.stdout and "equal to rounding only" in stopped.stdout
    done = forked.command(*command)
    assert done.returncode == 0, done.stderr
    assert "THREE: going on after step 5" in done.stdout and "equal to rounding only" in done.stdout
    assert_same_run(one_process["codyra"], tmp_path / "run", 0)


@pytest.mark.distributed
@pytest.mark.parametrize("asked", [0, 1])
def test_a_process_stops_within_a_pass_at_whose_end_the_other_waits(
    asked, one_process, recipe_files, tmp_path, forked
):
    """In the Fisher's, after the last step, where nothing agrees on a stop. The first process keeps the store
    where it is the one that is asked, as under DeepSpeed's launcher."""
    command = ["run", recipe_files / "ewc.yaml", f"output={tmp_path / 'run'}"]
    port = str(free_port())

    def work(rank: int) -> None:
        if asked == 0:
            os.environ.update(TORCHELASTIC_USE_AGENT_STORE="False", MASTER_PORT=port)
        if rank == asked:
            run_stopped.ask_within("each")
        main([str(word) for word in command])

    stopped = forked.ranks(work)
    assert stopped.codes == [75, 75], stopped.stderr
    assert stopped.stderr.count("all is saved; run the same command to resume") == 1, stopped.stderr
    assert "mistake of codyra_llm" not in stopped.stderr and "Traceback" not in stopped.stderr
    assert not (tmp_path / "run" / "lease.json").exists()
    done = forked.command(*command)
    assert done.returncode == 0, done.stderr
    assert_same_run(one_process["ewc"], tmp_path / "run", 0)


def begun(process: psutil.Process) -> bool:
    """Whether it has begun to import torch, which comes after the first lines of the command line."""
    return any("libtorch" in file.path for file in process.memory_maps())


@pytest.mark.distributed
def test_no_process_outlives_a_launcher_that_is_killed_before_they_met(recipe_files, tmp_path):
    """The launcher keeps the store that they would meet at."""
    with open(tmp_path / "log", "w") as log:
        launcher = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                "2",
                "-m",
                "codyra_llm",
                "run",
                recipe_files / "codyra.yaml",
                f"output={tmp_path / 'run'}",
            ],
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    while len(started := psutil.Process(launcher.pid).children()) < 2 or not all(map(begun, started)):
        time.sleep(0.1)
    launcher.kill()
    launcher.wait()
    assert not psutil.wait_procs(started, 120)[1]
    assert (tmp_path / "log").read_text().count("the launcher is gone; run the same command to resume") == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.distributed
@pytest.mark.parametrize("launcher", ["torchrun", "zero2"])
def test_a_process_that_is_killed_ends_the_other_with_its_name(
    launcher, one_process, recipe_files, tmp_path, forked
):
    """By itself, and where torchrun has the same in mind."""
    command = ["run", recipe_files / "codyra.yaml", f"output={tmp_path / 'run'}", "save.minutes=1e-9"]
    killing = ["kill", "THREE", "3", *command]
    began = time.monotonic()
    if launcher == "torchrun":
        options = ["--standalone", "--nproc-per-node", "2"]
        words = [*options, TESTS / "run_stopped.py", *killing]
        done = forked.module("torch.distributed.run", *words).wait()
    else:
        done = interrupted(forked, launcher, *killing)
    assert time.monotonic() - began < 120 and done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("error (rank 0): rank 1 on ")]
    assert len(told) == 1 and socket.gethostname() in told[0] and "last seen at task " in told[0], done.stderr
    again = forked.command(*command)
    assert again.returncode == 0 and "THREE: going on after step 2" in again.stdout, again.stderr
    assert_same_run(one_process["codyra"], tmp_path / "run", 0)


@pytest.mark.distributed
@pytest.mark.parametrize("times", [1, 2], ids=["once", "twice"])
def test_ctrl_c_under_torchrun(times, recipe_files, tmp_path, forked):
    """As a terminal sends it, to all that the shell started. Once: the step is done, saved, and what to do is
    said, each in one line. Twice: the step, which would take a minute, is left."""
    run = tmp_path / "run"
    waits = ["wait", "ONE", "2" if times == 2 else "0"]
    words = ["run", recipe_files / "seqlora.yaml", f"output={run}", "data.epochs=50", "eval.zero_shot=false"]
    command = ["--standalone", "--nproc-per-node", "2", TESTS / "run_stopped.py", *waits, *words]
    launcher = forked.module("torch.distributed.run", *command, session=True)
    while not (run / "log.jsonl").is_file() or len(rows(run / "log.jsonl")) < 2:
        time.sleep(0.1)
        assert launcher.running(), launcher.wait()
    os.killpg(launcher.processes[0], signal.SIGINT)
    if times == 2:
        time.sleep(signals.AGAIN + 0.5)
        assert launcher.running()
        os.killpg(launcher.processes[0], signal.SIGINT)
    done = launcher.wait(45)
    assert done.returncode == 1
    told = done.stdout + done.stderr
    assert told.count(signals.MESSAGE) == 1
    assert told.count("all is saved; run the same command to resume") == 2 - times
    saved = len(list((run / "progress").glob("*")))
    assert (saved, (run / "lease.json").is_file()) == ((1, False) if times == 1 else (0, True))
