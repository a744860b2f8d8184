"""What a launcher asks for in the environment and in DeepSpeed's config: checked before any weights load."""

import os

import torch
from accelerate import DeepSpeedPlugin

from codyra_llm.core.errors import Fault

# Ways to train that `accelerate launch` asks for by a variable, and that would be left out without a word.
OTHERS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
# How many processes srun or mpirun has started, which gives none of them the ranks that torch reads.
COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def check_environment() -> None:
    """Raises one Fault with all that the launcher asks for and that can't be followed."""
    faults = [*_other_ways(), *_unconnected()]
    if faults:
        raise Fault(*faults)


def _other_ways() -> list[str]:
    """Ways to train that the accelerate config asks for, and that are not followed here."""
    found = []
    for name, way in OTHERS.items():
        if os.environ.get(name, "").lower() in ("true", "1"):
            found.append(
                f"{name}: the accelerate config asks for {way}, expected one process, DDP or DeepSpeed ZeRO; "
                "take a config of recipes/accelerate (zero3.yaml shards the base too)"
            )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        found.append(
            f"ACCELERATE_DYNAMO_BACKEND: the accelerate config has the dynamo_backend {backend}, expected "
            "no, since models are not compiled; remove dynamo_config from it"
        )
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1") and torch.cuda.is_available():
        found.append(
            "ACCELERATE_USE_CPU: the accelerate config has use_cpu: true on a machine with a GPU, and "
            "it would be used; set CUDA_VISIBLE_DEVICES to nothing as well, or use_cpu to false"
        )
    return found


def _unconnected() -> list[str]:
    """What keeps the processes of this launch from finding each other."""
    if torch.distributed.is_initialized():
        return []
    if "WORLD_SIZE" in os.environ:
        missing = [name for name in ("RANK", "LOCAL_RANK") if name not in os.environ]
        if not missing or os.environ["WORLD_SIZE"] == "1":
            return []
        return [
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, and {', '.join(missing)} not set; set RANK, "
            "LOCAL_RANK, MASTER_ADDR and MASTER_PORT in each process, or start with ./launch.sh or torchrun"
        ]
    started = [name for name in COUNTS if os.environ.get(name, "").isdecimal()]
    several = [name for name in started if int(os.environ[name]) > 1]
    # In an interactive shell of srun the first task alone has the terminal.
    if not several or "SLURM_PTY_PORT" in os.environ:
        return []
    name, *others = several
    return [
        f"{name} is {os.environ[name]}: so many processes were started without the ranks that torch reads "
        "(RANK, WORLD_SIZE), and each would do the whole run; start ./launch.sh or torchrun once per "
        f"machine, or, where each process has a run of its own, unset {' '.join([name, *others])}"
    ]


def check_deepspeed() -> None:
    """Raises one Fault with all that DeepSpeed's config asks for and that can't be followed."""
    try:
        plugin = DeepSpeedPlugin()  # reads the environment, and the file that it names
    except ValueError as error:
        said = " ".join(str(error).split())
        raise Fault(f"Accelerate refuses the DeepSpeed config of this launch: {said}; correct it") from error
    settle_deepspeed(plugin.deepspeed_config)


def settle_deepspeed(config: dict) -> None:
    """Make `config`, DeepSpeed's, one that the recipe decides: its batch sizes, precision, and every "auto".
    Raises one Fault with all that it asks for and that can't be followed."""
    zero = config.get("zero_optimization") or {}
    faults = []
    if zero.get("stage") not in (1, 2, 3):
        faults.append(
            f"the DeepSpeed config has zero_optimization.stage {zero.get('stage')}, expected 1, 2 or 3; set "
            "it, or launch without DeepSpeed to run as DDP"
        )
    if (zero.get("offload_optimizer") or {}).get("device", "none") not in ("none", None):
        faults.append(
            "zero_optimization.offload_optimizer replaces the optimizer by DeepSpeed's own, which knows no "
            "soft threshold; set its device to none (offload_param may stay)"
        )
    for section in ("optimizer", "scheduler"):
        if section in config:
            faults.append(
                f"the DeepSpeed config has a section '{section}', and the recipe's optim section decides on "
                "that; remove it from the config"
            )
    if faults:
        raise Fault(*faults)
    # Batches are cut by tokens here, so to DeepSpeed's engine every micro-batch is a step of its own.
    config.update(
        train_micro_batch_size_per_gpu=1,
        gradient_accumulation_steps=1,
        zero_allow_untested_optimizer=True,
        bf16={"enabled": False},
        fp16={"enabled": False},
    )
    config.pop("train_batch_size", None)
    _drop_auto(config)


def _drop_auto(config: dict) -> None:
    """Remove what is "auto", so that DeepSpeed's own default holds: to Accelerate it means a value that
    depends on the model or on a data loader, and it is given neither."""
    for key, value in list(config.items()):
        if value == "auto":
            del config[key]
        elif isinstance(value, dict):
            _drop_auto(value)
