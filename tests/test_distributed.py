"""Two processes on this machine equal one: DDP under torchrun, DeepSpeed under accelerate launch; faults end
both.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

import codyra_llm.recipes
from codyra_llm.config.recipe import load_recipe
from codyra_llm.core.errors import Fault
from codyra_llm.core.files import await_file
from codyra_llm.data.batches import micro_batches
from codyra_llm.experiment import run as runs
from codyra_llm.experiment.setup import prepare
from codyra_llm.lora.proximal import ProximalAdamW
from codyra_llm.runtime import launch
from codyra_llm.runtime.launch import accelerator
from codyra_llm.train.engine import Engine

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


@pytest.fixture(scope="module")
def recipe_files(tiny_llama, toy_stream, tmp_path_factory):
    """Recipe files by method, each a program as well."""
    folder = tmp_path_factory.mktemp("recipes")
    for method in METHODS:
        text = PROGRAM.format(yaml.safe_dump(sections(tiny_llama, toy_stream, method)))
        (folder / f"{method}.yaml").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def one_process(recipe_files, tmp_path_factory):
    """The runs that two processes must equal."""
    out = tmp_path_factory.mktemp("one")
    return {
        method: runs.run(load_recipe(recipe_files / f"{method}.yaml", [f"output={out / method}"])).path
        for method in METHODS
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launched(*command: str | Path, timeout: float = 240) -> subprocess.CompletedProcess:
    """A launcher's module and arguments, started as a user would, without what this process has set for
    itself.
    """
    clean = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("ACCELERATE_", "DS_"))
        and k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    }
    return subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**clean, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


def torchrun(recipe: Path, *overrides: str) -> subprocess.CompletedProcess:
    return launched(
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
        "-m",
        "codyra_llm",
        "run",
        recipe,
        *overrides,
    )


def accelerate(config: Path, recipe: Path, *overrides: str) -> subprocess.CompletedProcess:
    return launched(
        "accelerate.commands.launch",
        "--config_file",
        config,
        "--main_process_port",
        str(free_port()),
        recipe,
        *overrides,
    )


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


def test_the_oracle_prunes_and_moves(one_process, recipe_files):
    """What the other tests compare with is no idle run: some ranks are gone, some are left, B has moved, and
    two processes do not get the same number of micro-batches."""
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
def test_ddp(method, one_process, recipe_files, tmp_path):
    done = torchrun(recipe_files / f"{method}.yaml", f"output={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert (
        "2 processes on 1 machine (DDP) agree; 7 examples per optimizer step over all, up to 60 tokens"
        in done.stdout
    )
    assert_same_run(one_process[method], tmp_path / "run", 0)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("config", "method"),
    [("zero1", "seqlora"), ("zero2", "codyra"), ("zero2", "ewc"), ("zero3_offload", "codyra")],
)
def test_zero(config, method, one_process, recipe_files, tmp_path):
    done = accelerate(
        SHIPPED / "accelerate" / f"{config}.yaml",
        recipe_files / f"{method}.yaml",
        f"output={tmp_path / 'run'}",
    )
    assert done.returncode == 0, done.stderr
    assert "built successfully" not in done.stdout  # nothing was compiled
    assert_same_run(one_process[method], tmp_path / "run", int(config[4]))


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [0, 2])
def test_deepspeeds_own_launcher(stage, one_process, recipe_files, tmp_path):
    """It says ranks and nothing else, so that a recipe runs as DDP where no DeepSpeed file is named. With one
    host it starts the processes here, whatever its name; only its checks would use ssh."""
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    asked = ["--deepspeed_config", tmp_path / "zero.json"] if stage else []
    done = launched(
        "deepspeed.launcher.runner",
        "--hostfile",
        tmp_path / "hosts",
        "--no_ssh_check",
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        free_port(),
        recipe_files / "codyra.yaml",
        *asked,
        f"output={tmp_path / 'run'}",
    )
    assert done.returncode == 0, done.stderr
    assert_same_run(one_process["codyra"], tmp_path / "run", stage)


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
def test_zero_3_with_every_parameter_in_shards(one_process, recipe_files, tmp_path):
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
    done = accelerate(
        tmp_path / "zero3.yaml",
        Path(__file__).with_name("run_weighed.py"),
        "run",
        recipe_files / "codyra.yaml",
        f"output={tmp_path / 'run'}",
        "model.gradient_checkpointing=true",
    )
    assert done.returncode == 0, done.stderr
    assert_same_run(one_process["codyra"], tmp_path / "run", 3)
    left = {
        (int(task), int(size))
        for task, size in re.findall(r"behind task (\d): (\d+) bytes of tensors", done.stdout)
    }
    assert {task for task, _ in left} == {0, 1} and max(
        size for _, size in left
    ) < 1000  # 130,000 a task, else


def refused(done: subprocess.CompletedProcess, *sentences: str) -> None:
    """Each sentence once, no traceback of ours, and the launcher says that it failed."""
    assert done.returncode != 0
    for sentence in sentences:
        assert done.stderr.count(sentence) == 1, done.stderr
    assert "codyra_llm/" not in done.stderr and "[rank" not in done.stderr, done.stderr


@pytest.mark.distributed
def test_a_fault_of_the_first_process_ends_both(recipe_files, tmp_path):
    """Only the first process opens the run folder; the second must not wait for it."""
    (tmp_path / "thesis.tex").write_text("x")
    began = time.monotonic()
    refused(torchrun(recipe_files / "codyra.yaml", f"output={tmp_path}"), "holds files of something else")
    assert time.monotonic() - began < 60
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.distributed
def test_a_loss_that_is_not_finite_ends_both(recipe_files, tmp_path):
    done = torchrun(recipe_files / "seqlora.yaml", f"output={tmp_path / 'run'}", "optim.lr=1e30")
    refused(done, "task ONE, step 2: the loss is nan")
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


@pytest.mark.parametrize("code", [0, 2])
def test_a_process_of_a_group_ends_at_once(code, tmp_path):
    """With what it printed, its exit code, and without the interpreter's own end; alone it goes on."""
    script = (
        "import atexit, torch; from codyra_llm.distributed import leave; atexit.register(print, "
        f"'finalised')\nleave({code}); print('alone')\ntorch.distributed.init_process_group('gloo', "
        f"store=torch.distributed.HashStore(), rank=0, world_size=1)\nleave({code}); print('left')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (code, "alone\n"), done.stderr


def interrupted(launcher: str, *arguments: str | Path) -> subprocess.CompletedProcess:
    """`run_stopped.py` under DDP, in one process, or under a shipped accelerate config."""
    program = Path(__file__).with_name("run_stopped.py")
    if launcher == "one":
        return subprocess.run(
            [sys.executable, program, *map(str, arguments)], capture_output=True, text=True, timeout=240
        )
    if launcher == "ddp":
        return launched("torch.distributed.run", "--standalone", "--nproc-per-node", "2", program, *arguments)
    return launched(
        "accelerate.commands.launch",
        "--config_file",
        SHIPPED / "accelerate" / f"{launcher}.yaml",
        "--main_process_port",
        str(free_port()),
        program,
        *arguments,
    )


@pytest.mark.distributed
@pytest.mark.parametrize(("first", "then"), [("one", "zero2"), ("zero3", "ddp"), ("zero1", "zero3")])
def test_a_run_goes_on_under_another_launch(first, then, one_process, recipe_files, tmp_path):
    """Only the first process is asked to stop; all agree on the step. What it left is of no number of
    processes.
    """
    command = ["run", recipe_files / "codyra.yaml", f"output={tmp_path / 'run'}"]
    stopped = interrupted(first, "THREE", 2, *command)
    assert stopped.returncode != 0 and "stopped (task THREE, step 3 of " in stopped.stderr, stopped.stderr
    assert [path.name for path in (tmp_path / "run" / "progress").iterdir()] == ["01-THREE-00000003"]
    done = (
        torchrun(*command[1:])
        if then == "ddp"
        else accelerate(SHIPPED / "accelerate" / f"{then}.yaml", *command[1:])
    )
    assert done.returncode == 0, done.stderr
    assert "THREE: going on behind step 3" in done.stdout and "equal to rounding only" in done.stdout
    assert_same_run(
        one_process["codyra"], tmp_path / "run", int(then.removeprefix("zero")) if then != "ddp" else 0
    )


def begun(process: psutil.Process) -> bool:
    """Whether it has begun to import torch, behind the first lines of the command line."""
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
    assert (tmp_path / "log").read_text().count("the launcher is gone; the same command goes on") == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.distributed
@pytest.mark.parametrize("launcher", ["ddp", "zero2"])
def test_a_process_that_is_killed_ends_the_other_with_its_name(launcher, one_process, recipe_files, tmp_path):
    command = ["run", recipe_files / "codyra.yaml", f"output={tmp_path / 'run'}", "save.minutes=1e-9"]
    began = time.monotonic()
    done = interrupted(launcher, "kill", "THREE", 3, *command)
    assert time.monotonic() - began < 120 and done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("error (rank 0): rank 1 on ")]
    assert len(told) == 1 and socket.gethostname() in told[0] and "last seen at task " in told[0], done.stderr
    again = torchrun(*command[1:])
    assert again.returncode == 0 and "THREE: going on behind step 2" in again.stdout, again.stderr
    assert_same_run(one_process["codyra"], tmp_path / "run", 0)
