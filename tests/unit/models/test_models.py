"""Resolving, checking and loading models; reading single weights. Oracle: the models that transformers
loads.
"""

import hashlib
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file
from tiny import SIZES, save_tiny
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GemmaConfig,
    GemmaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from codyra_llm.config.methods.base import PROJECTIONS
from codyra_llm.core.errors import Fault
from codyra_llm.models import families, loading
from codyra_llm.models.tokenizer import adds_bos, load_tokenizer
from codyra_llm.models.weights import WeightReader, fingerprint, stored

OTHERS = {
    "gemma": (GemmaForCausalLM, GemmaConfig(**SIZES, head_dim=16)),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=16)),
}


@pytest.fixture(params=["llama", "gemma2", "gemma3_text", *OTHERS])
def any_model(request, tmp_path):
    """(model_type, folder) of every supported family."""
    if request.param in OTHERS:
        return request.param, save_tiny(tmp_path / request.param, *OTHERS[request.param])
    fixture = {"llama": "tiny_llama", "gemma2": "tiny_gemma2", "gemma3_text": "tiny_gemma3"}[request.param]
    return request.param, request.getfixturevalue(fixture)


@pytest.fixture
def copy(tiny_llama, tmp_path):
    """A copy of the tiny LLaMA that a test may damage."""
    return shutil.copytree(tiny_llama, tmp_path / "copy")


def edit(file, **values):
    content = json.loads(file.read_text())
    content.update(values)
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def test_every_family_is_covered(any_model):
    family, folder = any_model
    assert family in families.registered()
    assert loading.resolve(str(folder)) == folder and loading.check(folder) == []


