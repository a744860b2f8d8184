"""Greedy generation in torch. Prompts are batched by length, and batches are divided among the ranks;
finished rows leave their batch, and a shared prefix is encoded once."""

import os
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from codyra_llm.data.encoding import Encoder
from codyra_llm.evaluate import static_steps
from codyra_llm.evaluate.budget import batches, budget, within_memory
from codyra_llm.methods.base import Condition
from codyra_llm.models import families
from codyra_llm.models.ends import ended
from codyra_llm.models.inference import empty_cache, last_logits
from codyra_llm.runtime import heartbeat, signals
from codyra_llm.store import observer

# The first steps of every batch are not recorded: many answers, such as a single letter, end within them.
UNRECORDED = 4
LEAST_SHARED = 16  # tokens; a shorter prefix does not pay a forward pass of its own


class Answer(NamedTuple):
    """A model's answer; `cut`: it reached the token limit before it ended."""

    text: str
    cut: bool


def shared_prefix(prompts: Sequence[list[int]], new: int, windows: Sequence[int], keep: int = 1) -> int:
    """How many of the first tokens, which all `prompts` share, to encode once; 0 where this saves less than
    an eighth of the tokens. The last `keep` tokens of each are not among them, since their logits are wanted.

    The pads of shorter prompts are then between the prefix and the rest. A sliding window counts them, so
    with `windows` (of the sliding layers, in tokens) nothing is shared unless prompt and answer fit into
    each."""
    lengths = [len(p) for p in prompts]
    shared = min(len(os.path.commonprefix(prompts)), min(lengths) - keep)
    pays = shared >= LEAST_SHARED and 8 * shared * (len(prompts) - 1) >= sum(lengths)
    return shared if pays and all(max(lengths) + new <= window for window in windows) else 0


@torch.no_grad()
def generate_ids(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    new: int,
    ends: int | Collection[int],
    condition: Condition | None = None,
    stop: Callable[[list[int]], bool] | None = None,
) -> list[list[int]]:
    """Greedy continuations of one batch of prompts, each of at most `new` tokens, up to and including one of
    `ends` (EOS, and other tokens that end a turn), or until `stop` of the tokens so far is true.

    A row of the cache holds [shared prefix | pads | own tokens], or [pads | a method's prefix | own tokens];
    pads are masked and positions count tokens only. Finished rows are removed when they are a quarter of the
    batch, since removing them copies the cache of the others.
    """
    ends = {ends} if isinstance(ends, int) else ends
    width = max(map(len, prompts))
    # A condition may differ from row to row, so that no prefix is shared.
    shared = 0 if condition else shared_prefix(prompts, new, families.windows(model.config))
    cache = _cache(model, prompts, shared)
    given, mask = _prefill(model, prompts, shared, condition)
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, shared:]
    batch = _Batch(len(prompts), ends, stop)
    for number in range(new):
        padded = any(len(prompts[row]) < width for row in batch.rows)
        logits = last_logits(
            model,
            **given,
            attention_mask=mask if padded else None,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        ids = logits[:, -1].argmax(-1, keepdim=True)
        going = batch.add(ids[:, 0].tolist())
        if not going:
            break
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        positions = positions[:, -1:] + 1
        if 4 * len(going) <= 3 * len(batch.rows):  # a quarter is done
            chosen = torch.tensor(going, device=model.device)
            batch.keep(going)
            ids, mask, positions = ids[chosen], mask[chosen], positions[chosen]
            cache.batch_select_indices(chosen)
            if condition:
                condition.select(chosen)
        given = {"input_ids": ids}
        left = new - number - 1
        if number + 1 >= UNRECORDED and condition is None and static_steps.pays(model, left):
            _finish(model, cache, mask, ids, positions, batch, left)
            break
    return batch.out


@torch.no_grad()
def prompt_logits(
    model: PreTrainedModel, prompts: Sequence[list[int]], keep: int, condition: Condition | None = None
) -> Tensor:
    """Logits [B, keep, V] at the last `keep` tokens of every prompt; a prefix that all share is read once."""
    shared = 0 if condition else shared_prefix(prompts, 0, families.windows(model.config), keep)
    given, mask = _prefill(model, prompts, shared, condition)
    if len(set(map(len, prompts))) > 1:
        given["attention_mask"] = mask
    if shared:
        given["past_key_values"] = _cache(model, prompts, shared)
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, shared:]
    return last_logits(model, keep, **given, position_ids=positions, use_cache=bool(shared))


def _cache(model: PreTrainedModel, prompts: Sequence[list[int]], shared: int) -> DynamicCache:
    """A cache with the `shared` first tokens of the prompts, for each of them."""
    cache = empty_cache(model)
    if shared:
        prefix = torch.tensor([prompts[0][:shared]], device=model.device)
        last_logits(model, input_ids=prefix, past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(prompts))
    return cache


