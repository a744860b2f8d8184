"""The files of a PEFT adapter: whether a folder holds one, and what their headers say."""

from pathlib import Path

from codyra_llm.models import families
from codyra_llm.models.loading import missing_files
from codyra_llm.models.weights import stored, weight_files

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."  # of an adapter's names, in front of the base's


def of_vocabulary(name: str) -> bool:
    """Whether a module or weight of this name belongs to the embeddings or the head of some family."""
    return any(part in name for part in _embeddings() | _heads())


def _embeddings() -> set[str]:
    return {family.embeddings.rpartition(".")[2] for family in families.registered().values()}


def _heads() -> set[str]:
    return {family.head.rpartition(".")[2] for family in families.registered().values()}


def is_adapter(folder: Path) -> bool:
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
            "it write it anew with PEFT, by PeftModel.from_pretrained(base, folder).save_pretrained(folder)."
        ]
    return [f"{folder} has no {WEIGHTS}: expected the adapter's weights; copy them there."]


def vocabulary(folder: Path) -> int | None:
    """How many tokens the model had that the adapter was saved from: the rows of the embeddings or the head
    that it holds whole or adapts; None where it leaves both alone."""
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
