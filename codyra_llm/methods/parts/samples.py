"""Sequences that a model generates by itself, from BOS or from a given beginning: inputs without data."""

from collections.abc import Callable, Collection, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from codyra_llm.core.tensors import generator
from codyra_llm.data.encoding import Encoded
from codyra_llm.models.families import pretrained
from codyra_llm.runtime import signals
from codyra_llm.store import observer

# Rows drawn by one generator, whatever the number of processes: in one batch, since a step reads all weights
# whatever its rows.
TOGETHER = 64  # of short texts
PROMPTS_TOGETHER = 32  # of rows that begin with prompts of a task, whose keys and values take more memory


@torch.no_grad()
def self_sampled(
    model: nn.Module, count: int, length: int, seed: int, rank: int = 0, world: int = 1
) -> list[Encoded]:
    """This rank's share of `count` sequences: BOS, one token at random, and `length` drawn by the model at
    temperature 1. A function of (weights, count, length, seed) up to the split over ranks.

    The random second token makes the texts diverse: without it a model that begins most texts in the same way
    would show little of what it knows. Decoding caches keys and values, so a sequence costs one forward of
    its length."""
    rows = written_after(model, partial(_starts, model), count, length, ("self-sampled", seed), rank, world)
    return [Encoded(row[:-1], row[-1:], cut=False) for row in rows]


@torch.no_grad()
def self_sampled_chats(
    model: nn.Module,
    frame: tuple[list[int], list[int]],
    count: int,
    length: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
) -> list[Encoded]:
    """This rank's share of `count` chats (Magpie, 2406.08464): from what its chat template writes before a
    user's text, the model goes on for `length` tokens at temperature 1, so it writes a user's text first and
    then an answer. Where no answer begins within `length`, all tokens but the last are the prompt.
    """
    before, after = frame

    def begin(n: int, draw: torch.Generator) -> Tensor:
        return torch.tensor([before] * n)

    rows = written_after(model, begin, count, length, ("self-sampled chats", seed), rank, world)
    places = [min(end_of(after, row, len(before)), len(row) - 1) for row in rows]
    return [Encoded(row[:place], row[place:], cut=False) for place, row in zip(places, rows, strict=True)]


def written_after(
    model: nn.Module,
    starts: Callable[[int, torch.Generator], Tensor],
    count: int,
    length: int,
    key: tuple[int | str, ...],
    rank: int = 0,
    world: int = 1,
    together: int = TOGETHER,
) -> list[list[int]]:
    """This rank's share of `count` rows: `starts(n, draw)` [n, k] and what the model writes after them, drawn
    by generators of this key, one for `together` rows."""
    training, rows = model.training, []
    model.eval()
    for start in range(rank * together, count, world * together):
        signals.check()
        observer.at("sequences that the base writes")
        draw = generator(*key, start)
        rows += _continued(model, starts(min(together, count - start), draw), length, draw).tolist()
    model.train(training)
    return rows


def end_of(part: list[int], row: list[int], start: int) -> int:
    """The position in `row` after the first occurrence of `part` from `start` on; the row's length if there
    is none."""
    places = range(start, len(row) - len(part) + 1)
    return next((i + len(part) for i in places if row[i : i + len(part)] == part), len(row))


@torch.no_grad()
def continued(
    model: nn.Module,
    prefix: list[int],
    count: int,
    length: int,
    ends: Collection[int],
    *key: int | str,
) -> list[Encoded]:
    """`count` sequences that begin with `prefix` (BOS where it is empty) and of which the model draws up to
    `length` tokens at temperature 1, as prompt and answer; an answer ends with the first of `ends` that the
    model draws. A function of (weights, prefix, count, length, ends, key).
    """
    training, found = model.training, []
    prompt = prefix or [first_token(model)]
    model.eval()
    for start in range(0, count, PROMPTS_TOGETHER):
        signals.check()
        observer.at("sequences that the model writes")
        draw = generator("continued", *key, start)
        ids = torch.tensor([prompt] * min(PROMPTS_TOGETHER, count - start))
        for row in _continued(model, ids, length, draw)[:, len(prompt) :].tolist():
            written = next((i + 1 for i, token in enumerate(row) if token in ends), length)
            found.append(Encoded(prompt, row[:written], cut=False))
    model.train(training)
    return found


