"""PEFT LoRA adapters from any source: check one against its base by headers alone, and merge it."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from codyra_llm.core.errors import Fault
from codyra_llm.core.parsing import read_mapping, shown
from codyra_llm.formats.adapter_files import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    adapter_file_faults,
    config_faults,
    module_names,
    of_vocabulary,
    vocabulary,
)
from codyra_llm.models import families, loading
from codyra_llm.models.families.config_file import explain_errors, size_faults
from codyra_llm.models.weights import stored, stored_shapes, weight_files


class Base(NamedTuple):
    """A base model: a folder, hub id or GGUF file, and the revision of a hub id (None: the newest)."""

    path: str
    revision: str | None = None


def base_of(folder: Path, given: Base | None) -> Base:
    """The base that the adapter in `folder` belongs to: the one `given`, or the one that its config names, at
    the revision that it names. Raises Fault, before anything is loaded, for a folder that is not a plain LoRA
    adapter of that base."""
    config = _lora_config(folder)
    named = _named_base(folder, config)
    base = given or named
    if base is None:
        raise Fault(f"{folder}/{CONFIG} names no base_model_name_or_path; give the base with --base")
    try:
        weights = loading.resolve(*base)
    except Fault as fault:
        if given:
            raise
        raise Fault(
            f"{folder}/{CONFIG} names a base that can't be used here ({fault}); give the base with --base"
        ) from None
    names = [name for file in weight_files(weights) for name in stored(file)]
    faults = config_faults(folder, config, module_names(names))
    if faults:
        raise Fault(*faults)
    _check_shapes(folder, weights)
    return base


def _lora_config(folder: Path) -> dict[str, Any]:
    """The config of the adapter in `folder`. Raises Fault where its files are not those of a LoRA adapter, or
    peft is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError:
        raise Fault(
            f"{folder} is a PEFT adapter, and the package peft is not installed; install codyra-llm[peft]"
        ) from None
    faults = size_faults(folder)
    if faults:
        raise Fault(*faults)
    config = read_mapping(folder / CONFIG, "the adapter's config")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise Fault(
            f"{folder} is an adapter of peft_type {kind}, expected LORA, which can be merged into its base; "
            "merge it where it was made, and give the merged folder"
        )
    faults = adapter_file_faults(folder)
    if faults:
        raise Fault(*faults)
    return config


def _named_base(folder: Path, config: dict[str, Any]) -> Base | None:
    """The base that an adapter's config names; None where it names none. Raises Fault for a name or a
    revision that is not text."""
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if name is not None and not isinstance(name, str):
        raise Fault(
            f"{folder}/{CONFIG}: base_model_name_or_path is {shown(name)}, expected text; correct it, or "
            "give the base with --base"
        )
    if revision is not None and not isinstance(revision, str):
        raise Fault(
            f"{folder}/{CONFIG}: revision is {shown(revision)}, expected text or null; correct it, or give "
            "the base with --base"
        )
    return Base(name, revision) if name else None


def build(base: Path, adapter: Path, dtype: torch.dtype, attention: str | None) -> PreTrainedModel:
    """The base with the adapter merged in float32 and cast once, equal to PEFT's unmerged model. It gets rows
    for tokens that the adapter adds, and an untied head if the adapter changes embeddings or head and the
    base ties them. A base with several towers is loaded whole, since adapters name its parts that way; the
    result is its text model."""
    from peft import PeftModel

    model = loading.load_whole(base, torch.float32, attention)
    rows = vocabulary(adapter)
    if rows and rows != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)
    if any(of_vocabulary(name) for name in stored(adapter / WEIGHTS)):
        _untie(model)
    with explain_errors(
        f"{adapter} can't be merged into {base}",
        "give the base that it was trained on with --base, or merge it where it was made",
    ):
        merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return families.text_model(merged.to(dtype).requires_grad_(False))


def _untie(model: PreTrainedModel) -> None:
    """Give the head a parameter of its own, so that what is merged into it does not reach the embeddings."""
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False


def _check_shapes(folder: Path, base: Path) -> None:
    """Raises Fault where an adapter's factors don't fit the base's weights."""
    family = families.family_in(base)
    found = {family.whole_name(name): shape for name, (shape, _) in stored_shapes(base).items()}
    names = [name for file in weight_files(base) for name in stored(file)]
    other_towers = {_part(name) for name in names if family.own_name(name) is None}
    faults = []
    for name, (shape, _) in stored(folder / WEIGHTS).items():
        module, factor, _ = name.removeprefix(PREFIX).partition(".lora_")
        letter = name.rpartition(".lora_")[2].split(".")[0]
        weight = found.get(f"{module}.weight")
        if not factor or letter not in "AB" or of_vocabulary(module):
            continue
        if weight is None:
            if _part(module) not in other_towers:  # which no text reaches
                faults.append(f"{folder} adapts {shown(module)}, which the base {base} lacks")
            continue
        axis = 1 if letter == "A" else 0  # A [rank, in], B [out, rank]
        if shape[axis] != weight[axis]:
            faults.append(
                f"{folder} has {shown(name)} of shape {shape}, and the weight of the base {base} has {weight}"
            )
    if faults:
        raise Fault(f"{faults[0]}; give the base that it was trained on with --base")


def _part(name: str) -> str:
    """The part of a whole model that a name belongs to, e.g. vision_tower."""
    return name.removeprefix("model.").partition(".")[0]
