"""Greedy generation: batched by length, left-padded, sharded over ranks."""

from collections.abc import Iterator, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import Encoder


def batches(lengths: Sequence[int], new: int, tokens: int) -> Iterator[list[int]]:
    """Positions in batches of like length, longest first, each at most `tokens` tokens with its `new` ones."""
    current: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if current and (lengths[current[0]] + new) * (len(current) + 1) > tokens:
            yield current
            current = []
        current.append(i)
    if current:
        yield current


@torch.no_grad()
def generate_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]],
                 new: int) -> list[list[int]]:
    """Greedy continuations of one batch of prompts, left-padded; without pads, up to and with EOS."""
    width = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=False, num_beams=1,
                         temperature=None, top_p=None, top_k=None, repetition_penalty=1.0,
                         eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    rows = out[:, width:].tolist()
    return [row[: row.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in row else row for row in rows]


def answers(acc: Accelerator, model: PreTrainedModel, encoder: Encoder, texts: Sequence[str], new: int,
            tokens: int | None = None) -> list[str]:
    """The model's answers to prompts, at most `new` tokens each, the same list on every rank.

    Each distinct prompt is answered once: TRACE's test sets repeat some, and greedy answers are the same.
    """
    tokens = tokens or (131072 if acc.device.type == "cuda" else 16384)
    distinct = list(dict.fromkeys(texts))
    prompts = [encoder.prompt(text)[0] for text in distinct]
    own: list[tuple[int, str]] = []
    for number, chosen in enumerate(batches([len(p) for p in prompts], new, tokens)):
        if number % acc.num_processes == acc.process_index:
            ids = generate_ids(model, encoder.tokenizer, [prompts[i] for i in chosen], new)
            own += zip(chosen, encoder.tokenizer.batch_decode(ids, skip_special_tokens=True))
    found = dict(gather_object(own))
    by_text = {text: found[i] for i, text in enumerate(distinct)}
    return [by_text[text] for text in texts]
