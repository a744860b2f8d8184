"""Stage `facts`: versions, what the device can do at most, whether the kernels that training relies on
compute what they should, and what some of them take.
"""

import os
import shutil
import sys
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from codyra_llm.bench.gpu.context import Context
from codyra_llm.core.version import __version__
from codyra_llm.models.attention import packed_attention
from codyra_llm.runtime.memory import peak_bytes

PACKAGES = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "deepspeed", "triton")
LENGTHS = [100, 37, 3, 160]  # of segments in a packed row
# Heads, key heads, head size, sliding window.
ATTENTION = ((8, 8, 64, None), (8, 2, 64, None), (8, 1, 256, None), (8, 2, 128, 48))


def facts(context: Context) -> None:
    """Record versions, host and GPU, the device's limits, and the errors of the kernels."""
    context.record("versions", {"codyra_llm": __version__, "python": sys.version.split()[0], **_installed()})
    context.record(
        "host", {"cpus": os.cpu_count(), "free disk, GB": shutil.disk_usage(context.out).free >> 30}
    )
    context.on_gpu("gpu", _gpu)
    context.attempt("limits", lambda: limits(context))
    context.attempt("skinny products", lambda: skinny(context))
    context.attempt("a step of AdamW, ms", lambda: optimizer_steps(context))
    context.on_gpu("attention in float32", lambda: float32_attention(context))
    context.attempt("an eigenproblem in float64, s", lambda: eigenproblems(context))
    for heads, shared, size, window in ATTENTION:
        name = f"packed attention, {heads} heads, {shared} key heads of {size}, window {window}"
        context.attempt(name, partial(attention_errors, context, heads, shared, size, window))


def _installed() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _gpu() -> dict:
    seen = torch.cuda.get_device_properties(0)
    return {
        "name": seen.name,
        "capability": [seen.major, seen.minor],
        "memory, GB": seen.total_memory >> 30,
        "multiprocessors": seen.multi_processor_count,
        "cuda": torch.version.cuda,
    }


def limits(context: Context) -> dict[str, float]:
    """What the device can do at most: a bfloat16 product of n x n matrices, and a copy."""
    n = 256 if context.tiny else 8192
    a = torch.randn(n, n, device=context.device).to(torch.bfloat16)
    return {
        "bf16 TFLOP/s": round(2 * n**3 / context.seconds(lambda: a @ a, 10) / 1e12, 2),
        "copy, GB/s": round(copy_speed(context) / 1e9, 1),
    }


def copy_speed(context: Context) -> float:
    """Bytes per second of a copy on the device, read and written bytes both counted."""
    source = torch.zeros(1 << (20 if context.tiny else 31), dtype=torch.uint8, device=context.device)
    target = torch.empty_like(source)
    return 2 * source.numel() / context.seconds(lambda: target.copy_(source), 10)


def skinny(context: Context) -> dict[str, float]:
    """Relative errors against float64 of the thin products of three adapters of rank 16 together, x Aᵀ and
    dYᵀ x. cuBLAS may split a long sum and round its parts; with `mm(out_dtype=)` it must not."""
    tokens, width = (256, 128) if context.tiny else (8192, 4096)
    x, a, dy = (
        torch.randn(shape, device=context.device).to(torch.bfloat16)
        for shape in ((tokens, width), (48, width), (tokens, 48))
    )
    exact = x.double() @ a.double().T
    found = {"x Aᵀ": distance(x @ a.T, exact), "rounded once": distance(exact.to(torch.bfloat16), exact)}
    if context.cuda:
        product = torch.mm(dy.T, x, out_dtype=torch.float32)
        found["dYᵀ x in float32"] = distance(product, dy.double().T @ x.double())
    return found


def optimizer_steps(context: Context) -> dict[str, float]:
    """Milliseconds of a step for the factors of 112 sites, as PyTorch chooses and in its fused kernel."""
    sites, width = (2, 32) if context.tiny else (112, 2048)
    found = {}
    for name, fused in (("default", None), ("fused", True)):
        factors = []
        for shape in ((16, width), (16,), (width, 16)) * sites:
            factors.append(torch.nn.Parameter(torch.zeros(shape, device=context.device)))
            factors[-1].grad = torch.ones_like(factors[-1])
        found[name] = round(1000 * context.seconds(torch.optim.AdamW(factors, fused=fused).step), 3)
    return found


def eigenproblems(context: Context) -> dict[str, float]:
    """Seconds of a symmetric eigenproblem on the CPU and on the device, which methods ask for per input."""
    size = 64 if context.tiny else 2048
    draw = torch.Generator().manual_seed(0)
    factor = torch.randn(size, size, dtype=torch.float64, generator=draw)
    found = {}
    for device in dict.fromkeys(("cpu", context.device.type)):
        matrix = (factor @ factor.T).to(device)
        found[device] = round(context.seconds(partial(torch.linalg.eigh, matrix), 1), 3)
    return found


def float32_attention(context: Context) -> dict[str, float]:
    """Megabytes at the peak of forward and backward over padded rows, and of all scores, which are not to be
    kept."""
    rows, heads, shared, tokens, size = 2, 8, 2, 256 if context.tiny else 2048, 64
    query, key, value = (
        torch.randn(rows, count, tokens, size, device=context.device, requires_grad=True)
        for count in (heads, shared, shared)
    )

    def work() -> None:
        y, _ = packed_attention.causal(torch.nn.Module(), query, key, value, None, scaling=size**-0.5)
        torch.autograd.grad(y.sum(), (query, key, value))

    work()
    scores = 4 * rows * heads * tokens**2
    return {"peak MB": round(peak_bytes(work, context.device) / 1e6, 1), "scores, MB": scores / 1e6}


def attention_errors(context: Context, heads: int, shared: int, size: int, window: int | None) -> dict:
    """Forward and gradients of attention over a packed row in bfloat16, against the formula in float64."""
    torch.manual_seed(0)
    shapes = [(1, count, sum(LENGTHS), size) for count in (heads, shared, shared)]
    rows = [torch.randn(shape, device=context.device).to(torch.bfloat16) for shape in shapes]
    dy = torch.randn(1, sum(LENGTHS), heads, size, device=context.device).to(torch.bfloat16)
    found, exact = (_attention(rows, dy, window, dtype) for dtype in (torch.bfloat16, torch.float64))
    names = ("y", "dq", "dk", "dv")
    errors = {name: distance(a, b) for name, a, b in zip(names, found, exact, strict=True)}
    return {**errors, "right": max(errors.values()) < 0.02}


def _attention(rows: list[Tensor], dy: Tensor, window: int | None, dtype: torch.dtype) -> list[Tensor]:
    """The output and the gradients of query, key and value."""
    query, key, value = (row.to(dtype).requires_grad_() for row in rows)
    y, _ = packed_attention.packed(
        torch.nn.Module(),
        query,
        key,
        value,
        None,
        segments=LENGTHS,
        cu_seq_lens_q=packed_attention.segment_ends(LENGTHS).to(query.device),
        max_length_q=max(LENGTHS),
        scaling=query.shape[-1] ** -0.5,
        sliding_window=window,
    )
    return [y.detach(), *torch.autograd.grad(y, (query, key, value), dy.to(dtype))]


def distance(found: Tensor, exact: Tensor) -> float:
    """The relative error ‖found - exact‖ / ‖exact‖, to two digits."""
    return float(f"{((found.double() - exact).norm() / exact.norm()).item():.2g}")
