"""From records to batches: the stream of tasks, token ids with a label mask by position, and micro-batches."""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from datasets import Dataset, disable_progress_bars
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from . import attention, benchmark, sources
from .errors import Fault
from .examples import SPLITS
from .files import file_sha256
from .loss import head_loss
from .models import adds_bos, chat
from .seeds import generator

if TYPE_CHECKING:
    from .recipe import DataSection

ABSENT = "no file"
disable_progress_bars()  # the bars of tokenising thousands of short rows say nothing


@dataclass(frozen=True)
class Encoded:
    """One example in token ids: BOS (where the tokenizer adds one) and prompt, then answer and EOS. Only the answer
    and EOS are labelled, by position, so pad = EOS does no harm."""

    prompt: list[int]
    answer: list[int]
    cut: bool  # the prompt or the answer was truncated

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


class Encoder:
    """Text to token ids, the same for training and for generation.

    The prompt is tokenised alone, as it is at generation; the answer as its continuation, without the word-start mark
    that SentencePiece gives a text of its own. Room for BOS and EOS is kept: a truncated example still ends in EOS.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: "DataSection"):
        self.tokenizer, self.data = tokenizer, data
        self.bos = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
        self.newline = self._ids("\n")

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def prompt(self, text: str) -> tuple[list[int], bool]:
        """Ids of a prompt, at most `max_prompt_tokens` with BOS, and whether it was cut."""
        if self.data.chat_template:
            text = chat(self.tokenizer, [{"role": "user", "content": text}])
        ids = self._ids(text)
        ids = ids[len(self.bos):] if self.bos and ids[:1] == self.bos else ids  # Py150's texts begin with "<s>"
        room = self.data.max_prompt_tokens - len(self.bos)
        if len(ids) <= room:
            return self.bos + ids, False
        head = room // 2 if self.data.truncation == "middle" else 0
        return self.bos + ids[:head] + ids[len(ids) - (room - head):], True

    def answer(self, text: str) -> tuple[list[int], bool]:
        """Ids of an answer with EOS, at most `max_answer_tokens`, and whether it was cut."""
        ids = self._ids("\n" + text)
        n = len(self.newline)
        ids = ids[n:] if ids[:n] == self.newline else self._ids(text)
        room = self.data.max_answer_tokens - 1
        return ids[:room] + [self.tokenizer.eos_token_id], len(ids) > room

    def encode(self, records: Sequence[dict]) -> list[Encoded]:
        columns = Dataset.from_list([{"prompt": r["prompt"], "answer": r["answer"]} for r in records])
        rows = columns.map(self._row, remove_columns=columns.column_names, keep_in_memory=True, new_fingerprint="x")
        return [Encoded(**row) for row in rows]

    def _row(self, record: dict) -> dict:
        (prompt, cut), (answer, cut_too) = self.prompt(record["prompt"]), self.answer(record["answer"])
        return {"prompt": prompt, "answer": answer, "cut": cut or cut_too}


class Stream:
    """The tasks of a recipe and their records, read once."""

    def __init__(self, data: "DataSection", root: Path, render: sources.Render = sources.plain):
        """`render`: writes the chats of tasks that have `messages`."""
        self.data, self.root, self.tasks, self.render = data, root, data.tasks, render
        self.benchmark = benchmark.load(data.benchmark)

    @cached_property
    def epochs(self) -> list[int]:
        given = self.data.epochs
        return [given if isinstance(given, int) else given[task] for task in self.tasks]

    @lru_cache(maxsize=None)  # noqa: B019 - a stream lives as long as the run
    def _read(self, task: str, split: str) -> list[dict]:
        return sources.read(self.root, task, self.benchmark.task(task), split, self.render)

    def records(self, index: int, split: str) -> list[dict]:
        """Records of task `index`; the training split is limited to `max_train_examples`, the eval split is without
        the prompts that it shares with test, since settings are chosen on it."""
        rows = self._read(self.tasks[index], split)
        if split == "eval":
            known = {row["prompt"] for row in self._read(self.tasks[index], "test")}
            rows = [row for row in rows if row["prompt"] not in known]
            if not rows:
                name = self.tasks[index]
                own, test = (sources.place(self.root, name, self.benchmark.task(name), key) for key in ("eval", "test"))
                raise Fault(f"{own} has no prompt that {Path(test).name} has not; give an eval split of its own")
        return rows[: self.data.max_train_examples] if split == "train" else rows

    def extra(self, name: str) -> list[dict]:
        """The training records of a set beside the tasks, e.g. Lima."""
        return self._read(name, "train")

    def hashes(self) -> dict[str, str]:
        """sha256 by split of the tasks' data: of TRACE's files; of declared sources, which may be no files, of the examples
        that were read from them."""
        return {key: value for task in self.tasks for split in SPLITS
                for key, value in [self._hash(task, split)]}

    def _hash(self, task: str, split: str) -> tuple[str, str]:
        if not self.benchmark.task(task).declared:
            file = self.root / task / f"{split}.json"
            return f"{task}/{split}.json", file_sha256(file) if file.is_file() else ABSENT
        try:
            rows = self._read(task, split)
        except Fault:  # of a split that is not used, or it would have been said before
            return f"{task}/{split}", ABSENT
        return f"{task}/{split}", hashlib.sha256(json.dumps(rows).encode()).hexdigest()


@dataclass
class Batch:
    """One micro-batch of `examples`: padded on the right (so causal attention needs no mask), or packed into one row in
    which they follow one another, of the lengths `segments`, with `positions` that restart.

    ids [R, T]; positions [1, T] or None. A labelled token is a target [M]; the hidden state that predicts it stands at
    `predictors` [M] of the flattened rows. weights [M] sum to 1 over the labelled tokens of the global batch.
    """

    ids: Tensor
    positions: Tensor | None
    predictors: Tensor
    targets: Tensor
    weights: Tensor
    examples: list[int]
    segments: list[int] | None = None

    def to(self, device: torch.device) -> "Batch":
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)

    def content(self, lengths: Sequence[int]) -> Tensor:
        """Where the tokens of the examples, of these lengths, stand in the flattened rows, without pads and without the
        first of each: BOS, or what attends as BOS does."""
        width = self.ids.shape[1]
        starts = range(0, self.ids.numel(), width) if self.segments is None else accumulate([0, *lengths[:-1]])
        places = [torch.arange(start + 1, start + n) for start, n in zip(starts, lengths)]
        return torch.cat(places).to(self.ids.device)

    def hidden(self, model: nn.Module, front: Tensor | None = None) -> Tensor:
        """The last hidden states that predict the labelled tokens, [M, h]. `front` [R, P, h]: embeddings before each row,
        which is not packed."""
        if front is not None:
            embedded = model.get_input_embeddings()(self.ids)
            embedded = torch.cat([front.to(embedded.dtype), embedded], 1)
            states = model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state[:, front.shape[1]:]
            return states.flatten(0, 1).index_select(0, self.predictors)
        packing = {} if self.segments is None else {
            "position_ids": self.positions, **attention.arguments(self.segments, self.ids.device)}
        states = model.model(input_ids=self.ids, use_cache=False, **packing).last_hidden_state
        return states.flatten(0, 1).index_select(0, self.predictors)

    def cross_entropy(self, model: nn.Module, front: Tensor | None = None) -> Tensor:
        """Σ weight·CE over the labelled tokens. The head runs on their positions alone: most of a TRACE example is
        prompt, and logits over the vocabulary are the largest tensor of a step."""
        return head_loss(model.lm_head, self.hidden(model, front), self.targets, self.weights, softcap(model))


def softcap(model: nn.Module) -> float | None:
    """c of logits c·tanh(z/c), where the model has one."""
    return getattr(model.config, "final_logit_softcapping", None)


def collate(encoded: Sequence[Encoded], chosen: Sequence[int], weights: Sequence[float], pad: int,
            packed: bool = False) -> Batch:
    """The batch of examples `chosen`; a weight of 0 marks a filler that keeps the ranks in step."""
    own = [encoded[i] for i in chosen]
    lengths = [len(e) for e in own]
    shape = (1, sum(lengths)) if packed else (len(own), max(lengths))
    starts = accumulate([0] + lengths) if packed else range(0, math.prod(shape), shape[1])
    ids, predictors, targets, shares = torch.full(shape, pad), [], [], []
    for start, e, weight in zip(starts, own, weights):
        tokens, first = e.prompt + e.answer, max(len(e.prompt), 1)  # nothing predicts the first token of all
        ids.view(-1)[start: start + len(e)] = torch.tensor(tokens)
        predictors.extend(range(start + first - 1, start + len(e) - 1))
        targets += tokens[first:]
        shares += [weight] * (len(e) - first)
    return Batch(ids, torch.cat([torch.arange(n) for n in lengths])[None] if packed else None,
                 torch.tensor(predictors, dtype=torch.long), torch.tensor(targets, dtype=torch.long),
                 torch.tensor(shares, dtype=torch.float32), list(chosen), lengths if packed else None)


def example_weights(encoded: Sequence[Encoded], chosen: Sequence[int], average: str) -> list[float]:
    """Weight per labelled token: 1 / (labelled tokens of the global batch), or 1 / (examples · own labelled tokens)."""
    counts = [len(encoded[i].answer) for i in chosen]
    total = sum(counts)
    return [1 / total if average == "token" else 1 / (len(chosen) * n) for n in counts]


def shuffled(visited: range, *key: int) -> list[int]:
    """The order of an epoch: a function of the key (seed, task, epoch) alone."""
    return [visited[i] for i in torch.randperm(len(visited), generator=generator("order", *key)).tolist()]


def micro_batches(lengths: Sequence[int], world: int, tokens: int, packed: bool = False) -> list[list[list[int]]]:
    """Cut a global batch (positions 0 .. n-1, by their lengths) into micro-batches: [rank][step][positions].

    Sorted by length, dealt to the ranks in turn, cut where a micro-batch would pass `tokens` (padding counts; packed
    rows have none), though it always holds at least one example. All ranks get the same number of steps: a rank with
    fewer ends in empty ones, which the caller fills.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    ranks = [list(_cut(order[rank::world], lengths, tokens, packed)) for rank in range(world)]
    steps = max(map(len, ranks))
    return [steps_of_rank + [[] for _ in range(steps - len(steps_of_rank))] for steps_of_rank in ranks]


def default_tokens(device: torch.device) -> int:
    """Tokens of a micro-batch where the recipe names none."""
    return 16384 if device.type == "cuda" else 4096


def batch_tokens(lengths: Sequence[int], packed: bool) -> int:
    """Tokens of a micro-batch of examples of these lengths, padding included."""
    return sum(lengths) if packed else max(lengths, default=0) * len(lengths)


def _cut(order: list[int], lengths: Sequence[int], tokens: int, packed: bool) -> Iterator[list[int]]:
    current: list[int] = []
    for i in order:
        if current and batch_tokens([lengths[j] for j in (*current, i)], packed) > tokens:
            yield current
            current = []
        current.append(i)
    if current:
        yield current
