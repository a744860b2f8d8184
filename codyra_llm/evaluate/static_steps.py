"""Decoding steps whose tensors stay at fixed addresses, so that a GPU replays one recorded step (a CUDA
graph): a step of a small batch is hundreds of kernels, and launching them takes the host longer than the GPU
runs them.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel

from codyra_llm.models import families
from codyra_llm.runtime import graphs

log = logging.getLogger(__name__)

LEAST = 12  # steps left for recording to pay: it costs about as much as four steps that are not recorded
# The cache's length is a multiple of this: cuBLAS has no fast kernel for rows of scores that do not begin at
# a multiple of 16 bytes.
ALIGNED = 16
Linear = tuple[Tensor, Tensor | None]  # weight and bias
AT_ONCE = 8  # steps whose tokens the host reads together: it waits for the GPU each time that it reads


def pays(model: PreTrainedModel, left: int) -> bool:
    """Whether to go on with recorded steps: on a GPU, with PyTorch's own attention, where the family allows
    it and enough steps are `left`."""
    config = model.config
    if model.device.type != "cuda" or left < LEAST or config._attn_implementation != "sdpa":
        return False
    return possible(config)


def possible(config: PreTrainedConfig) -> bool:
    """Whether steps can be recorded: in families that attend to everything before a token. Not with a RoPE of
    the kind "dynamic": its code reads at every step, on the host, how long the longest row is."""
    attends_to_all = families.of(config).recorded_steps and not families.windows(config)
    return attends_to_all and "dynamic" not in families.rope_type(config)


def joined_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of what `join` gives for all attention modules."""
    shapes = families.attention_shapes(config)
    outputs = sum((shape.heads + 2 * shape.kv_heads) * shape.head_dim for shape in shapes)
    return outputs * config.hidden_size * dtype.itemsize


class Recordings:
    """What the recorded steps of all batches of a call have in common. `on`: whether there are any, until
    memory runs out in them; `joins`: whether they read joined weights, which are copies."""

    def __init__(self, model: PreTrainedModel, joins: bool):
        self.model, self.joins, self.on = model, joins, True
        self._joined: list[Linear | None] | None = None

    @property
    def joined(self) -> list[Linear | None]:
        """What `join` gives for every attention module, once for all batches; None for each where nothing is
        joined."""
        if self._joined is None:
            modules = families.attentions(self.model)
            self._joined = [join(module) if self.joins else None for module in modules]
        return self._joined

    def stop(self) -> None:
        """Record nothing more, and let go of the joined weights."""
        self.on, self._joined = False, None
        log.info("recorded decoding steps do not fit into memory; going on with steps that are not recorded")


class StaticSteps:
    """Greedy steps of a batch.

    Keys and values of every layer, `layers` [B, H_kv, L, d], are a ring: a step writes the column `slot`, the
    next step the one after it, and after the last column comes the first. So a row has L columns for its
    prompt and answer, and another prompt may take the place of one that is done. `seen` [B, L] says which
    columns a row may attend to; token [B, 1] is the last one generated, which no layer has read yet, and
    position [B, 1] its position. `joined`: what `join` gave for every attention module, or None for it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: list[tuple[Tensor, Tensor]],
        seen: Tensor,
        token: Tensor,
        position: Tensor,
        slot: Tensor,
        joined: list[Linear | None],
    ):
        self.model, self.layers, self.joined = model, layers, joined
        self.length = layers[0][0].shape[2]
        # What is added to the scores, [B, H_kv, 1, L]: as many copies as the products of a layer read.
        self.mask = _added(seen, layers[0][0].dtype)[:, None, None].repeat(1, layers[0][0].shape[1], 1, 1)
        self.token, self.position, self.slot = token.clone(), position.clone(), slot.clone()
        self.graph: torch.cuda.CUDAGraph | None = None

    @classmethod
    def begun(
        cls,
        recordings: Recordings,
        rings: list[tuple[Tensor, Tensor]],
        mask: Tensor,
        token: Tensor,
        position: Tensor,
    ) -> "StaticSteps":
        """Steps of a batch whose prompts are in the first S columns of `rings` [B, H_kv, L, d], and mask
        [B, S] says which of those are tokens. Until the ring comes round, these columns stay as they are."""
        used = mask.shape[1]
        seen = mask.new_zeros(len(mask), rings[0][0].shape[2], dtype=torch.bool)
        seen[:, :used] = mask.bool()
        slot = torch.full((1,), used, device=mask.device)
        return cls(recordings.model, rings, seen, token, position, slot, recordings.joined)

    def next(self, count: int) -> Tensor:
        """The next `count` tokens of every row, [B, count]."""
        tokens = [self._next().clone() for _ in range(count)]
        return torch.cat(tokens, 1)

    def _next(self) -> Tensor:
        """The next token of every row, [B, 1]; the same tensor each time."""
        if self.graph is None and self.token.is_cuda:
            # A stream for this alone: training may have recordings too, and others may not be gone yet.
            self.graph = graphs.recorded(self._step, torch.cuda.Stream(self.token.device))
        if self.graph:
            self.graph.replay()
        else:
            self._step()
        return self.token

    def select(self, rows: Tensor) -> "StaticSteps":
        """Steps for these rows alone, to be recorded again; this object can't be used any more."""
        layers = [(keys[rows], values[rows]) for keys, values in self.layers]
        seen, token, position = self.mask[rows, 0, 0] == 0, self.token[rows], self.position[rows]
        return StaticSteps(self.model, layers, seen, token, position, self.slot, self.joined)

    def put(
        self,
        rows: Tensor,
        layers: Sequence[tuple[Tensor, Tensor]],
        mask: Tensor,
        token: Tensor,
        position: Tensor,
    ) -> None:
        """Let other prompts take the places of `rows` [k], with arguments as those of `begun`, for k rows and
        S at most the ring's length. They get the S columns before `slot`."""
        count = mask.shape[1]
        columns = (self.slot - count + torch.arange(count, device=rows.device)) % self.length
        # Rows and columns [k, S], and in what is assigned the heads after them.
        places = rows[:, None], slice(None), columns[None]
        for (keys, values), (own_keys, own_values) in zip(self.layers, layers, strict=True):
            keys[places] = own_keys.transpose(1, 2)
            values[places] = own_values.transpose(1, 2)
        added = self.mask.new_full((len(rows), self.length), -torch.inf)
        added[:, columns] = _added(mask.bool(), self.mask.dtype)
        self.mask[rows] = added[:, None, None].expand(-1, *self.mask.shape[1:])
        self.token[rows], self.position[rows] = token, position

    def park(self, rows: Tensor) -> None:
        """Take the positions of rows that are done back to 0, since their steps go on: of some models the
        longest position chooses the frequencies of RoPE."""
        self.position.index_fill_(0, rows, 0)

    def _step(self) -> None:
        """One step, on the device alone: nothing in it depends on the host."""
        self.mask.index_fill_(3, self.slot, 0.0)
        with self._attending():
            logits = self.model(
                input_ids=self.token,
                attention_mask=self.mask,
                position_ids=self.position,
                use_cache=False,
                logits_to_keep=1,
            ).logits
        self.token.copy_(logits[:, -1].argmax(-1, keepdim=True))
        self.position.add_(1)
        self.slot.add_(1).remainder_(self.length)

    @contextmanager
    def _attending(self) -> Iterator[None]:
        """Within this block, the model's attention modules are `attend`."""
        modules = families.attentions(self.model)
        before = [vars(module).get("forward") for module in modules]
        for module, qkv, cache in zip(modules, self.joined, self.layers, strict=True):
            module.forward = partial(attend, module, qkv, cache, self.slot, self.mask)
        try:
            yield
        finally:
            for module, own in zip(modules, before, strict=True):
                del module.forward
                if own:
                    module.forward = own


