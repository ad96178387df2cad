"""MoFaSGD: momentum kept as its own rank-r singular value decomposition, and steps along its singular directions (arXiv 2507.08091).

    Ĝ = UUᵀG + GVVᵀ − UUᵀGVVᵀ;   U, Σ, V ← the r leading singular triplets of β·UΣVᵀ + Ĝ;   W ← (1 − ηλ)W − η·( UVᵀ + η₂·(G − Ĝ) )

The triplets come from 2r×2r matrices: with QR factors [U, GV] = U′R_U and [V, GᵀU] = V′R_V they are those of R_U·[[βΣ − UᵀGV, I], [I, 0]]·R_Vᵀ,
turned by U′ and V′, which is the dense recursion exactly. Biased: what lies outside both sides is dropped, and all singular values become one. At
first the triplets of the gradient. State: (m + n + 1)r elements.

``spectrum="reciprocal"``: steps along U·min(1/Σ, ``largest``)·Vᵀ, as the published configurations have it. Differs from the published code: that
begins with the triplets of the weight, and its form named nesterov, left out here, gives the same gradient to the momentum twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from estimators import directions
from optimizers.bases import Basis, Draw
from optimizers.frames import Frame, TwoSided
from optimizers.inner import Inner, Move, Rate, State
from optimizers.outputs import Complement, Context
from optimizers.subspace import Params, Rule, Subspace


@dataclass(frozen=True)
class Factors(TwoSided):
    """Momentum U diag(sigma) Vᵀ; ``before``: what it was made from, which is no state."""

    sigma: Float[Tensor, "*batch r"]
    before: Factors | None = None

    @classmethod
    def of(cls, state: dict[str, Any]) -> Factors | None:
        return cls(state["U"], state["V"], state["sigma"]) if "sigma" in state else None

    def tensors(self) -> dict[str, Any]:
        return {"U": self.U, "V": self.V, "sigma": self.sigma}

    def sketch(self, G: Tensor) -> Tensor:  # noqa: ARG002
        """Σ: the factors are all that the inner rule sees."""
        return self.sigma

    def passes(self, G: Tensor) -> Tensor:
        """Ĝ, of the factors that met G; at first what the factors hold of it."""
        if self.before is None:
            return self.U @ (self.U.mT @ G @ self.V) @ self.V.mT
        U, V = self.before.U, self.before.V
        left, right = U @ (U.mT @ G), (G @ V) @ V.mT
        return left + right - U @ (U.mT @ right)


@dataclass(frozen=True)
class MomentumFactors(Basis):
    """The r leading singular triplets of β·momentum + Ĝ, of G the first time."""

    beta: float = 0.9

    frame: ClassVar[type[Frame]] = Factors

    def choose(self, G: Tensor, draw: Draw) -> Frame:
        r = self.size(min(G.shape[-2:]))
        if not isinstance(draw.previous, Factors):
            U, s, V = directions.svd(G)
            return Factors(U[..., :r].contiguous(), V[..., :r].contiguous(), known(s[..., :r], G))
        return followed(draw.previous, G, self.beta)


def followed(old: Factors, G: Tensor, beta: float) -> Factors:
    """The factors of β·momentum + Ĝ, cut to as many."""
    U, V, r = old.U, old.V, old.sigma.shape[-1]
    GV, GU = G @ V, G.mT @ U
    Q, R = torch.linalg.qr(torch.cat([U, GV], dim=-1))
    P, T = torch.linalg.qr(torch.cat([V, GU], dim=-1))
    eye = torch.eye(r, dtype=G.dtype, device=G.device).expand(*G.shape[:-2], r, r)
    core = torch.cat(
        [torch.cat([beta * torch.diag_embed(old.sigma) - U.mT @ GV, eye], -1), torch.cat([eye, torch.zeros_like(eye)], -1)], -2
    )
    A, s, B = directions.svd(R @ core @ T.mT)
    return Factors((Q @ A[..., :r]).contiguous(), (P @ B[..., :r]).contiguous(), known(s[..., :r], G), old)


def known(sigma: Tensor, G: Tensor) -> Tensor:
    """Singular values (*batch, r), zero where they are rounding errors beside the largest, as numerical ranks are counted: a step is as long along a
    small one as along a large one."""
    return torch.where(sigma > sigma[..., :1] * max(G.shape[-2:]) * torch.finfo(G.dtype).eps, sigma, 0.0)


@dataclass(frozen=True, kw_only=True)
class Spectrum(Inner):
    """−η·diag(f(Σ)): f is one where Σ > 0, or with ``largest`` min(1/Σ, largest)."""

    largest: float | None = None
    eps: float = 1e-10

    def move(self, state: State, B: Tensor, lr: Rate) -> Move:  # noqa: ARG002
        positive = self.eps < B
        f = (
            positive.to(B.dtype)
            if self.largest is None
            else torch.where(positive, (1 / B.clamp_min(self.eps)).clamp_max(self.largest), 0.0)
        )
        return Move(torch.diag_embed(f), None, lr, lr)


@dataclass(frozen=True)
class Outside(Complement):
    """−η·scale·(G − Ĝ)."""

    scale: float

    def term(self, context: Context) -> tuple[Tensor, Rate] | None:
        return (context.G - context.frame.passes(context.G), context.move.size * -self.scale) if self.scale else None


class MoFaSGD(Subspace):
    """See the module docstring. ``rank``: r; ``beta``: β; ``rest_scale``: η₂, None for none; ``largest``: of the reciprocals."""

    choices = {"spectrum": ("ones", "reciprocal")}

    def __init__(
        self,
        params: Params,
        lr: float = 0.01,
        *,
        rank: int | float | None = 32,
        beta: float = 0.85,
        spectrum: str = "ones",
        largest: float = 1000.0,
        rest_scale: float | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        own = {"rank": rank, "beta": beta, "spectrum": spectrum, "largest": largest, "rest_scale": rest_scale}
        super().__init__(params, lr, own, seed=seed, **options)

    def rule(self, group: dict[str, Any]) -> Rule:
        return Rule(
            basis=MomentumFactors(group["rank"], group["beta"]),
            every=1,
            side="right",
            inner=Spectrum(largest=group["largest"] if group["spectrum"] == "reciprocal" else None),
            complement=Outside(group["rest_scale"] or 0.0),
        )
