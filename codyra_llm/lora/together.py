"""The work of an optimizer step on the factors of all sites, in a few operations per shape instead of a few
per site: on a GPU hundreds of small kernels take longer to launch than to run."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from codyra_llm.lora.function import Factors, Shadow
from codyra_llm.lora.shared import SharedInput

T = TypeVar("T")


def make_shadows(shared: Sequence[SharedInput]) -> None:
    """Make the shadows that the next forward uses, where parameters are whole; bit for bit equal to those
    that every group would make by itself."""
    # One dtype and one scale per group: its layers have the same spec.
    same_kind = _grouped(shared, lambda group: (group.layers[0].dtype, group.layers[0].spec.scale))
    for (dtype, scale), groups in same_kind.items():
        factors = [_factors(group) for group in groups]
        for group, made in zip(groups, shadows(factors, scale, dtype), strict=True):
            group.keep(dtype, made)


def _factors(group: SharedInput) -> Factors:
    return [layer.factors for layer in group.layers]


@torch.no_grad()
def shadows(groups: Sequence[Factors], scale: float, dtype: torch.dtype) -> list[Shadow]:
    """`function.shadow` of every group. Shadows of one input size share a tensor, each in adjacent rows."""
    a, wa = _row_shadows(groups, scale, dtype)
    b, wb = _column_shadows(groups, scale, dtype)
    made = []
    for i, group in enumerate(groups):
        own_b = tuple(b[i, k] for k in range(len(group)))
        own_wb = tuple(wb[i, k] for k in range(len(group)))
        made.append(Shadow(a[i], wa[i], own_b, own_wb))
    return made


def _row_shadows(
    groups: Sequence[Factors], scale: float, dtype: torch.dtype
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Every group's A [R, in] and s·diag(w) A, by its number."""
    plain, weighted = {}, {}
    for same in _grouped(range(len(groups)), lambda i: _kind(groups[i][0][0], 1)).values():
        factors = [triple for i in same for triple in groups[i]]
        ranks = [_rank(groups[i]) for i in same]
        rows = torch.cat([a for a, _, _ in factors])  # [Σ R, in]
        products = rows * _weights(factors, scale)[:, None]
        plain |= dict(zip(same, rows.to(dtype).split(ranks), strict=True))
        weighted |= dict(zip(same, products.to(dtype).split(ranks), strict=True))
    return plain, weighted


def _column_shadows(
    groups: Sequence[Factors], scale: float, dtype: torch.dtype
) -> tuple[dict[tuple[int, int], Tensor], dict[tuple[int, int], Tensor]]:
    """Every layer's B [out, r] and s·B diag(w), by the numbers of its group and of itself in it."""
    plain, weighted = {}, {}
    places = [(i, k) for i, group in enumerate(groups) for k in range(len(group))]
    for same in _grouped(places, lambda at: _kind(groups[at[0]][at[1]][2], 0, 1)).values():
        factors = [groups[i][k] for i, k in same]
        stack = torch.stack([b for _, _, b in factors])  # [n, out, r]
        products = stack * _weights(factors, scale).view(len(stack), 1, -1)
        plain |= dict(zip(same, stack.to(dtype), strict=True))
        weighted |= dict(zip(same, products.to(dtype), strict=True))
    return plain, weighted


def _rank(group: Factors) -> int:
    """R, the sum of the ranks of a group's layers."""
    return sum(len(a) for a, _, _ in group)


@contextmanager
def deferred(shared: Sequence[SharedInput], wanted: bool = True) -> Iterator[None]:
    """Within this block, if `wanted`, backward gives the factors no gradients. It leaves the products of
    gradients and inputs with the groups, which sum them over micro-batches, and `finish_gradients` computes
    the gradients from the sums."""
    for group in shared:
        group.defers = wanted
    try:
        yield
    finally:
        for group in shared:
            group.defers = False


class _Site(NamedTuple):
    """One layer's factors, the products that its backward left, and its scale."""

    factors: tuple[Tensor, Tensor | None, Tensor]
    q: Tensor  # [r, in]
    p: Tensor  # [out, r]
    scale: float


@torch.no_grad()
def finish_gradients(shared: Sequence[SharedInput]) -> None:
    """Compute the factors' gradients from what `deferred` backward passes left: dA = s·diag(w) Q,
    dw = s·colsum(B ∘ P), dB = s·P diag(w). All three are linear in P and Q, so these can be summed first."""
    sites = [site for group in shared for site in _left(group)]
    # dA: the Q of all sites with the same input size are the rows of one matrix.
    for same in _grouped(sites, lambda site: (_kind(site.q, 1), site.scale)).values():
        weights = _weights([site.factors for site in same], same[0].scale)
        grads = torch.cat([site.q for site in same]).mul_(weights[:, None])
        parts = grads.split([len(site.q) for site in same])
        _add((site.factors[0], grad) for site, grad in zip(same, parts, strict=True))
    # dw and dB: the P of all sites of one shape are stacked.
    for same in _grouped(sites, lambda site: (_kind(site.p, 0, 1), site.scale)).values():
        p = torch.stack([site.p for site in same])
        if same[0].factors[1] is not None:
            b = torch.stack([site.factors[2] for site in same])
            dw = same[0].scale * (b * p).sum(1)
            _add((site.factors[1], grad) for site, grad in zip(same, dw, strict=True))
        p.mul_(_weights([site.factors for site in same], same[0].scale).view(len(p), 1, -1))
        _add((site.factors[2], grad) for site, grad in zip(same, p, strict=True))


def _left(group: SharedInput) -> list[_Site]:
    """Take out what the group's backward passes left, layer by layer."""
    if group.left is None:
        return []
    (q, ps), group.left = group.left, None
    layers = group.layers
    parts = q.split([p.shape[1] for p in ps])
    return [
        _Site(layer.factors, part, p, layer.spec.scale)
        for layer, part, p in zip(layers, parts, ps, strict=True)
    ]


def _add(grads: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Add to the gradients of these parameters, given as (parameter, gradient); not to frozen ones."""
    for p, grad in grads:
        if p.requires_grad:
            p.grad = grad if p.grad is None else p.grad.add_(grad)


def _weights(factors: Factors, scale: float) -> Tensor:
    """s·w of all sites, concatenated; w None (at every site or at none) counts as ones."""
    if factors[0][1] is None:
        return factors[0][0].new_full((sum(len(a) for a, _, _ in factors),), scale)
    return scale * torch.cat([w for _, w, _ in factors])


def _kind(x: Tensor, *dims: int) -> tuple:
    """What tensors must have in common to be handled in one operation."""
    return x.dtype, x.device, *(x.shape[dim] for dim in dims)


def _grouped(items: Iterable[T], key: Callable[[T], Hashable]) -> dict[Hashable, list[T]]:
    """The items by their key, in order."""
    found = defaultdict(list)
    for item in items:
        found[key(item)].append(item)
    return found