def test_reader_agrees_with_the_state_dict(any_model):
    _, folder = any_model
    model, reader = loading.load(folder, torch.float32, "eager"), WeightReader(folder)
    state = model.state_dict()
    assert set(reader.handle_of) | set(reader.alias) == set(state)
    for name, value in state.items():
        assert torch.equal(reader.get(name), value), name
    targets = [
        name for name, value in state.items() if name.split(".")[-2] in PROJECTIONS and value.ndim == 2
    ]
    assert len(targets) == 2 * len(PROJECTIONS)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_reader_follows_shards_and_keeps_the_stored_dtype(tiny_llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    reader = WeightReader(tmp_path / "sharded")
    for name, value in model.state_dict().items():
        assert reader.get(name).dtype == torch.bfloat16 and torch.equal(reader.get(name), value)


def test_reader_names_the_nearest_weight(tiny_llama):
    with pytest.raises(Fault, match=r"Did you mean 'model\.layers\.1\.self_attn\.q_proj\.weight'"):
        WeightReader(tiny_llama).get("model.layers.1.self_attn.qproj.weight")


def test_fingerprint_is_the_hash_of_the_files(copy, tiny_llama):
    file = copy / "model.safetensors"
    assert fingerprint(copy) == hashlib.sha256(file.read_bytes()).hexdigest() == fingerprint(tiny_llama)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert fingerprint(copy) != fingerprint(tiny_llama)


def test_tokenizer_pads_left_and_adds_bos(any_model):
    _, folder = any_model
    tokenizer = load_tokenizer(folder)
    short, long = tokenizer(["Answer:7", "Write a summary für 态度"], padding=True)["input_ids"]
    assert short[0] == tokenizer.pad_token_id == 0 and len(short) == len(long) and adds_bos(tokenizer)
    assert (
        tokenizer("How many pens?", truncation=True, max_length=3, add_special_tokens=False)["input_ids"]
        == tokenizer("How many pens?", add_special_tokens=False)["input_ids"][-3:]
    )
    assert tokenizer.decode(long, skip_special_tokens=True) == "Write a summary für 态度"
    tokenizer.backend_tokenizer.post_processor = type(tokenizer.backend_tokenizer.post_processor)(single="$A")
    assert not adds_bos(tokenizer)


@pytest.mark.parametrize(
    "removed, pad",
    [
        (["pad_token"], "<eos>"),
        (["pad_token", "eos_token"], "<unk>"),
        (["pad_token", "eos_token", "unk_token"], None),
    ],
)
def test_pad_falls_back_to_eos_then_unknown(copy, removed, pad):
    edit(copy / "tokenizer_config.json", **dict.fromkeys(removed))
    assert load_tokenizer(copy).pad_token == pad
    faults = " ".join(loading.check(copy))
    assert ("without EOS" in faults) == ("eos_token" in removed) and ("without pad" in faults) == (
        pad is None
    )


def test_check_collects_every_fault(copy):
    edit(
        copy / "config.json", model_type="gpt2", vocab_size=300, quantization_config={"quant_method": "gptq"}
    )
    faults = loading.check(copy, chat_template=True)
    for fault, words in zip(
        faults,
        [
            "model_type 'gpt2': expected one of llama, gemma,",
            "stored quantised ('gptq')",
            "vocab_size of 300",
            "no chat template",
        ],
        strict=True,
    ):
        assert words in fault and "\n" not in fault
    (copy / "tokenizer.json").unlink()
    assert "no tokenizer.json" in loading.check(copy)[-1]
    (copy / "config.json").write_text("{")
    assert "invalid JSON" in loading.check(copy)[0]


def test_a_chat_template_is_found(copy):
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(copy)
    assert loading.check(copy, chat_template=True) == []


def test_resolve_writes_out_home_and_variables_as_recipes_do(copy, monkeypatch):
    monkeypatch.setenv("HOME", str(copy.parent))
    monkeypatch.setenv("WHERE", copy.name)
    assert loading.resolve("~/$WHERE") == copy


def test_resolve_refuses_folders_that_lack_files(copy):
    os.rename(copy / "model.safetensors", copy / "pytorch_model.bin")
    with pytest.raises(Fault, match="only pickled weights"):
        loading.resolve(str(copy))
    (copy / "pytorch_model.bin").unlink()
    (copy / "config.json").unlink()
    with pytest.raises(Fault) as caught:
        loading.resolve(str(copy))
    assert len(caught.value.messages) == 2


def test_resolve_names_a_missing_shard(tiny_llama, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(
        tmp_path / "sharded", max_shard_size="20KB"
    )
    first = min((tmp_path / "sharded").glob("*.safetensors"))
    first.unlink()
    with pytest.raises(Fault, match=f"lacks {first.name}"):
        loading.resolve(str(tmp_path / "sharded"))


@pytest.mark.parametrize(
    "path, words",
    [
        ("/nowhere/model", "neither an existing folder nor a hub id"),
        ("nobody/never-cached", "can't be reached"),
        ("nowhere.gguf", "doesn't exist"),
    ],
)
def test_resolve_without_a_network_is_one_sentence(path, words):
    with pytest.raises(Fault, match=words) as caught:
        loading.resolve(path, None)
    assert "\n" not in str(caught.value)


def test_load_refuses_weights_that_would_stay_random(copy):
    edit(copy / "config.json", num_hidden_layers=3)
    with pytest.raises(Fault, match="lacks 9 weights, such as model.layers.2"):
        loading.load(copy, torch.float32)


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_9"])
def test_load_names_an_attention_that_the_model_lacks(tiny_gemma2, attention):
    with pytest.raises(Fault, match=f"attention '{attention}'.*choose eager") as caught:
        loading.load(tiny_gemma2, torch.float32, attention)
    assert "\n" not in str(caught.value)


def test_a_header_that_begins_as_a_pickle_does_is_no_pickle(tmp_path):
    """Its length is the first thing in a safetensors file, and 128 or 640 begin with the byte 0x80."""
    for padding in range(1, 600):
        save_file({"w": torch.ones(2)}, tmp_path / "w.safetensors", {"note": "x" * padding})
        if (tmp_path / "w.safetensors").read_bytes()[:1] == b"\x80":
            break
    else:
        pytest.fail("no such header was made")
    assert stored(tmp_path / "w.safetensors") == {"w": ([2], "F32")}
    pickled = tmp_path / "pickled.safetensors"
    torch.save({"w": torch.ones(2)}, pickled, _use_new_zipfile_serialization=False)
    with pytest.raises(Fault, match="is a pickle under another name"):
        stored(pickled)
