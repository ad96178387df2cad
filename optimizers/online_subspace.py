"""Online Subspace Descent: GaLore whose projector is no singular value decomposition but follows the gradients step by step (arXiv 2408.12857).

    V = r leading right singular vectors of the first gradient;  R = GV;  M, N ← Adam's means of R, R²
    W ← (1 − ηλ)W − η·α·(M̂/(√N̂ + ε))Vᵀ
    V ← AdamW step of length η_V along ∇_V ( ‖ĜVVᵀ − Ĝ‖² + λ_V‖VᵀV − I‖² ),  Ĝ = G/‖G‖, after every step but the first

Biased: what V does not see is dropped; V is only nearly orthonormal, and VVᵀ may stretch what it does see. Moments are not re-projected. State:
mr + 2nr + 2mr elements (m ≤ n), with ``basis="sgd"`` mr + 2nr.

``basis_lr``: η_V over η, and ``penalty``: λ_V; the paper varies both, 0.5 and 0.1 are ours. At η = 0.01 that is the η_V of the published code; the
paper's 5 moves every number of V by 0.05 a step under Adam, as much as the numbers of an orthonormal V of 400 rows are large, and V is lost
until the penalty has brought it back. ``variant="reference-code"``: no penalty, η_V = 1/``every`` scaled as the schedule scales η, a decay of 0.01
on V; ε before the bias correction and decay of W after the step, as in GaLore's code. Its Lion and Adafactor for V are left out.
"""

from __future__ import annotations

from typing import Any, Literal

from optimizers.learned import OnlinePCA
from optimizers.outputs import Lift
from optimizers.subspace import Params, Rule, Subspace


class OnlineSubspaceDescent(Subspace):
    """See the module docstring. ``rank``: r; ``scale``: α; ``every``: of the reference code, 1/η_V; ``basis``: "adam" or "sgd"."""

    choices = {"variant": ("paper", "reference-code"), "basis": ("adam", "sgd")}

    def __init__(
        self,
        params: Params,
        lr: float = 0.01,
        *,
        rank: int | float | None = 128,
        every: int = 200,
        scale: float = 0.25,
        side: str = "smaller",
        basis: Literal["adam", "sgd"] = "adam",
        basis_lr: float = 0.5,
        penalty: float = 0.1,
        variant: str = "paper",
        seed: int = 0,
        **options: Any,
    ) -> None:
        own = {"rank": rank, "every": every, "scale": scale, "side": side, "basis": basis, "basis_lr": basis_lr, "penalty": penalty}
        super().__init__(params, lr, own | {"variant": variant}, seed=seed, **options)

    def rule(self, group: dict[str, Any]) -> Rule:
        code, lr = group["variant"] == "reference-code", float(group["lr"])
        first = float(group.get("initial_lr", lr))
        rate = (lr / first if first else 0.0) / group["every"] if code else group["basis_lr"] * lr
        return Rule(
            basis=OnlinePCA(group["rank"], rate, group["basis"], 0.01 if code else 0.0, 0.0 if code else group["penalty"]),
            side=group["side"],
            inner=self.adam(group, eps_inside=code),
            output=Lift(group["scale"]),
            decay_last=code,
        )
