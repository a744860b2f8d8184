"""Products of matrices in half precision whose sums stay in float32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def gram(x: Tensor) -> Tensor:
    """xᵀ x [in, in] of x [n, in], in float32 (float64 for float64).

    In half precision the factors' products are exact in float32, so the processor's instructions for it are
    used with sums in float32: they lose nothing and take half of the time or less."""
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(x.T, x, out_dtype=torch.float32)
    whole = x if x.dtype == torch.float64 else x.float()
    if x.dtype != torch.bfloat16:
        return whole.T @ whole
    with _read_as_bfloat16():
        return whole.T @ whole


@contextmanager
def _read_as_bfloat16() -> Iterator[None]:
    """Within this block a CPU that multiplies bfloat16 rounds float32 factors to it, and sums in float32."""
    products = torch.backends.mkldnn.matmul  # pyright: ignore
    before = products.fp32_precision
    products.fp32_precision = "bf16"
    try:
        yield
    finally:
        products.fp32_precision = before
