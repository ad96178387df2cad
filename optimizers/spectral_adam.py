"""SpectralAdam, our own: Adam on directions drawn with the spectral law, moments carried exactly and filled where nothing is known.

    every T steps: k leading right singular directions of G by a range finder, the rest isotropic (estimators/spectral.py);
                   J by the inclusion probabilities π of least variance;  Q = [drawn directions, a Haar frame for those of the rest];  V = Q·π_J^(−½)
    R = GV;  W ← (1 − ηλ)W − η·α·(M̂/(√N̂ + ε))·Vᵀ
    moments: M ← MC, N ← the mean square of rotated numbers of known mean and variance, C = V⁺V_new; the share of a new direction that lies
    outside the old frame, 1 − Σ_j cos²(q_j, q), has the row's mean N, measured along unit directions

Unbiased gradient path whatever Q and π are made of: E[VVᵀ] = I given the directions (estimators/spectral.py), so E[lift(GV)] = G for every gradient
that does not depend on the draw: that of the step it is made at and, in the limit of small steps, those of its period. Variance:
theory/spectral.py. With ``inner="sgd"`` the momentum is lifted and sketched anew at a refresh, so the mean update is the mean of past
gradients, at a variance that grows with every refresh. Biased after Adam, which divides the π^(−½) of the sketch out again.
``weights="lift"`` puts all of 1/π at the lift: then, with the moments of all directions known, the mean update would be Adam's in the basis of all
of them, at the price of steps 1/π long along rare ones. Without the filling, a direction never seen before starts at N = 0 and, late in training,
steps by (1−β₁)/√(1−β₂) in every entry, however small its gradient. State: mr + 2nr + r elements (m ≤ n), nothing m×m, O(mnk) operations a
refresh. Reference for the law: arXiv 2603.20632. No published code to differ from.
"""

from __future__ import annotations

from typing import Any, Literal

from optimizers.bases import WEIGHTS, Spectral
from optimizers.inner import Momentum
from optimizers.outputs import Lift
from optimizers.subspace import Params, Rule, Subspace
from optimizers.transports import ReprojectBoth, ReprojectFirst


class SpectralAdam(Subspace):
    """See the module docstring. ``rank``: r; ``every``: T in steps; ``keep``: directions known, as a multiple of r; ``floor``: share of r/m that
    every direction keeps in π; ``scale``: α; ``weights``: "both" or "lift"; ``inner``: "adam", or "sgd" with ``momentum``."""

    choices = {"weights": tuple(WEIGHTS), "inner": ("adam", "sgd")}

    def __init__(
        self,
        params: Params,
        lr: float = 0.01,
        *,
        rank: int | float | None = 128,
        every: int = 200,
        keep: float = 2.0,
        weights: str = "both",
        floor: float = 0.1,
        scale: float = 0.25,
        inner: Literal["adam", "sgd"] = "adam",
        momentum: float = 0.9,
        seed: int = 0,
        **options: Any,
    ) -> None:
        own = {
            "rank": rank,
            "every": every,
            "keep": keep,
            "weights": weights,
            "floor": floor,
            "scale": scale,
            "inner": inner,
            "momentum": momentum,
        }
        super().__init__(params, lr, own, seed=seed, **options)

    def rule(self, group: dict[str, Any]) -> Rule:
        sgd = group["inner"] == "sgd"
        return Rule(
            basis=Spectral(group["rank"], keep=group["keep"], floor=group["floor"], frame=WEIGHTS[group["weights"]]),
            every=group["every"],
            inner=Momentum(beta=group["momentum"], dampening=group["momentum"], copy_first=False, storage=self.storage(group))
            if sgd
            else self.adam(group),
            transport=ReprojectFirst() if sgd else ReprojectBoth(filled=True),
            output=Lift(group["scale"]),
        )
