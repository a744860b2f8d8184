"""Causal attention over short rows in bfloat16 on a CPU, by plain matrix products: PyTorch's flash kernel
takes two to five times as long there, forward and backward together.
"""

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

LONGEST = 512  # tokens; PyTorch's kernel is as fast at about 600
IN_CACHE = 2**18  # scores that are made at once, so that softmax and the next product find them in the cache


def causal(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **given
) -> tuple[Tensor, None]:
    """transformers' sdpa attention of query [R, H, T, d] to key and value [R, H_kv, T, d], to [R, T, H, d];
    by `ShortAttention` where that is faster."""
    if attention_mask is None and not given.get("dropout") and suits(query, key, value):
        out = ShortAttention.apply(query, key, value, given.get("scaling") or query.shape[-1] ** -0.5)
        return out.transpose(1, 2), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **given)


def suits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether these are whole short rows of bfloat16 on a CPU."""
    return (
        query.device.type == "cpu"
        and {query.dtype, key.dtype, value.dtype} == {torch.bfloat16}
        and 1 < query.shape[2] == key.shape[2] <= LONGEST
    )


class ShortAttention(torch.autograd.Function):
    """softmax(s·Q Kᵀ + causal mask) V by plain products, a few key heads at a time; the query heads that
    share a key head are rows of one product.

    Saves Q, K and V: backward makes the probabilities P again, with dS = P ∘ (dP - rowsum(dP ∘ P)) and
    dP = dO Vᵀ. Scores are rounded to the dtype, sums are not; errors against float64 are those of PyTorch's
    kernel.
    """

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query [R, H, T, d], key and value [R, H_kv, T, d] to [R, H, T, d]."""
        q, k, v = by_key_head(query, key), flat(key), flat(value)
        ctx.save_for_backward(q, k, v)
        ctx.scale, ctx.shapes = scale, (query.shape, key.shape, value.shape)
        out = q.new_empty(*q.shape[:2], v.shape[2])
        mask = _mask(q, k)
        for heads in portions(q, k):
            torch.bmm(_probabilities(q[heads], k[heads], scale, mask), v[heads], out=out[heads])
        return out.view(*query.shape[:3], v.shape[2])

    @staticmethod
    def backward(ctx, do: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # pyright: ignore
        """dQ, dK and dV from dO [R, H, T, d], in the shapes of query, key and value."""
        q, k, v = ctx.saved_tensors
        do = do.reshape(*q.shape[:2], v.shape[2])  # [R·H_kv, g·T, d]
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        mask = _mask(q, k)
        for heads in portions(q, k):
            p = _probabilities(q[heads], k[heads], ctx.scale, mask)
            torch.bmm(p.mT, do[heads], out=dv[heads])
            dp = torch.bmm(do[heads], v[heads].mT)
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
            torch.bmm(ds, k[heads], out=dq[heads])
            torch.bmm(ds.mT, q[heads], out=dk[heads])
        dq.mul_(ctx.scale)
        dk.mul_(ctx.scale)
        query_shape, key_shape, value_shape = ctx.shapes
        return dq.view(query_shape), dk.view(key_shape), dv.view(value_shape), None


def by_key_head(query: Tensor, key: Tensor) -> Tensor:
    """The query [R, H, T, d] as [R·H_kv, g·T, d]: for each key head the rows of its g query heads."""
    return query.reshape(len(query) * key.shape[1], -1, query.shape[3])


def flat(heads: Tensor) -> Tensor:
    """[R, H_kv, T, d] as [R·H_kv, T, d]."""
    return heads.reshape(-1, *heads.shape[2:])


def _mask(q: Tensor, k: Tensor) -> Tensor:
    """What is added to scores, [g·T, T]: -inf where a token would look at a later one, else 0."""
    tokens = k.shape[1]
    later = q.new_full((tokens, tokens), -torch.inf).triu(1)
    return later.repeat(q.shape[1] // tokens, 1)


def portions(q: Tensor, k: Tensor) -> list[slice]:
    """Key heads whose scores fit into the cache together."""
    step = max(1, IN_CACHE // (q.shape[1] * k.shape[1]))
    return [slice(start, start + step) for start in range(0, len(q), step)]


def _probabilities(q: Tensor, k: Tensor, scale: float, mask: Tensor) -> Tensor:
    """softmax(scale·Q Kᵀ + mask), [heads, g·T, T]."""
    return torch.baddbmm(mask.expand(len(q), -1, -1), q, k.mT, alpha=scale).softmax(-1)
