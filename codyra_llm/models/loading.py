"""Base models: from a hub id, a folder or a GGUF file to a checked local folder, and from there to a frozen
model.

Weights are read from safetensors only: pickles can run code, and lazy reading of single tensors needs
safetensors.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoModelForCausalLM, PreTrainedModel

from codyra_llm.core.errors import Fault
from codyra_llm.core.files import file_sha256
from codyra_llm.core.parsing import expanded, read_json, shown
from codyra_llm.models import families
from codyra_llm.models.attention import packed_attention
from codyra_llm.models.families.config_file import read_config, size_faults
from codyra_llm.models.saved import TERMS
from codyra_llm.models.tokenizer import tokenizer_faults
from codyra_llm.models.weights import INDEX, SINGLE, header_faults, weight_files
from codyra_llm.runtime.quiet import without_messages, without_weight_bars

DOWNLOADED = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "tokenizer.model",
    "merges.txt",
    "vocab.txt",
    "README.md",
    *TERMS,  # which an export passes on
]


def resolve(path: str, revision: str | None = None) -> Path:
    """Local folder with config.json and safetensors for a folder, a `.gguf` file or a hub id (`owner/name`).

    A GGUF file is converted once, into $CODYRA_CACHE (default ~/.cache/codyra_llm). Raises Fault where the
    path doesn't exist, the hub refuses or can't be reached, or the folder lacks a file.
    """
    local = Path(expanded(path))
    if local.suffix == ".gguf":
        if not local.is_file():
            raise Fault(f"model '{path}' doesn't exist: expected a GGUF file, a folder or a hub id.")
        from codyra_llm.models.gguf import convert  # of use to these files alone

        cache = Path(os.environ.get("CODYRA_CACHE", "~/.cache/codyra_llm")).expanduser()
        return convert(local, cache / f"gguf-{file_sha256(local)[:16]}")
    folder = local if local.is_dir() else download(path, revision)
    faults = missing_files(folder)
    if faults:
        raise Fault(*faults)
    return folder


def bare(
    base: Path,
    dtype: torch.dtype,
    attention: str | None,
    layers: int | None = None,
    device: torch.device | str = "meta",
) -> PreTrainedModel:
    """A frozen model as in `base`, without weights (meta device) or with random ones; `layers`: only so many
    of its first layers."""
    config = families.text_config(base)
    if layers is not None:
        config = families.shortened(config, layers)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    return model.requires_grad_(False)


def download(name: str, revision: str | None) -> Path:
    """Snapshot of a hub model in the hub's own cache, without pickles and without second copies of the
    weights.
    """
    at = f"{name}@{revision}" if revision else name
    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=DOWNLOADED, ignore_patterns=["*/*", "consolidated*"]
            )
        )
    except HFValidationError:
        reason = "is neither an existing folder nor a hub id: expected a path to a folder, or owner/name"
    except GatedRepoError:
        reason = f"is gated: accept its licence at https://huggingface.co/{name} and run 'hf auth login'"
    except RevisionNotFoundError:
        reason = "has no such revision on the hub: expected a branch, a tag or a commit; check 'revision'"
    except LocalEntryNotFoundError:
        reason = (
            "is not a folder here, is not in the hub's cache and the hub can't be reached: check the network "
            "and HF_HUB_OFFLINE, or give a local folder or a GGUF file"
        )
    except RepositoryNotFoundError:
        reason = "is neither an existing folder nor a model on the hub (or it is private): check its name"
    except HfHubHTTPError as error:
        reason = f"can't be downloaded ({str(error).splitlines()[0]}): try again later or give a local folder"
    raise Fault(f"model '{at}' {reason}.")


def missing_files(folder: Path) -> list[str]:
    """Faults of a model folder whose config or safetensors are not there; shards of the index are checked by
    name.
    """
    if (folder / "recipe.json").is_file():
        return [
            f"{folder} is a run's folder or a stage of one, not a model: write one with `codyra-llm export "
            f"{folder} OUT`, or ask and score it as {folder}@TASK."
        ]
    if (folder / "adapter_config.json").is_file():
        return [_adapter_fault(folder)]
    faults = []
    if not (folder / "config.json").is_file():
        faults.append(f"{folder} has no config.json: expected a Hugging Face model folder; give one.")
    there = any((folder / name).is_file() for name in (SINGLE, INDEX))
    if not there and any(folder.glob("*.safetensors")):
        faults.append(
            f"{folder} has *.safetensors, but neither {SINGLE} nor {INDEX}, by which transformers finds a "
            "model's weights: rename the one file, or download the index too."
        )
    elif not there:
        faults.append(_no_weights(folder))
    else:
        faults += [
            f"{folder} lacks {file.name}, which {INDEX} names: expected every shard; download it again."
            for file in weight_files(folder)
            if not file.is_file()
        ]
    return faults


def _adapter_fault(folder: Path) -> str:
    """The fault of a model folder with an adapter in it, with or without a whole model."""
    if weight_files(folder):
        return (
            f"{folder} holds a whole model and an adapter, and transformers would load one into the other: "
            "expected the one or the other; move adapter_config.json and adapter_model.safetensors into a "
            "folder of their own."
        )
    return (
        f"{folder} is a PEFT adapter, not a model: give its base, or a folder that the adapter is "
        "merged into, by PEFT's merge_and_unload and save_pretrained."
    )


def _no_weights(folder: Path) -> str:
    """The fault of a folder without safetensors."""
    if any(any(folder.glob(kind)) for kind in ("*.bin", "*.pth", "*.pt")):
        return (
            f"{folder} has only pickled weights, which can run code: expected *.safetensors; load it where "
            "you trust it and write it again with save_pretrained."
        )
    return f"{folder} has no *.safetensors: expected the model's weights; download them too."


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Gradient checkpointing: keep of every layer only its input, and compute the rest again in backward.
    transformers asks for the embeddings' gradient too, which only re-entrant checkpoints need; without it
    backward ends at the first layer that trains, and the layers before it are computed once."""
    config = model.config  # not the model: its layers keep `contexts`, so it would refer to itself

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), packed_attention.As(config)  # made in forward, entered in backward

    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
    model.disable_input_require_grads()