def _added(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of columns: 0 where they are `seen`, else -inf."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, -torch.inf)


def longer(kept: Tensor, length: int) -> Tensor:
    """Keys or values [B, H_kv, S, d] with room for more tokens after them: [B, H_kv, L, d], where L is at
    least `length`."""
    batch, heads, used, size = kept.shape
    whole = kept.new_zeros(batch, heads, -(-length // ALIGNED) * ALIGNED, size)
    whole[:, :, :used] = kept
    return whole


def join(module: Any) -> Linear | None:
    """Weight and bias of the module's projections of query, key and value as one, since one product takes a
    third of the time of three small ones. None where they are no plain linear layers."""
    layers = (module.q_proj, module.k_proj, module.v_proj)
    if any(type(layer) is not nn.Linear or not isinstance(layer.weight, Tensor) for layer in layers):
        return None
    biases = [layer.bias for layer in layers if layer.bias is not None]
    weight = torch.cat([layer.weight.detach() for layer in layers])
    return weight, torch.cat(biases).detach() if biases else None


def attend(
    module: Any,
    qkv: Linear | None,
    cache: tuple[Tensor, Tensor],
    slot: Tensor,
    mask: Tensor,
    /,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    **others,
) -> tuple[Tensor, None]:
    """What the attention `module` of a LLaMA (or one with norms of q and k) gives for one token per row,
    hidden_states [B, 1, h], with few operations: q, k and v are one product (`qkv`), q and k are rotated
    together, and the token's key and value are written into `cache` at `slot`. Returns [B, 1, h]."""
    keys, values = cache
    batch, shared, _, size = keys.shape
    if qkv:
        every = functional.linear(hidden_states, *qkv)
    else:
        layers = (module.q_proj, module.k_proj, module.v_proj)
        every = torch.cat([layer(hidden_states) for layer in layers], -1)
    every = every.view(batch, -1, size)  # [B, H + 2 H_kv, d]
    both, value = every[:, :-shared], every[:, -shared:]
    if hasattr(module, "q_norm"):
        query, key = module.q_norm(both[:, :-shared]), module.k_norm(both[:, -shared:])
        both = torch.cat([query, key], 1)
    both = rotated(both, *position_embeddings)
    keys.index_copy_(2, slot, both[:, -shared:, None])
    values.index_copy_(2, slot, value[:, :, None])
    out = grouped(both[:, :-shared], keys, values, mask, module.scaling)
    return module.o_proj(out.reshape(batch, 1, -1)), None


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of x [B, heads, d] at one position per row, cos and sin [B, 1, d]: the halves (x₁, x₂) become
    (x₁ cos - x₂ sin, x₂ cos + x₁ sin)."""
    (first, second), (sin_first, sin_second) = x.chunk(2, -1), sin.chunk(2, -1)
    out = x * cos
    half = x.shape[-1] // 2
    out[..., :half].addcmul_(second, sin_first, value=-1)
    out[..., half:].addcmul_(first, sin_second)
    return out


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
