"""PLUMAGE: GaLore with directions drawn among all singular ones by the probabilities of least variance (arXiv 2505.18313).

    every T steps: G = Σ sᵢuᵢqᵢᵀ;  πᵢ = min{1, c·sᵢ} with Σπᵢ = r;  J with P(i ∈ J) = πᵢ, |J| = r;  Q = [qᵢ, i ∈ J]
    R = GQ;  both Adam moments carried to the new Q;  W ← W − η·α·(M̂/(√N̂ + ε))·diag(1/π_J)·Qᵀ

Unbiased gradient path: E[Q diag(1/π_J) Qᵀ] = I for any gradient of the period, so E[lift(GQ)] = G; of least variance for the gradient it was
drawn for (theory/optimal.py). Under Adam the weights 1/π belong at the lift: Adam does not see the length of a column, and a column of
R is the same number whichever others are drawn, so with the moments of all columns known the mean update would be Adam's in the basis of
all qᵢ. Moments of columns that were not drawn are not known. State: mr + 2nr + r elements (m ≤ n).

Written from the abstract, which leaves open where the weights enter and how moments are carried; both are choices made here:
``weights="lift"`` (1/π at the lift) or "both" (1/√π at sketch and lift); moments as in LDAdam.
"""

from __future__ import annotations

from typing import Any

from optimizers.bases import Spectral
from optimizers.outputs import Lift
from optimizers.subspace import Params, Rule, Subspace
from optimizers.transports import ReprojectBoth


class Plumage(Subspace):
    """See the module docstring. ``rank``: r; ``every``: T in steps; ``scale``: α; ``floor``: share of r/m that every direction keeps in π."""

    def __init__(
        self,
        params: Params,
        lr: float = 0.01,
        *,
        rank: int | float | None = 128,
        every: int = 200,
        scale: float = 0.25,
        floor: float = 1e-3,
        seed: int = 0,
        **options: Any,
    ) -> None:
        own = {"rank": rank, "every": every, "scale": scale, "floor": floor}
        super().__init__(params, lr, own, seed=seed, **options)

    def rule(self, group: dict[str, Any]) -> Rule:
        return Rule(
            basis=Spectral(group["rank"], keep=None, floor=group["floor"]),
            every=group["every"],
            inner=self.adam(group),
            transport=ReprojectBoth(),
            output=Lift(group["scale"]),
        )
