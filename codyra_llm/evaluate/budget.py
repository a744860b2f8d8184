"""How many tokens are decoded at once: prompts in batches of similar length, as many as fit into memory."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache
from transformers import PreTrainedConfig, PreTrainedModel

from codyra_llm.core.errors import Fault
from codyra_llm.evaluate import static_steps
from codyra_llm.models import families
from codyra_llm.runtime import heartbeat, signals
from codyra_llm.runtime.memory import if_it_fits
from codyra_llm.store import observer

MOST = {"cpu": 4096, "cuda": 131072}  # tokens of a batch
# Prompt tokens that cost as much as one decoding step. Measured on the CPU; on an H100 800 to 3000.
STEP = {"cpu": 16, "cuda": 1024}
PREFIX = 64  # tokens by which rows are compared
JOINED = 8  # weights that recorded steps join take at most one in so many bytes of the free memory

T = TypeVar("T")


@dataclass
class Budget:
    """`tokens`: the most tokens of a batch, prompts and answers together. `step`: how many prompt tokens cost
    as much time as one decoding step."""

    tokens: int
    step: int

    def halve(self, needed: int, rows: int) -> None:
        """Halve the budget after a batch of `needed` tokens in `rows` rows ran out of memory. Raises Fault
        for a single row, which can't be split."""
        if rows == 1:
            raise Fault(
                f"one prompt with its answer, {needed} tokens, does not fit into the device's memory; lower "
                "data.max_prompt_tokens or the number of new tokens"
            )
        self.tokens = needed // 2
        clear_device_cache(garbage_collection=True)

    def agree(self, acc: Accelerator) -> None:
        """Take the smallest budget of all ranks (collective). A rank that has halved its own would cut the
        prompts into other batches than the rest, and some prompt would be in no rank's share."""
        if acc.num_processes > 1:
            with heartbeat.waiting():
                self.tokens = min(gather_object([self.tokens]))


def budget(acc: Accelerator, model: PreTrainedModel, asked: int | None) -> Budget:
    """The budget that is `asked` for, or else what fits on the device (collective). It is the same on every
    rank, so that all ranks make the same batches."""
    kind = acc.device.type
    if asked or kind != "cuda":
        return Budget(asked or MOST["cpu"], STEP.get(kind, STEP["cpu"]))
    held = Budget(affordable(model.config, model.dtype, free_bytes(acc.device)), STEP["cuda"])
    held.agree(acc)
    return held


