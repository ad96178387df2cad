"""LDAdam: a subspace that follows the momentum at every step, both moments carried along, and what is lost fed back (arXiv 2410.16103).

    a = G + e;  b = ρ·lift(M̂) + (1−ρ)a;  V ← orth(bᵀb·V)        (singular vectors of a at the first step);  C = V_oldᵀV
    M ← β₁MC + (1−β₁)aV;   N ← β₂(1−β₂ᵗ)·|(N̂ − M̂²)(C∘C) + (M̂C)²| + (1−β₂)(aV)²
    W ← (1 − ηλ)W − η·M̂/(√N̂ + ε)·Vᵀ;   e ← a − aVVᵀ + β₁/(1−β₁)·(lift(M_old) − lift(M_oldC))

V is the projector, t the steps made, M̂ = M/(1−β₁ᵗ) and N̂ = N/(1−β₂ᵗ) the corrected moments, and lift(X) = XVᵀ in the frame that X belongs
to, V_old before the change and V after it.

Biased at every step and repaired over time: the error feedback pays later what V does not see (theory/feedback.py). State: mr + 2nr + mn elements
(m ≤ n), the error buffer included.

Differs from the published code: the error lives in the state and not in ``p.grad``, so gradients may be clipped, set to None, averaged by
DDP and unscaled as with any optimizer; ``step`` is part of the state, so a resumed run goes on with its bias correction.
"""

from __future__ import annotations

from typing import Any

from optimizers.bases import PowerIteration
from optimizers.outputs import DROP, Complement, ErrorFeedback
from optimizers.subspace import Params, Rule, Subspace
from optimizers.transports import ReprojectBoth


class LDAdam(Subspace):
    """See the module docstring. ``rank``: r; ``rho``: ρ; ``feedback``: False drops the error; ``exact``: singular vectors of b every time."""

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        *,
        rank: int | float | None = 16,
        rho: float = 0.908,
        betas: tuple[float, float] = (0.908, 0.99),
        feedback: bool = True,
        exact: bool = False,
        side: str = "smaller",
        seed: int = 0,
        **options: Any,
    ) -> None:
        own = {"rank": rank, "rho": rho, "betas": betas, "feedback": feedback, "exact": exact, "side": side}
        super().__init__(params, lr, own, seed=seed, **options)

    def rule(self, group: dict[str, Any]) -> Rule:
        feedback: Complement = ErrorFeedback(group["betas"][0]) if group["feedback"] else DROP
        return Rule(
            basis=PowerIteration(group["rank"], group["rho"], group["exact"]),
            side=group["side"],
            every=1,
            inner=self.adam(group),
            transport=ReprojectBoth(),
            complement=feedback,
        )
