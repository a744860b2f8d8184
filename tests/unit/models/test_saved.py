"""Model folders that are written: what did not change is the base's, byte for byte, and both majors of
transformers read what has no base."""

import json
import re

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from tiny import SIZES, save_tiny
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from codyra_llm.core.errors import Fault
from codyra_llm.models import loading, saved
from codyra_llm.models.weights import INDEX, WeightReader, leftovers, weight_files


def keep(name, weight):
    return weight


def published(folder):
    """A base as transformers 4 wrote it: LLaMA 3's RoPE scaling in its layout, further files."""
    save_tiny(folder, LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=False))
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"], config["dtype"]
    config |= {
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 64,
            "rope_type": "llama3",
        },
        "torch_dtype": "float32",
        "transformers_version": "4.43.0",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<eos>"}')
    (folder / "LICENSE.txt").write_text("terms")
    (folder / "optimizer.txt").write_text("not of the model")
    return folder


def test_a_copy_is_the_base_byte_for_byte(tmp_path):
    base = published(tmp_path / "base")
    saved.copy_model(base, tmp_path / "copy", keep)
    names = {file.name for file in (tmp_path / "copy").iterdir()}
    assert names == {file.name for file in base.iterdir()} - {"optimizer.txt"}
    for name in names:
        assert (tmp_path / "copy" / name).read_bytes() == (base / name).read_bytes(), name
    written = sum(file.stat().st_size for file in (tmp_path / "copy").iterdir())
    assert saved.size(base) == written


