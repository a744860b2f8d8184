"""Attention with prefixes: in some layers every token also attends to a few keys and values that do not come
from tokens."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from codyra_llm.models import families
from codyra_llm.models.attention.cache import cached

NAME = "prefixed"


def use(model: PreTrainedModel) -> None:
    """Let `model` attend to prefixes, in training as in generation; there are none yet."""
    AttentionInterface.register(NAME, prefixed)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    show(model, {})


def show(model: PreTrainedModel, prefixes: dict[int, Tensor]) -> None:
    """From now on row b of a batch sees `prefixes[layer][b]`, keys and values [B, 2, H_kv, P, d], in these
    layers alone.

    They come before what the family's mask covers (causal, sliding) and are not in the cache, so positions,
    windows and pads are unaffected. Keys are used as they are, as if already rotated."""
    for number, attention in enumerate(families.attentions(model)):
        attention.prefix = prefixes.get(number)


def select(model: PreTrainedModel, rows: Tensor) -> None:
    """Keep the prefixes of only these rows of the batch."""
    show(
        model,
        {
            i: attention.prefix[rows]
            for i, attention in enumerate(families.attentions(model))
            if attention.prefix is not None
        },
    )


@torch.no_grad()
def made_by(model: PreTrainedModel, ids: Tensor, layers: list[int]) -> Tensor:
    """The keys (rotated) and values of the tokens `ids` [P] in these layers: [layers, 2, H_kv, P, d]."""
    cache = DynamicCache()  # without the config, so that no sliding window drops any
    families.backbone(model)(input_ids=ids[None], **cached(cache))
    return torch.stack([_keys_and_values(cache, i) for i in layers])


def _keys_and_values(cache: DynamicCache, number: int) -> Tensor:
    """What one layer keeps, [2, H_kv, P, d]."""
    layer = cache.layers[number]
    assert isinstance(layer, CacheLayerMixin), "a layer with a prefix has attention"
    assert layer.keys is not None and layer.values is not None, "tokens have gone through it"
    return torch.cat([layer.keys, layer.values])


def prefixed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **others,
) -> tuple[Tensor, None]:
    """Attention of query [B, H, T, d] to the layer's prefix and to key and value [B, H_kv, S, d]: [B, T, H,
    d].

    `attention_mask` [B, 1, T, S] is true where a token may look, None for plain causality; `softcap` c makes
    scores s into c·tanh(s/c).
    """
    prefix = module.prefix
    assert prefix is None or isinstance(prefix, Tensor), "`show` puts it there"
    if prefix is None and not softcap:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling)
    mask = _mask(attention_mask, query.shape[2], key.shape[2], query.device)
    if prefix is not None:
        own = prefix.to(key.dtype)  # [B, 2, H_kv, P, d]
        key, value = torch.cat([own[:, 0], key], 2), torch.cat([own[:, 1], value], 2)  # [B, H_kv, P + S, d]
        mask = functional.pad(mask, (own.shape[3], 0), value=True)
    if not softcap:
        return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling)
    groups = query.shape[1] // key.shape[1]  # of query heads, each of which shares a key head
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * (scaling / softcap))  # [B, H, T, P + S]
    scores = scores.to(torch.promote_types(query.dtype, torch.float32))
    # Not -inf, which would give NaN in the row of a pad, which may attend to nothing.
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    shares = functional.dropout(scores.softmax(-1).to(query.dtype), dropout)
    return (shares @ value).transpose(1, 2), None


def _mask(mask: Tensor | None, tokens: int, seen: int, device: torch.device) -> Tensor:
    """The mask that is given, or the causal one of `tokens` queries at the end of `seen` keys."""
    if mask is not None:
        return mask
    return torch.ones(1, 1, tokens, seen, dtype=torch.bool, device=device).tril(seen - tokens)
