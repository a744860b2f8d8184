"""The families that are supported, those that packages add, and why a model is of none of them."""

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from codyra_llm.core.errors import Fault
from codyra_llm.core.parsing import shown
from codyra_llm.models.families.family import Family, Tower

GROUP = "codyra_llm.families"  # of the entry points by which packages add theirs

# What configs call the number of their experts: Llama 4 and Mixtral, Qwen and Gemma 4, DeepSeek.
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")

LLAMA = Family(
    "LLaMA 1 to 3",
    ("llama",),
    fused_norms=("LlamaRMSNorm",),
    turn_ends=("<|eot_id|>", "<|eom_id|>"),
    recorded_steps=True,
    gguf="llama",
)
GEMMA = Family(
    "Gemma 1",
    ("gemma",),
    norm="1+w",
    fused_norms=("GemmaRMSNorm",),
    needs_bos=True,
    turn_ends=("<end_of_turn>",),
    recorded_steps=True,
    gguf="gemma",
)
GEMMA2 = replace(
    GEMMA,
    title="Gemma 2",
    model_types=("gemma2",),
    fused_norms=("Gemma2RMSNorm",),
    recorded_steps=False,
    gguf="gemma2",
)
GEMMA3 = replace(
    GEMMA2, title="Gemma 3", model_types=("gemma3_text",), fused_norms=("Gemma3RMSNorm",), gguf="gemma3"
)
LANGUAGE_MODEL = Tower(
    prefixes=("language_model.model.", "model.language_model."),  # of Gemma 3 as published; of Gemma 4
    heads=("language_model.lm_head", "lm_head"),
    module="model.language_model",
)
# Its norms multiply by w, unlike those of the Gemmas before it.
GEMMA4 = Family("Gemma 4", ("gemma4_text", "gemma4_unified_text"), needs_bos=True)
MISTRAL = Family("Mistral", ("mistral",), fused_norms=("MistralRMSNorm",), recorded_steps=True, gguf="llama")
QWEN2 = Family(
    "Qwen 2",
    ("qwen2",),
    fused_norms=("Qwen2RMSNorm",),
    turn_ends=("<|im_end|>",),
    recorded_steps=True,
    gguf="qwen2",
)
QWEN3 = replace(QWEN2, title="Qwen 3", model_types=("qwen3",), fused_norms=("Qwen3RMSNorm",), gguf="qwen3")

WHOLE_GEMMA3 = replace(GEMMA3, model_types=("gemma3",), tower=LANGUAGE_MODEL)
WHOLE_GEMMA4 = replace(GEMMA4, model_types=("gemma4", "gemma4_unified"), tower=LANGUAGE_MODEL)
FAMILIES = (LLAMA, GEMMA, GEMMA2, GEMMA3, WHOLE_GEMMA3, GEMMA4, WHOLE_GEMMA4, MISTRAL, QWEN2, QWEN3)

_registered = {model_type: family for family in FAMILIES for model_type in family.model_types}


def register(family: Family) -> Family:
    """Support models of this family from now on, in this process. Raises Fault for a model_type that another
    family has."""
    for model_type in family.model_types:
        other = _registered.get(model_type)
        if other not in (None, family):
            raise Fault(
                f"family '{family.title}': the model_type {shown(model_type)} belongs to {other.title}; "
                "register a model_type that no other family has"
            )
    _registered.update(dict.fromkeys(family.model_types, family))
    return family


@cache
def _from_packages() -> None:
    """Register the families of installed packages; cached, so that this is done once."""
    for entry in entry_points(group=GROUP):
        try:
            offered = entry.load()
        except Exception as error:  # whatever the import of another package raises
            raise Fault(
                f"the entry point '{entry.name}' of {GROUP} can't be loaded ({error}); fix or uninstall "
                f"the package of {entry.value}"
            ) from None
        if not isinstance(offered, Family):
            raise Fault(
                f"the entry point '{entry.name}' of {GROUP} names {entry.value}, a {type(offered).__name__}: "
                "expected a codyra_llm.models.families.Family; correct it in that package"
            )
        register(offered)


def registered() -> dict[str, Family]:
    """All families by model_type."""
    _from_packages()
    return dict(_registered)


def of(config: Any) -> Family:
    """The family of a config of transformers. Raises Fault for one of no family."""
    _from_packages()
    family = _registered.get(config.model_type)
    if family is None:
        raise Fault(f"the model has {_unknown(config.model_type)}")
    return family


def refusals(folder: Path, config: dict) -> list[str]:
    """Why models of this config.json are not trained here; empty where they are."""
    kind, parts = config.get("model_type"), _parts(config)
    if any(part.get(key) for part in parts for key in EXPERTS):
        called = "Llama 4, which is " if kind in ("llama4", "llama4_text") else ""
        return [
            f"{folder} ({shown(kind)}) is {called}a mixture of experts: its blocks choose by token among "
            "several MLPs, of which each sees a part of the data, and adapters here go to blocks whose one "
            f"MLP sees every token. Choose a dense model ({titles()})."
        ]
    family = registered().get(kind) if isinstance(kind, str) else None
    if family is None and "vision_config" in config:
        return [
            f"{folder} ({shown(kind)}) reads images as well as text, and where its text model lies is not "
            f"known here: choose a model of type {', '.join(registered())}."
        ]
    if family is None:
        return [f"{folder} has {_unknown(kind)}"]
    if any(part.get("use_bidirectional_attention") in (True, "all") for part in parts):
        return [
            f"{folder} ({shown(kind)}) attends to later tokens too (use_bidirectional_attention), as models "
            "that embed texts do: expected one that goes on with a text; choose a model that generates."
        ]
    key = family.tower.config if family.tower else None
    if key and not isinstance(config.get(key), dict):
        return [
            f"{folder}/config.json has no mapping '{key}': expected the config of the text model there; "
            "download it again."
        ]
    return []


def titles() -> str:
    """The families as people call them."""
    return ", ".join(dict.fromkeys(family.title for family in registered().values()))


def _parts(config: dict) -> Iterable[dict]:
    """The config, and that of its text model where it is nested."""
    nested = [value for key, value in config.items() if key.endswith("text_config")]
    return [config, *(part for part in nested if isinstance(part, dict))]


def _unknown(kind: object) -> str:
    return f"model_type {shown(kind)}: expected one of {', '.join(registered())}; choose such a model."
