"""AdaLomo: LOMO with a second moment in factors, and steps as long as the weights are large (arXiv 2310.10195).

    β₂ = 1 − t^−0.8;   R, C ← means of rows and columns of G² + 10⁻³⁰, running with β₂
    U = G/√(R Cᵀ/mean R);   U ← U/max(1, RMS(U));   ηₜ = η·max(10⁻³, RMS(W))
    W ← (1 − ηₜλ)W − ηₜU

Adafactor (1804.04235) without a first moment, matrix by matrix, in which no gradient waits for another: with ``per_layer`` it runs inside the
backward pass. Unbiased as a path, biased after the root. State: m + n elements. RMS(W) is that of the weights before the step. An update is clipped
by its own size, so that clipping gradients has no use; it is there as for LOMO (two passes).

Every tensor of a group with a ``rank`` is trained by the rule. What is no matrix is one of a single row: R/mean R = 1 and C is all of G², the full
second moment of the published code, in as many elements and one. A group with ``rank=None`` is AdamW, as everywhere here.

Differs from the published code: t counts the steps of each parameter, there of all; a gradient that is not finite is refused.
"""

from __future__ import annotations

from typing import Any

from optimizers.bases import Identity
from optimizers.inner import Adafactor
from optimizers.subspace import Params, Rule, Subspace


class AdaLomo(Subspace):
    """See the module docstring. ``clip``: largest RMS of U; ``relative``: least RMS(W) that multiplies η, None for no multiplication. ``rank``,
    of which nothing is read, says which groups are trained by the rule; all by default."""

    fused = True
    any_shape = True

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        *,
        rank: int | float | None = 1,
        clip: float = 1.0,
        relative: float | None = 1e-3,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, {"rank": rank, "clip": clip, "relative": relative}, seed=seed, **options)

    def rule(self, group: dict[str, Any]) -> Rule:
        return Rule(basis=Identity(), side="right", inner=Adafactor(clip=group["clip"]), relative=group["relative"])
