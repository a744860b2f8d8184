"""Causal attention in bfloat16 on a CPU, by plain matrix products: PyTorch's flash kernel takes 1.7 to 5
times as long there, forward and backward together.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

BLOCK = 128  # queries at once; they read no keys after the last of them
IN_CACHE = 2**18  # scores that are made at once, so that softmax and the next product find them in the cache


def causal(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **given
) -> tuple[Tensor, None]:
    """transformers' sdpa attention of query [R, H, T, d] to key and value [R, H_kv, T, d], to [R, T, H, d];
    by `PlainAttention` where that is faster."""
    if attention_mask is None and not given.get("dropout") and suits(query, key, value):
        out = PlainAttention.apply(query, key, value, given.get("scaling") or query.shape[-1] ** -0.5)
        return out.transpose(1, 2), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **given)


def suits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether these are whole rows of bfloat16 on a CPU."""
    return (
        query.device.type == "cpu"
        and {query.dtype, key.dtype, value.dtype} == {torch.bfloat16}
        and 1 < query.shape[2] == key.shape[2]
    )


class PlainAttention(torch.autograd.Function):
    """softmax(s·Q Kᵀ + causal mask) V by plain products, a block of queries and a few key heads at a time.
    The query heads that share a key head are rows of one product.

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
        out = q.new_empty(*q.shape[:3], v.shape[2])
        read(q, k, v, scale, None, out)
        return out.view(*query.shape[:3], v.shape[2])

    @staticmethod
    def backward(ctx, do: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # pyright: ignore
        """dQ, dK and dV from dO [R, H, T, d], in the shapes of query, key and value."""
        q, k, v = ctx.saved_tensors
        shared, length = q.shape[1], k.shape[1]
        do = do.reshape(*q.shape[:3], v.shape[2])
        dq = torch.empty_like(q)
        # Several blocks are summed in float32.
        precise = q.dtype if length <= BLOCK else torch.promote_types(q.dtype, torch.float32)
        dk, dv = torch.zeros_like(k, dtype=precise), torch.zeros_like(v, dtype=precise)
        for block, keys in blocks(length, length):
            rows, grads = q[:, :, block].flatten(1, 2), do[:, :, block].flatten(1, 2)  # [N, g·n, d]
            added = mask_of(None, block, keys, q)
            for heads in portions(len(q), added.numel()):
                upto = k[heads, :keys]
                p = probabilities(rows[heads], upto, ctx.scale, added)
                dv[heads, :keys] += torch.bmm(p.mT, grads[heads])
                dp = torch.bmm(grads[heads], v[heads, :keys].mT)
                ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
                dq[heads, :, block] = torch.bmm(ds, upto).unflatten(1, (shared, -1))
                dk[heads, :keys] += torch.bmm(ds.mT, rows[heads])
        dq.mul_(ctx.scale)
        dk.mul_(ctx.scale)
        query_shape, key_shape, value_shape = ctx.shapes
        return dq.view(query_shape), dk.to(k.dtype).view(key_shape), dv.to(v.dtype).view(value_shape), None


def read(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, out: Tensor) -> None:
    """Write softmax(scale·Q Kᵀ + mask) V of q [N, g, T, d], k [N, S, d] and v [N, S, e] to out [N, g, T, e].
    The mask [T, S] is true where a query reads a key, and nowhere after the query's own; None: it reads all
    up to there. The last query is at the last key."""
    for block, keys in blocks(q.shape[2], k.shape[1]):
        rows = q[:, :, block].flatten(1, 2)  # [N, g·n, d]
        added = mask_of(mask, block, keys, q)
        for heads in portions(len(q), added.numel()):
            p = probabilities(rows[heads], k[heads, :keys], scale, added)
            out[heads, :, block] = torch.bmm(p, v[heads, :keys]).unflatten(1, (q.shape[1], -1))


def by_key_head(query: Tensor, key: Tensor) -> Tensor:
    """The query [R, H, T, d] as [R·H_kv, g, T, d]: for each key head its g query heads."""
    return query.reshape(len(query) * key.shape[1], -1, *query.shape[2:])


def flat(heads: Tensor) -> Tensor:
    """[R, H_kv, T, d] as [R·H_kv, T, d]."""
    return heads.reshape(-1, *heads.shape[2:])


def blocks(tokens: int, length: int) -> Iterator[tuple[slice, int]]:
    """Blocks of `tokens` queries, the last of which is at the last of `length` keys, and up to which key each
    block reads."""
    for start in range(0, tokens, BLOCK):
        stop = min(tokens, start + BLOCK)
        yield slice(start, stop), length - tokens + stop


def mask_of(mask: Tensor | None, block: slice, keys: int, q: Tensor) -> Tensor:
    """What is added to a block's scores, [g·n, keys]: 0 where a query reads a key. Elsewhere -inf, or with a
    mask, in which a query may read nothing, the least number, since softmax would make NaN of -inf alone."""
    count = block.stop - block.start
    if mask is None:
        added = q.new_full((count, keys), -torch.inf).triu(1 + keys - count)
    else:
        hidden = ~mask[block, :keys]
        added = q.new_zeros(count, keys).masked_fill_(hidden, torch.finfo(q.dtype).min)
    return added.repeat(q.shape[1], 1)


def portions(heads: int, scores: int) -> list[slice]:
    """Key heads whose scores, so many for each, fit into the cache together."""
    step = max(1, IN_CACHE // scores)
    return [slice(start, start + step) for start in range(0, heads, step)]


def probabilities(q: Tensor, k: Tensor, scale: float, mask: Tensor) -> Tensor:
    """softmax(scale·Q Kᵀ + mask), [heads, g·n, S]."""
    return torch.baddbmm(mask.expand(len(q), -1, -1), q, k.mT, alpha=scale).softmax(-1)
