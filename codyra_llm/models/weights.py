"""What a model folder says about its weights, without loading them: the index, the files' headers, the
config's shapes.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig

from codyra_llm.core.errors import Fault, nearest
from codyra_llm.core.files import CHUNK
from codyra_llm.core.parsing import read_json, shown
from codyra_llm.models import families
from codyra_llm.models.families.config_file import explain_errors

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = (b"PK\x03\x04", b"\x80")  # how torch.save's files begin, zipped or not
FLOATING = ("F64", "F32", "F16", "BF16")
NAMED = 5  # faulty weights that are listed one by one; the rest are counted


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads, sorted by name: `model.safetensors` where there is one,
    or else those that the index names; none where there is neither. Raises Fault for an index that is broken
    or that names anything but files of the folder."""
    index = folder / INDEX
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not index.is_file():
        return []
    content = read_json(index, "the model's index of shards")
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise Fault(
            f"{index} has no mapping 'weight_map': expected the file of every weight; download it again."
        )
    outside = [name for name in shards.values() if not _is_own_shard(name)]
    if outside:
        raise Fault(
            f"{index} names {shown(outside[0])}: expected *.safetensors files of its own folder alone; don't "
            "use this model unless you know who made it."
        )
    return sorted({folder / name for name in shards.values()})


def _is_own_shard(name: Any) -> bool:
    if not isinstance(name, str) or "\0" in name:
        return False
    return Path(name).name == name and name.endswith(".safetensors")


def leftovers(folder: Path) -> list[str]:
    """Names of the folder's weights that are not read, such as shards of an older save next to a newer
    model.safetensors; sorted."""
    read = {file.name for file in weight_files(folder)}
    other = {file.name for file in folder.glob("*.safetensors")} - read
    stale = {INDEX} if (folder / INDEX).is_file() and read == {SINGLE} else set()
    return sorted(other | stale)


def stored(file: Path) -> dict[str, tuple[list[int], str]]:
    """(shape, dtype) by name of the tensors in a safetensors file, from its header. Raises Fault for a file
    of another kind, or one that ends before its last tensor."""
    with open(file, "rb") as stream:
        begins = stream.read(9)
    # A header of 640 bytes begins as a pickle does, but only safetensors have a JSON object after its length.
    if begins.startswith(PICKLED) and begins[8:] != b"{":
        raise Fault(
            f"{file} is a pickle under another name, which can run code: expected safetensors; write it "
            "again with save_pretrained where you trust it."
        )
    with (
        explain_errors(f"{file} is not a whole safetensors file", "download it again"),
        safe_open(file, framework="pt") as opened,
    ):
        parts = {name: opened.get_slice(name) for name in opened.keys()}
        return {name: (part.get_shape(), part.get_dtype()) for name, part in parts.items()}


def formats(folder: Path) -> set[str]:
    """Names by safetensors, such as BF16, of the number formats that the weights in `folder` are in."""
    headers = [stored(file) for file in weight_files(folder)]
    return {dtype for header in headers for _, dtype in header.values()}


