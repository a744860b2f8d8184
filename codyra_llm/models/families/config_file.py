"""Reads config.json within bounds, and turns other packages' errors about a user's file into one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, PreTrainedConfig

from codyra_llm.core.errors import Fault
from codyra_llm.core.parsing import read_mapping

# The least and the most that a config may hold; the most is far above that of any published model.
BOUNDS = {
    "num_hidden_layers": (1, 1000),
    "hidden_size": (1, 1 << 20),
    "intermediate_size": (1, 1 << 20),
    "vocab_size": (1, 1 << 24),
    "num_attention_heads": (1, 1 << 12),
    "num_key_value_heads": (1, 1 << 12),
    "head_dim": (1, 1 << 12),
    "max_position_embeddings": (1, 1 << 30),
    "sliding_window": (0, 1 << 30),
    "rms_norm_eps": (0, 1),
    "rope_theta": (1, 1e15),
    "factor": (1e-3, 1e6),
    "attention_factor": (1e-3, 1e3),
    "original_max_position_embeddings": (1, 1 << 30),
    "attention_dropout": (0, 1),
    "initializer_range": (0, 100),
}
# The most bytes that each small file may have; the longest published ones have a tenth of it.
SIZES = {
    "config.json": 1 << 20,
    "generation_config.json": 1 << 20,
    "adapter_config.json": 1 << 20,
    "chat_template.jinja": 1 << 20,
    "chat_template.json": 1 << 20,
    "special_tokens_map.json": 1 << 22,
    "added_tokens.json": 1 << 24,
    "tokenizer_config.json": 1 << 24,
    "tokenizer.json": 1 << 28,
    "model.safetensors.index.json": 1 << 26,
}
MOST_LISTED = 10_000  # entries of a list in a config, such as its layers' kinds
OF_CLASSIFIERS = ("id2label", "label2id", "num_labels")  # what no language model has a use for
INSTEAD = "expected the model's own config; download it again"

# What other packages raise where a file holds something unexpected: they don't check, but fail somewhere.
FOREIGN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    StrictDataclassError,
    SafetensorError,
)


@contextmanager
def explain_errors(what: str, instead: str) -> Iterator[None]:
    """Within this block, what another package raises about a user's file becomes a Fault: "`what` (the
    reason): `instead`."
    """
    try:
        yield
    except Exception as error:
        # tokenizers raises Exception itself; any other kind is a defect here, or Ctrl-C.
        if not isinstance(error, FOREIGN) and type(error) is not Exception:
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        reason = f"it has no {reason}" if isinstance(error, KeyError) else reason
        raise Fault(f"{what} ({reason}): {instead}.") from None


def size_faults(folder: Path) -> list[str]:
    """Files of a model or adapter whose size says that they are something else; nothing is read."""
    found = {name: (folder / name).stat().st_size for name in SIZES if (folder / name).is_file()}
    return [
        f"{folder}/{name} has {found[name]:,d} bytes, expected at most {SIZES[name]:,d}; take out what "
        "doesn't belong there (such as id2label, in a config), or download the file again."
        for name in found
        if found[name] > SIZES[name]
    ]


def read_config(folder: Path) -> PreTrainedConfig:
    """The config of the model in `folder` as transformers reads it, without the names of a classifier's
    labels. Raises Fault for one that describes no model, or one that nobody could compute with."""
    faults = size_faults(folder)
    if faults:
        raise Fault(*faults)
    where = f"{folder}/config.json describes no model"
    raw = read_mapping(folder / "config.json", "the model's config")
    kept = {key: value for key, value in raw.items() if key not in OF_CLASSIFIERS}
    reason = _out_of_bounds(kept)
    if reason:
        raise Fault(f"{where} ({reason}): {INSTEAD}.")
    kind = kept.get("model_type")
    if kind == "mistral" and "layer_types" in kept:  # as AutoConfig reads it
        kept["model_type"] = kind = "ministral"
    known = isinstance(kind, str) and kind in CONFIG_MAPPING
    with explain_errors(where, INSTEAD):
        config_class = CONFIG_MAPPING[kind] if known else PreTrainedConfig  # imported when it is looked up
        config = config_class.from_dict(kept)
    config.name_or_path = str(folder)
    return config


def _out_of_bounds(raw: dict) -> str:
    """What in a config is too small, too large or too long; empty where nothing is."""
    for key, value in _numbers(raw):
        least, most = BOUNDS[key.rpartition(".")[2]]
        if not least <= value <= most:  # NaN too
            return f"{key} is {value}, expected {least:,} to {most:,}"
    for key, value in raw.items():
        if isinstance(value, list | dict) and len(value) > MOST_LISTED:
            return f"{key} has {len(value):,d} entries, at most {MOST_LISTED:,d}"
    return ""


def _numbers(raw: dict) -> Iterator[tuple[str, float]]:
    """The numbers of a config that have bounds, with their keys: its own, and those in the sections of RoPE
    and of towers."""
    parts = {f"{key}.": part for key, part in raw.items() if _is_section(key, part)}
    inner = {}  # RoPE by kind of layer, as in Gemma 3
    for prefix, section in parts.items():
        inner |= {f"{prefix}{key}.": value for key, value in section.items() if _is_section(key, value)}
    for prefix, section in {"": raw, **parts, **inner}.items():
        for key in BOUNDS:
            value = section.get(key)
            if isinstance(value, int | float):
                yield prefix + key, value


def _is_section(key: str, part: object) -> bool:
    return isinstance(part, dict) and key not in OF_CLASSIFIERS
