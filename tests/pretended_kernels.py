"""The mathematics of CUDA kernels that a CPU build of PyTorch lacks."""

import torch
from torch import Tensor
from torch.nn import functional


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """scaled_dot_product_attention from operators that every device has: the choice of a fused kernel asks a
    real device."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = (query @ key.transpose(-1, -2)).float() * (scale or query.shape[-1] ** -0.5)
    if is_causal:
        seen = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    elif attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
    elif attn_mask is not None:
        scores = scores + attn_mask
    shares = functional.dropout(scores.softmax(-1).to(query.dtype), dropout_p)
    return shares @ value


def _shares(q: Tensor, k: Tensor, ends: Tensor, scale: float, window: list[int]) -> Tensor:
    """What each token [T] of a packed row attends to, [H, T, T], causal and within its segment."""
    left, right = window
    at = torch.arange(len(q))
    segment = torch.bucketize(at, ends[1:].long(), right=True)
    distance = at[:, None] - at
    seen = (segment[:, None] == segment) & (distance >= -right)
    if left >= 0:
        seen &= distance <= left
    scores = torch.einsum("thd,shd->hts", q.float(), k.float()) * scale
    return scores.masked_fill(~seen, -torch.inf).softmax(-1)


def _varlen(q, k, v, ends, ends_k, longest, longest_k, causal=False, scale=None, window=None, *_, **__):
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
    out = torch.einsum("hts,shd->thd", _shares(q, k, ends, scale, window), v.float()).to(q.dtype)
    logsumexp = q.new_zeros(q.shape[1], q.shape[0], dtype=torch.float32)  # the backward here needs none
    return out, logsumexp, torch.zeros(2, dtype=torch.uint64)


def _varlen_backward(
    dy, q, k, v, out, lse, ends, ends_k, longest, longest_k, causal, rng, scale=None, window=None
):
    groups = q.shape[1] // k.shape[1]
    wide_k, wide_v = (t.repeat_interleave(groups, 1).float() for t in (k, v))
    shares, dy = _shares(q, wide_k, ends, scale, window), dy.float()
    d_shares = torch.einsum("thd,shd->hts", dy, wide_v)
    d_scores = shares * (d_shares - (d_shares * shares).sum(-1, keepdim=True)) * scale
    dq = torch.einsum("hts,shd->thd", d_scores, wide_k)
    dk = torch.einsum("hts,thd->shd", d_scores, q.float())
    dv = torch.einsum("hts,thd->shd", shares, dy)
    dk, dv = (t.view(len(k), k.shape[1], groups, -1).sum(2) for t in (dk, dv))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _product(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    return (a.float() @ b.float()).to(out_dtype)


KERNELS = {
    "aten.mm.dtype": _product,
    "torch_attn._varlen_attn.default": _varlen,
    "torch_attn._varlen_attn_backward.default": _varlen_backward,
}
