"""Dion: low-rank Muon by one power iteration of the momentum a step, from where the last one ended (arXiv 2504.05295).

    A = M + G;  P = orth(A·Q);  R = AᵀP;  M ← A − (1−μ)·P·Rᵀ;  Q ← columns of R over their lengths
    W ← (1 − ηλ)W − η·√(m/n)·P·Qᵀ          (for m ≥ n; otherwise the same of Aᵀ, so that Q belongs to the smaller dimension)

Biased at every step; the momentum keeps what was not passed on (error feedback), and P·Qᵀ has columns of length one in the place of near-orthogonal
ones. State: mn + r·min(m, n) elements.

``side="left"`` has Q on the columns whatever the shape, as the published simple form. ``adjust``: the factor of the learning rate, "spectral" √(m/n)
as published; see optimizers/muon.py. Differs from the published code: QR in the place of its randomized Cholesky QR; nothing of its distributed
forms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor

from optimizers.bases import Basis, Draw
from optimizers.frames import Dense, Frame
from optimizers.orthogonal import ADJUSTMENTS, UnitColumns
from optimizers.outputs import FedBack
from optimizers.subspace import Params, Rule, Subspace


@dataclass(frozen=True)
class Iterate(Dense):
    """V = P belongs to one step and is no state; what stays is Q (*batch, M, r), which the inner rule writes."""

    Q: Float[Tensor, "*batch M r"] | None = None

    @classmethod
    def of(cls, state: dict[str, Any]) -> Self | None:
        return cls(state["Q"][..., :0, :], state["Q"]) if "Q" in state else None

    def tensors(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class FromLast(Basis):
    """P = orth(AᵀQ) for A (*batch, M, N) and Q (*batch, M, r), Gaussian the first time."""

    frame: ClassVar[type[Frame]] = Iterate

    def choose(self, G: Tensor, draw: Draw) -> Frame:
        r = self.size(min(G.shape[-2:]))
        Q = draw.previous.Q if isinstance(draw.previous, Iterate) else None
        if Q is None:
            Q = draw.each(G, lambda X, g: torch.randn(X.shape[-2], r, generator=g, device=X.device, dtype=X.dtype))
        return Iterate(torch.linalg.qr(G.mT @ Q)[0], Q)


class Dion(Subspace):
    """See the module docstring. ``rank``: r; ``mu``: μ; ``eps`` is added to the lengths of columns."""

    choices = {"adjust": tuple(ADJUSTMENTS)}

    def __init__(
        self,
        params: Params,
        lr: float = 0.02,
        *,
        rank: int | float | None = 128,
        mu: float = 0.95,
        side: str = "larger",
        adjust: str = "spectral",
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, {"rank": rank, "mu": mu, "side": side, "adjust": adjust}, seed=seed, **options)

    def rule(self, group: dict[str, Any]) -> Rule:
        return Rule(
            basis=FromLast(group["rank"]),
            every=1,
            side=group["side"],
            inner=UnitColumns(eps=group["eps"]),
            complement=FedBack(group["mu"]),
            adjust=ADJUSTMENTS[group["adjust"]],
        )
