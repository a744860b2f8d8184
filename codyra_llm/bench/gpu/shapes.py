"""Models with random weights in the shapes of real ones, and examples of random tokens: nothing is
fetched.
"""

import random
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, PreTrainedConfig, PreTrainedModel

from codyra_llm.bench.gpu.context import Context
from codyra_llm.bench.layers import LLAMA_3_8B
from codyra_llm.bench.step import RANK
from codyra_llm.config.registry import METHODS
from codyra_llm.data.encoding import Encoded
from codyra_llm.lora.shared import share_inputs
from codyra_llm.methods.base import Method
from codyra_llm.models import fused_norm

CONFIGS = {
    "llama-3.2-1b": LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128256,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
    ),
    "four layers of llama-3-8b": LlamaConfig(**LLAMA_3_8B, num_hidden_layers=4, vocab_size=128256),
    "gemma-2b": GemmaConfig(
        hidden_size=2048,
        intermediate_size=16384,
        num_hidden_layers=18,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=256,
        vocab_size=256000,
    ),
}
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 2048,
    "max_position_embeddings": 1024,
}
# (least, most) tokens of a prompt, and of an answer: about those of FOMC and NumGLUE, and of MeetingBank.
SHORT = (60, 150), (2, 20)
LONG = (600, 1024), (40, 120)
PAD = 0


def config(context: Context, name: str) -> PreTrainedConfig:
    """A config of that shape; with --tiny of a small model of the same family. A new one each time, since a
    model that packs its rows says so in its config."""
    made = CONFIGS[name]
    return type(made)(**(made.to_dict() | (TINY if context.tiny else {})))


def model(context: Context, name: str, layers: int | None = None) -> PreTrainedModel:
    """Random weights in bfloat16 on the device, frozen; with only its first `layers` layers, if given."""
    shape = config(context, name)
    if layers is not None:
        fewer: dict[str, Any] = {"num_hidden_layers": layers}
        shape = type(shape)(**(shape.to_dict() | fewer))
    torch.manual_seed(0)
    with torch.device(context.device):
        made = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    return made.requires_grad_(False)


def skeleton(context: Context, name: str) -> PreTrainedModel:
    """The model of that shape without weights, on the meta device."""
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config(context, name), dtype=torch.bfloat16)
    return made.requires_grad_(False)


def adapted(made: PreTrainedModel, context: Context) -> Method:
    """Give the model the adapters of a codyra run, and put it into train mode; returns the method."""
    method = METHODS["codyra"](METHODS["codyra"].Config(rank=RANK), 0)
    if context.cuda:
        fused_norm.replace(made)
    method.attach(made)
    share_inputs(made)
    if made.device.type != "meta":
        method.begin_task(made, SimpleNamespace(index=0))
    made.train()
    return method


def examples(context: Context, count: int, long: bool = False) -> list[Encoded]:
    """`count` examples of random tokens, the same in every process; with --tiny a tenth as long."""
    draw, scale = random.Random(f"{count} {long}"), 10 if context.tiny else 1

    def tokens(bounds: tuple[int, int]) -> list[int]:
        length = max(2, draw.randint(*bounds) // scale)
        return [draw.randrange(5, 1000) for _ in range(length)]

    prompts, answers = LONG if long else SHORT
    return [Encoded(tokens(prompts), tokens(answers), False) for _ in range(count)]
