"""Configs of Accelerate and DeepSpeed that users already have: what can be followed is, and what can't is
refused in a sentence before any weights load."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands import launch as accelerate_launch
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from forked import set_by_accelerate
from launches import SHIPPED, assert_same_run

from codyra_llm.cli import main
from codyra_llm.config.recipe import load_recipe
from codyra_llm.core.errors import Fault
from codyra_llm.experiment.run import run
from codyra_llm.models import loading
from codyra_llm.runtime import launchers


def with_file(folder: Path, deepspeed: dict) -> dict[str, str]:
    """What `accelerate launch` sets for a config that names a DeepSpeed file with this content."""
    config = yaml.safe_load((SHIPPED / "accelerate" / "zero2.yaml").read_text())
    (folder / "deepspeed.json").write_text(json.dumps(deepspeed))
    config["deepspeed_config"] = {"deepspeed_config_file": str(folder / "deepspeed.json")}
    (folder / "accelerate.yaml").write_text(yaml.safe_dump(config))
    return set_by_accelerate(folder / "accelerate.yaml")


@pytest.fixture
def unloaded(monkeypatch):
    """Fails where weights are loaded."""
    monkeypatch.setattr(loading, "load", lambda *a, **k: pytest.fail("weights were loaded"))


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("ACCELERATE_USE_FSDP", "true", "FSDP"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "parallelism_config"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "dynamo_backend"),
        ("SLURM_STEP_NUM_TASKS", "8", "unset SLURM_STEP_NUM_TASKS"),
        ("OMPI_COMM_WORLD_SIZE", "2", "unset OMPI_COMM_WORLD_SIZE"),
        ("PMI_SIZE", "2", "unset PMI_SIZE"),
        ("WORLD_SIZE", "2", "RANK, LOCAL_RANK"),
    ],
)
def test_what_can_not_be_followed_is_refused(
    name, value, told, recipe_files, tmp_path, monkeypatch, unloaded
):
    monkeypatch.setenv(name, value)
    with pytest.raises(Fault, match=told) as caught:
        run(load_recipe(recipe_files / "seqlora.yaml", [f"output={tmp_path / 'run'}"]))
    assert name in str(caught.value) and len(caught.value.messages) == 1
    assert not (tmp_path / "run").exists()


def test_a_gpu_that_a_config_does_not_want_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    launchers.check_environment()  # without one it says what is done anyway
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(Fault, match="use_cpu: true on a machine with a GPU"):
        launchers.check_environment()


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_STEP_NUM_TASKS": "1", "PMI_SIZE": "1", "ACCELERATE_DYNAMO_BACKEND": "NO"},
        {"SLURM_STEP_NUM_TASKS": "2", "WORLD_SIZE": "16", "RANK": "9", "LOCAL_RANK": "1"},  # torchrun on two
        {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PTY_PORT": "39999"},  # in `srun --pty bash`
        {"WORLD_SIZE": "1", "ACCELERATE_USE_FSDP": "false"},
    ],
)
def test_what_is_usual_is_not_refused(environment, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    launchers.check_environment()


@pytest.mark.distributed
def test_values_that_deepspeed_files_leave_to_a_trainer(one_process, recipe_files, tmp_path, forked):
    """A file as it is written for transformers' Trainer: DeepSpeed's defaults hold for what is "auto"."""
    auto = {
        "stage": 2,
        "offload_optimizer": {"device": "auto"},
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_gather_16bit_weights_on_model_save": "auto",
    }
    whole = ("gradient_accumulation_steps", "gradient_clipping", "train_batch_size")
    file = {
        "zero_optimization": auto,
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto", "loss_scale": 0},
        "train_micro_batch_size_per_gpu": "auto",
        "zero_allow_untested_optimizer": "auto",
        **dict.fromkeys(whole, "auto"),
    }
    words = ["run", recipe_files / "seqlora.yaml", f"output={tmp_path / 'run'}"]
    done = forked.ranks(lambda rank: main(list(map(str, words))), with_file(tmp_path, file))
    assert done.returncode == 0, done.stderr
    assert_same_run(one_process, tmp_path / "run", 2)


@pytest.fixture(scope="module")
def one_process(recipe_files, tmp_path_factory):
    """The run that two processes must equal."""
    out = tmp_path_factory.mktemp("one")
    return run(load_recipe(recipe_files / "seqlora.yaml", [f"output={out / 'run'}"])).path


@pytest.mark.distributed
def test_what_deepspeed_files_can_not_decide_is_refused(recipe_files, tmp_path, forked):
    """All of it at once, by the first process alone, before any weights load."""
    file = {
        "zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
    }

    def work(rank: int) -> None:
        loading.load = lambda *arguments: pytest.fail("weights were loaded")
        main(["run", str(recipe_files / "seqlora.yaml"), f"output={tmp_path / 'run'}"])

    done = forked.ranks(work, with_file(tmp_path, file))
    assert set(done.codes) == {2}, done.stderr
    for told in (
        "error: the DeepSpeed config has zero_optimization.stage 0, expected 1, 2 or 3",
        "error: zero_optimization.offload_optimizer replaces the optimizer",
        "error: the DeepSpeed config has a section 'optimizer'",
        "error: the DeepSpeed config has a section 'scheduler'",
    ):
        assert told in done.stderr
    assert "codyra_llm/" not in done.stderr


def test_a_stage_0_of_an_accelerate_config_is_refused(monkeypatch):
    """It has no file, and would be DeepSpeed without ZeRO."""
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "0")
    with pytest.raises(Fault, match="zero_optimization.stage 0, expected 1, 2 or 3"):
        launchers.check_deepspeed()


@pytest.mark.parametrize(
    ("content", "told"), [("{}", "specify the ZeRO"), ("{", "Expecting property"), (None, "existing")]
)
def test_a_deepspeed_file_that_accelerate_can_not_read(content, told, tmp_path, monkeypatch):
    file = tmp_path / "deepspeed.json"
    if content:
        file.write_text(content)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    with pytest.raises(Fault, match=f"Accelerate refuses the DeepSpeed config.*{told}"):
        launchers.check_deepspeed()


@pytest.mark.parametrize("config", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_a_second_machine_needs_no_ssh(config, monkeypatch):
    """As the comment in each file says how to add one: Accelerate's own choice is pdsh and a hostfile."""
    asked = []
    monkeypatch.setattr(accelerate_launch, "deepspeed_launcher", asked.append)
    file = str(SHIPPED / "accelerate" / f"{config}.yaml")
    words = ["--config_file", file, "--num_machines", "2", "--machine_rank", "1", "--num_processes", "16"]
    words += ["--main_process_ip", "10.0.0.1", "--main_process_port", "29501", "recipe.yaml"]
    accelerate_launch.launch_command(accelerate_launch.launch_command_parser().parse_args(words))
    (found,) = asked
    command, _ = prepare_deepspeed_cmd_env(found)
    assert command is None  # it is torchrun that starts the processes
    assert (found.nnodes, found.node_rank, found.nproc_per_node) == ("2", 1, "8")
    assert found.rdzv_endpoint == "10.0.0.1:29501"
