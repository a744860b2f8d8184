"""The head with cross entropy or distillation on labelled positions, in chunks, so that no tensor of all
logits is ever made.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

CHUNK = 2**25  # logits at once: 128 MiB in float32
MIN_ROWS = 16  # below this the product with the head reads its weight too often
TILE = 128  # rows that a GPU's product computes together: 261 rows would take as long as 384


class WeightedCrossEntropy(torch.autograd.Function):
    """Σ_m weights[m]·CE(z[m], targets[m]) with logits z = cap·tanh(x Wᵀ + b / cap), or x Wᵀ + b without a
    cap.

    Shapes: hidden x [M, h]; weight W [V, h]; bias b [V] or None; targets [M]; weights [M]; result [] in
    float32, for float64 in float64. The product runs in x's dtype, everything after it in float32. With p =
    softmax(z) and y one-hot,

        dL/dz = weights·(p - y)     dL/d(x Wᵀ + b) = dL/dz·(1 - (z/cap)²)

    can be computed while a chunk's logits exist, so forward computes dL/dx (and dL/dW, dL/db where they
    train) and backward only scales them. Peak memory, without the result: one float32 chunk (two with a cap)
    and one in x's dtype.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weights: Tensor,
        cap: float | None,
    ) -> Tensor:
        """Σ_m weights[m]·CE_m, a scalar; the gradients are computed here, while a chunk's logits exist."""
        precise = torch.promote_types(hidden.dtype, torch.float32)
        loss, rows = hidden.new_zeros((), dtype=precise), _rows(len(weight), CHUNK)
        dx, dw, db = _empty_gradients(ctx.needs_input_grad, hidden, weight, bias, precise)
        for part in (slice(i, i + rows) for i in range(0, len(targets), rows)):
            x, y, share = hidden[part], targets[part], weights[part].to(precise)  # [n, h], [n], [n]
            loss += _chunk(x, weight, bias, y, share, cap, (None if dx is None else dx[part], dw, db))
        ctx.save_for_backward(dx, dw, db)
        ctx.head = weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, scale: Tensor):
        """What forward computed, times the gradient of the scalar."""
        dx, dw, db = ctx.saved_tensors
        return (
            None if dx is None else dx * scale,
            None if dw is None else (dw * scale).to(ctx.head),
            None if db is None else (db * scale).to(ctx.head),
            None,
            None,
            None,
        )


