"""Layers that share an input, and the MLP as one function: against plain autograd, in operations, and in
bytes saved.
"""

from copy import deepcopy

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from codyra_llm.config.methods.base import PROJECTIONS
from codyra_llm.lora.layer import AdapterSpec, attach, sites
from codyra_llm.lora.shared import share_inputs
from codyra_llm.models.quantize import QuantizedLinear, quantize

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 60,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class Copies(dict):
    """Configurations, of which every reader gets a copy: `from_config` writes the dtype that it is asked for
    into the one that it is given."""

    def __getitem__(self, name: str):
        return deepcopy(super().__getitem__(name))


CONFIGS = Copies(
    {
        "llama": LlamaConfig(**SIZES),
        "llama with biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
        "gemma": GemmaConfig(**SIZES),
        "gemma2": Gemma2Config(**SIZES, sliding_window=4),
        "gemma3": Gemma3TextConfig(
            **SIZES, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
        ),
        "mistral": MistralConfig(**SIZES),
        "qwen2": Qwen2Config(**SIZES),
        "qwen3": Qwen3Config(**SIZES),
    }
)


IDS = torch.arange(3, 27).view(2, 12)


def adapted(
    config,
    fused,
    *,
    dtype=torch.float64,
    targets=PROJECTIONS,
    dropout=0.0,
    importance="normal",
    checkpointing=False,
):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype).requires_grad_(False).train()
    attach(model, list(targets), AdapterSpec(4, 1.3, dropout, importance))
    for name, layer in sites(model).items():
        layer.reset(0, name)
        nn.init.normal_(layer.lora_B, std=0.1)
    if fused is not None:
        share_inputs(model, fused)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def loss_and_gradients(model, autocast=False):
    torch.manual_seed(1)  # dropout
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(IDS).logits.double().square().mean()
    loss.backward()
    return [loss.detach()] + [p.grad for p in model.parameters() if p.requires_grad]


def distances(found, expected):
    return [
        ((a.double() - b.double()).norm() / b.double().norm()).item()
        for a, b in zip(found, expected, strict=True)
    ]


def saved_bytes(action, *held) -> int:
    """Bytes that `action` leaves for backward, each storage once, without those of the tensors `held`."""
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = action()
    for t in held:
        storages.pop(t.untyped_storage().data_ptr(), None)
    assert out is not None
    return sum(storages.values())


def quantised_pair(config, kind, dtype=torch.float32, targets=PROJECTIONS, checkpointing=False, fused=True):
    """A quantised model with adapters, and the same one with plain weights that hold what the packed ones
    stand for.
    """
    pair = []
    for packed in (True, False):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).to(dtype).requires_grad_(False).train()
        with torch.no_grad():
            for name, p in model.named_parameters():  # fresh biases are zero
                if name.endswith("bias"):
                    p.normal_(std=0.1)
        quantize(model, kind)
        if not packed:
            for name, module in list(model.named_modules()):
                if isinstance(module, QuantizedLinear):
                    plain = nn.Linear(module.in_features, module.out_features, dtype=dtype)
                    plain.weight, plain.bias = (
                        nn.Parameter(module.weight.dequantize(dtype), False),
                        module.bias,
                    )
                    parent, _, leaf = name.rpartition(".")
                    setattr(model.get_submodule(parent), leaf, plain)
        torch.manual_seed(1)
        attach(model, list(targets), AdapterSpec(4, 1.3, 0.0, "normal"))
        for name, layer in sites(model).items():
            layer.reset(0, name)
            nn.init.normal_(layer.lora_B, std=0.1)
        share_inputs(model, fused)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        pair.append(model)
    return pair
