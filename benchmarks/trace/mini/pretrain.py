"""The small LLaMA of mini-TRACE: byte-level BPE tokenizer and a short pretraining on general skills.

`python -m codyra_llm.benchmarks.trace.mini.pretrain OUT SEED` made the folders under `bases/`.
"""

import random
import re
import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from codyra_llm.benchmarks.trace.mini.lexicon import WORDS_ZH
from codyra_llm.benchmarks.trace.mini.skills import skill_records
from codyra_llm.benchmarks.trace.mini.tasks import TASKS, Pair
from codyra_llm.core.files import replacing
from codyra_llm.models.saved import write_model

ROWS = 6  # rows of 128 tokens in a step, about 33 examples

# A digit stands alone and `<EOL>` stays whole, so one rule sees one token per unit of meaning.
PIECES = r" ?<\w+>|\d| ?\p{L}+|\n+| ?[^\s\p{L}\d]|\s"


def train_tokenizer(texts: list[str], vocab_size: int = 1280) -> PreTrainedTokenizerFast:
    """A tokenizer that adds BOS in front (and no EOS) and can encode any text, trained on `texts`.

    Chinese has no spaces: its merges are learned from the word list alone, so that no token spans two words.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [re.sub("[\u4e00-\u9fff]+", "\n", text) for text in texts] + ["\n".join(WORDS_ZH)] * len(texts)
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<pad>", "<bos>", "<eos>"],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, pairs: list[Pair]) -> list[dict[str, list[int]]]:
    """Token ids of prompt, answer and EOS; the loss sees the answer and EOS only."""
    prompts = tokenizer([p for p, _ in pairs], return_attention_mask=False)["input_ids"]
    answers = tokenizer([a for _, a in pairs], return_attention_mask=False, add_special_tokens=False)[
        "input_ids"
    ]
    return [
        {
            "input_ids": p + a + [tokenizer.eos_token_id],
            "labels": [-100] * len(p) + a + [tokenizer.eos_token_id],
        }
        for p, a in zip(prompts, answers, strict=True)
    ]


def pack(examples: list[dict[str, list[int]]], length: int = 128) -> list[dict[str, list[int]]]:
    """Rows of `length` tokens, each of several examples; positions restart with every example, which is what
    keeps the attention of one from the next. Half the cost of padding each example to the longest."""
    rows: list[dict[str, list[int]]] = []
    for example in examples:
        size = len(example["input_ids"])
        if not rows or len(rows[-1]["input_ids"]) + size > length:
            rows.append({"input_ids": [], "labels": [], "position_ids": []})
        rows[-1]["input_ids"] += example["input_ids"]
        rows[-1]["labels"] += example["labels"]
        rows[-1]["position_ids"] += range(size)
    for row in rows:
        rest = length - len(row["input_ids"])
        row["input_ids"] += [0] * rest
        row["labels"] += [-100] * rest
        row["position_ids"] += range(rest)
    return rows


def small_llama(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A LLaMA of 0.41 million weights. The wide initialization and the low RoPE base let attention find its
    patterns within a few hundred steps, as texts are no longer than 50 tokens."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            initializer_range=0.08,
            rope_parameters={"rope_type": "default", "rope_theta": 100.0},
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def pretrain_mini(out: Path, seed: int = 0, steps: int = 1500) -> None:
    """Train tokenizer and model from nothing and write the Hugging Face folder `out`.

    One of the `steps` steps sees about 33 examples; 1500 take about a minute on two free cores. Training is
    in float32, and the weights are rounded to bfloat16 when they are written. Sets the global random seed.
    Replaces `out` when all is done.
    """
    rng = random.Random(f"pretrain {seed}")
    pairs = skill_records(rng, steps * ROWS * 6)
    # The tokenizer sees examples of the tasks as well, so that none of their words falls apart.
    examples = pairs[:8000] + [task(rng)[:2] for task in TASKS.values() for _ in range(200)]
    tokenizer = train_tokenizer(["".join(pair) for pair in examples])
    set_seed(seed)
    model = small_llama(tokenizer)
    with replacing(Path(out)) as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=ROWS,
            learning_rate=3e-3,
            warmup_steps=steps // 20,
            lr_scheduler_type="cosine",
            weight_decay=0.01,
            adam_beta2=0.98,
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        model.config.use_cache = False  # with a cache, attention would ignore where positions restart
        Trainer(
            model=model,
            args=arguments,
            train_dataset=pack(encode(tokenizer, pairs)),
            data_collator=default_data_collator,
        ).train()
        model.config.use_cache = True
        write_model(model.bfloat16(), tokenizer, scratch)


if __name__ == "__main__":
    pretrain_mini(Path(sys.argv[1]), int(sys.argv[2]))
