"""Attention in training without a T x T mask: over a packed row, in which each example attends only to
itself, and over rows that are padded on the right."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv

from codyra_llm.models import families
from codyra_llm.models.attention import plain_attention, prefix_attention

NAME = "packed"
FLASH = "flash_attention_2"
WIDE = ((8, 0), (9, 0), (10, 0))  # compute capabilities whose flash backward takes heads of more than 192


def causal(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **given
) -> tuple[Tensor, None]:
    """Causal attention of query [R, H, T, d] to key and value [R, H_kv, T, d], to [R, T, H, d], by
    `plain_attention.causal`.

    Except in float32 on a GPU, where every query head first gets a copy of its key head: of PyTorch's kernels
    only flash reads key heads that are shared, and it takes 16-bit numbers alone. Without the copies PyTorch
    would keep all scores, [R, H, T, T]."""
    if attention_mask is None and _lacks_shared_heads(query) and query.shape[1] != key.shape[1]:
        groups = query.shape[1] // key.shape[1]
        heads = repeat_kv(key, groups), repeat_kv(value, groups)
        dropout, scale = given.get("dropout", 0.0), given.get("scaling")
        out = functional.scaled_dot_product_attention(
            query, *heads, dropout_p=dropout, is_causal=query.shape[2] > 1, scale=scale
        )
        return out.transpose(1, 2), None
    return plain_attention.causal(module, query, key, value, attention_mask, **given)


def _lacks_shared_heads(query: Tensor) -> bool:
    """Whether every kernel that reads key heads shared by several query heads keeps all scores."""
    return query.is_cuda and query.dtype == torch.float32


# Attention functions, by name, that are causal when they get no mask.
WITHOUT_MASK = {"sdpa": causal, prefix_attention.NAME: prefix_attention.prefixed}
EAGER = "eager"  # transformers' own products, to whose scores a mask is added; causal only with one
KINDS = {"full_attention", "sliding_attention"}  # of layers whose masks are made here


def states(model: nn.Module, **given) -> Tensor:
    """The last hidden states [R, T, h] of rows that are padded on the right, or packed (and then with what
    `arguments` gives)."""
    with own_masks(model, given) as masks:
        return families.backbone(model)(**given, **masks, use_cache=False).last_hidden_state


def all_states(model: nn.Module, ids: Tensor) -> tuple[Tensor, ...]:
    """The hidden states [R, T, h] of the embeddings and of every layer, of rows padded on the right."""
    given = {"input_ids": ids}
    with own_masks(model, given) as masks:
        made = families.backbone(model)(**given, **masks, use_cache=False, output_hidden_states=True)
    return made.hidden_states


@contextmanager
def own_masks(model: nn.Module, given: dict) -> Iterator[dict]:
    """Within this block transformers makes no masks for the model's layers, of which those that need one get
    it by the arguments that this yields. Rows that are padded on the right need none that depends on them: a
    token attends only to earlier ones. transformers first checks whether the positions of such rows restart,
    for which the host waits for the GPU, once for every kind of layer.

    This has no effect with other attention functions: packed rows have no masks, and with flash_attention_2
    transformers asks for the positions of a single row in every layer too."""
    config = families.pretrained(model).config
    name = getattr(config, "_attn_implementation", None) or ""
    function = WITHOUT_MASK.get(name)
    if not KINDS.issuperset(getattr(config, "layer_types", None) or ()):
        yield {}
    elif name == EAGER:
        yield _masks(model, given, added=True)
    elif function is None:
        yield {}
    else:
        # transformers makes masks only for attention functions whose names it knows.
        AttentionInterface.register(f"{name}_unmasked", function)
        config._attn_implementation = f"{name}_unmasked"
        try:
            yield _masks(model, given, added=False)
        finally:
            config._attn_implementation = name


def _masks(model: nn.Module, given: dict, added: bool) -> dict:
    """The model's argument with the masks [1, 1, T, T] of its layers; `added`: as numbers that are added to
    scores, else true where a token looks, and only where a layer's window is shorter than the rows."""
    base = families.pretrained(model)
    rows = given["input_ids"] if "input_ids" in given else given["inputs_embeds"]
    embeddings = cast(nn.Embedding, base.get_input_embeddings())
    dtype = embeddings.weight.dtype if added else torch.bool
    kinds = getattr(base.config, "layer_types", None)
    windows = [shape.window for shape in families.attention_shapes(base.config)]
    made = {window: _mask(rows.shape[1], window, dtype, rows.device) for window in set(windows)}
    if not kinds:  # all layers are alike
        return {"attention_mask": made[windows[0]]}
    return {"attention_mask": {kind: made[window] for kind, window in zip(kinds, windows, strict=True)}}


