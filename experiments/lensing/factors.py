"""The gradient of a linear layer as a sum over tokens, G = Σ_i δ_i x_iᵀ = ΔᵀX, and the side of it that lies in the residual stream.

Y = XWᵀ with X (T, n), Δ = ∂L/∂Y (T, m): hence rank G ≤ T, the right singular vectors of G lie in span{x_i}, the left ones in span{δ_i}.
In a block of a LLaMA the inputs of q, k, v, gate and up are the residual stream (after its norm), and so are the outputs of o and down; their other
sides are heads or neurons, which the vocabulary says nothing about. Reference: Backward Lens, arXiv 2402.12865.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from estimators.directions import svd
from experiments.training.models import loss_of
from theory.grams import Side

SIDES: dict[str, Side] = {
    "q_proj": "input",
    "k_proj": "input",
    "v_proj": "input",
    "o_proj": "output",
    "gate_proj": "input",
    "up_proj": "input",
    "down_proj": "output",
}


def side_of(name: str) -> Side | None:
    """The side of a layer that lies in the residual stream, by the last part of its name; None if there is none that is known."""
    return SIDES.get(name.rsplit(".", 1)[-1])


class Factors(NamedTuple):
    """X (T, n), Δ (T, m) of one layer, and the gradient of its weight (m, n) that autograd gives."""

    X: Tensor
    D: Tensor
    G: Tensor


def factors(model: nn.Module, ids: Int[Tensor, "sequences length"], names: list[str]) -> dict[str, Factors]:
    """Those of the mean next-token cross-entropy of ``ids``, by layer; T counts all tokens of all sequences. In the precision of the model."""
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = arguments[0].detach(), output

        return hook

    hooks = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    try:
        loss = loss_of(model, ids)
    finally:
        for hook in hooks:
            hook.remove()
    found = torch.autograd.grad(loss, [*(seen[name][1] for name in names), *(layers[name].weight for name in names)])
    flat = lambda t: t.reshape(-1, t.shape[-1])  # noqa: E731
    return {
        name: Factors(flat(seen[name][0]), flat(D), G) for name, D, G in zip(names, found[: len(names)], found[len(names) :], strict=True)
    }


def contributions(X: Float[Tensor, "t n"], D: Float[Tensor, "t m"], side: Side) -> Float[Tensor, "t d"]:
    """What each token adds, on the side of the residual stream: x_i‖δ_i‖, or −δ_i‖x_i‖, towards which a step of descent moves the output."""
    return X * D.norm(dim=1, keepdim=True) if side == "input" else -D * X.norm(dim=1, keepdim=True)


def gram_factor(A: Float[Tensor, "*draws m k"], C: Float[Tensor, "*draws n k"], side: Side) -> Float[Tensor, "*draws d p"]:
    """H with HHᵀ = ĜᵀĜ (side input) or ĜĜᵀ (side output) for Ĝ = ACᵀ, p = min(k, size of the other side); Ĝ is not formed."""
    A, C = (A, C) if side == "output" else (C, A)
    return A @ torch.linalg.qr(C)[1].mT


def leading(H: Float[Tensor, "*draws d p"], count: int) -> Float[Tensor, "*draws d q"]:
    """The singular vectors of the ``count`` largest singular values, or of all p if they are fewer."""
    return svd(H)[0][..., :count]


def oriented(W: Float[Tensor, "d q"], rows: Float[Tensor, "t d"]) -> Float[Tensor, "d q"]:
    """Each direction with the sign that makes the largest of its products with ``rows`` positive: singular vectors have none of their own."""
    products = rows @ W
    largest = products.gather(0, products.abs().argmax(0, keepdim=True))
    return W * torch.where(largest < 0, -1.0, 1.0)
