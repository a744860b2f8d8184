"""The processes of a launch: their accelerator, and how they agree, wait and end. Only this file and
`engine.py` use DeepSpeed.
"""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs, PartialState
from accelerate.utils import broadcast_object_list, gather_object
from transformers.integrations import unset_hf_deepspeed_config

from codyra_llm.core.errors import Fault
from codyra_llm.core.parsing import read_mapping
from codyra_llm.runtime import heartbeat

log = logging.getLogger(__name__)
_at_work = RLock()


@contextmanager
def in_one_thread() -> Iterator[None]:
    """While a thread is within this block it raises Fault in every other thread of the process. transformers
    changes functions of torch while it loads a model and puts them back, and two threads that do so at once
    leave them changed, so that no model loads in this process again."""
    if not _at_work.acquire(blocking=False):
        raise Fault(
            "another thread of this process is at work on a run or an evaluation; wait for its end, or start "
            "each in a process of its own, as a sweep does"
        )
    try:
        yield
    finally:
        _at_work.release()


def accelerator() -> Accelerator:
    """The launch's Accelerator. On a CPU it names the gloo backend, without which Accelerate would see a
    single process.

    Adapters are float32 and cast where they are used, whatever the base's dtype, so there is no autocast, and
    DeepSpeed gets no low precision in its config: it would cast the adapters and their gradients.
    """
    leave_out_cudnn_attention()
    cpu = not torch.cuda.is_available()
    zero = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("true", "1")
    many = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if zero:
        _prepare_deepspeed(cpu)
    if many:
        heartbeat.launcher()
    # Only the first process converts models and writes checkpoints, which can take longer than the default
    # timeout of ten minutes.
    backend = {"backend": "gloo"} if cpu and (zero or many) else {}
    group = InitProcessGroupKwargs(timeout=timedelta(hours=2), **backend)
    # Not cpu=True with ZeRO, which would drop DeepSpeed.
    made = Accelerator(mixed_precision="no", cpu=cpu and not zero, kwargs_handlers=[group])
    if zero:
        config = made.state.deepspeed_plugin.deepspeed_config
        if config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none":
            raise Fault(
                "zero_optimization.offload_optimizer replaces the optimizer by DeepSpeed's own, which knows "
                "no soft threshold; set its device to none (offload_param may stay)"
            )
        # Batches are cut by tokens here, so to DeepSpeed's engine every micro-batch is a step of its own.
        config.update(
            train_micro_batch_size_per_gpu=1,
            gradient_accumulation_steps=1,
            zero_allow_untested_optimizer=True,
            bf16={"enabled": False},
            fp16={"enabled": False},
        )
        config.pop("train_batch_size", None)
        unset_hf_deepspeed_config()
    return made


def device() -> torch.device:
    """The device of this process: its GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def is_first() -> bool:
    """Whether this process is the first of its launch."""
    return PartialState().is_main_process


def leave_out_cudnn_attention() -> None:
    """Use only PyTorch's own attention kernels in this process. cuDNN's, which PyTorch prefers on recent
    GPUs, builds a plan for every new shape, and in generation every step has a new length: on an H100 (torch
    2.11) answering new prompts took six times as long as answering them again."""
    torch.backends.cuda.enable_cudnn_sdp(False)


def ask_deepspeed(file: Path) -> None:
    """Have `accelerator` use DeepSpeed with this JSON file: what `accelerate launch` passes in the
    environment, for launchers that pass only ranks. Raises Fault if there is no launcher, or the file asks
    for no ZeRO stage."""
    if "RANK" not in os.environ:
        raise Fault(
            f"--deepspeed_config: {file} needs a launcher; start with deepspeed, torchrun or launch.sh"
        )
    zero = read_mapping(file, 'a DeepSpeed config such as {"zero_optimization": {"stage": 2}}').get(
        "zero_optimization"
    )
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage not in (1, 2, 3):
        raise Fault(
            f"--deepspeed_config: zero_optimization.stage of {file} is {stage}, expected 1, 2 or 3; set it, "
            "or leave the option out to run as DDP"
        )
    os.environ.update(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_CONFIG_FILE=str(file))


def _prepare_deepspeed(cpu: bool) -> None:
    if cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is first imported
    try:
        import deepspeed
    except ImportError:
        raise Fault(
            "this launch asks for DeepSpeed, which is not installed; install codyra-llm[deepspeed], or "
            "launch without it"
        ) from None
    # Without this DeepSpeed compiles a shared-memory all-reduce for minutes, and fails where there is no
    # compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed calls collectives by deprecated names, so torch would warn at every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def leave(code: int = 0) -> None:
    """End this process at once if it belongs to a group: gloo's threads may still be freeing the last
    tensors, and Python aborts the process if they do so while it finalises. Without a group this returns."""
    if torch.distributed.is_initialized():
        heartbeat.leave(code)
        if not code:
            torch.distributed.barrier()  # nobody watches any more when rank 0, which may keep the store, ends
            torch.distributed.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def collectively(mine: bool, action: Callable, *args) -> Any:
    """`action(*args)` on the processes where `mine` is true, None on the others, which wait for it. A Fault
    of any process is raised on all, so that none continues and waits for one that has ended."""
    result, faults = None, []
    if mine:
        try:
            result = action(*args)
        except Fault as fault:
            faults = fault.messages
    with heartbeat.waiting():
        faults = gather_object(faults)
    if faults:
        raise Fault(*dict.fromkeys(faults))
    return result


def on_first(action: Callable, *args) -> Any:
    """`collectively` in the first process alone: its result there, None in the others."""
    return collectively(is_first(), action, *args)


def of_first(make: Callable[[], Any]) -> Any:
    """What `make()` returns in the first process, on all processes. For what could differ between them, such
    as reading the run folder, which the first process may have changed meanwhile."""
    value = make() if is_first() else None
    with heartbeat.waiting():
        return broadcast_object_list([value])[0]


def wait() -> None:
    """Wait until all processes are here."""
    with heartbeat.waiting():
        PartialState().wait_for_everyone()


def say(message: str) -> None:
    """Log it, once for all processes."""
    if is_first():
        log.info("%s", message)


def zero_stage(acc: Accelerator) -> int:
    """ZeRO's stage; 0 without DeepSpeed."""
    plugin = acc.state.deepspeed_plugin
    return plugin.zero_stage if plugin else 0
