"""RSO: a sequence of problems in random subspaces, each held near its start (arXiv 2502.07222).

    outer k: V Gaussian, E[VVᵀ] = I;  B = 0;  K steps of Adam on  min_B  F(W + BVᵀ) + (μ/2)‖B‖²;  W ← W + BVᵀ

    that is, every K steps: a new V, B = M = N = 0;   R = GV + μB;  M, N ← Adam's means of R, R²;  D = M̂/(√N̂ + ε)
    B ← B − η·D;   W ← (1 − ηλ)W − η·α·D·Vᵀ

The sketch is unbiased, with the variance of theory/gaussian.py; the term μB and Adam bias the update. State: mr + 3nr elements (m ≤ n), the sum B of
the steps included, mr + 2nr for μ = 0. With μ = 0 this is the Gaussian law of LowRank-IPA with lifts at every step (``lowrank pretrain --law gaussian
--state reset``), there without the full gradient. ``pull`` is μ, 0 unless given: what μ the paper trains with is not known to us, and any other
number would be ours. It pulls at B, the sum of the steps, of which W gets α·BVᵀ. No published code was read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from estimators.gaussian import Gaussian
from optimizers.bases import FromLaw
from optimizers.inner import Adam, Move, Rate, State
from optimizers.outputs import Lift
from optimizers.subspace import Params, Rule, Subspace
from optimizers.transports import Reset


@dataclass(frozen=True, kw_only=True)
class Proximal(Adam):
    """Adam on the sketch and ``pull`` times the way that was made since the frame was drawn."""

    pull: float = 0.0

    names: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq", "way")

    def move(self, state: State, B: Tensor, lr: Rate) -> Move:
        if not self.pull:
            return super().move(state, B, lr)
        way = self._begun(state, "way", B)
        step = super().move(state, B.add(way, alpha=self.pull), lr).step()
        self.write(state, "way", way + step)
        return Move(step, None, -1.0, lr)


class RSO(Subspace):
    """See the module docstring. ``rank``: r; ``every``: K in steps; ``pull``: μ, not negative; ``scale``: α."""

    def __init__(
        self,
        params: Params,
        lr: float = 0.01,
        *,
        rank: int | float | None = 128,
        every: int = 200,
        pull: float = 0.0,
        scale: float = 0.25,
        side: str = "smaller",
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, {"rank": rank, "every": every, "pull": pull, "scale": scale, "side": side}, seed=seed, **options)

    def rule(self, group: dict[str, Any]) -> Rule:
        return Rule(
            basis=FromLaw(group["rank"], Gaussian),
            every=group["every"],
            side=group["side"],
            inner=Proximal(betas=group["betas"], eps=group["eps"], storage=self.storage(group), pull=group["pull"]),
            transport=Reset(),
            output=Lift(group["scale"]),
        )
