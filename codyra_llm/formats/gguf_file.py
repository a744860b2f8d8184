"""Write a model as a GGUF file, for llama.cpp and the programs built on it (Ollama, LM Studio).

Field names and tensor layouts are those of llama.cpp's own converter. A model is refused if llama.cpp would
compute it differently from transformers, because GGUF has no field for something that it needs."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from torch import Tensor
from transformers import PreTrainedConfig

from codyra_llm.core.errors import Fault
from codyra_llm.formats.gguf_tokenizer import INSTEAD, write_template, write_vocabulary
from codyra_llm.models import families
from codyra_llm.models.ends import end_of_turn
from codyra_llm.models.tokenizer import load_tokenizer
from codyra_llm.models.weights import WeightReader

TYPES = {
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
}
ACTIVATIONS = {"llama": ("silu",), "qwen2": ("silu",), "qwen3": ("silu",)}  # Gemma's: GELU by tanh
MOST_F16 = 65504
BLOCK = 32  # numbers that q8_0 scales together
PERIODS = {"gemma2": 2, "gemma3": 6}  # layers to the next one of full attention, fixed in llama.cpp
LARGEST = {"gemma2": 46, "gemma3": 62}  # layers of the 27B models, whose queries llama.cpp scales differently


def faults(base: Path) -> list[str]:
    """Why the model in `base` can't be a GGUF file that llama.cpp computes as transformers does."""
    config = families.text_config(base)
    architecture = _architecture(config)
    if not architecture:
        known = ", ".join(kind for kind, family in families.registered().items() if family.gguf)
        return [f"a GGUF export knows {known}, and the model is a {config.model_type}; {INSTEAD}"]
    reasons = [*_activation(config, architecture), *_rope_scaling(config), *_attention(config, architecture)]
    return [f"{reason}, which llama.cpp computes differently; {INSTEAD}" for reason in reasons]


def _architecture(config: PreTrainedConfig) -> str:
    """llama.cpp's name for the model's graph; empty where the family has none."""
    return families.of(config).gguf or ""


def _activation(config: PreTrainedConfig, architecture: str) -> list[str]:
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    known = ACTIVATIONS.get(architecture, ("gelu_pytorch_tanh",))
    return [] if activation in known else [f"the model's activation is {activation}"]


def _rope(config: PreTrainedConfig) -> dict:
    """The RoPE settings of the model, or of its layers of full attention."""
    return config.rope_parameters.get("full_attention", config.rope_parameters)


def _rope_scaling(config: PreTrainedConfig) -> list[str]:
    kind = _rope(config).get("rope_type", "default")
    return [] if kind in ("default", "linear", "llama3") else [f"the model's RoPE is scaled by {kind}"]


def _attention(config: PreTrainedConfig, architecture: str) -> list[str]:
    """What is wrong with sliding windows and the scale of queries, for which GGUF has no fields in these
    architectures."""
    kinds, period = getattr(config, "layer_types", None), PERIODS.get(architecture)
    if period is None:
        slides = kinds is None or "sliding_attention" in kinds
        window = getattr(config, "sliding_window", None)
        return [f"the model attends to the last {window} tokens only"] if window and slides else []
    reasons = []
    full = [number for number, kind in enumerate(kinds) if kind == "full_attention"]
    if full != list(range(period - 1, len(kinds), period)):
        reasons.append(f"full attention is not in the last of every {period} layers")
    width = config.hidden_size // config.num_attention_heads
    scale = width if config.num_hidden_layers == LARGEST[architecture] else config.head_dim
    if config.query_pre_attn_scalar != scale:
        reasons.append(f"the model scales queries by {config.query_pre_attn_scalar}")
    return reasons


