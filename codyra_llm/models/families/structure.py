"""Finds the parts of a model or its config that its family describes: modules, shapes of attention, soft
caps."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig

from codyra_llm.core.parsing import read_json
from codyra_llm.models.families.config_file import read_config
from codyra_llm.models.families.family import Family, Tower
from codyra_llm.models.families.known import LLAMA, of, registered

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class AttentionShape:
    """The attention of one layer. `window`: to how many tokens a token attends, including itself; None: all
    before it. `own_keys`: False where it uses the keys and values of an earlier layer."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    own_keys: bool


def family_named(model_type: object) -> Family:
    """The family of a model_type; for an unknown one LLaMA, whose names most models share."""
    return registered().get(model_type, LLAMA) if isinstance(model_type, str) else LLAMA


def family_in(folder: Path) -> Family:
    """The family of a folder of weights, by its config.json where there is one. Raises Fault for a config
    that can't be read."""
    file = folder / "config.json"
    if not file.is_file():
        return LLAMA
    config = read_json(file, "the model's config")
    return family_named(config.get("model_type") if isinstance(config, dict) else None)


def text_part(config: dict) -> dict:
    """The mapping of a config.json that describes the text model."""
    tower = family_named(config.get("model_type")).tower
    part = config.get(tower.config) if tower else config
    return part if isinstance(part, dict) else {}


def text_config(folder: Path) -> PreTrainedConfig:
    """The config of the text model in `folder`. Raises Fault for one that describes no model."""
    whole = read_config(folder)
    tower = of(whole).tower
    return _config_in(whole, tower) if tower else whole


def _config_in(whole: PreTrainedConfig, tower: Tower) -> PreTrainedConfig:
    """The text model's config inside that of a model with several towers. The whole model's says whether the
    head is tied, and this is set in the text model's too."""
    text = getattr(whole, tower.config)
    text.tie_word_embeddings = whole.tie_word_embeddings
    return text


def text_model(whole: "PreTrainedModel") -> "PreTrainedModel":
    """The text model of a whole one, around the same modules."""
    from transformers import AutoModelForCausalLM  # slow to import, and methods' files import this one

    tower = of(whole.config).tower
    if tower is None:
        return whole
    text = _config_in(whole.config, tower)
    family = of(text)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(text, dtype=whole.dtype)
    model.set_submodule(family.backbone, whole.get_submodule(tower.module))
    model.set_submodule(family.head, whole.get_output_embeddings())
    model.config._attn_implementation_internal = text._attn_implementation_internal
    model.generation_config = whole.generation_config
    return model


def pretrained(model: nn.Module) -> "PreTrainedModel":
    """The same model, typed as transformers' class for attributes that `nn.Module` does not declare: config,
    device, embeddings. In the hooks of methods and in accelerate its type is `nn.Module`."""
    return cast("PreTrainedModel", model)


def backbone(model: nn.Module) -> nn.Module:
    """The module that computes the last hidden states."""
    return model.get_submodule(of(model.config).backbone)


def head(model: nn.Module) -> nn.Linear:
    """The language model's head."""
    return cast(nn.Linear, model.get_submodule(of(model.config).head))


def blocks(model: nn.Module) -> nn.ModuleList:
    """The model's blocks, in order."""
    return cast(nn.ModuleList, model.get_submodule(of(model.config).blocks))


def set_blocks(model: nn.Module, chosen: nn.ModuleList) -> None:
    """Let the model consist of these blocks."""
    parent, _, leaf = of(model.config).blocks.rpartition(".")
    setattr(model.get_submodule(parent), leaf, chosen)


def attentions(model: nn.Module) -> list[Any]:
    """The attention module of each block, in order; of a class of transformers' own."""
    name = of(model.config).attention
    return [block.get_submodule(name) for block in blocks(model)]


def projections(model: nn.Module) -> dict[str, nn.Linear]:
    """The projections of all blocks by name."""
    leaves = of(model.config).projections
    return {
        name: module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in leaves and isinstance(module, nn.Linear)
    }


def softcap(model: nn.Module) -> float | None:
    """c of logits c·tanh(z/c), where the model has one."""
    return getattr(model.config, "final_logit_softcapping", None)


def attention_softcap(config: PreTrainedConfig) -> float | None:
    """c of attention scores c·tanh(s/c), where the model has one."""
    return getattr(config, "attn_logit_softcapping", None)


def attention_shapes(config: PreTrainedConfig) -> list[AttentionShape]:
    """The attention of each layer, in order."""
    count = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    layers_differ = getattr(config, "is_heterogeneous", False)
    with_own_keys = count - (getattr(config, "num_kv_shared_layers", None) or 0)  # the first so many layers
    shapes = []
    for number in range(count):
        layer = config.per_layer_config[number] if layers_differ else config
        slides = kinds is None or kinds[number] == "sliding_attention"
        shapes.append(
            AttentionShape(
                heads=layer.num_attention_heads,
                kv_heads=layer.num_key_value_heads,
                head_dim=getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads,
                window=window if slides else None,
                own_keys=number < with_own_keys,
            )
        )
    return shapes


def windows(config: PreTrainedConfig) -> list[int]:
    """The sliding windows of the layers that have one, in tokens."""
    return [shape.window for shape in attention_shapes(config) if shape.window]


def rope_type(config: PreTrainedConfig) -> str:
    """The kind of RoPE, by transformers' names; "default" where layers have kinds of their own."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return parameters.get("rope_type") or "default"


def takes_embeddings(config: PreTrainedConfig) -> bool:
    """Whether a text may be preceded by embeddings that belong to no token. Not where every layer adds
    embeddings of the tokens themselves (Gemma 4's per-layer embeddings)."""
    return not getattr(config, "hidden_size_per_layer_input", None)


def shortened(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The config of the model's first layers alone."""
    cut = copy.deepcopy(config)
    cut.num_hidden_layers = layers
    kinds = getattr(config, "layer_types", None)
    if kinds:
        cut.layer_types = kinds[:layers]
    if hasattr(config, "num_kv_shared_layers"):
        cut.num_kv_shared_layers = max(0, layers - config.num_hidden_layers + config.num_kv_shared_layers)
    return cut
