"""COAP: GaLore whose projector keeps in touch with the last one, by gradient steps and cheap sketches (arXiv 2412.00071).

    every T steps: V ← V − η_V·clip(∇_V [mean((GVVᵀ − G)²)·(1 − mean cos(MVᵀ, G))]),   every λT steps and at first: V = singular vectors of orth(GV)ᵀG
    R = GV;  M, N ← Adam's means of R, R²;  W ← (1 − ηλ)W − η·α·(M̂/(√N̂ + ε))Vᵀ

Biased: what V does not see is dropped, and V is not orthonormal after a gradient step. The loss grows with ‖G‖², its gradient is cut to length one:
with small gradients V hardly moves between sketches, with large ones every step is as long as another. State: mr + 2nr elements (m ≤ n).

``carry=True``: moments follow, M ← M·VᵀV_new, N ← (√N·VᵀV_new)². ``inner``: "adam" or "adafactor". ``variant="reference-code"``: the cosine is along
the columns' dimension of the parameter whichever side is projected, ε before the bias correction, decay after the step.
Differs from the published code: first sketches are keyed, one a parameter, there one for all; convolutions are not projected.
"""

from __future__ import annotations

from typing import Any, Literal

from optimizers.inner import Adafactor
from optimizers.learned import Correlated
from optimizers.outputs import Lift
from optimizers.subspace import Params, Rule, Subspace
from optimizers.transports import KEEP, Roots


class COAP(Subspace):
    """See the module docstring. ``rank``: r; ``every``: T in steps; ``recalibrate``: λ; ``scale``: α; ``basis_lr``: η_V."""

    choices = {"variant": ("paper", "reference-code"), "inner": ("adam", "adafactor")}

    def __init__(
        self,
        params: Params,
        lr: float = 0.01,
        *,
        rank: int | float | None = 128,
        every: int = 32,
        recalibrate: int = 5,
        scale: float = 0.25,
        basis_lr: float = 0.1,
        inner: Literal["adam", "adafactor"] = "adam",
        beta1: float = 0.9,
        carry: bool = False,
        variant: str = "paper",
        seed: int = 0,
        **options: Any,
    ) -> None:
        own: dict[str, Any] = {"rank": rank, "every": every, "recalibrate": recalibrate, "scale": scale, "basis_lr": basis_lr}
        super().__init__(params, lr, own | {"inner": inner, "beta1": beta1, "carry": carry, "variant": variant}, seed=seed, **options)

    def rule(self, group: dict[str, Any]) -> Rule:
        code, adafactor = group["variant"] == "reference-code", group["inner"] == "adafactor"
        if adafactor and group["carry"]:
            raise ValueError("COAP(inner='adafactor', carry=True): Adafactor keeps no second moment that could follow")
        return Rule(
            basis=Correlated(group["rank"], group["recalibrate"], group["basis_lr"], "stands" if code else "rows"),
            every=group["every"],
            inner=Adafactor(beta1=group["beta1"], storage=self.storage(group)) if adafactor else self.adam(group, eps_inside=code),
            transport=Roots() if group["carry"] else KEEP,
            output=Lift(group["scale"]),
            decay_last=code and not adafactor,
        )
