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
from codyra_llm.core.gpus import has_nvidia_gpu
from codyra_llm.core.parsing import read_mapping
from codyra_llm.runtime import heartbeat, launchers, signals

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
    launchers.check_environment()
    cpu = not torch.cuda.is_available()
    zero = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("true", "1")
    many = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if many and not cpu:
        _refuse_sharing()
    if zero:
        _prepare_deepspeed(cpu)
        launchers.check_deepspeed()
    if many:
        heartbeat.launcher()
    # Only the first process converts models and writes checkpoints, which can take longer than the default
    # timeout of ten minutes.
    backend = {"backend": "gloo"} if cpu and (zero or many) else {}
    group = InitProcessGroupKwargs(timeout=timedelta(hours=2), **backend)
    # Not cpu=True with ZeRO, which would drop DeepSpeed.
    made = Accelerator(mixed_precision="no", cpu=cpu and not zero, kwargs_handlers=[group])
    if cpu and _hides_a_gpu():
        say(unused_gpu())
    if zero:
        launchers.settle_deepspeed(made.state.deepspeed_plugin.deepspeed_config)
        unset_hf_deepspeed_config()
    return made


def _refuse_sharing() -> None:
    """Raises Fault where processes would have to share a GPU, at which NCCL fails."""
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if processes > gpus:
        raise Fault(
            f"{processes} processes were started on this machine, and PyTorch finds {gpus} of its GPUs, of "
            f"which each process needs one; start {gpus} (PROCESSES of launch.sh, --nproc-per-node of "
            "torchrun, --num_processes of accelerate launch)"
        )


def _hides_a_gpu() -> bool:
    """Whether PyTorch finds none of this machine's GPUs, though CUDA_VISIBLE_DEVICES does not hide them all:
    empty or -1 asks for the CPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip()
    return has_nvidia_gpu() and visible not in ("", "-1")


def unused_gpu() -> str:
    """That everything runs on the CPU although there is a GPU, and what to do."""
    if torch.version.cuda is None:
        reason = "is built without CUDA; install a build with CUDA"
    else:
        reason = (
            f"can't use it, often since the driver is too old for CUDA {torch.version.cuda}; run nvidia-smi, "
            "then update the driver, or install a build of PyTorch for the driver's CUDA"
        )
    return (
        f"this machine has an NVIDIA GPU, but PyTorch {torch.__version__} {reason}. Everything runs on the "
        "CPU now, many times slower; to ask for that set CUDA_VISIBLE_DEVICES to nothing"
    )


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
        if code == signals.EXIT:
            heartbeat.leave_stopped()
        else:
            heartbeat.leave(code)
        if not code:
            # Rank 0, which may keep the store, ends only once no other process watches it through the store.
            torch.distributed.barrier()
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


def on_others(action: Callable, *args) -> None:
    """`collectively` in all processes but the first."""
    collectively(not is_first(), action, *args)


def by_machine(action: Callable, *args) -> Any:
    """`action(*args)` on all processes: in the first one, then in the first of each other machine, then in
    the rest. So a cache that is filled on first use is filled once, whether machines share its folder or
    not."""
    first_here = PartialState().is_local_main_process
    result = collectively(is_first(), action, *args)
    result = collectively(first_here and not is_first(), action, *args) or result
    return collectively(not first_here, action, *args) or result


def of_first(make: Callable[[], Any]) -> Any:
    """What `make()` returns in the first process, on all processes. For what could differ between them, such
    as reading the run folder, which the first process may have changed meanwhile."""
    value = make() if is_first() else None
    with heartbeat.waiting():
        return broadcast_object_list([value])[0]


def everywhere(mine: bool) -> bool:
    """Whether `mine` is true on all processes (collective)."""
    with heartbeat.waiting():
        return all(gather_object([mine]))


def wait() -> None:
    """Wait until all processes have called this."""
    with heartbeat.waiting():
        PartialState().wait_for_everyone()


def say(message: str) -> None:
    """Log the message, in the first process alone."""
    if is_first():
        log.info("%s", message)


def zero_stage(acc: Accelerator) -> int:
    """ZeRO's stage; 0 without DeepSpeed."""
    plugin = acc.state.deepspeed_plugin
    return plugin.zero_stage if plugin else 0
