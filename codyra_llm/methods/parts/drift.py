"""The drift of old outputs as a penalty: how much an update changes a layer's outputs on old inputs, relative
to the outputs themselves."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from codyra_llm.lora.layer import LoraLinear, sites
from codyra_llm.methods.parts.inputs import distinct_inputs
from codyra_llm.methods.parts.moments import SecondMoment, kept_columns, stacked


@dataclass
class _Group:
    """Inputs whose layers have the same shapes: their moments [n, in, k], the layers of every input, and the
    factor s²/tr(W Σ Wᵀ) of each layer [n, layers]."""

    moments: SecondMoment
    layers: list[list[LoraLinear]]
    shares: Tensor


class DriftPenalty:
    """Σ_sites s² tr(B_w A Σ Aᵀ B_wᵀ) / tr(W Σ Wᵀ), B_w = B diag(w): E|ΔW x|² over old inputs, as a share of
    E|W x|², summed over sites.

    From r x r products: ⟨B_wᵀ B_w, A Σ Aᵀ⟩, all inputs of one shape in one batched product;
    `penalty_operations` counts them. Memory: the moments in float32 on the device.
    """

    def __init__(self, model: nn.Module, old: Mapping[str, SecondMoment]):
        found, groups = sites(model), {}
        for names in distinct_inputs(model):
            if names[0] in old:
                layers = [found[name] for name in names]
                moment = old[names[0]].to(layers[0].lora_A)
                shapes = tuple((layer.lora_A.shape, layer.lora_B.shape) for layer in layers)
                groups.setdefault((moment.factor.shape, shapes), []).append((moment, layers))
        self.groups = [_group(inputs) for inputs in groups.values()]

    def __call__(self) -> Tensor:
        """The penalty at the adapters' current factors, a scalar with gradient."""
        return sum(_drift(group) for group in self.groups)


def penalty_operations(model: nn.Module, sketch: int) -> int:
    """Operations of the matrix products of one penalty and its gradient, where every input of the model has a
    moment of this sketch. Its layers' rows are read together, so products of rows with rows are as wide as
    all of them. The model may be without weights."""
    found, total = sites(model), 0
    for names in distinct_inputs(model):
        layers = [found[name] for name in names]
        size, rows = layers[0].in_features, sum(layer.spec.rank for layer in layers)
        columns = kept_columns(size, sketch)
        read = 2 * rows * size * columns
        if columns == size:  # backward multiplies what forward has read by R x R
            total += read + 4 * rows**2 * size
        else:  # R x R of what was read and of the rows themselves; backward takes twice as many
            total += 2 * read + 6 * rows**2 * (columns + size)
        total += sum(6 * layer.spec.rank**2 * layer.out_features for layer in layers)  # BᵀB
    return total


def share(layer: LoraLinear, moment: SecondMoment) -> Tensor:
    """s²/tr(W Σ Wᵀ), which scales E|B A x|² to a share of the energy of the layer's output; 0 where that is
    0."""
    energy = moment.energy(layer.frozen(moment.factor.dtype))
    return torch.where(energy > 0, layer.spec.scale**2 / energy, 0.0)


@torch.no_grad()
def _group(inputs: list[tuple[SecondMoment, list[LoraLinear]]]) -> _Group:
    moments, layers = zip(*inputs, strict=True)
    shares = [_shares(moment, own) for moment, own in inputs]
    return _Group(stacked(list(moments)), list(layers), torch.stack(shares))


def _shares(moment: SecondMoment, layers: list[LoraLinear]) -> Tensor:
    return torch.stack([share(layer, moment) for layer in layers])


def _drift(group: _Group) -> Tensor:
    rows = torch.stack([_all_rows(layers) for layers in group.layers])  # [n, Σ r, in]
    read = group.moments.between(rows)  # [n, Σ r, Σ r], of which the blocks of one layer each count
    total, start = 0.0, 0
    for j, layer in enumerate(group.layers[0]):
        columns = torch.stack([_weighted(layers[j]) for layers in group.layers])  # [n, out, r]
        own = slice(start, start + layer.lora_A.shape[0])
        drift = (columns.mT @ columns * read[:, own, own]).sum((1, 2))  # [n]: tr(B A Σ Aᵀ Bᵀ)
        total = total + (group.shares[:, j] * drift).sum()
        start = own.stop
    return total


def _all_rows(layers: list[LoraLinear]) -> Tensor:
    return torch.cat([layer.lora_A for layer in layers])


def _weighted(layer: LoraLinear) -> Tensor:
    return layer.lora_B if layer.lora_w is None else layer.lora_B * layer.lora_w
