"""PLUMAGE: GaLore with directions drawn among all singular ones by the probabilities of least variance (arXiv 2505.18313).

    every T steps: G = Σ sᵢuᵢqᵢᵀ;  πᵢ = min{1, κ·sᵢ}, kept above a floor, with Σπᵢ = r;  J with P(i ∈ J) = πᵢ, |J| = r;  V = [qᵢ/√πᵢ, i ∈ J]
    R = GV;  both Adam moments carried to the new V;  W ← (1 − ηλ)W − η·α·(M̂/(√N̂ + ε))·Vᵀ

Unbiased gradient path: E[VVᵀ] = I given the directions, so E[lift(GV)] = G for every gradient that does not depend on the draw: that of the
step it is made at and, in the limit of small steps, those of its period. Least variance for the gradient whose directions they are
(theory/optimal.py). Biased after Adam, which divides the 1/√π of the sketch out again. State: mr + 2nr + r elements (m ≤ n).

Written from the abstract, which leaves open where the weights enter and how moments are carried; these are choices made here: moments as in
LDAdam; ``weights="both"``, 1/√π at sketch and lift, or "lift", all of 1/π at the lift, where with the moments of all directions known the
mean update would be Adam's in the basis of all qᵢ, at the price of steps 1/π long along rare directions.
"""

from __future__ import annotations

from typing import Any

from optimizers.bases import WEIGHTS, Spectral
from optimizers.outputs import Lift
from optimizers.subspace import Params, Rule, Subspace
from optimizers.transports import ReprojectBoth


class Plumage(Subspace):
    """See the module docstring. ``rank``: r; ``every``: T in steps; ``scale``: α; ``floor``: share of r/m that every direction keeps in π;
    ``weights``: "both" or "lift"."""

    choices = {"weights": tuple(WEIGHTS)}

    def __init__(
        self,
        params: Params,
        lr: float = 0.01,
        *,
        rank: int | float | None = 128,
        every: int = 200,
        scale: float = 0.25,
        weights: str = "both",
        floor: float = 1e-3,
        seed: int = 0,
        **options: Any,
    ) -> None:
        own = {"rank": rank, "every": every, "scale": scale, "weights": weights, "floor": floor}
        super().__init__(params, lr, own, seed=seed, **options)

    def rule(self, group: dict[str, Any]) -> Rule:
        return Rule(
            basis=Spectral(group["rank"], keep=None, floor=group["floor"], frame=WEIGHTS[group["weights"]]),
            every=group["every"],
            inner=self.adam(group),
            transport=ReprojectBoth(),
            output=Lift(group["scale"]),
        )
