"""Shared fixtures: tiny models with a real tokenizer, made here, so that no test needs the network."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    PreTrainedTokenizerFast,
)

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
    config.get_text_config().vocab_size = len(tokenizer)
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():  # fresh norms are all equal, which would hide a norm that is read wrongly
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
