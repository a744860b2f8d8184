"""From records to batches: the stream of tasks, token ids with a label mask by position, and
micro-batches.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor, nn

from codyra_llm.core.tensors import generator
from codyra_llm.data.encoding import Encoded
from codyra_llm.models import families
from codyra_llm.models.attention import packed_attention
from codyra_llm.models.head_loss import head_loss


@dataclass
class Batch:
    """One micro-batch of `examples`: padded on the right (so causal attention needs no mask), or packed into
    one row, one after the other, with lengths `segments`, ends `ends` and `positions` that restart for each.

    ids [R, T]; positions [1, T] or None. The labelled tokens are `targets` [M]; the hidden states that
    predict them are at `predictors` [M] in the flattened rows. weights [M] sum to 1 over the labelled tokens
    of the global batch. For each example, on the host: `prompts`, the tokens before the answer, and
    `labelled`, the number of labelled tokens, including those of a chat's earlier turns."""

    ids: Tensor
    positions: Tensor | None
    predictors: Tensor
    targets: Tensor
    weights: Tensor
    examples: list[int]
    prompts: list[list[int]]
    labelled: list[int]
    segments: list[int] | None = None
    ends: Tensor | None = None
    longest: int | None = None  # an upper bound of the segments' lengths, where it is not the longest of them

    def to(self, device: torch.device) -> "Batch":
        """The batch on the device; it goes to a GPU in one copy, for which the host does not wait."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        moved = in_one_copy(list(tensors.values()), device)
        return replace(self, **dict(zip(tensors, moved, strict=True)))

    def content(self, lengths: Sequence[int]) -> Tensor:
        """The positions, in the flattened rows, of the tokens of the examples, which have these lengths;
        without pads and without the first token of each: BOS, or one that takes its role in attention."""
        width = self.ids.shape[1]
        if self.segments is None:  # one example per row
            starts = range(0, self.ids.numel(), width)
        else:
            starts = accumulate([0, *lengths[:-1]])
        places = [torch.arange(start + 1, start + n) for start, n in zip(starts, lengths, strict=True)]
        return torch.cat(places).to(self.ids.device)

    def hidden(self, model: nn.Module, front: Tensor | None = None) -> Tensor:
        """The last hidden states that predict the labelled tokens, [M, h]. `front` [R, P, h]: embeddings
        before each row, which is not packed."""
        if front is not None:
            embedded = families.pretrained(model).get_input_embeddings()(self.ids)
            embedded = torch.cat([front.to(embedded.dtype), embedded], 1)
            whole = packed_attention.states(model, inputs_embeds=embedded)
            states = whole[:, front.shape[1] :]  # [R, T, h]
            return states.flatten(0, 1).index_select(0, self.predictors)
        packing = {}
        if self.segments is not None:
            packing = packed_attention.arguments(self.segments, self.ends, self.longest)
            packing["position_ids"] = self.positions
        states = packed_attention.states(model, input_ids=self.ids, **packing)  # [R, T, h]
        return states.flatten(0, 1).index_select(0, self.predictors)

    def cross_entropy(self, model: nn.Module, front: Tensor | None = None) -> Tensor:
        """Σ weight·CE over the labelled tokens. The head runs only on their positions: most of a TRACE
        example is prompt, and logits over the vocabulary would be the largest tensor of a step."""
        return self.cross_entropy_of(model, self.hidden(model, front))

    def cross_entropy_of(self, model: nn.Module, hidden: Tensor) -> Tensor:
        """`cross_entropy` from hidden states [M, h] that are already computed."""
        head, cap = families.head(model), families.softcap(model)
        return head_loss(head, hidden, self.targets, self.weights, cap)


def in_one_copy(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The tensors on the device; from the host to a GPU in one asynchronous copy."""
    if device.type != "cuda" or tensors[0].device.type != "cpu":
        return [tensor.to(device) for tensor in tensors]
    return through_pinned(tensors, device)