def _mask(width: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """The mask of rows of this width in a layer with this window; None where one of bool would only say that
    all earlier tokens are seen."""
    reach = window or width + 1
    if dtype == torch.bool and reach > width:
        return None
    seen = torch.ones(1, 1, width, width, dtype=torch.bool, device=device).tril().triu(1 - reach)
    if dtype == torch.bool:
        return seen
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


class As:
    """Within this context a model of this config attends as it did when the object was made. Checkpointed
    layers need it: they are recomputed in backward, when `own_masks` has ended. It may be entered more than
    once, since backward may run again."""

    def __init__(self, config: PreTrainedConfig):
        self.config = config
        self.name = config._attn_implementation
        self.outside: list[str | None] = []

    def __enter__(self) -> None:
        self.outside.append(self.config._attn_implementation)
        self.config._attn_implementation = self.name

    def __exit__(self, *error: object) -> None:
        self.config._attn_implementation = self.outside.pop()


def use(model: PreTrainedModel) -> None:
    """Let `model` attend within segments, which every call must give (`arguments`). A model that uses
    flash_attention_2 keeps it, since it takes the same arguments. Not for generation, where rows are padded:
    no mask hides the padding."""
    AttentionInterface.register(NAME, packed)
    if model.config._attn_implementation != FLASH:
        model.set_attn_implementation(NAME)


def used(model: PreTrainedModel) -> bool:
    """Whether `use` was called, after which `model` takes only packed rows."""
    return model.config._attn_implementation == NAME


def pays(model: PreTrainedModel, device: torch.device) -> bool:
    """Whether packing is faster than padding: one kernel handles all segments of the row."""
    config = model.config
    if config._attn_implementation in (FLASH, "eager"):
        return config._attn_implementation == FLASH
    heads = {shape.head_dim for shape in families.attention_shapes(config)}
    softcap = families.attention_softcap(config)
    return all(_has_kernel(device, model.dtype, size, softcap, config.attention_dropout) for size in heads)


def arguments(lengths: Sequence[int], ends: Tensor, longest: int | None = None) -> dict:
    """The arguments that describe a packed row's segments to transformers' flash attention and to `packed`,
    for a call of the model; `ends` is that of `segment_ends`, on its device. `longest`: an upper bound of the
    lengths, in place of the longest of them."""
    longest = longest or max(lengths)
    return {
        "segments": list(lengths),
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def segment_ends(lengths: Sequence[int]) -> Tensor:
    """The start of each segment of these lengths and the end of the last one, int32 [segments + 1]."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    segments: list[int],
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others,
) -> tuple[Tensor, None]:
    """Causal attention of each segment to itself: query [1, H, T, d], key and value [1, H_kv, T, d] to [1, T,
    H, d].

    `sliding_window` counts the token itself; `softcap` c makes scores s into c·tanh(s/c).
    """
    if not _has_kernel(query.device, query.dtype, query.shape[-1], softcap, dropout):
        # A loop over the segments; query heads that share a key head get copies of it.
        groups = query.shape[1] // key.shape[1]
        rows = (query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1))
        parts = zip(*(row.split(segments, 2) for row in rows), strict=True)  # each [1, H, n, d]
        out = [_segment(q, k, v, scaling, dropout, sliding_window, softcap) for q, k, v in parts]
        return torch.cat(out, 2).transpose(1, 2), None
    left = sliding_window - 1 if sliding_window and sliding_window < max_length_q else -1  # -1: no window
    q, k, v = (row[0].transpose(0, 1) for row in (query, key, value))  # the kernel's layout, [T, H, d]
    out = varlen_attn(
        q,
        k,
        v,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=(left, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, Tensor), "no other output was requested"
    return out[None], None


def _segment(
    q: Tensor, k: Tensor, v: Tensor, scaling: float, dropout: float, window: int | None, softcap: float | None
) -> Tensor:
    """Causal attention [1, H, n, d] of one segment."""
    n = q.shape[2]
    mask = None  # [n, n], true where a token may look; None: plain causality
    if softcap or (window and window < n):
        mask = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()
        mask = mask.triu(1 - window) if window else mask
    if not softcap:
        return functional.scaled_dot_product_attention(
            q, k, v, mask, dropout, is_causal=mask is None, scale=scaling
        )
    assert mask is not None, "with a soft cap one is made above"
    scores = softcap * torch.tanh(q @ k.transpose(2, 3) * (scaling / softcap))  # [1, H, n, n]
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)).masked_fill(~mask, -torch.inf)
    return functional.dropout(scores.softmax(-1).to(q.dtype), dropout) @ v


def _has_kernel(
    device: torch.device, dtype: torch.dtype, head: int, softcap: float | None, dropout: float
) -> bool:
    """Whether PyTorch's flash attention over segments of unequal length runs here, its backward included, for
    heads of size `head`."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    if softcap or dropout or head % 8:
        return False
    capability = torch.cuda.get_device_capability(device)
    return capability >= (8, 0) and (head <= 192 or head <= 256 and capability in WIDE)
