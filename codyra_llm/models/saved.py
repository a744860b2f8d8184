"""Writes model folders: a copy of a base in which only the weights differ, and a model that has no files of
its own.

What training did not change is copied byte for byte: transformers would rewrite configs and tokenizers in the
layout of its own major version, which older versions misread without an error."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from codyra_llm.core.errors import Fault
from codyra_llm.core.parsing import read_json
from codyra_llm.core.tensors import save_tensors
from codyra_llm.models.weights import FLOATING, INDEX, SINGLE, weight_files
from codyra_llm.runtime.quiet import without_weight_bars

MODEL = ("config.json", "generation_config.json")
TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "*processor_config.json",  # of images, where the base has a vision tower
)
TERMS = ("LICENSE*", "NOTICE*", "USE_POLICY*")  # which the base's licence may ask to be passed on

NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

UNLIMITED = 1 << 53  # transformers writes 10^30 where there is no limit
# Keys of tokenizer_config.json that say how a tokenizer was loaded, not what it is.
LOADED = ("backend", "is_local", "local_files_only", "padding_side", "truncation_side", "processor_class")


def copied(base: Path, patterns: tuple[str, ...]) -> list[Path]:
    """The base's files of these patterns, relative to it, sorted."""
    found = {file for pattern in patterns for file in base.glob(pattern) if file.is_file()}
    return sorted(file.relative_to(base) for file in found)


def copy_files(base: Path, folder: Path, patterns: tuple[str, ...]) -> None:
    """Copy the base's files of these patterns into `folder`, byte for byte."""
    for name in copied(base, patterns):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base / name, folder / name)


def copy_model(
    base: Path, folder: Path, changed: Callable[[str, Tensor], Tensor], dtype: torch.dtype | None = None
) -> None:
    """Write the base's model into `folder`, each weight as `changed(name, stored)` gives it, in the base's
    own files and under its own names. Floating-point weights are in `dtype`, by default in the one that the
    base stores each of them in; everything else of the base is copied as it is.

    One file of the base is held in memory at a time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    copy_files(base, folder, (*MODEL, *TOKENIZER, *TERMS))
    files = weight_files(base)
    for file in files:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
            tensors = {
                name: _written(name, opened.get_tensor(name), changed, dtype) for name in opened.keys()
            }
        save_tensors(tensors, folder / file.name, metadata)
    if [file.name for file in files] != [SINGLE]:
        _write_index(base, folder, files)
    if dtype:
        _name_dtype(folder / "config.json", dtype)


def _written(
    name: str, weight: Tensor, changed: Callable[[str, Tensor], Tensor], dtype: torch.dtype | None
) -> Tensor:
    if not weight.is_floating_point():
        return weight
    new = changed(name, weight).to(dtype or weight.dtype).contiguous()
    if new.dtype == torch.float16 and not new.isfinite().all():
        raise Fault(
            f"--dtype: {name} holds values past float16's largest, 65504, which would become infinite; "
            "choose bfloat16 or float32"
        )
    # Two names of one parameter may be given one tensor, which safetensors refuses to store twice.
    return new if new.data_ptr() == weight.data_ptr() else new.clone()


def _write_index(base: Path, folder: Path, files: list[Path]) -> None:
    index = read_json(base / INDEX, "the model's index of shards")
    total = sum(stored_bytes(folder / file.name) for file in files)
    if index.get("metadata", {}).get("total_size") == total:
        shutil.copyfile(base / INDEX, folder / INDEX)
        return
    index["metadata"] = {**index.get("metadata", {}), "total_size": total}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _name_dtype(file: Path, dtype: torch.dtype) -> None:
    """Set the dtype that a config names; the file is unchanged if it is right already."""
    config, name = read_json(file, "the model's config"), str(dtype).removeprefix("torch.")
    sections = [value for key, value in config.items() if key.endswith("_config")]
    parts = [part for part in (config, *sections) if isinstance(part, dict)]
    keys = [(part, key) for part in parts for key in ("dtype", "torch_dtype") if key in part]
    keys = keys or [(config, "torch_dtype")]
    if all(part.get(key) == name for part, key in keys):
        return
    for part, key in keys:
        part[key] = name
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def stored_bytes(file: Path, dtype: torch.dtype | None = None) -> int:
    """Bytes of the tensors in a safetensors file; with `dtype`, as they would be if cast to it."""
    with safe_open(file, framework="pt") as opened:
        parts = [opened.get_slice(name) for name in opened.keys()]
        kinds = [(part.get_dtype(), torch.Size(part.get_shape()).numel()) for part in parts]
    total = 0.0
    for kind, count in kinds:
        is_cast = dtype is not None and kind in FLOATING
        total += count * _width(NAMES[dtype] if is_cast else kind)
    return int(total)


def _width(kind: str) -> float:
    """Bytes per number of a safetensors dtype, such as BF16, I64 or F8_E4M3."""
    bits = "".join(c for c in kind.partition("_")[0] if c.isdigit())
    return int(bits) / 8 if bits else 1


def size(base: Path, dtype: torch.dtype | None = None) -> int:
    """Bytes that `copy_model` writes, from headers alone."""
    weights = 0.0
    for file in weight_files(base):
        header = file.stat().st_size - stored_bytes(file)
        weights += header + stored_bytes(file, dtype)
    others = [*copied(base, (*MODEL, *TOKENIZER, *TERMS)), *copied(base, (INDEX,))]
    return int(weights) + sum((base / name).stat().st_size for name in others)


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a model that has no files of its own (from a GGUF file, or made here) as a folder that
    transformers 4 and 5, and tools based on either, read in the same way: config and tokenizer in the layout
    of published checkpoints."""
    # transformers imports DeepSpeed here if it is installed, which would warn about the CPU.
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with without_weight_bars():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rewrites = {"config.json": published_config, "tokenizer_config.json": _published_tokenizer}
    for name, rewrite in rewrites.items():
        content = rewrite(json.loads((folder / name).read_text(encoding="utf-8")))
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def published_config(config: dict[str, Any]) -> dict[str, Any]:
    """A config of transformers 5 with its RoPE settings and dtype under the names that transformers 4 writes,
    which 5 reads too."""
    out = dict(config)
    rope = out.pop("rope_parameters", None) or {}
    layered = "full_attention" in rope
    main = rope.get("full_attention", {}) if layered else rope
    if main:
        scaling = {key: value for key, value in main.items() if key != "rope_theta"}
        out["rope_theta"] = main["rope_theta"]
        out["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    if layered:
        out["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    if "dtype" in out:
        out["torch_dtype"] = out["dtype"]
    return out


def _published_tokenizer(config: dict[str, Any]) -> dict[str, Any]:
    out = {key: value for key, value in config.items() if key not in LOADED}
    if out.get("model_max_length", 0) > UNLIMITED:
        del out["model_max_length"]
    return out | {"tokenizer_class": "PreTrainedTokenizerFast"}
