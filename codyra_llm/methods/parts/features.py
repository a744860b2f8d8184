"""What methods read from prompts: which tokens of a batch are prompt, features pooled over them, and clusters
of features."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from codyra_llm.core.tensors import generator
from codyra_llm.data.batches import Batch, in_one_copy
from codyra_llm.methods.base import Task
from codyra_llm.models import families
from codyra_llm.models.attention import packed_attention

if TYPE_CHECKING:
    from codyra_llm.data.encoding import Encoded

ROUNDS = 100  # of k-means; a few dozen reach its fixed point on a task's prompts


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
    """Mask [R, T] of a training batch's prompt tokens, one example per row: all that is there when the answer
    is asked for, earlier turns of a chat among them, as in `over_prompts` and at the test."""
    (lengths,) = in_one_copy([torch.tensor([len(prompt) for prompt in batch.prompts])], batch.ids.device)
    return first_tokens(lengths, batch.ids.shape[1])


def on_prompts(batch: Batch) -> Batch:
    """The batch with the tokens of its prompts as those to predict, except each prompt's first: BOS, or one
    that nothing predicts. The tokens of a prompt share its example's weight in the loss equally."""
    counts = [len(prompt) - 1 for prompt in batch.prompts]
    width = batch.ids.shape[1]
    starts = range(0, batch.ids.numel(), width)
    if batch.segments is not None:
        starts = accumulate([0, *batch.segments[:-1]])
    places = [torch.arange(n) + start + 1 for start, n in zip(starts, counts, strict=True)]
    numbers = torch.arange(len(counts))  # of the examples
    of_labelled = numbers.repeat_interleave(torch.tensor(batch.labelled))
    of_places = numbers.repeat_interleave(torch.tensor(counts))
    on_host = [torch.cat(places), of_labelled, of_places, torch.tensor(counts)]
    at, of_labelled, of_places, sizes = in_one_copy(on_host, batch.ids.device)
    shares = batch.weights.new_zeros(len(counts)).index_add(0, of_labelled, batch.weights)
    weights = (shares / sizes.clamp_min(1))[of_places]
    return replace(
        batch, predictors=at - 1, targets=batch.ids.flatten()[at], weights=weights, labelled=counts
    )


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


def kmeans(x: Tensor, k: int, *key: int | str) -> Tensor:
    """k centroids [k, h] of x [n, h] on the CPU in float64: k-means++ seeds drawn by `key`, then ROUNDS of
    Lloyd's. A centroid that no point is nearest to stays; with fewer than k distinct points some coincide."""
    from scipy.cluster.vq import kmeans2  # slow to import

    draw = np.random.default_rng(generator(*key).initial_seed())
    # Neither is a fault here: an empty cluster, and no distance left to draw by, where points coincide.
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.filterwarnings("ignore", "One of the clusters is empty")
        # scipy calls it rng from 1.15 on, and takes both names.
        centroids, _ = kmeans2(x.numpy(), k, iter=ROUNDS, minit="++", seed=draw)  # pyright: ignore
    return torch.from_numpy(centroids)


def nearest_to_centroids(x: Tensor, count: int, *key: int | str) -> list[int]:
    """The numbers, in order, of `count` rows of x [n, h] (all where there are no more): k-means with as many
    clusters as rows are wanted, and of each cluster the row nearest to its centroid. An empty cluster has
    none; then the rows nearest to their centroids among the others make up for it."""
    if len(x) <= count:
        return list(range(len(x)))
    x = x.cpu().double()
    distances, clusters = torch.cdist(x, kmeans(x, count, *key)).min(1)
    # The rows of a cluster of two are equally near up to rounding, which devices do differently: the first.
    ranks = torch.round(distances / distances.max().clamp_min(1e-12), decimals=4)
    first, others, seen = [], [], set()
    for row in ranks.argsort(stable=True).tolist():
        cluster = int(clusters[row])
        (others if cluster in seen else first).append(row)
        seen.add(cluster)
    return sorted((first + others)[:count])
