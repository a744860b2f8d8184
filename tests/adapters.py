"""Recipes and models of three linear layers that several tests of LoRA methods share."""

from types import SimpleNamespace

import torch
from torch import nn

from codyra_llm.config.recipe import parse_recipe
from codyra_llm.config.registry import METHODS
from codyra_llm.lora.layer import sites
from codyra_llm.methods.base import Task

TASKS = ["ONE", "TWO", "THREE"]


def recipe(model, stream, out, method):
    return parse_recipe(
        {
            "model": {"path": str(model)},
            "data": {"root": str(stream), "tasks": TASKS, "epochs": 2},
            "method": {"rank": 4, **method},
            "optim": {"lr": 1e-2, "batch_size": 8, "loss_average": "token"},
            "output": str(out),
            "checkpoint": False,
            "eval": {"max_new_tokens": 2, "max_examples": 1},
        }
    )


SIZES = {"q_proj": (6, 5), "v_proj": (6, 3), "down_proj": (8, 6)}  # (in, out)


def attached(name, seed=0, **config):
    """A method on three linear layers of two input sizes, drawn adapters with B ≠ 0, and its model."""
    torch.manual_seed(seed)
    model = nn.ModuleDict({site: nn.Linear(*size, bias=False) for site, size in SIZES.items()})
    kind = METHODS[name]
    method = kind(kind.Config(**{"rank": 3, "targets": list(SIZES), **config}), 7)
    method.attach(model)
    return method, model


def a_task(index, archive=None, state=None, epochs=1):
    return Task(index, archive, SimpleNamespace(epochs=[epochs] * 9, tasks=TASKS), None, None, state or {})


def drawn(model, seed):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in sites(model).values():
            layer.lora_A.normal_(generator=draw)
            layer.lora_B.normal_(generator=draw)


SECTIONS = {
    "l2p": {"name": "l2p", "pool": 4, "length": 3, "chosen": 2},
    "dualprompt": {
        "name": "dualprompt",
        "general_layers": [0],
        "general_length": 2,
        "expert_layers": [1],
        "expert_length": 4,
    },
    "pp": {"name": "pp", "length": 4, "mlp_width": 16},
}
