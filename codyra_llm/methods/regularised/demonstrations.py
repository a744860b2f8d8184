"""Inputs like a finished task's, which a model writes after a few of its examples (SSR, 2403.01244)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from codyra_llm.core.tensors import generator
from codyra_llm.data.encoding import Encoded
from codyra_llm.methods.parts.features import nearest_to_centroids, padded, pooled_states
from codyra_llm.methods.parts.samples import PROMPTS_TOGETHER, end_of, first_token, written_after
from codyra_llm.models.families import pretrained


@dataclass(frozen=True)
class Demonstrations:
    """What is kept of a finished task, in tokens: training `examples`, the `opening` and the `closing` that
    all its prompts share, and the tokens that end its texts (`ends`). `closing` is empty where no tokens
    tell the end of a prompt."""

    examples: list[Encoded]
    opening: list[int]
    closing: list[int]
    ends: frozenset[int]

    @classmethod
    def load(cls, state: dict[str, Tensor], task: int) -> "Demonstrations":
        """What `state` gave for this task."""
        examples, number = [], 0
        while f"prompt.{task}.{number}" in state:
            prompt = state[f"prompt.{task}.{number}"].tolist()
            examples.append(Encoded(prompt, state[f"answer.{task}.{number}"].tolist(), cut=False))
            number += 1
        opening, closing = state[f"opening.{task}"].tolist(), state[f"closing.{task}"].tolist()
        return cls(examples, opening, closing, frozenset(state[f"ends.{task}"].tolist()))

    def state(self, task: int) -> dict[str, Tensor]:
        """What `load` reads."""
        parts = {f"opening.{task}": self.opening, f"closing.{task}": self.closing}
        parts[f"ends.{task}"] = sorted(self.ends)
        for number, example in enumerate(self.examples):
            parts[f"prompt.{task}.{number}"] = example.prompt
            parts[f"answer.{task}.{number}"] = example.answer
        return {name: torch.tensor(tokens, dtype=torch.long) for name, tokens in parts.items()}

    def context(self, order: Sequence[int], separator: list[int], first: int) -> list[int]:
        """The examples in this order, `separator` after each, and then the opening of the prompt to write.
        Only the first text keeps its BOS (`first`).

        Without a closing only the prompts are shown. After a prompt with its answer nothing would tell where
        in what the model writes the prompt ends."""
        tokens: list[int] = []
        bos = 1 if self._begin_with(first) else 0
        for number in order:
            shown = self._shown(self.examples[number])
            tokens += (shown[bos:] if tokens else shown) + separator
        tokens += self.opening[bos:] if tokens else self.opening
        return tokens or [first]

    def _begin_with(self, first: int) -> bool:
        """Whether `first` is the BOS of the prompts. A chat template's token that begins every turn is not,
        although SmolLM2's config calls it so."""
        prompts = [example.prompt for example in self.examples]
        return all(prompt[:1] == [first] and first not in prompt[1:] for prompt in prompts)

    def _shown(self, example: Encoded) -> list[int]:
        """A demonstration, without the token after which a document would end."""
        if not self.closing:
            return example.prompt
        is_ended = example.answer[-1:] and example.answer[-1] in self.ends
        return example.prompt + (example.answer[:-1] if is_ended else example.answer)

    def completed(self, written: list[int], separator: list[int]) -> list[int] | None:
        """The prompt that a model began by writing these tokens after a context: up to the closing, or, where
        there is none, up to the separator. None where it did not come to its end, is empty, or is one of the
        demonstrations'."""
        mark = self.closing or separator
        end = end_of(mark, written, 0)
        body = written[: end - len(mark)]
        is_ended = written[len(body) : end] == mark and not self.ends.intersection(body)
        prompt = self.opening + body + self.closing
        is_copy = prompt in [example.prompt for example in self.examples]
        return prompt if body and is_ended and not is_copy else None


def chosen(examples: Sequence[Encoded], count: int, room: int, *key: int | str) -> list[Encoded]:
    """Up to `count` of the examples, drawn by `key`, that have at most `room` tokens together. One that does
    not fit is passed over."""
    found: list[Encoded] = []
    for number in torch.randperm(len(examples), generator=generator("demonstrations", *key)).tolist():
        if len(found) == count:
            break
        if len(examples[number]) <= room:
            found.append(examples[number])
            room -= len(examples[number])
    return found


def common_prefix(sequences: Sequence[list[int]]) -> list[int]:
    """The tokens that all begin with."""
    first, last = min(sequences), max(sequences)  # in dictionary order, so what these two share all share
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[:length]


def common_closing(prompts: Sequence[list[int]], opening: list[int]) -> list[int]:
    """The tokens with which all prompts end after their opening. None where a prompt also holds them before
    its end, as it may a full stop: they don't tell where a prompt ends."""
    reversed_rests = [prompt[len(opening) :][::-1] for prompt in prompts]
    shared = common_prefix(reversed_rests)[::-1]
    is_mark = all(end_of(shared, prompt, len(opening)) == len(prompt) for prompt in prompts)
    return shared if is_mark else []


def new_inputs(
    model: nn.Module, kept: Demonstrations, count: int, length: int, separator: list[int], *key: int | str
) -> list[list[int]]:
    """Distinct prompts like the task's: those that come to an end among `count` that the model writes, each
    of up to `length` tokens at temperature 1 after the demonstrations in an order of its own. A function of
    (weights, what is kept, count, length, key)."""
    numbers, first = range(len(kept.examples)), first_token(model)
    start = len(kept.context(numbers, separator, first))  # in any order

    def begin(n: int, draw: torch.Generator) -> Tensor:
        orders = [torch.randperm(len(numbers), generator=draw).tolist() for _ in range(n)]
        return torch.tensor([kept.context(order, separator, first) for order in orders])

    found: dict[tuple[int, ...], None] = {}  # in the order in which they were written
    rows = written_after(model, begin, count, length, ("demonstrated", *key), together=PROMPTS_TOGETHER)
    for row in rows:
        prompt = kept.completed(row[start:], separator)
        if prompt:
            found[tuple(prompt)] = None
    return [list(prompt) for prompt in found]


@torch.no_grad()
def diverse(model: nn.Module, prompts: Sequence[list[int]], count: int, *key: int | str) -> list[list[int]]:
    """`count` of the prompts, or all where there are no more: the nearest to the centroids of k-means on the
    means of their last hidden states, each scaled to length 1."""
    if len(prompts) <= count:
        return list(prompts)
    training, parts = model.training, []
    model.eval()
    for start in range(0, len(prompts), PROMPTS_TOGETHER):
        ids, mask = padded(prompts[start : start + PROMPTS_TOGETHER], pretrained(model).device)
        parts.append(pooled_states(model, ids, mask).cpu().double())
    model.train(training)
    features = nn.functional.normalize(torch.cat(parts), dim=1)  # [n, h]
    return [prompts[i] for i in nearest_to_centroids(features, count, "diverse inputs", *key)]
