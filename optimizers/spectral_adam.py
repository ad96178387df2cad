"""SpectralAdam, our own: Adam on directions drawn with the spectral law, moments carried exactly and filled where nothing is known.

    every T steps: k leading right singular directions of G by a range finder, the rest isotropic (theory.md §3, sketched form);
                   J by the inclusion probabilities π of least variance;  Q = [drawn directions, a Haar frame for those of the rest]
    R = GQ;  W ← (1 − ηλ)W − η·α·(M̂/(√N̂ + ε))·diag(1/π_J)·Qᵀ
    moments: M ← MC, N ← the mean square of rotated numbers of known mean and variance, with C = Q_oldᵀQ; the share of a new direction that
    lies outside the old frame, 1 − Σ_j C_ji², has the row's mean N

Unbiased gradient path whatever Q and π are made of: E[lift(GQ)] = G, since E[Q diag(1/π_J) Qᵀ] = I given the directions (estimators/spectral.py);
its variance is theory/spectral.py's. Adam is not linear, so the mean update is Adam's only in the basis of all directions and with all moments
known. Without the filling, a direction never seen before starts at N = 0 and steps (1−β₂)^(−1/2) times too far.
State: mr + 2nr + r elements (m ≤ n), nothing m×m, O(mnk) operations a refresh. Reference: arXiv 2603.20632 for the law.
"""

from __future__ import annotations

from typing import Any, Literal

from optimizers.bases import Spectral
from optimizers.inner import Momentum
from optimizers.outputs import Lift
from optimizers.subspace import Params, Rule, Subspace
from optimizers.transports import ReprojectBoth, ReprojectFirst


class SpectralAdam(Subspace):
    """See the module docstring. ``rank``: r; ``every``: T in steps; ``keep``: directions known, as a multiple of r; ``floor``: share of r/m that
    every direction keeps in π; ``scale``: α; ``inner``: "adam", or "sgd" with ``momentum``, whose mean update is the full gradient's."""

    def __init__(
        self,
        params: Params,
        lr: float = 0.01,
        *,
        rank: int | float | None = 128,
        every: int = 200,
        keep: float = 2.0,
        floor: float = 0.1,
        scale: float = 0.25,
        inner: Literal["adam", "sgd"] = "adam",
        momentum: float = 0.9,
        seed: int = 0,
        **options: Any,
    ) -> None:
        own = {"rank": rank, "every": every, "keep": keep, "floor": floor, "scale": scale, "inner": inner, "momentum": momentum}
        super().__init__(params, lr, own, seed=seed, **options)

    def rule(self, group: dict[str, Any]) -> Rule:
        sgd = group["inner"] == "sgd"
        return Rule(
            basis=Spectral(group["rank"], group["keep"], group["floor"]),
            every=group["every"],
            inner=Momentum(beta=group["momentum"], dampening=group["momentum"], copy_first=False) if sgd else self.adam(group),
            transport=ReprojectFirst() if sgd else ReprojectBoth(filled=True),
            output=Lift(group["scale"]),
        )
