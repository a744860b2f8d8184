"""A GGUF file that is written reads back as the model, and what llama.cpp would compute otherwise is refused.

That llama.cpp's engine computes the same is shown by tests/readers, which need environments of their own."""

import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import SIZES, save_tiny
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from codyra_llm.core.errors import Fault
from codyra_llm.formats import gguf_file
from codyra_llm.formats.gguf_file import faults, write_gguf
from codyra_llm.formats.gguf_tokenizer import vocabulary

GEMMA = {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": False}),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, GEMMA),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, GEMMA | {"num_hidden_layers": 6}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 128}),
}


EYES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
TOKENS = {"mm_tokens_per_image": 1, "image_token_index": 260}


def keep(name, weight):
    return weight


def tiny(folder, family, **changed):
    model, config, own = FAMILIES[family]
    return save_tiny(folder, model, config(**SIZES | own | changed))


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(4, 44)[None]).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_reads_back_as_the_model(tmp_path, family):
    base = tiny(tmp_path / "base", family)
    (tmp_path / "out").mkdir()
    write_gguf(base, tmp_path / "out" / "m.gguf", keep, "f32", "tiny")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="m.gguf", dtype=torch.float32)
    expected = logits(AutoModelForCausalLM.from_pretrained(base))
    torch.testing.assert_close(logits(read), expected, rtol=1e-4, atol=1e-5)
    ours = AutoTokenizer.from_pretrained(base)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="m.gguf")
    text = "Sam has 12  pens\n态度 Größen"
    assert theirs(text)["input_ids"] == ours(text)["input_ids"]


def test_of_a_whole_gemma3_the_text_model_is_written(tmp_path):
    """The same tensors and fields, under GGUF's names, as of the text model by itself; no vision tower."""
    text = tiny(tmp_path / "text", "gemma3")
    eyes = SiglipVisionConfig(**EYES)
    config = Gemma3Config(text_config=AutoConfig.from_pretrained(text), vision_config=eyes, **TOKENS)
    whole = save_tiny(tmp_path / "whole", Gemma3ForConditionalGeneration, config)
    own = {f"language_model.{name}": weight for name, weight in load_file(text / "model.safetensors").items()}
    stored = load_file(whole / "model.safetensors")
    assert own.keys() < stored.keys()
    save_file(stored | own, whole / "model.safetensors", {"format": "pt"})
    for base, name in ((text, "text"), (whole, "whole")):
        write_gguf(base, tmp_path / f"{name}.gguf", keep, "f32", "tiny")
    one, other = (gguf.GGUFReader(tmp_path / f"{name}.gguf") for name in ("text", "whole"))
    by_name = {tensor.name: tensor.data for tensor in other.tensors}
    assert by_name.keys() == {tensor.name for tensor in one.tensors}
    assert all(np.array_equal(by_name[tensor.name], tensor.data) for tensor in one.tensors)
    fields = [{key: f.contents() for key, f in r.fields.items() if "." in key} for r in (one, other)]
    assert fields[0] == fields[1]


@pytest.mark.parametrize("kind", gguf_file.TYPES)
def test_matrices_are_rounded_once_and_norms_not_at_all(tmp_path, kind):
    base = tiny(tmp_path / "base", "llama")
    write_gguf(base, tmp_path / "m.gguf", lambda name, weight: weight * 1.001, kind, "tiny")
    weights = AutoModelForCausalLM.from_pretrained(base).state_dict()
    stands = gguf_file.TYPES[kind][0]
    written = gguf.GGUFReader(tmp_path / "m.gguf")
    # GGUF's specification requires it where a tensor is quantised.
    assert written.fields["general.quantization_version"].contents() == 2
    for tensor in written.tensors:
        found = gguf.dequantize(tensor.data, tensor.tensor_type)
        if tensor.name in ("blk.1.ffn_up.weight", "output_norm.weight"):
            name = {"b": "model.layers.1.mlp.up_proj.weight", "o": "model.norm.weight"}[tensor.name[0]]
            exact = (weights[name] * 1.001).numpy()
            kept = stands if exact.ndim == 2 else gguf.GGMLQuantizationType.F32
            assert tensor.tensor_type == kept
            np.testing.assert_array_equal(found, gguf.dequantize(gguf.quantize(exact, kept), kept))


def test_a_matrix_past_float16_is_refused(tmp_path):
    """It would become infinite, and every answer of the file noise; norms stay in float32."""
    base = tiny(tmp_path / "base", "llama")
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        matrix = "up_proj" in name

        def large(own, weight, name=name):
            return weight * 0 + 1e5 if own == name else weight

        for kind in gguf_file.TYPES:
            file = tmp_path / f"{kind}-{matrix}.gguf"
            if matrix and kind == "f16":
                with pytest.raises(Fault, match=f"--type: {name} holds values past float16's largest"):
                    write_gguf(base, file, large, kind, "tiny")
                continue
            write_gguf(base, file, large, kind, "tiny")
            for tensor in gguf.GGUFReader(file).tensors:
                assert np.isfinite(gguf.dequantize(tensor.data, tensor.tensor_type)).all()


def test_llama3s_frequencies_are_those_of_transformers(tmp_path):
    base = tiny(tmp_path / "base", "llama", rope_parameters=LLAMA3)
    config = AutoConfig.from_pretrained(base)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    plain = 1 / LLAMA3["rope_theta"] ** (torch.arange(0, 8, 2) / 8)
    factors = torch.tensor(gguf_file._frequency_factors(config))
    torch.testing.assert_close(plain / factors, scaled, rtol=1e-5, atol=1e-7)
    assert factors.min() == 1 and factors.max() == LLAMA3["factor"]


@pytest.mark.parametrize(
    "family, changed, words",
    [
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
            "RoPE is scaled by yarn",
        ),
        ("llama", {"hidden_act": "relu"}, "activation is relu"),
        ("gemma3", {"query_pre_attn_scalar": 16}, "scales queries by 16"),
        ("gemma3", {"layer_types": ["full_attention"] * 6}, "last of every 6 layers"),
        ("gemma2", {"layer_types": ["full_attention", "sliding_attention"]}, "last of every 2 layers"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path, family, changed, words):
    base = tiny(tmp_path / "base", family, **changed)
    assert any(words in fault and "convert_hf_to_gguf.py" in fault for fault in faults(base))
    with pytest.raises(Fault):
        write_gguf(base, tmp_path / "m.gguf", keep, "f16", "tiny")
    assert not (tmp_path / "m.gguf").exists()


def test_a_tokenizer_that_llama_cpp_has_no_name_for_is_refused(tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "base")
    file = tmp_path / "base" / "tokenizer.json"
    core = json.loads(file.read_text())
    split = {"type": "Split", "pattern": {"Regex": r"\d"}, "behavior": "Isolated", "invert": False}
    core["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, core["pre_tokenizer"]]}
    file.write_text(json.dumps(core))
    with pytest.raises(Fault, match="cuts a text into words"):
        vocabulary(AutoTokenizer.from_pretrained(tmp_path / "base"), 320)
