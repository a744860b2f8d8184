"""Decoding steps whose tensors stay at fixed addresses, so that a GPU replays one recorded step (a CUDA
graph): a step of a small batch is hundreds of kernels, and launching them takes the host longer than the GPU
runs them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from codyra_llm.models import families

LEAST = 12  # steps left for recording to pay: it costs about as much as four steps that are not recorded
AT_ONCE = 8  # steps whose tokens the host reads together: it waits for the GPU each time that it reads


def pays(model: PreTrainedModel, left: int) -> bool:
    """Whether to go on with recorded steps: on a GPU, for families that attend to everything before a token,
    with PyTorch's own attention, and where enough steps are `left`. Not with a RoPE of the kind "dynamic":
    its code reads at every step, on the host, how long the longest row is."""
    config = model.config
    if model.device.type != "cuda" or left < LEAST or config._attn_implementation != "sdpa":
        return False
    attends_to_all = families.of(config).recorded_steps and not families.windows(config)
    return attends_to_all and "dynamic" not in families.rope_type(config)


class StaticSteps:
    """Greedy steps of a batch whose prompts are in `layers`, keys and values [B, H_kv, S, d] of every layer.

    mask [B, S + 1] says which of these, and of the new token, a row may attend to; token [B, 1] is the last
    one generated, which no layer has seen yet, and position [B, 1] its position. At most `left` steps.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[tuple[Tensor, Tensor]],
        mask: Tensor,
        token: Tensor,
        position: Tensor,
        left: int,
    ):
        self.model, self.left, self.used = model, left, layers[0][0].shape[2]
        self.layers = [(longer(keys, left), longer(values, left)) for keys, values in layers]
        hidden = mask.new_ones(len(mask), self.used + left, dtype=torch.bool)
        hidden[:, : mask.shape[1]] = ~mask.bool()
        # What is added to the scores, [B, H_kv, 1, S]: as many copies as the products of a layer read.
        self.mask = torch.zeros_like(hidden, dtype=self.layers[0][0].dtype).masked_fill_(hidden, -torch.inf)
        self.mask = self.mask[:, None, None].repeat(1, self.layers[0][0].shape[1], 1, 1)
        self.token, self.position = token.clone(), position.clone()
        self.slot = torch.full((1,), self.used, device=mask.device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def next(self, count: int) -> Tensor:
        """The next `count` tokens of every row, [B, count]."""
        tokens = [self._next().clone() for _ in range(count)]
        return torch.cat(tokens, 1)

    def _next(self) -> Tensor:
        """The next token of every row, [B, 1]; the same tensor each time."""
        if self.graph is None and self.token.is_cuda:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._step()
        if self.graph:
            self.graph.replay()
        else:
            self._step()
        self.used, self.left = self.used + 1, self.left - 1
        return self.token

    def select(self, rows: Tensor) -> "StaticSteps":
        """Steps for these rows alone, to be recorded again; this object can't be used any more."""
        layers = [(keys[rows, :, : self.used], values[rows, :, : self.used]) for keys, values in self.layers]
        mask = self.mask[rows, 0, 0, : self.used + 1] == 0
        mask[:, -1] = True
        return StaticSteps(self.model, layers, mask, self.token[rows], self.position[rows], self.left)

    def _step(self) -> None:
        """One step, on the device alone: nothing in it depends on the host."""
        self.mask.index_fill_(3, self.slot, 0.0)
        with attending(self.model, self.layers, self.slot, self.mask):
            logits = self.model(
                input_ids=self.token,
                attention_mask=self.mask,
                position_ids=self.position,
                use_cache=False,
                logits_to_keep=1,
            ).logits
        self.token.copy_(logits[:, -1].argmax(-1, keepdim=True))
        self.position.add_(1)
        self.slot.add_(1)


def longer(kept: Tensor, more: int) -> Tensor:
    """Keys or values [B, H_kv, S, d] with room for `more` tokens after them."""
    batch, heads, used, size = kept.shape
    whole = kept.new_zeros(batch, heads, used + more, size)
    whole[:, :, :used] = kept
    return whole


@contextmanager
def attending(
    model: PreTrainedModel, layers: Sequence[tuple[Tensor, Tensor]], slot: Tensor, mask: Tensor
) -> Iterator[None]:
    """Within this block, the model's attention modules attend from one token per row to these keys and
    values, after they have written the token's own at `slot`."""
    modules = families.attentions(model)
    before = [vars(module).get("forward") for module in modules]
    for module, (keys, values) in zip(modules, layers, strict=True):
        module.forward = partial(attend, module, keys, values, slot, mask)
    try:
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            del module.forward
            if own:
                module.forward = own


def attend(
    module: Any,
    keys: Tensor,
    values: Tensor,
    slot: Tensor,
    mask: Tensor,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    **others,
) -> tuple[Tensor, None]:
    """What the attention `module` of a LLaMA gives for one token per row, hidden_states [B, 1, h], with few
    operations: q and k are rotated together. Returns [B, 1, h]."""
    batch, shared, size = len(hidden_states), keys.shape[1], keys.shape[3]
    query, key, value = projected(module, hidden_states, size)  # each [B, heads, d]
    both = rotated(torch.cat([query, key], 1), *position_embeddings)
    query, key = both[:, :-shared], both[:, -shared:]
    keys.index_copy_(2, slot, key[:, :, None])
    values.index_copy_(2, slot, value[:, :, None])
    out = grouped(query, keys, values, mask, module.scaling)
    return module.o_proj(out.reshape(batch, 1, -1)), None


def projected(module: Any, hidden: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query [B, H, d], key and value [B, H_kv, d] of hidden [B, 1, h], normed where the module has norms."""
    layers = (module.q_proj, module.k_proj, module.v_proj)
    query, key, value = (layer(hidden).view(len(hidden), -1, size) for layer in layers)
    if hasattr(module, "q_norm"):
        query, key = module.q_norm(query), module.k_norm(key)
    return query, key, value


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of x [B, heads, d] at one position per row, cos and sin [B, 1, d]: the halves (x₁, x₂) become
    (x₁ cos - x₂ sin, x₂ cos + x₁ sin)."""
    first, second = x.chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    return torch.addcmul(x * cos, turned, sin)


def grouped(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Attention of one query per row, [B, H, d], to keys and values [B, H_kv, S, d]: [B, H, d].

    The H / H_kv heads that read one key head are the rows of one product, so keys and values are read once
    and copied nowhere. `mask` [B, H_kv, 1, S] is added to the scores, in the product itself.
    """
    batch, heads, size = query.shape
    together = query.reshape(batch * keys.shape[1], -1, size)  # [B H_kv, H / H_kv, d]
    scores = torch.baddbmm(mask.flatten(0, 1), together, keys.flatten(0, 1).mT, alpha=scaling)
    weights = functional.softmax(scores, -1)
    return (weights @ values.flatten(0, 1)).view(batch, heads, size)