def _empty_gradients(
    needed: tuple, hidden: Tensor, weight: Tensor, bias: Tensor | None, precise: torch.dtype
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dL/dx [M, h], of which every chunk writes its own rows, and dL/dW [V, h] and dL/db [V], to which every
    chunk adds; None where `needed` (for x, W, b) says that one is not wanted."""
    return (
        torch.empty_like(hidden, memory_format=torch.contiguous_format) if needed[0] else None,
        torch.zeros_like(weight, dtype=precise) if needed[1] else None,
        torch.zeros_like(bias, dtype=precise) if bias is not None and needed[2] else None,
    )


def _chunk(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    share: Tensor,
    cap: float | None,
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> Tensor:
    """A chunk's part of the loss; writes its dL/dx, and adds to dL/dW and dL/db, where these are wanted. Its
    logits are freed when this returns, before the next chunk's are made."""
    dx, dw, db = gradients
    z = _logits(x, weight, bias, cap, share.dtype)  # [n, V]
    # In place where no cap asks for z again: a second chunk's memory costs more than the operation.
    log_p = torch.log_softmax(z, 1, out=None if cap else z)  # [n, V]
    loss = -(share @ log_p.gather(1, targets[:, None]).squeeze(1))
    if all(wanted is None for wanted in gradients):
        return loss
    d = _logit_gradient(log_p, targets, share, z, cap)
    low = d.to(x.dtype)
    if dx is not None:
        torch.mm(low, weight, out=dx)
    if dw is not None:
        dw += low.T @ x
    if db is not None:
        db += d.sum(0)
    return loss


def _logit_gradient(log_p: Tensor, targets: Tensor, share: Tensor, z: Tensor, cap: float | None) -> Tensor:
    """share·(softmax(z) - onehot) [n, V], through the softcap where there is one; overwrites log_p and z."""
    p = log_p.exp_().mul_(share[:, None])
    p.scatter_add_(1, targets[:, None], -share[:, None])
    return p.mul_(z.div_(cap).square_().neg_().add_(1)) if cap else p


def _rows(vocabulary: int, logits: int) -> int:
    """How many rows a chunk of about `logits` logits has; whole tiles where it has more than one."""
    rows = max(MIN_ROWS, logits // vocabulary)
    return rows - rows % TILE if rows > TILE else rows


class Distillation(torch.autograd.Function):
    """T² Σ_m weights[m]·KL(q_m ‖ p_m), q = softmax(z'/T) of the teacher and p = softmax(z/T) of the student
    (Hinton et al., 1503.02531). z are the logits of the student's hidden states `hidden` [M, h], z' those of
    the teacher's, `taught` [M, h], both under one frozen head, softcap included; weights [M]. `reverse`:
    KL(p_m ‖ q_m) instead, which has no cost for tokens that the teacher prefers and the student never
    chooses.

    Like `WeightedCrossEntropy`, except that dL/dz = T·weights·(p - q), and in reverse T·weights·p·(g - Σ p g)
    with g = log p - log q. Chunks are half as long, since about five tensors of a chunk exist at once. The
    teacher and the head get no gradient."""

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        taught: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weights: Tensor,
        temperature: float,
        cap: float | None,
        reverse: bool,
    ) -> Tensor:
        """T² Σ_m weights[m]·KL_m, a scalar; the gradient is computed here, while a chunk's logits exist."""
        precise = torch.promote_types(hidden.dtype, torch.float32)
        kl = _reverse_kl if reverse else _forward_kl
        loss, rows = hidden.new_zeros((), dtype=precise), _rows(len(weight), CHUNK // 2)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        for part in (slice(i, i + rows) for i in range(0, len(hidden), rows)):
            z, share = _logits(hidden[part], weight, bias, cap, precise), weights[part].to(precise)
            log_q = _logits(taught[part], weight, bias, cap, precise).div_(temperature).log_softmax(1)
            log_p = (z / temperature).log_softmax(1)
            values, d = kl(log_p, log_q)
            loss += temperature**2 * (share @ values)
            if dx is not None:
                d = d.mul_(temperature * share[:, None])
                d = d.mul_(z.div_(cap).square_().neg_().add_(1)) if cap else d
                torch.mm(d.to(hidden.dtype), weight, out=dx[part])
        ctx.save_for_backward(dx)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, scale: Tensor):
        """What forward computed, times the gradient of the scalar."""
        (dx,) = ctx.saved_tensors
        return (None if dx is None else dx * scale, *[None] * 7)


def _forward_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q ‖ p) of each row [n] and its gradient with respect to the logits of p; overwrites both [n, V]."""
    q = log_q.exp()
    values = log_q.sub_(log_p).mul_(q).sum(1)
    return values, log_p.exp_().sub_(q)


def _reverse_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p ‖ q) of each row [n] and its gradient with respect to the logits of p; overwrites both [n, V]."""
    gap = torch.sub(log_p, log_q, out=log_q)
    p = log_p.exp_()
    values = (p * gap).sum(1)
    return values, gap.sub_(values[:, None]).mul_(p)


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, cap: float | None, precise: torch.dtype
) -> Tensor:
    """cap·tanh((x Wᵀ + b) / cap), or x Wᵀ + b without a cap: [n, V] in `precise`."""
    z = functional.linear(hidden, weight, bias).to(precise)
    return z.div_(cap).tanh_().mul_(cap) if cap else z


def head_loss(
    head: nn.Linear, hidden: Tensor, targets: Tensor, weights: Tensor, cap: float | None = None
) -> Tensor:
    """`WeightedCrossEntropy` of hidden states `hidden` [M, h] under the language model's `head`: a scalar."""
    return _inside(head, lambda x, w, b: WeightedCrossEntropy.apply(x, w, b, targets, weights, cap), hidden)


def distillation(
    head: nn.Linear,
    hidden: Tensor,
    taught: Tensor,
    weights: Tensor,
    temperature: float,
    cap: float | None = None,
    reverse: bool = False,
) -> Tensor:
    """`Distillation` of a teacher's hidden states `taught` into the student's `hidden`, both [M, h], under
    the language model's `head`: a scalar.
    """

    def loss(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return Distillation.apply(x, taught, w, b, weights, temperature, cap, reverse)

    return _inside(head, loss, hidden)


def _inside(
    head: nn.Linear, loss: Callable[[Tensor, Tensor, Tensor | None], Tensor], hidden: Tensor
) -> Tensor:
    """`loss(hidden, weight, bias)` computed inside the head's own call, since ZeRO-3 gathers a module's
    weight only around its call."""

    def forward(x: Tensor) -> Tensor:
        parts = (x, head.weight, head.bias)
        if not torch.is_grad_enabled():
            parts = (None if p is None else p.detach() for p in parts)
        return loss(*parts)

    head.forward = forward
    try:
        return head(hidden)
    finally:
        del head.forward
