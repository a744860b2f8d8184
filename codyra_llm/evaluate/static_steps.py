"""Decoding steps whose tensors stay at fixed addresses, so that a GPU replays one recorded step (a CUDA
graph): a step of a small batch is hundreds of kernels, and launching them takes the host longer than the GPU
runs them.
"""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel, StaticCache

from codyra_llm.models import families

NAME = "grouped"
LEAST = 12  # steps left for recording to pay: it costs about as much as four steps that are not recorded


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
        layers: list[tuple[Tensor, Tensor]],
        mask: Tensor,
        token: Tensor,
        position: Tensor,
        left: int,
    ):
        self.model, self.left, self.used = model, left, layers[0][0].shape[2]
        self.cache = StaticCache(config=model.config, max_cache_len=self.used + left)
        for number, (keys, values) in enumerate(layers):
            self.cache.update(keys, values, number)
        self.seen = mask.new_zeros(len(mask), 1, 1, self.used + left, dtype=torch.bool)
        self.seen[:, 0, 0, : mask.shape[1]] = mask.bool()
        self.token, self.position = token.clone(), position.clone()
        self.slot = torch.full((1,), self.used, device=mask.device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def next(self) -> Tensor:
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
        layers = [
            (layer.keys[rows, :, : self.used], layer.values[rows, :, : self.used])
            for layer in self.cache.layers
        ]
        mask = self.seen[rows, 0, 0, : self.used + 1]
        mask[:, -1] = True
        return StaticSteps(self.model, layers, mask, self.token[rows], self.position[rows], self.left)

    def _step(self) -> None:
        """One step, on the device alone: nothing in it depends on the host."""
        self.seen.index_fill_(3, self.slot, True)
        logits = self.model(
            input_ids=self.token,
            attention_mask=self.seen,
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        self.token.copy_(logits[:, -1].argmax(-1, keepdim=True))
        self.position.add_(1)
        self.slot.add_(1)


def use(model: PreTrainedModel) -> None:
    """Let `model` attend as recorded steps do: one query per row."""
    AttentionInterface.register(NAME, grouped)
    model.set_attn_implementation(NAME)


def grouped(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    *,
    scaling: float,
    **others,
) -> tuple[Tensor, None]:
    """Attention of one query per row, [B, H, 1, d], to key and value [B, H_kv, S, d]: [B, 1, H, d].

    The H / H_kv heads that read one key head are the rows of one product, so keys and values are read once
    and copied nowhere. `attention_mask` [B, 1, 1, S] is true where a row may look.
    """
    batch, heads, _, size = query.shape
    shared = key.shape[1]
    together = query.reshape(batch, shared, heads // shared, size)  # [B, H_kv, H / H_kv, d]
    scores = (together @ key.mT).to(torch.promote_types(query.dtype, torch.float32)) * scaling
    weights = scores.masked_fill(~attention_mask, -torch.inf).softmax(-1).to(query.dtype)
    return (weights @ value).view(batch, 1, heads, size), None
