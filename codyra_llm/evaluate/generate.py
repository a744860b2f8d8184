"""Greedy generation in torch. Prompts are batched by length, and batches are divided among the ranks;
finished rows leave their batch, or give their places to prompts of later batches, and a shared prefix is
encoded once."""

import os
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from codyra_llm.data.encoding import Encoder
from codyra_llm.evaluate import static_steps
from codyra_llm.evaluate.budget import Budget, Share, batches, budget, joins
from codyra_llm.methods.base import Condition
from codyra_llm.models import families
from codyra_llm.models.attention.cache import cached, empty_cache
from codyra_llm.models.ends import ended
from codyra_llm.models.inference import last_logits
from codyra_llm.runtime import heartbeat, signals
from codyra_llm.runtime.memory import if_it_fits

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
    share: Share | None = None,
    recordings: static_steps.Recordings | None = None,
) -> list[list[int]]:
    """Greedy continuations of one batch of prompts, each of at most `new` tokens, up to and including one of
    `ends` (EOS, and other tokens that end a turn), or until `stop` of the tokens so far is true.

    A row of the cache holds [shared prefix | pads | own tokens], or [pads | a method's prefix | own tokens];
    pads are masked and positions count tokens only. Finished rows are removed when they are a quarter of the
    batch, since removing them copies the cache of the others. Where steps are recorded, prompts of later
    batches of the `share` take their places, and are answered there. `recordings`: what the recorded steps of
    several batches have in common.
    """
    if new < 1:
        return [[] for _ in prompts]
    ends = {ends} if isinstance(ends, int) else ends
    recordings = recordings or static_steps.Recordings(model, joins(model))
    rows = _Rows(model, prompts, new, condition)
    batch = _Batch(len(prompts), new, ends, stop)
    going, left = batch.add(rows.tokens), new - 1
    while going:
        if 4 * len(going) <= 3 * len(batch.rows):  # a quarter is done
            batch.keep(going)
            rows.keep(going)
        records = recordings.on and condition is None and new - left >= UNRECORDED
        if records and static_steps.pays(model, left) and _finish(rows, batch, share, recordings):
            break
        rows.step()
        going, left = batch.add(rows.tokens), left - 1
    return [batch.out[number] for number in range(len(prompts))]


@torch.no_grad()
def prompt_logits(
    model: PreTrainedModel, prompts: Sequence[list[int]], keep: int, condition: Condition | None = None
) -> Tensor:
    """Logits [B, keep, V] at the last `keep` tokens of every prompt; a prefix that all share is read once."""
    shared = 0 if condition else shared_prefix(prompts, 0, families.windows(model.config), keep)
    given, mask = _prefill(model, prompts, shared, condition)
    if len(set(map(len, prompts))) > 1:
        given["attention_mask"] = mask
    given |= cached(_cache(model, prompts, shared)) if shared else {"use_cache": False}
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, shared:]
    return last_logits(model, keep, **given, position_ids=positions)


def _cache(model: PreTrainedModel, prompts: Sequence[list[int]], shared: int) -> DynamicCache:
    """A cache with the `shared` first tokens of the prompts, for each of them."""
    cache = empty_cache(model)
    if shared:
        prefix = torch.tensor([prompts[0][:shared]], device=model.device)
        last_logits(model, input_ids=prefix, **cached(cache))
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


