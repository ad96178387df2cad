"""GUM: a coin decides for every matrix and period between its leading directions and all the others (arXiv 2510.17802).

    every K steps: V = r leading right singular vectors of G (of the smaller dimension); M = 0; with probability q the coin says "rest"
    leading:  R = GV/(1−q),        M ← βM + (1−β)R,  W ← W − η·f(m, n)·NS₅(M)·Vᵀ
    rest:     R = (G − GVVᵀ)/q,    M ← βM + (1−β)R,  W ← W − η·f(m, n)·NS₅(M)               (W ← (1 − ηλ)W before either)

What enters the momentum is unbiased given V: (1−q)·GVVᵀ/(1−q) + q·(G − GVVᵀ)/q = G, with variance q/(1−q)·‖GVVᵀ‖² + (1−q)/q·‖G − GVVᵀ‖², which is
least, 2‖GVVᵀ‖·‖G − GVVᵀ‖, at q/(1−q) = ‖G − GVVᵀ‖/‖GVVᵀ‖ (theory/coin.py). The update is not: Newton–Schulz is not linear, and as it does not see
the size of a momentum that begins anew with every coin, the weights 1/(1−q) and 1/q cancel out of it exactly. At full rank there is no rest and no
coin. State: mr, and nr or with probability q mn elements.

No published code to differ from; the paper was known from its reviews and abstract. ``adjust``: f, see optimizers/muon.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from estimators import keyed
from optimizers.bases import Basis, Draw, top_right_singular
from optimizers.frames import Frame
from optimizers.orthogonal import ADJUSTMENTS, PRECISIONS, Orthogonal
from optimizers.subspace import Params, Rule, Subspace
from optimizers.transports import Reset


@dataclass(frozen=True)
class Coin(Frame):
    """Leading: sketch weight·GV, lift BVᵀ. Rest: sketch weight·(G − GVVᵀ), lift B. The weight is paid at the sketch alone."""

    V: Float[Tensor, "N r"]
    rest: int
    weight: float

    def sketch(self, G: Tensor) -> Tensor:
        B = G @ self.V
        return torch.addmm(G, B, self.V.mT, beta=self.weight, alpha=-self.weight) if self.rest else B * self.weight

    def lift(self, B: Tensor, like: Tensor) -> Tensor:  # noqa: ARG002
        return B if self.rest else B @ self.V.mT


@dataclass(frozen=True)
class Tossed(Basis):
    """``share``: q."""

    share: float = 0.5

    frame: ClassVar[type[Frame]] = Coin
    batched: ClassVar[bool] = False  # the state has another shape after every toss

    def choose(self, G: Tensor, draw: Draw) -> Frame:
        r = self.size(min(G.shape))
        if r == G.shape[-1]:  # the rest would be rounding errors, which Newton–Schulz makes as large as anything
            return Coin(top_right_singular(G, r), 0, 1.0)
        toss = torch.rand((), generator=keyed.generator(draw.seed, f"{draw.names[0]}.coin", draw.index))
        rest = int(toss < self.share)
        return Coin(top_right_singular(G, r), rest, 1 / self.share if rest else 1 / (1 - self.share))


class GUM(Subspace):
    """See the module docstring. ``rank``: r; ``every``: K in steps; ``share``: q in (0, 1); ``momentum``: β; ``precision``: see Muon."""

    choices = {"adjust": tuple(ADJUSTMENTS), "precision": tuple(PRECISIONS)}

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        *,
        rank: int | float | None = 128,
        every: int = 200,
        share: float = 0.5,
        momentum: float = 0.95,
        adjust: str = "original",
        precision: str = "bfloat16",
        seed: int = 0,
        **options: Any,
    ) -> None:
        own = {"rank": rank, "every": every, "share": share, "momentum": momentum, "adjust": adjust, "precision": precision}
        super().__init__(params, lr, own, seed=seed, **options)

    def rule(self, group: dict[str, Any]) -> Rule:
        if not 0 < group["share"] < 1:
            raise ValueError(f"GUM(share={group['share']}): must be in (0, 1)")
        return Rule(
            basis=Tossed(group["rank"], group["share"]),
            every=group["every"],
            inner=Orthogonal(beta=group["momentum"], precision=group["precision"], storage=self.storage(group)),
            transport=Reset(),
            adjust=ADJUSTMENTS[group["adjust"]],
        )
