"""Whether this machine multiplies bfloat16 faster than float32."""

import torch
from accelerate import Accelerator

from codyra_llm.runtime.launch import of_first

# What `torch.cpu.get_capabilities` calls instructions that multiply bfloat16: Intel's and AMD's, and Arm's.
INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16")


def agreed(acc: Accelerator) -> bool | None:
    """`multiplies_bfloat16` as the first process finds it, for all processes of a launch; None for a single
    process, which calls it when it has to."""
    if acc.num_processes == 1:
        return None
    return of_first(multiplies_bfloat16)


def multiplies_bfloat16() -> bool:
    """Whether bfloat16 is worth its rounding here: on a GPU if it has units for it, on a CPU if it has
    instructions for it and PyTorch the library that uses them. Nothing is timed: what a busy machine finds
    fast changes from one moment to the next, and two runs of one recipe would differ in their bits."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    has_instructions = any(capabilities.get(name, False) for name in INSTRUCTIONS)
    return has_instructions and torch.backends.mkldnn.is_available()


def arithmetic() -> dict[str, str | int]:
    """What the order of sums on a CPU, and so the last bits of results, depends on: the instructions that
    PyTorch's kernels use, and the number of threads."""
    return {"cpu": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
