"""Shared fixtures: tiny models with a real tokenizer, made here, so that no test needs the network."""

import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported anywhere

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it gives

CORPUS = [
    "Solve the following math problem.\nQuestion:\nSam has 3 pens and buys 4 more. How many pens?\nAnswer:7",
    "What is the monetary policy stance for the following text? Choose one from A, B and C.\nText:\nStance:B",
    "Write a summary of the following meeting transcripts. "
    "判断以下文本对指定对象的态度 Vereinfachung für Kinder",
]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 320 tokens; <pad>, <bos>, <eos>, <unk> are 0-3; puts <bos> in front as LLaMA and
    Gemma do.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def save_tiny(folder, model_class, config):
    tokenizer = tiny_tokenizer()
    config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():  # fresh norms are all equal, which would hide a norm that is read wrongly
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pytest_addoption(parser):
    parser.addoption("--rewrite-trajectories", action="store_true", help="write tests/trajectories/ anew")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """Folder of a two-layer LLaMA, hidden 32, float32, untied embeddings."""
    config = LlamaConfig(**SIZES, tie_word_embeddings=False)
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny-llama", LlamaForCausalLM, config)


@pytest.fixture(scope="session")
def tiny_gemma2(tmp_path_factory):
    """Folder of a two-layer Gemma 2 (sliding, then full attention), hidden 32, float32, tied embeddings."""
    config = Gemma2Config(**SIZES, head_dim=16, query_pre_attn_scalar=16, sliding_window=16)
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny-gemma2", Gemma2ForCausalLM, config)


@pytest.fixture(scope="session")
def tiny_gemma3(tmp_path_factory):
    """Folder of a two-layer Gemma 3 (sliding, then full attention), hidden 32, float32, tied embeddings."""
    config = Gemma3TextConfig(
        **SIZES,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
    )
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny-gemma3", Gemma3ForCausalLM, config)


@pytest.fixture(scope="session")
def toy_stream(tmp_path_factory):
    """Folder of three tiny tasks in TRACE's layout: copy a letter (for eval "now": a prompt that test has
    not), name the next digit, answer in two words."""
    root = tmp_path_factory.mktemp("stream")
    makers = {
        "ONE": lambda i: (f"Say {'ABC'[i % 3]}{' now' * (20 <= i < 24)}:", "ABC"[i % 3]),
        "TWO": lambda i: (f"{i} next:", str(i + 1)),
        "THREE": lambda i: (f"Who is number {i} of the list?\nAnswer:", f"person {i % 4}"),
    }
    for task, make in makers.items():
        for split, numbers in (("train", range(20)), ("eval", range(20, 24)), ("test", range(24, 30))):
            (root / task).mkdir(exist_ok=True)
            rows = [dict(zip(("prompt", "answer"), make(i), strict=True)) for i in numbers]
            (root / task / f"{split}.json").write_text(json.dumps(rows), encoding="utf-8")
    return root


@pytest.fixture
def real_model():
    """Function from a name of `codyra-llm model get` to its folder under $CODYRA_MODELS; skips where it is
    not.
    """

    def folder(name: str) -> Path:
        path = Path(os.environ.get("CODYRA_MODELS", "models")) / name
        if not (path / "config.json").is_file():
            pytest.skip(
                f"no weights in {path}; run `codyra-llm model get {name} {path}` or set CODYRA_MODELS"
            )
        return path

    return folder


@pytest.fixture(scope="module")
def run(tiny_llama, toy_stream, tmp_path_factory):
    """For tests of LoRA methods: function from a method's section to its finished run, each made once."""
    from adapters import recipe

    from codyra_llm.experiment.run import run as run_recipe

    made = {}

    def finished(method):
        key = json.dumps(method, sort_keys=True)
        if key not in made:
            made[key] = run_recipe(
                recipe(tiny_llama, toy_stream, tmp_path_factory.mktemp("runs") / "run", method)
            )
        return made[key]

    return finished