def test_terms_are_downloaded_since_an_export_passes_them_on(monkeypatch, tmp_path):
    """LLaMA's licence wants its text and its notice with every copy."""
    asked = {}
    monkeypatch.setattr(loading, "snapshot_download", lambda name, **given: asked.update(given) or tmp_path)
    loading.download("owner/name", None)
    files = [
        "LICENSE",
        "LICENSE.txt",
        "NOTICE.txt",
        "USE_POLICY.md",
        "config.json",
        "original/LICENSE",
        "x.bin",
    ]
    kept = filter_repo_objects(
        files, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert list(kept) == files[:5]


def test_a_weight_past_float16_is_refused(tiny_llama, tmp_path):
    def large(name, weight):
        return weight * 0 + 1e5 if name == "model.norm.weight" else weight

    with pytest.raises(Fault, match="--dtype: model.norm.weight holds values past float16's largest, 65504"):
        saved.copy_model(tiny_llama, tmp_path / "copy", large, torch.float16)
    saved.copy_model(tiny_llama, tmp_path / "wide", large, torch.bfloat16)
    assert all(w.isfinite().all() for w in load_file(tmp_path / "wide" / "model.safetensors").values())


def test_shards_stay_and_a_weight_that_changed_is_where_it_was(tiny_llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    name = "model.layers.1.mlp.up_proj.weight"
    saved.copy_model(tmp_path / "base", tmp_path / "copy", lambda n, w: w + 1 if n == name else w)
    assert (tmp_path / "copy" / INDEX).read_bytes() == (tmp_path / "base" / INDEX).read_bytes()
    assert len(weight_files(tmp_path / "copy")) > 1
    old, new = WeightReader(tmp_path / "base"), WeightReader(tmp_path / "copy")
    assert all(torch.equal(new.get(n), old.get(n) + (n == name)) for n in old.handle_of)


def test_the_index_of_a_cast_model_has_its_size_as_a_whole_number(tiny_llama, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    saved.copy_model(tmp_path / "base", tmp_path / "copy", keep, torch.bfloat16)
    before, after = (
        json.loads((tmp_path / name / INDEX).read_text())["metadata"]["total_size"]
        for name in ("base", "copy")
    )
    assert type(after) is int and 2 * after == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_another_dtype_is_asked_for_and_said(tiny_llama, tmp_path, dtype):
    saved.copy_model(tiny_llama, tmp_path / "copy", keep, dtype)
    weights = load_file(tmp_path / "copy" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {dtype}
    assert AutoConfig.from_pretrained(tmp_path / "copy").dtype == dtype
    before, after = (json.loads((f / "config.json").read_text()) for f in (tiny_llama, tmp_path / "copy"))
    changed = {key for key in before | after if before.get(key) != after.get(key)}
    assert changed == (set() if dtype == torch.float32 else {"dtype"})
    written = sum(file.stat().st_size for file in (tmp_path / "copy").iterdir())
    assert abs(saved.size(tiny_llama, dtype) - written) < 200  # headers name the dtype of each weight


def test_integers_and_numbers_of_eight_bits_are_counted_as_they_are(tmp_path):
    tensors = {
        "a": torch.zeros(10, dtype=torch.int64),
        "b": torch.zeros(10, dtype=torch.float8_e4m3fn),
        "c": torch.zeros(10, dtype=torch.bool),
        "d": torch.zeros(10, dtype=torch.float32),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    assert saved.stored_bytes(tmp_path / "x.safetensors") == 80 + 10 + 10 + 40
    assert saved.stored_bytes(tmp_path / "x.safetensors", torch.bfloat16) == 80 + 10 + 10 + 20


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gemma2", "tiny_gemma3"])
def test_a_model_without_a_base_is_written_as_published_ones_are(name, request, tmp_path):
    """What transformers 4 reads by: top-level RoPE keys, torch_dtype, a tokenizer class that it has."""
    folder = request.getfixturevalue(name)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    if name == "tiny_llama":
        model.config.rope_parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}
    saved.write_model(model, tokenizer, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "rope_parameters" not in config and config["torch_dtype"] == "float32"
    expected = {
        "tiny_llama": (5e5, {"rope_type": "linear", "factor": 4.0}, None),
        "tiny_gemma2": (10000.0, None, None),
        "tiny_gemma3": (1000000.0, None, 10000.0),
    }[name]
    found = tuple(config.get(key) for key in ("rope_theta", "rope_scaling", "rope_local_base_freq"))
    assert found == expected
    read = AutoConfig.from_pretrained(tmp_path / "out")
    assert read.rope_parameters == model.config.rope_parameters
    told = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert told["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"padding_side", "local_files_only", "is_local", "backend"} & told.keys()
    again, text = AutoTokenizer.from_pretrained(tmp_path / "out"), "Say 12 Größen <eos>"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def two_sets(tiny_llama, folder):
    """Shards of the model with their index, next to a newer model.safetensors of other weights."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.save_pretrained(folder, max_shard_size="20KB")
    newer = {name: weight * 1.5 for name, weight in load_file(tiny_llama / "model.safetensors").items()}
    save_file(newer, folder / "model.safetensors", {"format": "pt"})
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    return folder


def test_of_two_sets_of_weights_that_is_read_which_transformers_loads(tiny_llama, tmp_path):
    folder = two_sets(tiny_llama, tmp_path / "both")
    model, reader = AutoModelForCausalLM.from_pretrained(folder), WeightReader(folder)
    assert all(torch.equal(reader.get(name), weight) for name, weight in model.state_dict().items())
    assert INDEX in leftovers(folder) and "model.safetensors" not in leftovers(folder)
    assert loading.check(folder) == []
    saved.copy_model(folder, tmp_path / "copy", keep)
    assert [file.name for file in (tmp_path / "copy").glob("model*")] == ["model.safetensors"]


def test_a_second_file_with_names_in_common_is_not_read(tiny_llama, tmp_path):
    saved.copy_model(tiny_llama, tmp_path / "base", keep)
    other = {"model.norm.weight": torch.full((32,), 7.0)}
    save_file(other, tmp_path / "base" / "zz.safetensors", {"format": "pt"})
    reader, plain = WeightReader(tmp_path / "base"), WeightReader(tiny_llama)
    assert torch.equal(reader.get("model.norm.weight"), plain.get("model.norm.weight"))
    assert leftovers(tmp_path / "base") == ["zz.safetensors"] and leftovers(tiny_llama) == []


@pytest.mark.parametrize(
    "config, words",
    [
        (
            {"model_type": "llama4", "text_config": {"num_local_experts": 16}, "vision_config": {}},
            "is Llama 4, which is a mixture of experts: .* Choose a dense model .LLaMA 1 to 3, Gemma 1,",
        ),
        ({"model_type": "mixtral", "num_local_experts": 8}, "mixture of experts"),
        ({"model_type": "qwen3_moe", "num_experts": 128}, "mixture of experts"),
        (
            {"model_type": "gemma4", "text_config": {"num_experts": 128, "enable_moe_block": True}},
            "mixture of experts",
        ),
        ({"model_type": "mllama", "vision_config": {}, "text_config": {}}, "reads images as well as text"),
        ({"model_type": "gemma3", "vision_config": {}}, "has no mapping 'text_config'"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "attends to later tokens too"),
        ({"model_type": "mamba"}, "has model_type 'mamba': expected one of llama"),
    ],
)
def test_models_that_are_not_trained_are_told_in_plain_words(tmp_path, config, words):
    faults = loading.config_faults(tmp_path, config)
    assert len(faults) == 1 and re.search(words, faults[0])


def test_weights_that_transformers_does_not_find_are_refused(tiny_llama, tmp_path):
    saved.copy_model(tiny_llama, tmp_path / "base", keep)
    (tmp_path / "base" / "model.safetensors").rename(tmp_path / "base" / "weights.safetensors")
    with pytest.raises(Fault, match="neither model.safetensors nor .*: rename the one file"):
        loading.resolve(str(tmp_path / "base"))
