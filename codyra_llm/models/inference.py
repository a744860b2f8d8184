"""Logits at the last positions of a batch, without gradients. On a CPU in bfloat16, attention is by plain
products: PyTorch's kernel takes 1.5 to 40 times as long.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from codyra_llm.models import families
from codyra_llm.models.attention.plain_attention import by_key_head, flat, read

NAME = "sdpa_or_products"


@torch.no_grad()
def last_logits(model: PreTrainedModel, keep: int = 1, **given: Any) -> Tensor:
    """Logits [R, keep, V] at the last `keep` positions of rows, padded on the left; `given` is what
    transformers' models take."""
    with _rows_without_gaps(model), _fast_attention(model):
        return model(**given, logits_to_keep=keep).logits


@contextmanager
def _rows_without_gaps(model: PreTrainedModel) -> Iterator[None]:
    """Within this block the head gets a copy of its inputs. transformers passes the last positions of every
    row as a view, and with a view PyTorch multiplies row by row; in bfloat16 on a CPU it copies the head's
    weight for every row before that."""

    def copied(head: nn.Module, given: tuple) -> tuple:
        return (given[0].contiguous(), *given[1:])

    hook = families.head(model).register_forward_pre_hook(copied)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _fast_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within this block `attend` takes the place of PyTorch's kernel on a CPU in bfloat16."""
    config = model.config
    before = config._attn_implementation
    if before != "sdpa" or model.device.type != "cpu" or model.dtype != torch.bfloat16:
        yield
        return
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **given: Any
) -> tuple[Tensor, None]:
    """transformers' sdpa attention of query [R, H, T, d] to key and value [R, H_kv, S, d], to [R, T, H, d];
    attention_mask [R, 1, T, S] is true where a token attends, and None for causal rows (T = S) and for single
    tokens that attend to everything. By plain products where they are faster."""
    scale = given.get("scaling") or query.shape[-1] ** -0.5
    if not _suits(query, key, attention_mask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **given)
    if query.shape[2] == 1:
        return single(query, key, value, attention_mask, scale).transpose(1, 2), None
    return whole(query, key, value, attention_mask, scale).transpose(1, 2), None


def _suits(query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
    """Whether these are tokens in bfloat16, with a mask of the usual kind."""
    tokens, length = query.shape[2], key.shape[2]
    usual = tokens in (1, length) if mask is None else mask.dtype == torch.bool
    return usual and query.dtype == torch.bfloat16


def single(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(s·Q Kᵀ + mask) V of one token per row, [R, H, 1, d], where mask [R, 1, 1, S] says which keys
    are read (None: all): the query heads that share a key head are rows of one product."""
    q, k, v = by_key_head(query, key).flatten(1, 2), flat(key), flat(value)
    if mask is None:
        scores = torch.bmm(q, k.mT).mul_(scale)
    else:
        # A row that may read nothing would become NaN with -inf.
        added = q.new_zeros(mask.shape).masked_fill_(~mask, torch.finfo(q.dtype).min)
        added = added.expand(-1, key.shape[1], -1, -1).flatten(0, 1)  # [R·H_kv, 1, S]
        scores = torch.baddbmm(added, q, k.mT, alpha=scale)
    return torch.bmm(scores.softmax(-1), v).view(*query.shape[:3], -1)


def whole(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(s·Q Kᵀ + mask) V, [R, H, T, d], where mask [R, 1, T, S] says which keys a token reads, none
    after itself (None: all up to there); the last token is at the last key."""
    shape = *query.shape[:3], value.shape[3]
    q = query.reshape(len(query), key.shape[1], -1, *query.shape[2:])  # [R, H_kv, g, T, d]
    out = q.new_empty(*q.shape[:4], shape[3])
    if mask is None:
        read(q.flatten(0, 1), flat(key), flat(value), scale, None, out.flatten(0, 1))
        return out.view(shape)
    for row, own in enumerate(mask.expand(len(query), -1, -1, -1)):
        read(q[row], key[row], value[row], scale, own[0], out[row])
    return out.view(shape)
