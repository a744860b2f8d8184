"""What methods read from prompts: which tokens of a batch are prompt, and features pooled over them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from codyra_llm.data.batches import Batch, in_one_copy
from codyra_llm.methods.base import Task
from codyra_llm.models import families, packed_attention

if TYPE_CHECKING:
    from codyra_llm.data.encoding import Encoded


def first_tokens(lengths: Tensor, width: int) -> Tensor:
    """Mask [R, width] of the first `lengths` [R] tokens of each row."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """ids [R, T], padded on the right, and the mask of the tokens that are not padding."""
    rows = [torch.tensor(prompt, dtype=torch.long) for prompt in prompts]
    lengths = torch.tensor([len(prompt) for prompt in prompts])  # [R]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    ids, lengths = in_one_copy([ids, lengths], device)
    return ids, first_tokens(lengths, ids.shape[1])


def prompt_mask(batch: Batch) -> Tensor:
    """Mask [R, T] of a training batch's prompt tokens, one example per row. As at test, a chat's prompt is
    all that stands before its last answer, with the earlier answers in it."""
    lengths = torch.tensor([len(prompt) for prompt in batch.prompts])  # [R]
    (lengths,) = in_one_copy([lengths], batch.ids.device)
    return first_tokens(lengths, batch.ids.shape[1])


def row_weights(batch: Batch) -> Tensor:
    """The share [R] of each example in the global loss; they sum to 1 over the global batch, so a term per
    example that is weighted by them does not depend on how that is cut."""
    rows, width = batch.ids.shape
    return batch.weights.new_zeros(rows).index_add(0, batch.predictors // width, batch.weights)


def mean_state(states: Tensor, mask: Tensor) -> Tensor:
    """Mean of states [R, T, h] where the mask [R, T] is on: [R, h] in float32 (float64 for float64)."""
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    weights = (mask / mask.sum(1, keepdim=True).clamp_min(1)).to(states)
    return torch.einsum("rth,rt->rh", states, weights)


def pooled_states(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Mean of the last hidden states over the prompt, [R, h]."""
    return mean_state(packed_attention.states(model, input_ids=ids), mask)


def pooled_embeddings(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Maximum of the token embeddings over the prompt, without pads, [R, h] in float32."""
    embedded = families.pretrained(model).get_input_embeddings()(ids).float()
    return embedded.masked_fill(~mask[..., None], -torch.inf).amax(1)


def mean_embeddings(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Mean of the token embeddings over the prompt, [R, h]."""
    return mean_state(families.pretrained(model).get_input_embeddings()(ids), mask)


@torch.no_grad()
def over_prompts(
    model: nn.Module,
    task: Task,
    examples: list["Encoded"],
    feature: Callable[[nn.Module, Tensor, Tensor], Tensor],
) -> Tensor:
    """`feature(model, ids, mask)` of every example's prompt, in their order: [n, h]; without dropout."""
    training, found, order = model.training, [], []
    model.eval()
    for batch in task.batches([replace(e, answer=[], turns=()) for e in examples]):
        lengths = torch.tensor([len(examples[i].prompt) for i in batch.examples], device=batch.ids.device)
        found.append(feature(model, batch.ids, first_tokens(lengths, batch.ids.shape[1])))
        order += batch.examples
    model.train(training)
    return torch.cat(found)[torch.tensor(order).argsort().to(found[0].device)]


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """Cosines of the rows of x [n, h] and y [m, h]: [n, m]."""
    return functional.normalize(x, dim=1) @ functional.normalize(y, dim=1).T
