"""Flora: momentum kept as a Gaussian sketch that is drawn anew every κ steps (arXiv 2402.03293).

    A: n×r, entries N(0, 1/r);  C ← βC + (1−β)GA;  W ← W − η·CAᵀ;   every κ steps: C ← C·AᵀA_new

Unbiased momentum: E[AAᵀ] = I, so E[GAAᵀ] = G, and the lifted C is the mean of past gradients in expectation, with relative mean squared error
(n+1)/r a gradient (theory/gaussian.py); a change of A multiplies C by AᵀA_new and adds noise of its own. State: nr + mr elements, A stored
(the paper's nr counts a seed; it is a pure function of one here too).

``variant="reference-code"`` is another method: Adafactor on the full gradient first, U = G/√N with N from row and column means; the output
(1−β)U + β·CAᵀ takes the present exactly and only the past from the sketch; it is clipped to RMS 1; C moves to a new A after it was used,
every κ steps; η is multiplied by max(1e-3, RMS(W)). State there: nr + mr + m + n.
Differs: the published class keeps matrices of aspect ratio above 4 unprojected; here that is the caller's choice (``split_parameters``).
"""

from __future__ import annotations

from typing import Any

from estimators.gaussian import Gaussian
from optimizers.bases import FromLaw
from optimizers.inner import Adafactor, Momentum
from optimizers.outputs import LIFT, ExactNow
from optimizers.subspace import Params, Rule, Subspace
from optimizers.transports import ReprojectFirst


class Flora(Subspace):
    """See the module docstring. ``rank``: r; ``every``: κ in steps; ``beta``: β; ``relative``: smallest RMS(W) that multiplies η, None for no
    multiplication, ``clip``: largest RMS of an update, both of the reference code."""

    choices = {"variant": ("paper", "reference-code")}

    def __init__(
        self,
        params: Params,
        lr: float = 1e-2,
        *,
        rank: int | float | None = 128,
        every: int = 1000,
        beta: float = 0.9,
        relative: float | None = 1e-3,
        clip: float = 1.0,
        variant: str = "paper",
        seed: int = 0,
        **options: Any,
    ) -> None:
        own = {"rank": rank, "every": every, "beta": beta, "relative": relative, "clip": clip, "variant": variant}
        super().__init__(params, lr, own, seed=seed, **options)

    def rule(self, group: dict[str, Any]) -> Rule:
        code, beta = group["variant"] == "reference-code", group["beta"]
        return Rule(
            basis=FromLaw(group["rank"], Gaussian),
            every=group["every"],
            phase=int(code),  # its steps are counted from 1
            inner=Momentum(beta=beta, dampening=beta, copy_first=False, storage=self.storage(group)),
            transport=ReprojectFirst(),
            output=ExactNow(beta=beta, clip=group["clip"]) if code else LIFT,
            precondition=Adafactor() if code else None,
            relative=group["relative"] if code else None,
        )