def describe(folder: Path) -> tuple[PreTrainedConfig, dict[str, torch.Size]]:
    """The config of the folder's text model, and the shapes by name of the weights that it describes. Raises
    Fault for one that describes no model."""
    config, where = families.text_config(folder), f"{folder}/config.json describes no model"
    with explain_errors(where, "expected the model's own config; download it again"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    if (folder / "generation_config.json").is_file():
        with explain_errors(
            f"{folder}/generation_config.json can't be read", "remove it, or download it again"
        ):
            GenerationConfig.from_pretrained(folder, local_files_only=True)
    return config, {name: value.shape for name, value in model.state_dict().items()}


def header_faults(folder: Path) -> list[str]:
    """What is wrong with config and weights, by the files' headers alone; empty if every weight is there and
    has its shape.
    """
    try:
        config, wanted = describe(folder)
        found = stored_shapes(folder)
    except Fault as fault:
        return fault.messages
    tied = {f"{families.of(config).head}.weight"} if config.tie_word_embeddings else set()
    out = _two_heads(folder) if tied & found.keys() else []
    missing = sorted(wanted.keys() - found.keys() - tied)
    if missing:
        out.append(
            f"{folder} lacks {len(missing)} weights, such as {', '.join(missing[:3])}: expected the whole "
            "model that config.json describes; download it again."
        )
    for name in sorted(wanted.keys() & found.keys()):
        shape, dtype = found[name]
        if tuple(shape) != tuple(wanted[name]):
            out.append(
                f"{folder}: the weight {name} has shape {shape}, expected {list(wanted[name])} as "
                "config.json has it; download both again."
            )
        elif dtype not in FLOATING:
            out.append(
                f"{folder}: the weight {name} is stored as {dtype}, expected one of {', '.join(FLOATING)}; "
                "choose the unquantised model."
            )
    rest = len(out) - NAMED
    if rest <= 1:  # a line for a single one is no longer than a line that counts it
        return out
    return [*out[:NAMED], f"{folder}: {rest} more such weights; download it again."]


def stored_shapes(folder: Path) -> dict[str, tuple[list[int], str]]:
    """(shape, dtype) of the weights of the folder's text model that are stored, by their names in it."""
    found = {name: of for file in weight_files(folder) for name, of in stored(file).items()}
    names = families.family_in(folder).own_names(found)
    return {own: found[name] for own, name in names.items()}


def _two_heads(folder: Path, rows: int = 1 << 12) -> list[str]:
    """A fault if a folder whose config ties the head to the embeddings stores a head that differs from them;
    else nothing. `rows`: how many are compared at a time."""
    family, reader = families.family_in(folder), WeightReader(folder)
    names = [f"{family.embeddings}.weight", f"{family.head}.weight"]
    if not reader.handle_of.keys() >= set(names):
        return []
    embeddings, head = (reader.slice(name) for name in names)
    shape = embeddings.get_shape()
    same = shape == head.get_shape() and all(
        torch.equal(embeddings[start : start + rows], head[start : start + rows])
        for start in range(0, shape[0], rows)
    )
    if same:
        return []
    return [
        f"{folder} stores a head that is not the embeddings, and its config ties the two: some readers "
        "take the one, some the other; set tie_word_embeddings to false in config.json where the head is "
        f"meant, or remove {reader.stored_as[names[1]]}."
    ]


def fingerprint(folder: Path) -> str:
    """Hex sha256 over the bytes of the model's safetensors files in order of name; ties adapters to their
    base.
    """
    digest = hashlib.sha256()
    for file in weight_files(folder):
        with open(file, "rb") as stream:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


class WeightReader:
    """Reads single base weights from a model folder without loading the model; names are those of the text
    model's state_dict. `handle_of` has the open file of each that is stored, `stored_as` its name there.
    """

    def __init__(self, folder: Path):
        self.folder, self.family = folder, families.family_in(folder)
        self.handles = [safe_open(file, framework="pt") for file in weight_files(folder)]
        handles = {name: handle for handle in self.handles for name in handle.keys()}
        self.stored_as = self.family.own_names(handles)
        self.handle_of = {own: handles[name] for own, name in self.stored_as.items()}
        head, embeddings = f"{self.family.head}.weight", f"{self.family.embeddings}.weight"
        self.alias = {} if head in self.handle_of else {head: embeddings}  # tied, stored once

    def get(self, name: str) -> torch.Tensor:
        """The tensor called `name`, in its stored dtype and on the CPU. Raises Fault, with the nearest name,
        where there is none.
        """
        own = self.alias.get(name, name)
        if own not in self.handle_of:
            raise Fault(
                f"{self.folder} has no weight '{name}': expected one of its {len(self.handle_of)} names."
                f"{nearest(name, self.handle_of)}"
            )
        return self.handle_of[own].get_tensor(self.stored_as[own])

    def slice(self, name: str):
        """The tensor stored for `name` as safetensors opens it: its shape, and rows that are read when asked
        for."""
        return self.handle_of[name].get_slice(self.stored_as[name])
