"""Sequences that a model writes by itself from BOS on: inputs like those of its pretraining, without data."""

import torch
from torch import Tensor, nn

from codyra_llm.core.tensors import generator
from codyra_llm.data.encoding import Encoded
from codyra_llm.runtime import heartbeat, signals

TOGETHER = 32  # sequences drawn by one generator, whatever the number of processes


@torch.no_grad()
def self_sampled(
    model: nn.Module, count: int, length: int, seed: int, rank: int = 0, world: int = 1
) -> list[Encoded]:
    """This rank's share of `count` sequences: BOS, one token at random, and `length` drawn by the model at
    temperature 1. A function of (weights, count, length, seed) up to the split over ranks.

    The random second token spreads the texts; without it a model that begins most texts alike would say
    little of what else it knows. Decoding keeps keys and values, so a sequence costs a forward of its length.
    """
    training, found = model.training, []
    model.eval()
    for start in range(rank * TOGETHER, count, world * TOGETHER):
        signals.check()
        heartbeat.at("sequences that the base writes")
        draw = generator("self-sampled", seed, start)
        rows = _continued(model, _starts(model, min(TOGETHER, count - start), draw), length, draw)
        found += [Encoded(row[:-1], row[-1:], cut=False) for row in rows.tolist()]
    model.train(training)
    return found


def _starts(model: nn.Module, count: int, draw: torch.Generator) -> Tensor:
    """[count, 2]: BOS (EOS where a model has no BOS) and one token of the vocabulary."""
    config = model.config
    first = config.eos_token_id if config.bos_token_id is None else config.bos_token_id
    first = first[0] if isinstance(first, list) else first
    drawn = torch.randint(config.vocab_size, (count, 1), generator=draw)
    return torch.cat([torch.full((count, 1), first or 0), drawn], 1)


def _continued(model: nn.Module, ids: Tensor, length: int, draw: torch.Generator) -> Tensor:
    """ids [n, 2 + length]."""
    cache, fed = None, ids
    for _ in range(length):
        out = model(input_ids=fed.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        chances = out.logits[:, -1].float().softmax(1).cpu()
        fed = torch.multinomial(chances, 1, generator=draw)
        ids = torch.cat([ids, fed], 1)
    return ids
