"""Whether this machine multiplies bfloat16 faster than float32."""

import time
from functools import cache

import torch
from accelerate import Accelerator

from codyra_llm.runtime.launch import of_first

# What `torch.cpu.get_capabilities` calls instructions that multiply bfloat16: Intel's and AMD's, and Arm's.
INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16")
FASTER = 1.25  # times float32's speed that the probe must find: below that, rounding buys nothing


def agreed(acc: Accelerator) -> bool | None:
    """What the first process finds, for all of a launch; None for one alone, which looks when it has to."""
    if acc.num_processes == 1:
        return None
    return of_first(multiplies_bfloat16() if acc.is_main_process else None)


@cache
def multiplies_bfloat16() -> bool:
    """Whether bfloat16 is worth its rounding here: on a GPU if it has units for it, on a CPU if it has
    instructions for it and a probe of about 50 ms finds them faster."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return _has_instructions() and _probe() >= FASTER


def _has_instructions() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in INSTRUCTIONS)


def _probe(rows: int = 256, width: int = 1024) -> float:
    """How many times as fast a product is in bfloat16 as in float32: the best of three of each, in turn, so
    that another program's load meets both."""
    best = dict.fromkeys((torch.float32, torch.bfloat16), float("inf"))
    inputs = {
        kind: (torch.ones(rows, width, dtype=kind), torch.ones(width, width, dtype=kind)) for kind in best
    }
    for x, w in inputs.values():
        torch.nn.functional.linear(x[:8], w)  # the first call of a kernel makes it
    for _ in range(3):
        for kind, (x, w) in inputs.items():
            began = time.perf_counter()
            torch.nn.functional.linear(x, w)
            best[kind] = min(best[kind], time.perf_counter() - began)
    return best[torch.float32] / best[torch.bfloat16]
