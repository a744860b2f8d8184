"""Levels `linear` and `block`: one adapted linear layer, and one decoder layer with all seven projections
adapted.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, LlamaConfig, PreTrainedConfig

from codyra_llm.bench.arms import ARMS, NOTES, Arm, draw, exact
from codyra_llm.bench.measure import Contestant, Options, compare, machine
from codyra_llm.models import families
from codyra_llm.models.loading import resolve
from codyra_llm.runtime.memory import saved_bytes

LLAMA_3_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}

SMOLLM2_135M: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}


class Linear(nn.Module):
    """One linear layer, under a name that takes adapters."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.config = LlamaConfig()  # its family tells which layers take adapters, by their names
        self.q_proj = nn.Linear(width, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """One projection."""
        return self.q_proj(x)


class Block(nn.Module):
    """The first decoder layer of a family, between rotary embedding and last norm."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.config = families.shortened(config, 1)
        self.config.vocab_size, self.config.pad_token_id = 2, None
        self.decoder = AutoModel.from_config(self.config)

    def forward(self, x: Tensor) -> Tensor:
        """All layers of a decoder."""
        return self.decoder(inputs_embeds=x, use_cache=False).last_hidden_state


def linear(options: Options) -> dict:
    """x [N, in] -> y [N, out], forward and backward with the gradient of x."""
    default = (8192, 4096, 4096, 16) if options.device.type == "cuda" else (1024, 576, 1536, 16)
    rows, width, out, rank = options.sizes("N,in,out,r", default)
    torch.manual_seed(0)
    return _measure("linear", Linear(width, out), (rows, width), rank, options)


def block(options: Options) -> dict:
    """x [rows, T, hidden] through attention and MLP, forward and backward with the gradient of x."""
    cuda = options.device.type == "cuda"
    if options.model:
        config = families.text_config(resolve(options.model))
    else:
        config = LlamaConfig(**(LLAMA_3_8B if cuda else SMOLLM2_135M))
    rows, length, rank = options.sizes("rows,T,r", (4, 2048, 16) if cuda else (4, 256, 16))
    torch.manual_seed(0)
    return _measure("block", Block(config), (rows, length, config.hidden_size), rank, options)


def _measure(level: str, base: nn.Module, shape: tuple[int, ...], rank: int, options: Options) -> dict:
    base = base.to(options.device, options.dtype).requires_grad_(False)
    numbers, names = draw(base, rank), options.chosen(list(ARMS))
    x = torch.randn(shape, device=options.device).to(options.dtype).requires_grad_()
    with torch.no_grad():
        dy = torch.randn_like(base(x))
    contestants = {
        name: _contestant(ARMS[name](base, numbers), exact(base, numbers, name), x, dy) for name in names
    }
    return {
        "level": level,
        "shape": [f"x {list(shape)}", f"y {list(dy.shape)}", f"r={rank}"],
        "machine": machine(options),
        "arms": compare(contestants, options, options.rounds or 20),
        "notes": [f"{name}: {NOTES[name]}" for name in names],
    }


def _contestant(arm: Arm, reference: Arm, x: Tensor, dy: Tensor) -> Contestant:
    expected = _outcome(reference, x.detach().double().requires_grad_(), dy.double())
    return Contestant(
        lambda: _outcome(arm, x, dy),
        expected,
        lambda _: _forward_backward(arm, x, dy),
        lambda: saved_bytes(lambda: _forward(arm, x), [x, *arm.model.parameters()]),
    )


def _forward(arm: Arm, x: Tensor) -> Tensor:
    with arm.context(x.device):
        return arm.model(x)


def _forward_backward(arm: Arm, x: Tensor, dy: Tensor) -> Tensor:
    x.grad = None
    arm.forget_gradients()
    y = _forward(arm, x)
    y.backward(dy.to(y.dtype))
    return y.detach()


def _outcome(arm: Arm, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    y = _forward_backward(arm, x, dy)
    return {"y": y, "dx": x.grad, **arm.gradients()}