def check(
    folder: Path, chat_template: bool = False, reads: Path | None = None, rows: int | None = None
) -> list[str]:
    """Faults of the model's config, weights and tokenizer, found without loading weights; empty when it can
    be trained. `reads`: the folder of the tokenizer, if not the model's own; `rows`: the embeddings that the
    model will have, if not its config's.
    """
    reads = reads or folder
    too_large = size_faults(folder)
    if reads != folder:
        too_large += size_faults(reads)
    if too_large:
        return too_large
    try:
        config = read_json(folder / "config.json", "the model's config")
    except Fault as fault:
        return fault.messages
    if not isinstance(config, dict):
        return [
            f"{folder}/config.json holds a {type(config).__name__}: expected the model's config; download it "
            "again."
        ]
    faults = config_faults(folder, config)
    if not any((reads / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return [
            *faults,
            f"{reads} has no tokenizer.json or tokenizer.model: expected the tokenizer next to the model; "
            "copy it there.",
        ]
    # Weights are compared with the model that the config describes, so only where it describes one.
    broken = [] if faults else header_faults(folder)
    if broken:
        return broken
    tokens = rows or families.text_part(config).get("vocab_size")
    return faults + tokenizer_faults(reads, tokens, chat_template)


def config_faults(folder: Path, config: dict) -> list[str]:
    """What in a config says that the model can't be trained."""
    faults = families.refusals(folder, config)
    if "quantization_config" in config:
        how = config["quantization_config"]
        method = shown(how.get("quant_method") if isinstance(how, dict) else how)
        faults.append(
            f"{folder} is stored quantised ({method}): expected plain weights; choose the unquantised model."
        )
    return faults


@contextmanager
def _one_tower(folder: Path) -> Iterator[dict]:
    """What transformers needs to load the text model alone; within the block it does not report that other
    towers' weights are unused."""
    family = families.family_in(folder)
    if family.tower is None:
        yield {"config": read_config(folder)}
        return
    with without_messages("transformers.modeling_utils", "LOAD REPORT"):
        yield {"config": families.text_config(folder), "key_mapping": family.renamed()}


def load(folder: Path, dtype: torch.dtype, attention: str | None = None) -> PreTrainedModel:
    """The causal LM of `folder` with every parameter frozen; of a checkpoint with several towers the text
    model alone. Raises Fault where weights are missing or have the wrong shape.
    """
    with _one_tower(folder) as given:
        return _loaded(folder, dtype, attention, given)


def load_whole(folder: Path, dtype: torch.dtype, attention: str | None = None) -> PreTrainedModel:
    """The same with all towers of the checkpoint, as transformers builds it."""
    return _loaded(folder, dtype, attention, {"config": read_config(folder)})


def try_attention(folder: Path, attention: str) -> None:
    """Raises Fault where the model of `folder` can't have this attention here, found on one layer without
    weights."""
    config = families.shortened(families.text_config(folder), 1)
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    except (ImportError, ValueError) as error:
        raise _unattended(folder, attention, error) from None


def _unattended(folder: Path, attention: str | None, error: Exception) -> Fault:
    """The fault where the attention's package is missing, or where Gemma 2 is asked for sdpa."""
    return Fault(
        f"{folder} can't be loaded with attention '{attention}' ({str(error).split('. ')[0]}): choose "
        "eager, which every model supports, or install what is missing."
    )


def _loaded(folder: Path, dtype: torch.dtype, attention: str | None, given: dict) -> PreTrainedModel:
    try:
        with without_weight_bars():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                **given,
                dtype=dtype,
                attn_implementation=attention,
                trust_remote_code=False,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
    except (ImportError, ValueError) as error:
        raise _unattended(folder, attention, error) from None
    if info["missing_keys"]:  # transformers leaves them at random values
        names = sorted(info["missing_keys"])
        raise Fault(
            f"{folder} lacks {len(names)} weights, such as {', '.join(names[:3])}: expected the whole model "
            "that config.json describes; download it again."
        )
    for name, weight in model.named_parameters():
        if not torch.stack(torch.aminmax(weight.detach())).isfinite().all():
            raise Fault(
                f"{folder}: the weight {name} holds NaN or infinite values: expected finite ones; download "
                "it again, or, if it was trained so, choose another model."
            )
    return model.requires_grad_(False)