@torch.no_grad()
def answered(
    model: nn.Module,
    prompts: Sequence[list[int]],
    length: int,
    ends: Collection[int],
    draws: Sequence[torch.Generator],
) -> list[list[int]]:
    """What the model answers to each prompt at temperature 1: up to `length` tokens, the last of them the
    model's EOS or one of `ends` where the model draws it. Each answer has a generator of its own, so it
    depends on no other prompt of the batch (up to rounding, since shorter prompts are padded on the left)."""
    # Here since they are slow to import, and `report` reads this file.
    from codyra_llm.models.attention.cache import cached, empty_cache
    from codyra_llm.models.inference import last_logits

    training, device = model.training, pretrained(model).device
    closing = end_tokens(model, ends)
    found = [[] for _ in prompts]
    unfinished = set(range(len(prompts)))
    uniform = torch.stack([torch.rand(length, generator=draw) for draw in draws]).to(device)  # [R, length]
    fed, mask = _left_padded(prompts, device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = empty_cache(pretrained(model))
    model.eval()
    for place in range(length):
        logits = last_logits(
            pretrained(model),
            input_ids=fed,
            attention_mask=mask,
            position_ids=positions,
            **cached(cache),
        )
        fed = _inverse_cdf(logits[:, -1], uniform[:, place, None])
        for row, token in enumerate(fed[:, 0].tolist()):
            if row in unfinished:
                found[row].append(token)
            if token in closing:
                unfinished.discard(row)
        if not unfinished:
            break
        mask = torch.cat([mask, torch.ones_like(fed)], 1)
        positions = positions[:, -1:] + 1
    model.train(training)
    return found


def _left_padded(prompts: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """The prompts [R, T] with pads on their left, and the mask that is 0 on pads."""
    width = max(map(len, prompts))
    ids, mask = [], []
    for prompt in prompts:
        pads = [0] * (width - len(prompt))
        ids.append(pads + prompt)
        mask.append(pads + [1] * len(prompt))
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _inverse_cdf(logits: Tensor, uniform: Tensor) -> Tensor:
    """For each row of logits [R, V], the token at which the cumulative probability passes the row's random
    number `uniform` [R, 1] in [0, 1): [R, 1]. The sums are in float64, in which the least likely of 250,000
    tokens still counts."""
    cumulative = logits.float().softmax(1).cumsum(1, dtype=torch.float64)
    at = uniform.double() * cumulative[:, -1:]  # the last sum is 1 only up to rounding
    return torch.searchsorted(cumulative, at, right=True).clamp(max=logits.shape[1] - 1)


def first_token(model: nn.Module) -> int:
    """BOS, or EOS where a model has no BOS."""
    config = pretrained(model).config
    first = config.eos_token_id if config.bos_token_id is None else config.bos_token_id
    return (first[0] if isinstance(first, list) else first) or 0


def end_tokens(model: nn.Module, ends: Collection[int] = ()) -> set[int]:
    """The model's EOS tokens, several or none, and `ends`, those of the encoder."""
    own = pretrained(model).config.eos_token_id
    listed = own if isinstance(own, list) else [own]
    return {*listed, *ends} - {None}


def _starts(model: nn.Module, count: int, draw: torch.Generator) -> Tensor:
    """[count, 2]: BOS (EOS where a model has no BOS) and one token of the vocabulary."""
    drawn = torch.randint(pretrained(model).config.vocab_size, (count, 1), generator=draw)
    return torch.cat([torch.full((count, 1), first_token(model)), drawn], 1)


def _continued(model: nn.Module, ids: Tensor, length: int, draw: torch.Generator) -> Tensor:
    """ids [n, k] followed by `length` tokens that the model draws: [n, k + length], on the model's device.
    All random numbers are drawn before, so that a GPU's queue stays full: no step waits for the one before.
    """
    # Here since they are slow to import, and `report` reads this file.
    from codyra_llm.models.attention.cache import cached, empty_cache
    from codyra_llm.models.inference import last_logits

    device = pretrained(model).device
    uniform = torch.rand(len(ids), length, generator=draw).to(device)
    cache, fed = empty_cache(pretrained(model)), ids.to(device)
    written = [fed]
    for place in range(length):
        logits = last_logits(pretrained(model), input_ids=fed, **cached(cache))
        fed = _inverse_cdf(logits[:, -1], uniform[:, place, None])
        written.append(fed)
    return torch.cat(written, 1)
