"""The forward and backward of one rank-selective LoRA linear, written by hand on ATen matrix products (no Triton)."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class RankSelective(torch.autograd.Function):
    """y = x Wᵀ + b + s·((x̃ Aᵀ) ⊙ w) Bᵀ for a frozen W; x̃ is the adapter's own input (x after dropout, or x itself).

    Shapes: x, x̃ [N, in]; W [out, in]; b [out] or None; A [r, in]; w [r] or None (all ones); B [out, r]; y [N, out].
    The adapter's product is taken first and the frozen one is added to it, so that a small update is not rounded away
    on the grid of y. With H = x̃ Aᵀ, G = dY B, P = dYᵀ H and Q = Gᵀ x̃:

        dB = s·P diag(w)     dA = s·diag(w) Q     dw = s·colsum(B ∘ P)     dx = dY W     dx̃ = s·(G ∘ w) A

    dw costs no pass over N, and it is not zero where w is zero, so a rank can come back. Nothing saved is overwritten.
    """

    @staticmethod
    def forward(ctx, x: Tensor, dropped: Tensor | None, weight: Tensor, bias: Tensor | None,
                a: Tensor, w: Tensor | None, b: Tensor, scale: float) -> Tensor:
        source = x if dropped is None else dropped
        hidden = source @ a.to(x.dtype).T
        y = hidden @ _scaled(b, w, scale).to(x.dtype).T
        y.addmm_(x, weight.T)
        if bias is not None:
            y += bias
        ctx.save_for_backward(x, dropped, weight, a, w, b, hidden)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, dropped, weight, a, w, b, hidden = ctx.saved_tensors
        scale, low = ctx.scale, dy.dtype
        g = dy @ b.to(low)
        p = (dy.T @ hidden).to(b.dtype)
        q = (g.T @ (x if dropped is None else dropped)).to(a.dtype)
        db = _scaled(p, w, scale)
        da = scale * q if w is None else (scale * w)[:, None] * q
        dw = None if w is None else scale * (b * p).sum(0)
        dx = d_dropped = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            d_adapter = g @ (scale * a if w is None else (scale * w)[:, None] * a).to(low)
            if dropped is None:
                dx = d_adapter.addmm_(dy, weight)
            else:
                dx, d_dropped = dy @ weight, d_adapter
        return dx, d_dropped, None, None, da, dw, db, None


def _scaled(b: Tensor, w: Tensor | None, scale: float) -> Tensor:
    """s·b·diag(w) in the dtype of b, before any cast to the compute dtype."""
    return scale * b if w is None else b * (scale * w)
