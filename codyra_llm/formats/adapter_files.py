"""The files of a PEFT adapter: whether a folder holds one, and what their headers say."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from codyra_llm.core.foreign import Failed, matches
from codyra_llm.core.parsing import shown
from codyra_llm.models import families
from codyra_llm.models.loading import missing_files
from codyra_llm.models.weights import stored, weight_files

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."  # PEFT puts it in front of the base's names
MOST_RANK = 1 << 16
# Not supported: they change the base's layers, or import a module that the adapter names.
UNUSED = ("layer_replication", "megatron_config")


def of_vocabulary(name: str) -> bool:
    """Whether a module or weight of this name belongs to the embeddings or the head of some family."""
    return any(part in name for part in _embeddings() | _heads())


def _embeddings() -> set[str]:
    return {family.embeddings.rpartition(".")[2] for family in families.registered().values()}


def _heads() -> set[str]:
    return {family.head.rpartition(".")[2] for family in families.registered().values()}


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds a PEFT adapter."""
    return (folder / CONFIG).is_file()


def adapter_file_faults(folder: Path) -> list[str]:
    """Why the adapter in `folder` can't be read; empty where it can."""
    if weight_files(folder):
        return missing_files(folder)
    if (folder / WEIGHTS).is_file():
        return []
    if (folder / PICKLED).is_file():
        return [
            f"{folder} has only {PICKLED}, a pickle, which can run code: expected {WEIGHTS}; where you trust "
            "it write it again with PEFT, by PeftModel.from_pretrained(base, folder).save_pretrained(folder)."
        ]
    return [f"{folder} has no {WEIGHTS}: expected the adapter's weights; copy them there."]


def config_faults(folder: Path, config: dict[str, Any], modules: Sequence[str]) -> list[str]:
    """The settings in an adapter's config that PEFT would fail on, or never finish with, on a base with these
    modules."""
    where, faults = f"{folder}/{CONFIG}", []
    for key, rank in _ranks(config):
        if not (type(rank) is int and 1 <= rank <= MOST_RANK):
            faults.append(f"{where}: {key} is {shown(rank)}, expected 1 to {MOST_RANK:,d}; correct it")
    for key in ("rank_pattern", "alpha_pattern"):
        if config.get(key) and not isinstance(config[key], dict):
            faults.append(f"{where}: {key} is {shown(config[key])}, expected a mapping; correct it")
    for key, alpha in _alphas(config):
        if not (isinstance(alpha, int | float) and not isinstance(alpha, bool) and abs(alpha) <= 1e9):
            faults.append(f"{where}: {key} is {shown(alpha)}, expected a number up to 1e9; correct it")
    faults += [
        f"{where}: {key} is set, which is not merged here; merge the adapter where it was made, and give the "
        "merged folder"
        for key in UNUSED
        if config.get(key)
    ]
    for key, pattern in _patterns(config):
        try:
            matches(pattern, modules)
        except Failed as error:
            faults.append(f"{where}: {key} has the pattern {shown(pattern)} ({error.reason}); correct it")
    return faults


def _ranks(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every rank in a config, with its key; 8 is PEFT's default."""
    yield "r", config.get("r", 8)
    for name, rank in _mapping(config, "rank_pattern").items():
        yield f"rank_pattern.{name}", rank


def _alphas(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every alpha in a config, with its key; 8 is PEFT's default."""
    yield "lora_alpha", config.get("lora_alpha", 8)
    for name, alpha in _mapping(config, "alpha_pattern").items():
        yield f"alpha_pattern.{name}", alpha


def _mapping(config: dict[str, Any], key: str) -> dict:
    """The mapping at a key; an empty one where there is none."""
    found = config.get(key)
    return found if isinstance(found, dict) else {}


def _patterns(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The regular expressions that PEFT makes of a config, each with its key."""
    for key in ("target_modules", "exclude_modules", "target_parameters"):
        pattern = config.get(key)
        if isinstance(pattern, str):
            yield key, pattern
    for key in ("rank_pattern", "alpha_pattern"):
        for name in _mapping(config, key):
            yield key, rf"(.*\.)?({name})"
    layers = config.get("layers_pattern")
    if isinstance(layers, str):
        layers = [layers]
    for name in layers if isinstance(layers, list) else ():
        yield "layers_pattern", rf".*\.{name}\.(\d+)\..*"


def module_names(weights: Sequence[str]) -> list[str]:
    """The modules that hold weights of these names, and those around them, sorted."""
    found = set()
    for name in weights:
        parts = name.split(".")[:-1]
        found |= {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
    return sorted(found)


def vocabulary(folder: Path) -> int | None:
    """The vocabulary size of the model that the adapter was saved from, by the embeddings or head that it
    holds whole or adapts; None where it leaves both alone."""
    for name, (shape, _) in stored(folder / WEIGHTS).items():
        if not of_vocabulary(name):
            continue
        if ".lora_" not in name and ".token_adapter." not in name:  # a module that was saved whole
            return shape[0]
        if "lora_embedding_A" in name:  # [rank, tokens]
            return shape[1]
        if ".lora_B." in name and any(part in name for part in _heads()):  # [tokens, rank]
            return shape[0]
    return None