def _prefill(
    model: PreTrainedModel, prompts: Sequence[list[int]], shared: int, condition: Condition | None
) -> tuple[dict[str, Any], Tensor]:
    """The first inputs of a batch after its `shared` tokens, left-padded, and the mask of all columns of the
    cache [B, width + a method's prefix]."""
    width = max(map(len, prompts))
    prefix = condition.prefix if condition else None
    front = 0 if prefix is None else prefix.shape[1]
    ids, mask = [], []
    for prompt in prompts:
        pads = [0] * (width - len(prompt))
        ids.append(pads + prompt[shared:])
        mask.append([1] * shared + pads + [1] * (front + len(prompt) - shared))
    ids_bt = torch.tensor(ids, device=model.device)
    mask_bt = torch.tensor(mask, device=model.device)
    if prefix is None or not front:
        return {"input_ids": ids_bt}, mask_bt
    return {"inputs_embeds": prefixed(model, ids_bt, prompts, prefix)}, mask_bt


class _Batch:
    """Which prompts the rows of a batch answer, and the answers so far."""

    def __init__(self, count: int, ends: Collection[int], stop: Callable[[list[int]], bool] | None):
        self.rows = list(range(count))  # of each row that is left, the number of its prompt
        self.out: list[list[int]] = [[] for _ in range(count)]
        self.done: set[int] = set()  # numbers of prompts
        self.ends, self.stop = ends, stop

    def add(self, tokens: list[int]) -> list[int]:
        """Add one more token to every row; returns the positions of the rows that go on."""
        for row, token in zip(self.rows, tokens, strict=True):
            if row not in self.done:
                self.out[row].append(token)
                if token in self.ends or (self.stop and self.stop(self.out[row])):
                    self.done.add(row)
        return [i for i, row in enumerate(self.rows) if row not in self.done]

    def keep(self, going: list[int]) -> None:
        """Keep only the rows at these positions."""
        self.rows = [self.rows[i] for i in going]


def _finish(
    model: PreTrainedModel,
    cache: DynamicCache,
    mask: Tensor,
    ids: Tensor,
    positions: Tensor,
    batch: _Batch,
    left: int,
) -> None:
    """The remaining steps of a batch, recorded. Finished rows are removed when they are half of it, since the
    smaller batch must be recorded again."""
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    steps = static_steps.StaticSteps(model, layers, mask, ids, positions, left)
    cache.layers.clear()  # the steps have copied it
    del layers
    while steps.left:
        tokens = steps.next(min(static_steps.AT_ONCE, steps.left))
        for column in zip(*tokens.tolist(), strict=True):
            going = batch.add(list(column))
        if not going:
            break
        if steps.left and 2 * len(going) <= len(batch.rows):  # half is done
            steps = steps.select(torch.tensor(going, device=model.device))
            batch.keep(going)


def prefixed(model: PreTrainedModel, ids: Tensor, prompts: Sequence[list[int]], prefix: Tensor) -> Tensor:
    """Embeddings of left-padded ids [B, T] with `prefix` [B, P, h] between pads and prompt: [B, P + T, h]."""
    embedded = model.get_input_embeddings()(ids)
    starts = [ids.shape[1] - len(p) for p in prompts]
    rows = []
    for row, own, start in zip(embedded, prefix, starts, strict=True):
        rows.append(torch.cat([row[:start], own.to(row.dtype), row[start:]]))
    return torch.stack(rows)


def answers(
    acc: Accelerator,
    model: PreTrainedModel,
    encoder: Encoder,
    texts: Sequence[str],
    new: int,
    tokens: int | None = None,
    conditions: Callable[[list[list[int]]], Condition] | None = None,
) -> list[Answer]:
    """The model's answers to prompts, at most `new` tokens each, the same list on every rank.

    `conditions` makes what a batch of prompts needs in addition to the model. Each distinct prompt is
    answered once: TRACE's test sets repeat some, and greedy answers are the same.
    """
    held = budget(acc, model, tokens)
    distinct = list(dict.fromkeys(texts))
    prompts = [ids for ids, _ in encoder.prompts(distinct)]
    lengths = [len(p) for p in prompts]
    own: list[tuple[int, Answer]] = []
    answered = 0
    observer.counted(0, len(prompts))

    def answer(chosen: list[int]) -> list[list[int]]:
        batch = [prompts[i] for i in chosen]
        return generate_ids(model, batch, new, encoder.ends, conditions and conditions(batch))

    for number, chosen in enumerate(list(batches(lengths, new, held.tokens, held.step))):
        if number % acc.num_processes == acc.process_index:
            signals.check()
            observer.at(f"batch {number + 1} of answers")
            for part, ids in within_memory(chosen, lengths, new, held, answer):
                cut = [not ended(row, encoder.ends) for row in ids]
                own += zip(part, map(Answer, encoder.texts(ids), cut), strict=True)
        answered += len(chosen)
        observer.counted(answered, len(prompts))
    with heartbeat.waiting():
        found = dict(gather_object(own))
    by_text = {text: found[i] for i, text in enumerate(distinct)}
    return [by_text[text] for text in texts]