def affordable(config: PreTrainedConfig, dtype: torch.dtype, free: int) -> int:
    """Tokens of a batch on a GPU with `free` bytes: those that fit into half of what recorded steps leave, at
    most `MOST`. The other half is for rows that are copied when others leave, or read when they take their
    places, and for the layer of the cache that is copied when recorded steps begin."""
    left = free - joined_within(config, dtype, free)
    return max(1, min(MOST["cuda"], left // 2 // token_bytes(config, dtype)))


def joined_within(config: PreTrainedConfig, dtype: torch.dtype, free: int) -> int:
    """Bytes that recorded steps take on a GPU with `free` bytes for joined weights. 0 where no steps are
    recorded, or where that would be more than its part (JOINED): a larger batch is worth more."""
    size = static_steps.joined_bytes(config, dtype) if static_steps.possible(config) else 0
    return size if JOINED * size <= free else 0


def joins(model: PreTrainedModel) -> bool:
    """Whether recorded steps of this model read joined weights, with the memory that is free now."""
    if model.device.type != "cuda":
        return True
    return joined_within(model.config, model.dtype, free_bytes(model.device)) > 0


def token_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes that a token takes in generation: keys and values of all layers and, while a prompt is read, the
    activations of one layer. Those are about four tensors of the hidden size, counted twice since norms are
    computed in float32, and three of the MLP's."""
    shapes = families.attention_shapes(config)
    cache = 2 * sum(shape.kv_heads * shape.head_dim for shape in shapes if shape.own_keys)
    activations = 8 * config.hidden_size + 3 * config.intermediate_size
    return (cache + activations) * dtype.itemsize


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated: what the driver has free, and what PyTorch's allocator has
    cached."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


class PrefixGroup(NamedTuple):
    """Rows, by their positions, that have the first `shared` tokens in common."""

    rows: list[int]
    shared: int


def by_prefix(rows: Sequence[list[int]], new: int, step: int) -> list[PrefixGroup]:
    """The rows in groups. Those with one beginning are a group of their own, if reading it once saves more
    prompt tokens than the batch that this adds costs (`new` and `step` as in `batches`); all others are one
    group. Questions after the same examples, such as those of a subject of MMLU, begin alike."""
    by_start: dict[tuple[int, ...], list[int]] = {}
    for i, row in enumerate(rows):
        by_start.setdefault(tuple(row[:PREFIX]), []).append(i)
    groups, others = [], []
    for members in by_start.values():
        shared = len(os.path.commonprefix([rows[i] for i in members]))
        if (len(members) - 1) * shared > step * new:
            groups.append(PrefixGroup(members, shared))
        else:
            others += members
    return [*groups, PrefixGroup(others, 0)] if others else groups


def batches(lengths: Sequence[int], new: int, tokens: int, step: int, again: int = 0) -> Iterator[list[int]]:
    """Positions in batches of similar length, longest first, each of at most `tokens` tokens including the
    `new` ones of every row.

    `step` says how many prompt tokens cost as much as one decoding step: a batch also ends where more pads
    would cost more than the `new` steps of another batch, and than the `again` prompt tokens that every batch
    reads first.
    """
    current: list[int] = []
    pads = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[current[0]] if current else lengths[i]
        pads += longest - lengths[i]
        full = (longest + new) * (len(current) + 1) > tokens
        if current and (full or pads > step * new + again):
            yield current
            current, pads = [], 0
        current.append(i)
    if current:
        yield current


class Share:
    """One process's share of the rows to answer: `batches` of positions in `rows`, `what` they are in words,
    and the most tokens that follow, `new`. While one batch is answered, rows of later ones may begin in it;
    their answers are in `early`. Progress is reported out of `total`, the rows of all processes.

    `groups`: numbers of the groups of rows that begin alike. Rows begin only in batches of their own group,
    since a beginning is read once only where all that are read together have it.
    """

    def __init__(
        self,
        what: str,
        rows: Sequence[list[int]],
        batches: list[list[int]],
        new: int,
        total: int,
        groups: Mapping[int, int] | None = None,
    ):
        self.what, self.rows, self.batches, self.new, self.total = what, rows, batches, new, total
        self.order = [i for batch in batches for i in batch]
        self.groups, self.group = groups or {}, None
        self.begun: set[int] = set()  # in the batch that is answered now
        self.done: set[int] = set()
        self.early: dict[int, list[int]] = {}
        observer.counted(0, total)

    def answered(self, held: Budget, answer: Callable[[list[int]], T]) -> Iterator[tuple[list[int], T]]:
        """Positions of rows with what `answer` gives for them, in batches that fit into memory."""
        lengths = [len(row) for row in self.rows]
        for batch in self.batches:
            chosen = self._begin(batch)
            if not chosen:
                continue
            signals.check()
            self.report()
            for part, found in within_memory(chosen, lengths, self.new, held, answer):
                self.done.update(part)
                yield part, found
        self.report()

    def _begin(self, batch: list[int]) -> list[int]:
        """The rows of a batch that are not done, and as many of later batches as are missing."""
        left = [i for i in batch if i not in self.done]
        self.begun, self.group = set(left), self.groups.get(batch[0])
        if not left:
            return left
        return left + self.take(len(batch) - len(left), max(len(self.rows[i]) for i in left))

    def take(self, count: int, most: int) -> list[int]:
        """Up to `count` rows of later batches, which begin now: the next in order that fit (`_fits`)."""
        taken = list(islice((i for i in self.order if self._fits(i, most)), count))
        self.begun.update(taken)
        return taken

    def _fits(self, row: int, most: int) -> bool:
        """Whether a row can begin in the batch: in a place of `most` tokens, of which it fills at least half,
        since attention reads all of them for a short row too."""
        waits = row not in self.begun and row not in self.done
        return waits and most / 2 <= len(self.rows[row]) <= most and self.groups.get(row) == self.group

    def finished_early(self, row: int, ids: list[int]) -> None:
        """Keep the answer of a row that began in the batch of others."""
        self.early[row] = ids
        self.done.add(row)

    def report(self) -> None:
        """Say how far this process has come, as if all had."""
        observer.at(f"{self.what}, {len(self.done)} of {len(self.order)} done")
        observer.counted(round(self.total * len(self.done) / max(1, len(self.order))), self.total)


def within_memory(
    chosen: Sequence[int], lengths: Sequence[int], new: int, held: Budget, answer: Callable[[list[int]], T]
) -> Iterator[tuple[list[int], T]]:
    """`answer` of the batch `chosen` (positions in `lengths`), whole or, where memory runs out, in parts: the
    budget is halved, and what has no answer yet is asked again."""
    waiting = [list(chosen)]
    while waiting:
        batch = waiting.pop()
        needed = (max(lengths[i] for i in batch) + new) * len(batch)
        if needed > held.tokens and len(batch) > 1:
            cut = batches([lengths[i] for i in batch], new, held.tokens, held.step)
            for part in reversed(list(cut)):
                waiting.append([batch[n] for n in part])
            continue
        found = if_it_fits(partial(answer, batch))
        if found is None:
            held.halve(needed, len(batch))
            waiting.append(batch)
        else:
            yield batch, found
