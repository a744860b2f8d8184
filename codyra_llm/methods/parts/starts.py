"""How A is initialised: at random, or in directions that the model hardly uses, so that training interferes
less with what it knows."""

import torch
from torch import Tensor, nn

from codyra_llm.config.methods.sequential import StartConfig
from codyra_llm.core.tensors import generator
from codyra_llm.lora.layer import sites
from codyra_llm.methods.base import Task
from codyra_llm.methods.parts.inputs import covariances, distinct_inputs
from codyra_llm.methods.parts.samples import self_sampled
from codyra_llm.methods.parts.subspace import Subspace, symmetric_root

SAMPLES, TOKENS = 256, 48  # sequences that the model writes, and the tokens of each
AT_ONCE = 16  # distinct inputs whose covariances are in memory together
DEFAULT_ENERGY = 0.95


@torch.no_grad()
def start(config: StartConfig, model: nn.Module, task: Task, seed: int) -> None:
    """Rewrite A of all fresh adapters (B = 0) by `config.start`; "random" leaves it.

    "inputs": the drawn rows without their part in the fewest leading directions that hold `start_energy` of
    the inputs' energy on sequences that the model generates (LoRA-Null, 2503.02659, uses the smallest
    directions themselves, of a data set's inputs, and W's part in them). "weights": W's smallest right
    singular vectors (MiLoRA, 2406.09044, uses the smallest singular part of W itself, and subtracts it from
    W). Rows keep the norms that they were drawn with; B = 0 in both, so the model starts unchanged. A trains
    and may leave these directions. Cost per task that starts from a fresh adapter: the sequences and a pass
    over them, or an SVD per site; where every task does, training takes 1.8 and 1.1 times as long as
    seqlora's on the quickstart."""
    if config.start == "inputs":
        _off_inputs(config, model, task, seed)
    elif config.start == "weights":
        for layer in sites(model).values():
            layer.lora_A.copy_(least_rows(layer.frozen(layer.lora_A.dtype), layer.lora_A))


def _off_inputs(config: StartConfig, model: nn.Module, task: Task, seed: int) -> None:
    energy = DEFAULT_ENERGY if config.start_energy is None else config.start_energy
    key = generator("start", seed, task.index).initial_seed()
    layers, found, examples = sites(model), distinct_inputs(model), self_sampled(model, SAMPLES, TOKENS, key)
    for first in range(0, len(found), AT_ONCE):
        portion = found[first : first + AT_ONCE]
        sums = covariances(model, [layers[names[0]] for names in portion], task, examples)
        for names, covariance in zip(portion, sums, strict=True):
            used = Subspace.nothing(len(covariance)).grown(symmetric_root(covariance), energy)
            for name in names:
                layers[name].lora_A.copy_(rows_off(used, layers[name].lora_A))


def rows_off(used: Subspace, rows: Tensor) -> Tensor:
    """The part of the rows [r, in] in the free space, scaled to their old norms."""
    free = used.free(rows.double().cpu().T).T
    norms = rows.double().cpu().norm(dim=1, keepdim=True)
    return (free * norms / free.norm(dim=1, keepdim=True).clamp_min(torch.finfo(free.dtype).tiny)).to(rows)


def least_rows(weight: Tensor, rows: Tensor) -> Tensor:
    """W's smallest right singular vectors instead of the rows [r, in], the smallest first, scaled to the
    rows' norms; where W [out, in] has fewer than r, the other rows stay."""
    vectors = torch.linalg.svd(weight, full_matrices=False)[2].flip(0)[: len(rows)]
    found = rows.clone()
    found[: len(vectors)] = vectors * rows[: len(vectors)].norm(dim=1, keepdim=True)
    return found
