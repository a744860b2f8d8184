"""The description of a model family. `known.py` has the families, `structure.py` reads models by them."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from codyra_llm.config.methods.base import PROJECTIONS


@dataclass(frozen=True)
class Tower:
    """Where the text model is in a checkpoint that has towers for images or sound as well.

    `prefixes`: what the names of the text backbone's weights begin with, one for each layout in which
    checkpoints of the family are stored. `heads`: what the head is called there. `module`: the backbone
    in the whole model as transformers builds it; PEFT adapters name their sites by it.
    """

    prefixes: tuple[str, ...]
    heads: tuple[str, ...]
    module: str
    config: str = "text_config"  # the key of the text model's config


@dataclass(frozen=True)
class Family:
    """The structure of a causal language model of transformers: dense blocks, one after the other.

    Names are paths of modules, those of blocks, embeddings and head as seen from the causal LM. Sizes, soft
    caps and sliding windows are read from the config, under the names that transformers gives them
    (`structure.py`). The defaults are LLaMA's, so that a family states what differs.
    """

    title: str  # for people, e.g. "Gemma 2"
    model_types: tuple[str, ...]  # of config.json
    backbone: str = "model"  # gives the last hidden states
    blocks: str = "model.layers"
    attention: str = "self_attn"  # in a block
    embeddings: str = "model.embed_tokens"
    head: str = "lm_head"
    projections: tuple[str, ...] = PROJECTIONS  # linear layers of a block that adapters and packing go to
    # Projections of one module that read the same input, in the order in which the module calls them.
    siblings: tuple[tuple[str, ...], ...] = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
    # (gate, up, down, activation) of an MLP that computes down(act(gate(x)) ⊙ up(x)); None: no other.
    gated_mlp: tuple[str, str, str, str] | None = ("gate_proj", "up_proj", "down_proj", "act_fn")
    norm: Literal["w", "1+w"] = "w"  # what a norm of weight w multiplies x / rms(x) by
    # Classes of norms that one kernel may replace: w · x / rms(x), with `weight` and `variance_epsilon`, or
    # (1 + w) · x / rms(x) in float32, with `weight` and `eps`.
    fused_norms: tuple[str, ...] = ()
    needs_bos: bool = False  # whether it was pretrained with BOS before every text, and needs it
    turn_ends: tuple[str, ...] = ()  # tokens that end a turn in the family's own chats
    # Whether `evaluate/static_steps.py` may attend in place of its modules, and whether training is the same
    # kernels for every micro-batch of a shape (`train/recorded.py`).
    recorded_steps: bool = False
    gguf: str | None = None  # llama.cpp's architecture, where a GGUF export is known to be computed alike
    tower: Tower | None = None  # None: the checkpoint is the text model

    def own_name(self, stored: str) -> str | None:
        """The name in the text model of what a checkpoint stores as `stored`; None for other towers'."""
        if self.tower is None:
            return stored
        for prefix in self.tower.prefixes:
            if stored.startswith(prefix):
                return f"{self.backbone}.{stored.removeprefix(prefix)}"
        for head in self.tower.heads:
            if stored.startswith(f"{head}."):
                return f"{self.head}.{stored.removeprefix(f'{head}.')}"
        return None

    def own_names(self, stored: Iterable[str]) -> dict[str, str]:
        """The weights of the text model: by their name in it, the name in the checkpoint."""
        named = {name: self.own_name(name) for name in stored}
        return {own: name for name, own in named.items() if own is not None}

    def whole_name(self, own: str) -> str:
        """What transformers' model with all towers calls the weight that the text model calls `own`."""
        inside = own.startswith(f"{self.backbone}.")
        if self.tower is None or not inside:
            return own
        return self.tower.module + own.removeprefix(self.backbone)

    def renamed(self) -> dict[str, str] | None:
        """For transformers' `key_mapping`: patterns at the start of stored names, and what replaces each."""
        if self.tower is None:
            return None
        names = dict.fromkeys(self.tower.prefixes, f"{self.backbone}.")
        names |= {f"{head}.": f"{self.head}." for head in self.tower.heads if head != self.head}
        return {f"^{re.escape(start)}": own for start, own in names.items()}
