"""The head and cross entropy on labelled positions, chunk by chunk: no tensor of all logits is ever made."""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

CHUNK = 2**25  # logits at once: 128 MiB in float32
MIN_ROWS = 16  # below this the product with the head reads its weight too often


class WeightedCrossEntropy(torch.autograd.Function):
    """Σ_m weights[m]·CE(z[m], targets[m]) with logits z = cap·tanh(x Wᵀ + b / cap), or x Wᵀ + b without a cap.

    Shapes: hidden x [M, h]; weight W [V, h]; bias b [V] or None; targets [M]; weights [M]; result [] in float32, for
    float64 in float64. The product runs in x's dtype, everything after it in float32. With p = softmax(z) and y one-hot,

        dL/dz = weights·(p - y)     dL/d(x Wᵀ + b) = dL/dz·(1 - (z/cap)²)

    are at hand while a chunk's logits are, so the forward leaves dL/dx (and dL/dW, dL/db where they train) and the
    backward only scales. Peak beside the result: two float32 chunks and one in x's dtype.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor,
                cap: float | None) -> Tensor:
        precise = torch.promote_types(hidden.dtype, torch.float32)
        loss, rows = hidden.new_zeros((), dtype=precise), max(MIN_ROWS, CHUNK // len(weight))
        dx, dw, db = _empty_gradients(ctx.needs_input_grad, hidden, weight, bias, precise)
        for part in (slice(i, i + rows) for i in range(0, len(targets), rows)):
            x, y, share = hidden[part], targets[part], weights[part].to(precise)
            z = functional.linear(x, weight, bias).to(precise)
            if cap:
                z.div_(cap).tanh_().mul_(cap)
            norm = z.logsumexp(1, keepdim=True)
            loss += share @ (norm - z.gather(1, y[:, None])).squeeze(1)
            if any(ctx.needs_input_grad):
                d = _logit_gradient(z, norm, y, share, cap)
                low = d.to(x.dtype)
            if dx is not None:
                torch.mm(low, weight, out=dx[part])
            if dw is not None:
                dw += low.T @ x
            if db is not None:
                db += d.sum(0)
        ctx.save_for_backward(dx, dw, db)
        ctx.head = weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, scale: Tensor):
        dx, dw, db = ctx.saved_tensors
        return (None if dx is None else dx * scale, None if dw is None else (dw * scale).to(ctx.head),
                None if db is None else (db * scale).to(ctx.head), None, None, None)


def _empty_gradients(needed: tuple, hidden: Tensor, weight: Tensor, bias: Tensor | None, precise: torch.dtype):
    return (torch.empty_like(hidden, memory_format=torch.contiguous_format) if needed[0] else None,
            torch.zeros_like(weight, dtype=precise) if needed[1] else None,
            torch.zeros_like(bias, dtype=precise) if bias is not None and needed[2] else None)


def _logit_gradient(z: Tensor, norm: Tensor, targets: Tensor, share: Tensor, cap: float | None) -> Tensor:
    """share·(softmax(z) - onehot), through the softcap where there is one; overwrites z [n, V]."""
    p = torch.sub(z, norm).exp_() if cap else z.sub_(norm).exp_()
    p.mul_(share[:, None])
    p.scatter_add_(1, targets[:, None], -share[:, None])
    return p.mul_(z.div_(cap).square_().neg_().add_(1)) if cap else p


def head_loss(head: nn.Linear, hidden: Tensor, targets: Tensor, weights: Tensor, cap: float | None = None) -> Tensor:
    """`WeightedCrossEntropy` of rows `hidden` [M, h] under the language model's `head`.

    It runs inside the head's own call, since ZeRO-3 gathers a module's weight around its call and nowhere else.
    """
    def loss(x: Tensor) -> Tensor:
        parts = (x, head.weight, head.bias)
        if not torch.is_grad_enabled():
            parts = (None if p is None else p.detach() for p in parts)
        return WeightedCrossEntropy.apply(*parts, targets, weights, cap)

    head.forward = loss
    try:
        return head(hidden)
    finally:
        del head.forward