class _Rows:
    """What a batch has read. `cache` [B, H_kv, S, d] of every layer, `mask` [B, S] of the columns that are
    tokens, the token generated last, `ids` [B, 1], which the cache does not have yet, and its `positions`
    [B, 1]."""

    def __init__(
        self, model: PreTrainedModel, prompts: Sequence[list[int]], new: int, condition: Condition | None
    ):
        """Read the prompts, of which up to `new` tokens are to follow."""
        self.model, self.condition = model, condition
        self.pads = [max(map(len, prompts)) - len(prompt) for prompt in prompts]
        # A condition may differ from row to row, so that no prefix is shared.
        shared = 0 if condition else shared_prefix(prompts, new, families.windows(model.config))
        self.cache = _cache(model, prompts, shared)
        given, self.mask = _prefill(model, prompts, shared, condition)
        self.positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, shared:]
        self._forward(**given)

    def step(self) -> None:
        """Read the last token of every row, and generate the next."""
        self.mask = torch.cat([self.mask, torch.ones_like(self.ids)], 1)
        self._forward(input_ids=self.ids)

    def keep(self, rows: list[int]) -> None:
        """Keep these rows alone."""
        chosen = torch.tensor(rows, device=self.model.device)
        self.pads = [self.pads[row] for row in rows]
        self.ids, self.mask, self.positions = self.ids[chosen], self.mask[chosen], self.positions[chosen]
        self.cache.batch_select_indices(chosen)
        if self.condition:
            self.condition.select(chosen)

    @property
    def tokens(self) -> list[int]:
        """The token generated last of every row."""
        return self.ids[:, 0].tolist()

    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every layer, which leave this object."""
        found = [(layer.keys, layer.values) for layer in self.cache.layers]
        self.cache.layers.clear()
        return found

    def rings(self, length: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every layer with room for `length` tokens. The cache has parts of them from now
        on, one layer after the other, so that no more than one layer is in memory twice."""
        found = []
        used = self.mask.shape[1]
        for layer in cast(list[DynamicLayer], self.cache.layers):
            assert layer.keys is not None and layer.values is not None, "prompts were read"
            keys, values = static_steps.longer(layer.keys, length), static_steps.longer(layer.values, length)
            layer.keys, layer.values = keys[:, :, :used], values[:, :, :used]
            found.append((keys, values))
        return found

    def _forward(self, **given: Tensor) -> None:
        logits = last_logits(
            self.model,
            **given,
            attention_mask=self.mask if any(self.pads) else None,
            position_ids=self.positions,
            **cached(self.cache),
        )
        self.ids = logits[:, -1].argmax(-1, keepdim=True)
        self.positions = self.positions[:, -1:] + 1


class _Batch:
    """Which prompts the rows of a batch answer, and the answers so far, by the prompts' numbers."""

    def __init__(self, count: int, new: int, ends: Collection[int], stop: Callable[[list[int]], bool] | None):
        self.count = count  # of rows at first
        self.rows = list(range(count))  # of each row that is left, the number of its prompt
        self.out: dict[int, list[int]] = {number: [] for number in self.rows}
        self.done: set[int] = set()  # numbers of prompts
        self.later: dict[int, int] = {}  # of prompts of later batches, their positions in the share
        self.new, self.ends, self.stop = new, ends, stop

    def add(self, tokens: list[int]) -> list[int]:
        """Add one more token to every row; returns the positions of the rows that go on."""
        for number, token in zip(self.rows, tokens, strict=True):
            if number not in self.done:
                self._add(number, token)
        return self.going()

    def going(self) -> list[int]:
        """The positions of the rows that go on."""
        return [i for i, number in enumerate(self.rows) if number not in self.done]

    def places_of_done(self) -> list[int]:
        """The positions of the rows that are done."""
        return [i for i, number in enumerate(self.rows) if number in self.done]

    def _add(self, number: int, token: int) -> None:
        own = self.out[number]
        own.append(token)
        if token in self.ends or len(own) == self.new or (self.stop and self.stop(own)):
            self.done.add(number)

    def left(self) -> int:
        """How many tokens the row that may go on for longest has left."""
        return max(self.new - len(self.out[number]) for number in self.rows if number not in self.done)

    def keep(self, going: list[int]) -> None:
        """Keep only the rows at these positions."""
        self.rows = [self.rows[i] for i in going]

    def put(self, places: list[int], taken: list[int], tokens: list[int]) -> None:
        """Let prompts of later batches, `taken` by their positions in the share, have the first of these
        places, with the first tokens of their answers."""
        for place, i, token in zip(places, taken, tokens, strict=False):
            number = len(self.out)
            self.rows[place], self.out[number], self.later[number] = number, [], i
            self._add(number, token)

    def hand_over(self, share: Share) -> None:
        """Give the finished answers to prompts of later batches to the `share`."""
        for number in self.later.keys() & self.done:
            share.finished_early(self.later.pop(number), self.out[number])


def _begun(
    rows: _Rows, batch: _Batch, recordings: static_steps.Recordings
) -> tuple[static_steps.StaticSteps, Tensor] | None:
    """Recorded steps of a batch, and the first tokens that they gave. None where memory ran out: then nothing
    more is recorded, and the rows, whose cache is as it was, go on without."""

    def begin() -> tuple[static_steps.StaticSteps, Tensor]:
        rings = rows.rings(rows.mask.shape[1] + batch.left())
        steps = static_steps.StaticSteps.begun(recordings, rings, rows.mask, rows.ids, rows.positions)
        return steps, steps.next(min(static_steps.AT_ONCE, batch.left()))

    begun = if_it_fits(begin)
    if begun is None:
        recordings.stop()
        clear_device_cache(garbage_collection=True)
    return begun


