"""Bases that learn: V follows a loss by gradient steps instead of a factorisation. G is (*batch, M, N), V (*batch, N, r).

``OnlinePCA``    V ← Opt(∇_V ‖ĜVVᵀ − Ĝ‖² + λ‖VᵀV − I‖²), Ĝ = G/‖G‖, after every step (Online Subspace Descent).
``Correlated``   V ← V − η_V·clip(∇_V [mean((GVVᵀ − G)²)·(1 − mean cos(MVᵀ, G))]), M the first moment, at most refreshes; at the others and the first
                 the right singular vectors of orth(GV)ᵀG, a sketch from the V of before (COAP).

V does not stay orthonormal under either: VVᵀ is then no projection, and may stretch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from optimizers.bases import Basis, Draw, top_right_singular
from optimizers.frames import Dense, Frame
from optimizers.inner import Adam, Inner, Momentum

PREFIX = "basis_"  # of the state of the optimizer of V


@dataclass(frozen=True)
class OnlinePCA(Basis):
    """``lr``: of V; ``method``: "adam" with decoupled ``decay``, or "sgd"; ``penalty``: λ."""

    lr: float = 0.005
    method: Literal["adam", "sgd"] = "adam"
    decay: float = 0.01
    penalty: float = 0.0

    frame: ClassVar[type[Frame]] = Dense
    follows: ClassVar[bool] = True

    def choose(self, G: Tensor, draw: Draw) -> Frame:  # noqa: ARG002
        return Dense(top_right_singular(G, self.size(min(G.shape[-2:]))))

    def follow(self, G: Tensor, B: Tensor, frame: Frame, state: dict[str, Any]) -> dict[str, Any]:
        if state["step"] == 1:  # V is of this very gradient
            return {}
        assert isinstance(frame, Dense)
        inner: Inner = Adam(betas=(0.9, 0.999)) if self.method == "adam" else Momentum(beta=0.0)
        own = {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}
        own["step"] = own.get("step", 0) + 1
        step = inner.move(own, online_gradient(G, B, frame.V, self.penalty), self.lr).step()
        if self.method == "sgd":
            own = {"step": own["step"]}
        V = frame.V * (1 - self.lr * self.decay) if self.method == "adam" else frame.V
        return {"V": V + step} | {PREFIX + key: value for key, value in own.items()}


def online_gradient(G: Tensor, B: Tensor, V: Tensor, penalty: float) -> Tensor:
    """∇_V of ‖ĜVVᵀ − Ĝ‖² + λ‖VᵀV − I‖² with Ĝ = G/‖G‖: 2(ĜᵀE + EᵀĜ)V + 4λV(VᵀV − I), E = ĜVVᵀ − Ĝ. (*batch, N, r).

    B = GV is known: the first is 2[GᵀB(VᵀV − I) + V·BᵀB − GᵀB]/‖G‖², one product with G, and exactly zero at V = I.
    """
    size = torch.linalg.vector_norm(G, dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(G.dtype).tiny)
    excess = V.mT @ V - torch.eye(V.shape[-1], dtype=V.dtype, device=V.device)
    unit, B = (G / size).contiguous(), (B / size).contiguous()  # as V·BᵀB and GᵀB are at V = I
    seen = unit.mT @ B
    gradient = 2 * (seen @ excess + (V @ (B.mT @ B) - seen))
    if penalty:
        gradient = gradient + 4 * penalty * (V @ excess)
    return gradient


@dataclass(frozen=True)
class Correlated(Basis):
    """``recalibrate``: λ, refreshes from one sketch to the next; ``lr``: η_V; ``along``: of which vectors the cosine is, "rows" of the M×N matrix
    G (its longer side, for the smaller projected), or of the parameter as it "stands", whichever side is projected."""

    recalibrate: int = 5
    lr: float = 0.1
    along: Literal["rows", "stands"] = "rows"

    frame: ClassVar[type[Frame]] = Dense
    needs_mean: ClassVar[bool] = True

    def choose(self, G: Tensor, draw: Draw) -> Frame:
        r = self.size(min(G.shape[-2:]))
        if isinstance(draw.previous, Dense) and draw.index % self.recalibrate:
            dim = -2 if self.along == "stands" and draw.flipped else -1
            return Dense(draw.previous.V - self.lr * correlation_gradient(G, draw.previous.V, draw.moment, dim))
        if isinstance(draw.previous, Dense):
            start = draw.previous.V
        else:
            start = draw.each(G, lambda X, g: torch.randn(X.shape[-1], r, generator=g, device=X.device, dtype=X.dtype))
        return Dense(sketched_directions(G, start))


def sketched_directions(G: Tensor, start: Tensor) -> Tensor:
    """Right singular vectors (*batch, N, r) of QᵀG with Q = orth(G·start), start (*batch, N, r)."""
    Q = torch.linalg.qr(G @ start)[0]
    return top_right_singular(Q.mT @ G, start.shape[-1])


def correlation_gradient(G: Tensor, V: Tensor, M: Tensor | None, dim: int) -> Tensor:
    """∇_V of mean((GVVᵀ − G)²)·(1 − mean cos(MVᵀ, G)) with cosines along ``dim``, cut to length one for each matrix. (*batch, N, r)."""
    with torch.enable_grad():
        V = V.detach().clone().requires_grad_()
        error = (G @ V @ V.mT - G).square().mean((-2, -1))
        likeness = torch.zeros_like(error) if M is None else torch.cosine_similarity(M @ V.mT, G, dim=dim).mean(-1)
        (gradient,) = torch.autograd.grad((error * (1 - likeness)).sum(), V)
    length = torch.linalg.vector_norm(gradient, dim=(-2, -1), keepdim=True)
    return gradient * (1 / (length + 1e-6)).clamp_max(1.0)
