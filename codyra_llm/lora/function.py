"""Forward and backward of rank-selective LoRA written by hand on ATen matrix products (no Triton): linear
layers that share an input, and the gated MLP as a whole."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Shadow(NamedTuple):
    """Copies of a group's factors in the compute dtype; R = Σ r_k. The parameters themselves, the masters,
    stay float32 and get the gradients, as in mixed-precision training."""

    a: Tensor  # [R, in], all A_k one below the other
    wa: Tensor  # [R, in], s·diag(w_k) A_k
    b: tuple[Tensor, ...]  # [out_k, r_k]
    wb: tuple[Tensor, ...]  # [out_k, r_k], s·B_k diag(w_k)


class Group(NamedTuple):
    """Frozen layers with a common input, and what their adapters need apart from the masters. `weights` are
    called where they are needed, in forward and in backward, so that a dequantised W exists only that long.
    If `leave` is given, backward passes it the products from which the factors' gradients follow, and the
    caller computes these later."""

    weights: tuple[Callable[[], Tensor], ...]  # () -> W_k [out_k, in]
    biases: tuple[Tensor | None, ...]
    scale: float
    shadow: Shadow
    leave: Callable[[Tensor, list[Tensor]], None] | None = None  # takes Q [R, in] and all P_k [out_k, r_k]


Factors = Sequence[tuple[Tensor, Tensor | None, Tensor]]  # (A_k, w_k, B_k), the masters


@torch.no_grad()
def shadow(factors: Factors, scale: float, dtype: torch.dtype) -> Shadow:
    """The shadow that all micro-batches of an optimizer step use. Products with w are computed in the
    masters' dtype, and cast afterwards.
    """
    a = torch.cat([a for a, _, _ in factors]).to(dtype)
    wa = torch.cat([scaled(a, w, scale, 0) for a, w, _ in factors]).to(dtype)
    b = tuple(b.detach().to(dtype) for _, _, b in factors)
    wb = tuple(scaled(b, w, scale, 1).to(dtype) for _, w, b in factors)
    return Shadow(a, wa, b, wb)


def scaled(factor: Tensor, w: Tensor | None, scale: float, rank_dim: int) -> Tensor:
    """s·factor with its rank dimension weighted by w, in the dtype of the factor."""
    return scale * factor if w is None else factor * (scale * w).unsqueeze(1 - rank_dim)


class SharedLinears(torch.autograd.Function):
    """y_k = x W_kᵀ + b_k + s·((x̃ A_kᵀ) ⊙ w_k) B_kᵀ for frozen W_k; x̃ is the adapters' input (x, or x after
    dropout).

    Shapes: x, x̃ [N, in]; W_k [out_k, in]; A_k [r_k, in]; w_k [r_k] or None (all ones); B_k [out_k, r_k]; y_k
    [N, out_k]. Called as `apply(x, x̃ or None, group, A_1, w_1, B_1, A_2, ...)`, returns (y_1, y_2, ...). The
    adapter's product is computed first and the frozen one is added to it in place. This saves a pass over y,
    and on a CPU keeps a small update from being rounded away (an H100 rounds before it adds). With H = x̃ Aᵀ
    (one product for all k), G_k = dY_k B_k, P_k = dY_kᵀ H_k and Q = Gᵀ x̃ (one product):

        dB = s·P diag(w)     dA = s·diag(w) Q     dw = s·colsum(B ∘ P)
        dx = Σ dY_k W_k      dx̃ = s·(G ∘ w) A

    dw needs no pass over N, and it is not zero where w is zero, so a rank can come back. x is read once for H
    and once for Q, whatever the number of layers. Only x and H are saved, and neither is overwritten.
    """

    @staticmethod
    def forward(ctx, x: Tensor, dropped: Tensor | None, group: Group, *factors: Tensor | None):
        """(y_1, y_2, …); x, x̃ and H are kept for backward."""
        outputs, hidden = _forward(group, x, x if dropped is None else dropped)
        ctx.group = group
        ctx.save_for_backward(x, dropped, hidden, *factors)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys: Tensor):
        """The gradients of x, x̃ and all factors, from dY_k [N, out_k]."""
        x, dropped, hidden, *factors = ctx.saved_tensors
        grads = _factor_grads(ctx.group, dys, x if dropped is None else dropped, hidden, _triples(factors))
        dx = d_dropped = None
        if dropped is None:
            dx = _input_grad(ctx.group, dys, grads.g) if ctx.needs_input_grad[0] else None
        elif ctx.needs_input_grad[1]:
            dx, d_dropped = _input_grad(ctx.group, dys, None), grads.g @ ctx.group.shadow.wa
        return dx, d_dropped, None, *grads.factors


class GatedMlp(torch.autograd.Function):
    """y = down(act(gate(x)) ⊙ up(x)), where gate, up and down are linear layers with adapters as in
    `SharedLinears`, without dropout.

    Called as `apply(x, gate-and-up group, down group, act, six factors of gate and up, three of down)`; x [N,
    h] -> y [N, h]. Saves x, gate, up and the two [N, r] products. Backward recomputes act(gate) ⊙ up,
    [N, intermediate]; plain autograd would have saved it and act(gate).
    """

    @staticmethod
    def forward(ctx, x: Tensor, pair: Group, down: Group, act: nn.Module, *factors: Tensor | None):
        """y [N, h]; x, gate, up and both H are kept for backward."""
        (gate, up), hidden = _forward(pair, x, x)
        inner = act(gate) * up
        (y,), hidden_down = _forward(down, inner, inner)
        ctx.groups, ctx.act = (pair, down), act
        ctx.save_for_backward(x, gate, up, hidden, hidden_down, *factors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        """The gradients of x and of all nine factors, from dY [N, h]."""
        x, gate, up, hidden, hidden_down, *factors = ctx.saved_tensors
        pair, down = ctx.groups
        factors = _triples(factors)
        with torch.enable_grad():  # autograd differentiates the activation, which may be any
            leaf = gate.detach().requires_grad_()
            activated = ctx.act(leaf)
        value = activated.detach()
        down_grads = _factor_grads(down, (dy,), value * up, hidden_down, factors[2:])
        d_inner = _input_grad(down, (dy,), down_grads.g)
        (d_gate,) = torch.autograd.grad(activated, leaf, d_inner * up)
        dys = (d_gate, d_inner.mul_(value))
        grads = _factor_grads(pair, dys, x, hidden, factors[:2])
        dx = _input_grad(pair, dys, grads.g) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, *grads.factors, *down_grads.factors


def _triples(factors: Sequence[Tensor | None]) -> Factors:
    """A_1, w_1, B_1, A_2, … as (A_k, w_k, B_k)."""
    return list(zip(factors[::3], factors[1::3], factors[2::3], strict=True))


def _forward(group: Group, x: Tensor, source: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """(y_1, …) and H [N, R] of x and source [N, in]."""
    hidden = source @ group.shadow.a.T  # [N, R]: one product for all layers
    parts = hidden.split([wb.shape[1] for wb in group.shadow.wb], 1)  # each [N, r_k]
    outputs = []
    for h, wb, weight, bias in zip(parts, group.shadow.wb, group.weights, group.biases, strict=True):
        y = h @ wb.T if bias is None else torch.addmm(bias, h, wb.T)  # [N, out_k]
        # The frozen product comes second and in place: one pass over y less (see `SharedLinears`).
        outputs.append(y.addmm_(x, weight().T))
    return tuple(outputs), hidden


class _Grads(NamedTuple):
    factors: list[Tensor | None]  # dA_1, dw_1, dB_1, dA_2, …
    g: Tensor  # [N, R]


def _factor_grads(
    group: Group, dys: Sequence[Tensor], source: Tensor, hidden: Tensor, factors: Factors
) -> _Grads:
    """The factors' gradients and G, from dY_k [N, out_k], x̃ `source` [N, in] and H `hidden` [N, R]."""
    parts = [dy @ b for dy, b in zip(dys, group.shadow.b, strict=True)]  # G_k, each [N, r_k]
    g = parts[0] if len(parts) == 1 else torch.cat(parts, 1)  # [N, R]
    ranks = [b.shape[1] for b in group.shadow.b]
    products = _master_product(g.T, source)  # Q [R, in]
    ps = [
        _master_product(dy.T, h) for dy, h in zip(dys, hidden.split(ranks, 1), strict=True)
    ]  # P_k [out_k, r_k]
    if group.leave:
        group.leave(products, ps)
        return _Grads([None] * (3 * len(dys)), g)
    out: list[Tensor | None] = []
    for p, q, (_, w, b) in zip(ps, products.split(ranks), factors, strict=True):
        dw = None if w is None else group.scale * (b * p).sum(0)
        out += [scaled(q, w, group.scale, 0), dw, scaled(p, w, group.scale, 1)]
    return _Grads(out, g)


def _input_grad(group: Group, dys: Sequence[Tensor], g: Tensor | None) -> Tensor:
    """Σ dY_k W_k, on top of the adapters' part where g is given."""
    dx = None if g is None else g @ group.shadow.wa
    for dy, weight in zip(dys, group.weights, strict=True):
        dx = dy @ weight() if dx is None else dx.addmm_(dy, weight())
    return dx


def _master_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in the dtype of the masters; on a GPU the product's float32 sums are kept."""
    if a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else (a @ b).float()
    return a @ b
