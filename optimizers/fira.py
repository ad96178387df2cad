"""Fira: GaLore, and the rest of the gradient beside it, each row as long as Adam made the projected one (arXiv 2410.01623).

    V, R = GV, M, N, step as in GaLore (optimizers/galore.py);   φᵢ = ‖direction(R)ᵢ‖/‖Rᵢ‖ for every row i of R
    S = φ∘(G − RVᵀ), its norm growing by a factor γ = 1.01 a step at most
    W ← (1 − ηλ)W − η(α·direction(R)Vᵀ + S)

Every step is full-rank and none is unbiased: the two parts have different sizes, and φ is a ratio of random numbers. State: mr + 2nr + 1
elements (m ≤ n).

``variant="reference-code"``: the residual is G − α·RVᵀ, so 1 − α of the projected gradient comes a second time, scaled by φ (75 % at α = ¼);
φ and γ act before the bias correction; ε before it and decay after the step, as in GaLore's code.
Differs from the published code: a gradient of zeros does not hold all later residuals at zero.
"""

from __future__ import annotations

from typing import Any

from optimizers.bases import TopSingular
from optimizers.outputs import Lift, Scaled
from optimizers.subspace import Params, Rule, Subspace


class Fira(Subspace):
    """See the module docstring. ``rank``: r; ``every``: T in steps; ``scale``: α; ``basis``: "exact" or "randomized"."""

    choices = {"variant": ("paper", "reference-code"), "basis": ("exact", "randomized")}

    def __init__(
        self,
        params: Params,
        lr: float = 0.01,
        *,
        rank: int | float | None = 128,
        every: int = 200,
        scale: float = 0.25,
        side: str = "smaller",
        basis: str = "exact",
        correct_bias: bool = True,
        variant: str = "paper",
        seed: int = 0,
        **options: Any,
    ) -> None:
        own = {"rank": rank, "every": every, "scale": scale, "side": side, "basis": basis, "correct_bias": correct_bias}
        super().__init__(params, lr, own | {"variant": variant}, seed=seed, **options)

    def rule(self, group: dict[str, Any]) -> Rule:
        code = group["variant"] == "reference-code"
        return Rule(
            basis=TopSingular(group["rank"], group["basis"]),
            side=group["side"],
            every=group["every"],
            inner=self.adam(group, eps_inside=code, correct_bias=group["correct_bias"]),
            output=Lift(group["scale"]),
            complement=Scaled(alpha=group["scale"] if code else 1.0),
            decay_last=code,
        )
