"""From a base and archived updates to weights: summed in float32 from the original base, cast once."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from codyra_llm.lora.update import Update
from codyra_llm.models.weights import WeightReader


class SiteChange(NamedTuple):
    """What an update changed at one site: `kept` of `rank` ranks, ‖ΔW‖_F, the drift ‖W_t - W₀‖_F, and the
    share of ΔW that survives the cast; None where a value does not apply."""

    site: str
    rank: int | None
    kept: int | None
    update_norm: float
    drift: float
    surviving: float | None


def merged_weight(base: Tensor, terms: list[Update], site: str) -> Tensor:
    """W₀ + Σ s_k B_k diag(w_k) A_k of one site in float32, [out, in], computed where W₀ is. The factors of
    all updates form one product, so W is written once."""
    here = [
        (update.adapters[site].to(base.device), update.scale) for update in terms if site in update.adapters
    ]
    if not here:
        return base.float()
    b = torch.cat([adapter.weighted_b(scale) for adapter, scale in here], 1)  # [out, Σ k]
    a = torch.cat([adapter.a for adapter, _ in here])  # [Σ k, in]
    return torch.addmm(base.float(), b, a)


def stored_weight(name: str, base: Tensor, terms: list[Update]) -> Tensor:
    """The parameter that the base stores under `name`, after `terms`: summed in float32 if adapters change
    it, the last whole one if updates replace it, else the base's."""
    site = name.removesuffix(".weight")
    if any(site in update.adapters for update in terms):
        return merged_weight(base, terms, site)
    held = [update.dense[name] for update in terms if name in update.dense]
    return held[-1] if held else base


@torch.no_grad()
def merge(model: nn.Module, reader: WeightReader, terms: list[Update], device: torch.device) -> None:
    """Write base + `terms` into the model, in the model's own dtype; W₀ is read from the base's files. Sites
    are summed one after the other on `device`, wherever the model is. Tied parameters have one name and stay
    tied."""
    for update in terms:
        for name, whole in update.dense.items():
            model.get_parameter(name).copy_(whole)
    for site in {site for update in terms for site in update.adapters}:
        weight = f"{site}.weight"
        base = reader.get(weight).to(device)
        model.get_parameter(weight).copy_(merged_weight(base, terms, site))


@torch.no_grad()
def report(
    reader: WeightReader,
    before: list[Update],
    after: list[Update],
    rank: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[SiteChange]:
    """One row per site for the last update of `after`: rank kept of `rank`, ‖ΔW‖_F, drift ‖W_t - W₀‖_F, and
    the share of ΔW = W_t - W_{t-1} that survives the cast to `dtype`. A site at a time on `device`.

    The share is ⟨cast(W_t) - cast(W_{t-1}), ΔW⟩ / ‖ΔW‖²: 1 where the stored weights moved as the update asks,
    0 where all of it was lost below the grid of `dtype`; null for an update of zero. Parameters that the
    update holds whole get a row each, with ranks and share null.
    """
    for site, adapter in after[-1].adapters.items():
        base = reader.get(f"{site}.weight").to(device).float()
        old, new = merged_weight(base, before, site), merged_weight(base, after, site)
        delta = new - old
        moved = new.to(dtype).float() - old.to(dtype).float()
        norm, share = delta.norm().item(), None
        if norm:
            share = (moved.flatten().double() @ delta.flatten().double()).item() / norm**2
        yield SiteChange(site, rank, len(adapter.a), norm, (new - base).norm().item(), share)
    held = before[-1].dense if before else {}
    for name, whole in after[-1].dense.items():
        base, new = reader.get(name).to(device).float(), whole.to(device).float()
        old = held[name].to(device).float() if name in held else base.to(dtype).float()
        site = name.removesuffix(".weight")
        norm = (new - old).norm().item()
        yield SiteChange(site, None, None, norm, (new - base).norm().item(), None)
