"""A tiny random model of every family, as transformers saves it: what the contract of families runs on."""

from collections.abc import Callable
from pathlib import Path

from tiny import SIZES, save_tiny
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Gemma4Config,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForCausalLM,
    Gemma4UnifiedForConditionalGeneration,
    Gemma4UnifiedTextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
)

from codyra_llm.models.families import Family

VOCABULARY = 320  # tokens of the tiny tokenizer
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
TWO_KINDS = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
FOUR_LAYERS = {
    **SIZES,
    "num_hidden_layers": 4,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "head_dim": 8,
    "global_head_dim": 16,
}
SCALED = {"head_dim": 16, "query_pre_attn_scalar": 16}
# Gemma 3 from 4B on stretches the positions of its full layers.
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
SIGLIP = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
GEMMA4_EYES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "patch_size": 4,
    "position_embedding_size": 64,
}


def gemma3_text() -> Gemma3TextConfig:
    return Gemma3TextConfig(**SIZES, **SCALED, **TWO_KINDS, rope_parameters=GEMMA3_ROPE)


def gemma3() -> Gemma3Config:
    """As Gemma 3 from 4B on: a text model and a SigLIP."""
    tokens = {"image_token_index": 260, "boi_token_index": 261, "eoi_token_index": 262}
    eyes = SiglipVisionConfig(**SIGLIP)
    return Gemma3Config(text_config=gemma3_text(), vision_config=eyes, mm_tokens_per_image=1, **tokens)


def gemma4_small() -> Gemma4TextConfig:
    """As Gemma 4 E2B: embeddings for each layer, layers that read the keys of others, wide MLPs there."""
    return Gemma4TextConfig(
        **FOUR_LAYERS,
        hidden_size_per_layer_input=4,
        vocab_size_per_layer_input=VOCABULARY,
        num_kv_shared_layers=2,
        use_double_wide_mlp=True,
        final_logit_softcapping=30.0,
    )


def gemma4_large() -> Gemma4TextConfig:
    """As Gemma 4 31B: in full layers wider heads, fewer of keys, and values that are the keys."""
    return Gemma4TextConfig(
        **FOUR_LAYERS,
        hidden_size_per_layer_input=0,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
        final_logit_softcapping=30.0,
    )


def gemma4() -> Gemma4Config:
    return Gemma4Config(text_config=gemma4_small(), vision_config=GEMMA4_EYES, audio_config=None)


def gemma4_unified_text() -> Gemma4UnifiedTextConfig:
    return Gemma4UnifiedTextConfig(**FOUR_LAYERS, final_logit_softcapping=30.0)


def gemma4_unified() -> Gemma4UnifiedConfig:
    """As Gemma 4 12B: patches of images go into the text model without a tower of their own."""
    eyes = {"patch_size": 2, "pooling_kernel_size": 1, "mm_embed_dim": 32, "mm_posemb_size": 8}
    vision = {**eyes, "output_proj_dims": 32}
    return Gemma4UnifiedConfig(text_config=gemma4_unified_text(), vision_config=vision, audio_config=None)


MADE: dict[str, tuple[type, Callable]] = {
    "llama": (LlamaForCausalLM, lambda: LlamaConfig(**SIZES)),
    "llama3": (LlamaForCausalLM, lambda: LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE)),
    "gemma": (GemmaForCausalLM, lambda: GemmaConfig(**SIZES, head_dim=16)),
    "gemma2": (Gemma2ForCausalLM, lambda: Gemma2Config(**SIZES, **SCALED, **TWO_KINDS)),
    "gemma3_text": (Gemma3ForCausalLM, gemma3_text),
    "gemma3": (Gemma3ForConditionalGeneration, gemma3),
    "gemma4_text, small": (Gemma4ForCausalLM, gemma4_small),
    "gemma4_text, large": (Gemma4ForCausalLM, gemma4_large),
    "gemma4": (Gemma4ForConditionalGeneration, gemma4),
    "gemma4_unified_text": (Gemma4UnifiedForCausalLM, gemma4_unified_text),
    "gemma4_unified": (Gemma4UnifiedForConditionalGeneration, gemma4_unified),
    "mistral": (MistralForCausalLM, lambda: MistralConfig(**SIZES, sliding_window=16)),
    "qwen2": (Qwen2ForCausalLM, lambda: Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen3": (Qwen3ForCausalLM, lambda: Qwen3Config(**SIZES, head_dim=16)),
}
WHOLE = ("gemma3", "gemma4", "gemma4_unified")  # those with other towers
# A family of one's own: norms after attention and MLP, and over all heads of queries and keys.
OLMO2 = Family("OLMo 2", ("olmo2",))
OWN = {"olmo2": (Olmo2ForCausalLM, lambda: Olmo2Config(**SIZES))}


def make(name: str, folder: Path) -> Path:
    kind, config = (MADE | OWN)[name]
    return save_tiny(folder, kind, config())
