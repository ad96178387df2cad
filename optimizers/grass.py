"""Grass: Adam on r rows of the gradient, chosen by their norms (arXiv 2406.17660).

    every K steps: r indices J of the smaller dimension and a scale ρ each;  M = N = 0 and the bias correction begins anew
    R = ρ∘G_J;  M, N ← Adam's means of R, R²;  W ← (1 − ηλ)W;  W_J ← W_J − η·α·ρ∘(M̂/(√N̂ + ε))

``Grass``: the r largest norms, ρ = 1; biased, the other rows are dropped for a period. ``GrassSampled``: r independent draws with
probabilities q proportional to the norms, ρ = 1/√(rq), so that E[VVᵀ] = I on the rows whose norm was not zero: unbiased, also for the later
gradients of the period as far as they are in such rows, at the variance of theory/coordinate.py (``weighted_second_moment``). Biased after Adam,
which divides the ρ of the sketch out again, whichever is chosen. State: 2nr + 2r elements (m ≤ n), the indices as 64-bit integers.
No published code to differ from (the repository holds none). The gradient is whole here, only the state is not.
"""

from __future__ import annotations

from typing import Any, ClassVar

from optimizers.outputs import Lift
from optimizers.selections import LargestColumns, SampledColumns
from optimizers.subspace import Params, Rule, Subspace
from optimizers.transports import Reset


class Grass(Subspace):
    """The r largest columns. ``rank``: r; ``every``: K in steps; ``scale``: α."""

    columns: ClassVar[type[LargestColumns | SampledColumns]] = LargestColumns

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        *,
        rank: int | float | None = 128,
        every: int = 200,
        scale: float = 0.25,
        side: str = "smaller",
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, {"rank": rank, "every": every, "scale": scale, "side": side}, seed=seed, **options)

    def rule(self, group: dict[str, Any]) -> Rule:
        return Rule(
            basis=self.columns(group["rank"]),
            every=group["every"],
            side=group["side"],
            inner=self.adam(group),
            transport=Reset(),
            output=Lift(group["scale"]),
        )


class GrassSampled(Grass):
    """Columns drawn with probabilities, and paid back."""

    columns = SampledColumns