def through_pinned(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The tensors on a device, from one buffer in pinned memory, where CUDA is there to pin it."""
    sizes = ((t.nbytes + 7) // 8 * 8 for t in tensors)  # whole 8 bytes, so that any dtype is aligned
    starts = list(accumulate(sizes, initial=0))
    buffer = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    for tensor, start in zip(tensors, starts[:-1], strict=True):
        buffer[start : start + tensor.nbytes] = tensor.contiguous().view(-1).view(torch.uint8)
    there = buffer.to(device, non_blocking=True)
    return [
        there[start : start + t.nbytes].view(t.dtype).view(t.shape)
        for t, start in zip(tensors, starts[:-1], strict=True)
    ]


def collate(
    encoded: Sequence[Encoded],
    chosen: Sequence[int],
    weights: Sequence[float],
    pad: int,
    packed: bool = False,
) -> Batch:
    """The batch of examples `chosen`; a weight of 0 marks a filler that keeps the ranks in step."""
    own = [encoded[i] for i in chosen]
    lengths = [len(example) for example in own]
    shape = (1, sum(lengths)) if packed else (len(own), max(lengths))  # [R, T]
    # Where each example begins in the flattened rows.
    starts = accumulate([0, *lengths[:-1]]) if packed else range(0, math.prod(shape), shape[1])
    ids = torch.full(shape, pad)
    predictors, targets, shares, prompts = [], [], [], []
    for start, example, weight in zip(starts, own, weights, strict=True):
        tokens, labelled = example.prompt + example.answer, example.labelled
        ids.view(-1)[start : start + len(example)] = torch.tensor(tokens)
        predictors += [start + place - 1 for place in labelled]
        targets += [tokens[place] for place in labelled]
        prompts.append(tokens[: max(len(example.prompt), 1)])
        shares += [weight] * len(labelled)
    return Batch(
        ids=ids,
        positions=torch.cat([torch.arange(n) for n in lengths])[None] if packed else None,
        predictors=torch.tensor(predictors, dtype=torch.long),
        targets=torch.tensor(targets, dtype=torch.long),
        weights=torch.tensor(shares, dtype=torch.float32),
        examples=list(chosen),
        prompts=prompts,
        labelled=[len(example.labelled) for example in own],
        segments=lengths if packed else None,
        ends=packed_attention.segment_ends(lengths) if packed else None,
    )


def example_weights(encoded: Sequence[Encoded], chosen: Sequence[int], average: str) -> list[float]:
    """Weight per labelled token: 1 / (labelled tokens of the global batch), or 1 / (examples · own labelled
    tokens). An example without labelled tokens has no weight."""
    counts = [max(encoded[i].targets, 1) for i in chosen]
    total = max(sum(encoded[i].targets for i in chosen), 1)
    return [1 / total if average == "token" else 1 / (len(chosen) * n) for n in counts]


def shuffled(visited: range, *key: int) -> list[int]:
    """The order of an epoch, which depends only on the key (seed, task, epoch)."""
    return [visited[i] for i in torch.randperm(len(visited), generator=generator("order", *key)).tolist()]


def micro_batches(
    lengths: Sequence[int], world: int, tokens: int, packed: bool = False
) -> list[list[list[int]]]:
    """Cut a global batch (positions 0 .. n-1, by their lengths) into micro-batches: [rank][step][positions].

    Examples are sorted by length, distributed to the ranks in turn, and cut where a micro-batch would exceed
    `tokens` (padding counts; packed rows have none); it always has at least one example. All ranks get the
    same number of steps: a rank with fewer ends with empty ones, which the caller fills."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    ranks = [list(_cut(order[rank::world], lengths, tokens, packed)) for rank in range(world)]
    steps = max(map(len, ranks))
    for own in ranks:
        own.extend([] for _ in range(steps - len(own)))
    return ranks


def default_tokens(device: torch.device) -> int:
    """Tokens of a micro-batch where the recipe names none."""
    return 16384 if device.type == "cuda" else 4096


def batch_tokens(lengths: Sequence[int], packed: bool) -> int:
    """Tokens of a micro-batch of examples of these lengths, padding included."""
    return sum(lengths) if packed else max(lengths, default=0) * len(lengths)


def _cut(order: list[int], lengths: Sequence[int], tokens: int, packed: bool) -> Iterator[list[int]]:
    """One rank's examples, in order, cut into micro-batches of at most `tokens` tokens, or of one example."""
    current: list[int] = []
    for i in order:
        if current and batch_tokens([lengths[j] for j in (*current, i)], packed) > tokens:
            yield current
            current = []
        current.append(i)
    if current:
        yield current
