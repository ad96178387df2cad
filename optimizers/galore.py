"""GaLore: Adam on the gradient projected to its own r leading singular directions; the weights stay full-rank (arXiv 2403.03507).

    every T steps: V = r leading right singular vectors of G    (of the smaller dimension: G is transposed where m < n)
    R = GV;  M, N ← Adam's means of R, R²;  W ← (1 − ηλ)W − η·α·(M̂/(√N̂ + ε))Vᵀ

V is the paper's projector P, or its Q where the right side is the smaller; M̂ = M/(1−β₁ᵗ) and N̂ = N/(1−β₂ᵗ) after t steps.

Biased: what lies outside the leading directions of one old mini-batch gradient is dropped, at every step of a period. Moments are neither
reset nor re-projected when V changes. State: mr + 2nr elements (m ≤ n); "8bit": 2nr bytes and a scale a block. Bias: theory/truncated.py.

``inner``: "adam" or "adafactor" (one row and one column of second moments instead of N; ``relative`` multiplies η by max(relative, RMS(W))).
``variant="reference-code"``: ε is added to √N before the bias correction, and W decays after the step, by its new value.
``basis="randomized"``: two power iterations from the last V in the place of the SVD (estimators/directions.py `power`).
Differs from galore-torch: tensors of other dimensions are not projected (its Tucker form cannot run as published); ε of the paper's variant
is 1e-8; a group without rank is AdamW; ``p.grad`` keeps its shape; V is float32 also beside bf16 weights.
"""

from __future__ import annotations

from typing import Any, Literal

from optimizers.bases import TopSingular, TwoSingular
from optimizers.groups import SIDES
from optimizers.inner import Adafactor
from optimizers.outputs import Lift
from optimizers.subspace import Params, Rule, Subspace


class GaLore(Subspace):
    """See the module docstring. ``rank``: r, an integer or a fraction of the smaller dimension; ``every``: T in steps; ``scale``: α;
    ``side``: "smaller", "larger", "left", "right", or "both" (r×r core UᵀGV). Other options: ``Subspace``."""

    choices = {
        "variant": ("paper", "reference-code"),
        "basis": ("exact", "randomized"),
        "inner": ("adam", "adafactor"),
        "side": (*SIDES, "both"),
    }

    def __init__(
        self,
        params: Params,
        lr: float = 0.01,
        *,
        rank: int | float | None = 128,
        every: int = 200,
        scale: float = 0.25,
        side: str = "smaller",
        basis: Literal["exact", "randomized"] = "exact",
        inner: Literal["adam", "adafactor"] = "adam",
        beta1: float | None = None,
        relative: float | None = None,
        correct_bias: bool = True,
        variant: str = "paper",
        seed: int = 0,
        **options: Any,
    ) -> None:
        own: dict[str, Any] = {"rank": rank, "every": every, "scale": scale, "side": side, "basis": basis, "inner": inner, "beta1": beta1}
        own |= {"relative": relative, "correct_bias": correct_bias, "variant": variant}
        super().__init__(params, lr, own, seed=seed, **options)

    def rule(self, group: dict[str, Any]) -> Rule:
        code = group["variant"] == "reference-code"
        adafactor = group["inner"] == "adafactor"
        adam = self.adam(group, eps_inside=code, correct_bias=group["correct_bias"])
        inner = Adafactor(beta1=group["beta1"], storage=self.storage(group)) if adafactor else adam
        return Rule(
            basis=TwoSingular(group["rank"]) if group["side"] == "both" else TopSingular(group["rank"], group["basis"]),
            side=group["side"] if group["side"] != "both" else "right",
            every=group["every"],
            inner=inner,
            output=Lift(group["scale"]),
            relative=group["relative"],
            decay_last=code and not adafactor,
        )