def write_gguf(
    base: Path,
    file: Path,
    changed: Callable[[str, Tensor], Tensor],
    kind: str,
    name: str,
    reads: Path | None = None,
    chats: bool = True,
) -> None:
    """Write the model in `base`, each weight as `changed(name, stored)` gives it, to `file`. Matrices are
    stored as `kind` (of TYPES), cast once from float32; norms and biases in float32. One weight is held at a
    time. `reads`: the tokenizer's folder, if not the base's. `chats`: whether the file gets the tokenizer's
    chat template. Raises Fault for what `faults` lists."""
    wrong = faults(base)
    if wrong:
        raise Fault(*wrong)
    config, tokenizer = families.text_config(base), load_tokenizer(reads or base)
    architecture = _architecture(config)
    writer = GGUFWriter(file, architecture)
    writer.add_name(name)
    writer.add_file_type(TYPES[kind][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)  # of q8_0's blocks
    _write_config(writer, config, architecture)
    write_vocabulary(writer, tokenizer, config.vocab_size, end_of_turn(tokenizer))
    if chats:
        write_template(writer, tokenizer.chat_template)
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    reader = WeightReader(base)
    kept = {own: _tensor_name(own, names) for own in reader.handle_of if _kept(own, config)}
    # The file begins with the shape and place of every tensor; the tensors follow, one at a time.
    for own, gguf_name in kept.items():
        shape = reader.slice(own).get_shape()
        writer.add_tensor_info(gguf_name, *_info(shape, _type_of(shape, kind)))
    factors = _frequency_factors(config)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", *_info(list(factors.shape), GGMLQuantizationType.F32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for own in kept:
        weight = changed(reader.stored_as[own], reader.get(own)).float()
        if _type_of(list(weight.shape), kind) == GGMLQuantizationType.F16 and weight.abs().max() > MOST_F16:
            raise Fault(f"--type: {own} holds values past float16's largest, {MOST_F16}; choose bf16 or f32")
        writer.write_tensor_data(_quantised(_arranged(own, weight, config), kind))
    if factors is not None:
        writer.write_tensor_data(factors)
    writer.close()


def _write_config(writer: GGUFWriter, config: PreTrainedConfig, architecture: str) -> None:
    rope, head = _rope(config), _head_dim(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if architecture in PERIODS:
        writer.add_sliding_window(config.sliding_window)
    for cap in ("attn", "final"):
        value = getattr(config, f"{cap}_logit_softcapping", None)
        if value:
            getattr(writer, f"add_{cap}_logit_softcapping")(value)
    if "sliding_attention" in config.rope_parameters:
        writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])


def _head_dim(config: PreTrainedConfig) -> int:
    return families.attention_shapes(config)[0].head_dim


def _kept(own: str, config: PreTrainedConfig) -> bool:
    """Whether GGUF has this tensor too: not a tied head, which is the embeddings, nor RoPE's frequencies,
    which are computed."""
    tied = config.tie_word_embeddings and own == f"{families.of(config).head}.weight"
    return not tied and not own.endswith("inv_freq")


def _tensor_name(own: str, names: gguf.TensorNameMap) -> str:
    """GGUF's name of the weight `own`. Raises Fault where it has none."""
    called = names.get_name(own, try_suffixes=(".weight", ".bias"))
    if called is None:
        raise Fault(f"GGUF has no name for the weight {own}; {INSTEAD}")
    return called


def _arranged(own: str, weight: Tensor, config: PreTrainedConfig) -> Tensor:
    """A weight as llama.cpp's graphs read it: rotated pairs next to each other (`llama`), and Gemma's norms
    as plain factors, which transformers stores minus one."""
    family = families.of(config)
    if family.gguf == "llama" and (".q_proj." in own or ".k_proj." in own):
        heads = config.num_attention_heads if ".q_proj." in own else config.num_key_value_heads
        # transformers rotates row i of a head with row i + d/2, llama.cpp row 2i with row 2i + 1.
        halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        return halves.swapaxes(1, 2).reshape(weight.shape)
    if family.norm == "1+w" and own.endswith("norm.weight"):
        return weight + 1
    return weight


def _type_of(shape: list[int], kind: str) -> GGMLQuantizationType:
    """The type in which a tensor of this shape is stored: float32 for vectors, `kind` for matrices, except
    those whose rows can't be divided into q8_0's blocks."""
    if len(shape) < 2:
        return GGMLQuantizationType.F32
    if kind == "q8_0" and shape[-1] % BLOCK:
        return GGMLQuantizationType.F16
    return TYPES[kind][0]


def _info(
    shape: list[int], stored: GGMLQuantizationType
) -> tuple[tuple[int, ...], np.dtype, int, GGMLQuantizationType | None]:
    """Shape, dtype, bytes and type of a tensor as GGUFWriter takes them."""
    plain = {GGMLQuantizationType.F32: np.dtype(np.float32), GGMLQuantizationType.F16: np.dtype(np.float16)}
    if stored in plain:
        return tuple(shape), plain[stored], int(np.prod(shape)) * plain[stored].itemsize, None
    size, count = gguf.GGML_QUANT_SIZES[stored]  # numbers of a block, and the bytes that it takes
    row = shape[-1] // size * count
    return (*shape[:-1], row), np.dtype(np.uint8), int(np.prod(shape[:-1])) * row, stored


def _quantised(weight: Tensor, kind: str) -> np.ndarray:
    """A weight as its type in the file stores it, cast once from float32."""
    return gguf.quantize(weight.contiguous().numpy(), _type_of(list(weight.shape), kind))


def _frequency_factors(config: PreTrainedConfig) -> np.ndarray | None:
    """LLaMA 3's scaling of RoPE: what each frequency is divided by, [head_dim / 2], float32. As in
    transformers' `_compute_llama3_parameters`: long waves are stretched by `factor`, short ones kept, and in
    between the two are blended."""
    rope, head = _rope(config), _head_dim(config)
    if rope.get("rope_type") != "llama3":
        return None
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, head, 2, dtype=torch.float64) / head)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * torch.pi)
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - share) / factor + share)).float().numpy()
