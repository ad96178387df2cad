"""Next-token cross-entropy of a linear head whose logits are never all held.

For one row, with logits z = W h, p = softmax(z) and target t:  loss = −log p_t,  ∂loss/∂z = p − e_t.  Both follow from that row alone, so chunks
of tokens are walked once: d(hidden) and d(weight) are formed beside the loss, and backward only scales them. Held at a time are two
(chunk, vocabulary) buffers, logits in the dtype of the products and probabilities in float32, and in 16 bits a float32 copy of the logits that
log_softmax makes; kept for backward are tensors of the size of ``hidden`` and ``weight``.

Differs from torch.nn.functional.linear_cross_entropy, which chunks too but exists only since torch 2.13; this project supports torch ≥ 2.9.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100
CHUNK_BYTES = 2**26  # of float32 logits held at a time, at most 1024 tokens


def linear_cross_entropy(
    hidden: Float[Tensor, "tokens n"], weight: Float[Tensor, "vocabulary n"], targets: Int[Tensor, " tokens"], *, chunk: int | None = None
) -> Float[Tensor, ""]:
    """Mean over tokens of −log softmax(hidden @ weight.mT)[target], in nats, at least float32. Targets of −100 are left out.

    The products are in the dtype of ``hidden``, or of autocast where it is on. Where no gradient is required none is computed. As in
    F.cross_entropy, the mean of no tokens is nan, with gradients of 0. Raises ValueError where the shapes do not fit.
    """
    if chunk is None:
        chunk = max(1, min(1024, CHUNK_BYTES // (4 * len(weight))))
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or targets.shape != hidden.shape[:1] or chunk < 1:
        shapes = ", ".join(f"{name}={tuple(t.shape)}" for name, t in (("hidden", hidden), ("weight", weight), ("targets", targets)))
        raise ValueError(f"linear_cross_entropy({shapes}, chunk={chunk}): needs (tokens, n), (vocabulary, n), (tokens,) and chunk >= 1")
    device, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:  # autocast leaves float64 alone
        dtype = torch.get_autocast_dtype(device)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(hidden, weight, targets, chunk, dtype)  # pyright: ignore[reportReturnType]
    return _walk(hidden, weight, targets, chunk, dtype, (False, False))[0]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
        loss, *gradients = _walk(hidden, weight, targets, chunk, dtype, ctx.needs_input_grad[:2])
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return *(None if g is None else g * outer for g in ctx.saved_tensors), None, None, None


@torch.no_grad()
def _walk(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, dtype: torch.dtype, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(loss, its derivative by hidden, by weight), each derivative only where wanted."""
    with torch.autocast(hidden.device.type, enabled=False):
        h, W = hidden.to(dtype), weight.to(dtype)
        exact = torch.promote_types(dtype, torch.float32)
        valid = targets != IGNORED
        index = targets.where(valid, 0)[:, None]
        rows = min(chunk, len(h))
        z, p = h.new_empty(rows, len(W)), h.new_empty(rows, len(W), dtype=exact)
        nats = h.new_zeros((), dtype=exact)
        dh = torch.empty_like(h) if wanted[0] else None
        dW = torch.zeros_like(W, dtype=exact) if wanted[1] else None
        for i in range(0, len(h), chunk):
            part = slice(i, i + chunk)
            h_i, t_i, valid_i = h[part], index[part], valid[part, None]
            z_i, p_i = z[: len(h_i)], p[: len(h_i)]
            torch.mm(h_i, W.mT, out=z_i)
            torch.log_softmax(z_i, 1, dtype=exact, out=p_i)
            nats -= p_i.gather(1, t_i).where(valid_i, 0).sum()
            if dh is None and dW is None:
                continue
            p_i.exp_().scatter_add_(1, t_i, p_i.new_full((1, 1), -1.0).expand_as(t_i))
            d = p_i if dtype == exact else z_i.copy_(p_i)
            if dh is not None:
                torch.mm(d, W, out=dh[part])
            if dW is not None:
                masked = h_i * valid_i
                dW = dW.addmm_(d.mT, masked) if dtype == exact else dW.add_(d.mT @ masked)
        count = valid.sum()
        scale = 1 / count.clamp(min=1).to(exact)
        dh = None if dh is None else dh.mul_(valid[:, None] * scale).to(hidden.dtype)
        dW = None if dW is None else dW.mul_(scale).to(weight.dtype)
        return nats / count, dh, dW