def _finish(rows: _Rows, batch: _Batch, share: Share | None, recordings: static_steps.Recordings) -> bool:
    """The remaining steps of a batch, recorded; whether there was memory for the first. Where a quarter of
    the rows are done, prompts of later batches take their places, unless more than half of the rows are gone:
    a step of a small batch takes about as long as one of a large batch. Else finished rows are removed when
    they are half of the batch, since the smaller one must be recorded again."""
    begun = _begun(rows, batch, recordings)
    if begun is None:
        return False
    steps, tokens = begun
    del begun  # steps of fewer rows take the place of these, whose memory is then free
    rows.layers()
    length = rows.mask.shape[1] + batch.left()
    most = length - (batch.new - 1)  # tokens of a prompt that fits in: an answer's last token is not read
    going, refills = batch.going(), share is not None
    while going:
        for column in zip(*tokens.tolist(), strict=True):
            going = batch.add(list(column))
        full = 2 * len(batch.rows) >= batch.count
        if share and refills and full and 4 * len(going) <= 3 * len(batch.rows):
            refills = _refill(rows.model, steps, batch, share, most)
            going = batch.going()
        if not going:
            break
        if 2 * len(going) <= len(batch.rows):  # half is done
            steps = steps.select(torch.tensor(going, device=rows.model.device))
            batch.keep(going)
        elif len(going) < len(batch.rows):
            steps.park(torch.tensor(batch.places_of_done(), device=rows.model.device))
        tokens = steps.next(min(static_steps.AT_ONCE, batch.left()))
    if share:
        batch.hand_over(share)
    return True


def _refill(
    model: PreTrainedModel, steps: static_steps.StaticSteps, batch: _Batch, share: Share, most: int
) -> bool:
    """Give the places of finished rows to prompts of later batches, of at most `most` tokens. Returns whether
    this may be tried again: not where memory ran out, which leaves the other rows as they are."""
    signals.check()
    share.report()
    free = batch.places_of_done()
    batch.hand_over(share)
    taken = share.take(len(free), most)
    if not taken:
        return True
    prompts = [share.rows[i] for i in taken]
    tokens = if_it_fits(partial(_put, model, steps, prompts, batch.new, free[: len(taken)]))
    if tokens is None:
        clear_device_cache(garbage_collection=True)
        return False
    batch.put(free, taken, tokens)
    return True


def _put(
    model: PreTrainedModel,
    steps: static_steps.StaticSteps,
    prompts: list[list[int]],
    new: int,
    places: list[int],
) -> list[int]:
    """Let prompts take these places of a batch; returns the first tokens of their answers."""
    read = _Rows(model, prompts, new, None)
    chosen = torch.tensor(places, device=model.device)
    steps.put(chosen, read.layers(), read.mask, read.ids, read.positions)
    return read.tokens


def prefixed(model: PreTrainedModel, ids: Tensor, prompts: Sequence[list[int]], prefix: Tensor) -> Tensor:
    """Embeddings of left-padded ids [B, T] with `prefix` [B, P, h] between pads and prompt: [B, P + T, h]."""
    embedded = model.get_input_embeddings()(ids)
    starts = [ids.shape[1] - len(p) for p in prompts]
    rows = []
    for row, own, start in zip(embedded, prefix, starts, strict=True):
        rows.append(torch.cat([row[:start], own.to(row.dtype), row[start:]]))
    return torch.stack(rows)


def generated(
    model: PreTrainedModel,
    share: Share,
    held: Budget,
    ends: int | Collection[int],
    conditions: Callable[[list[list[int]]], Condition] | None = None,
    stop: Callable[[list[int]], bool] | None = None,
) -> dict[int, list[int]]:
    """The answers to all rows of a share, as token ids, by the rows' positions. `conditions` makes what a
    batch of prompts needs in addition to the model."""
    recordings = static_steps.Recordings(model, joins(model))

    def answer(chosen: list[int]) -> list[list[int]]:
        batch = [share.rows[i] for i in chosen]
        condition = conditions(batch) if conditions else None
        return generate_ids(model, batch, share.new, ends, condition, stop, share, recordings)

    found = {}
    for chosen, ids in share.answered(held, answer):
        found |= zip(chosen, ids, strict=True)
    return found | share.early


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
    mine = list(batches(lengths, new, held.tokens, held.step))[acc.process_index :: acc.num_processes]
    share = Share("answers", prompts, mine, new, len(prompts))
    found = generated(model, share, held, encoder.ends, conditions)
    cut = [not ended(ids, encoder.ends) for ids in found.values()]
    own = list(zip(found, map(Answer, encoder.texts(list(found.values())), cut), strict=True))
    with heartbeat.waiting():
        all_found = dict(gather_object(own))
    by_text = {text: all_found[i] for i, text in enumerate(distinct)}
    return [by_text[text] for text in texts]
