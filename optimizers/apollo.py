"""APOLLO: the full gradient, each row as long as Adam made the row of a small random sketch of it (arXiv 2412.05270).

    every T steps: V: m×r, entries N(0, 1/r)       (m the smaller dimension)
    R = GV;  M, N ← Adam's means of R, R²;  sᵢ = ‖M̂ᵢ/(√N̂ᵢ + ε)‖/‖Rᵢ‖ for every row i, or one s for the matrix
    S = s∘G, its norm growing by a factor γ = 1.01 a step at most;  W ← (1 − ηλ)W − η·α·S

The gradient itself is exact; its lengths are estimated, √(r/m) too short in expectation, which α or η pays back. Moments are neither reset nor
re-projected when V changes. APOLLO-Mini: rank 1, one s for the matrix, α = √128. State: 2nr + mr + 1 elements (m ≤ n), V stored; the paper's
2nr + 2 counts a seed.

``variant="reference-code"``: the scale enters as its square root; ε before the bias correction, which multiplies the step after the limiter;
decay after the step. Whether the limiter sees α makes no difference: it is homogeneous.
Differs from the published code: a gradient of zeros does not hold all later steps at zero.
The rule is the paper's; the published code was run beside it and not read.
"""

from __future__ import annotations

from typing import Any, ClassVar

from estimators.gaussian import Gaussian
from optimizers.bases import FromLaw, TopSingular
from optimizers.outputs import Limiter, ScaleGradient
from optimizers.subspace import Params, Rule, Subspace


class Apollo(Subspace):
    """See the module docstring. ``rank``: r; ``every``: T in steps; ``scale``: α, its square in the reference code, None for the paper's;
    ``whole``: one s a matrix; ``limit``: γ, None for no limit; ``basis``: "gaussian" or "svd"."""

    choices = {"variant": ("paper", "reference-code"), "basis": ("gaussian", "svd")}
    default_scale: ClassVar[float] = 1.0  # α

    def __init__(
        self,
        params: Params,
        lr: float = 0.01,
        *,
        rank: int | float | None = 128,
        every: int = 200,
        scale: float | None = None,
        whole: bool = False,
        limit: float | None = 1.01,
        side: str = "smaller",
        basis: str = "gaussian",
        correct_bias: bool = True,
        variant: str = "paper",
        seed: int = 0,
        **options: Any,
    ) -> None:
        own = {"rank": rank, "every": every, "scale": scale, "whole": whole, "limit": limit, "side": side, "basis": basis}
        super().__init__(params, lr, own | {"correct_bias": correct_bias, "variant": variant}, seed=seed, **options)

    def rule(self, group: dict[str, Any]) -> Rule:
        code, scale = group["variant"] == "reference-code", group["scale"]
        return Rule(
            basis=FromLaw(group["rank"], Gaussian) if group["basis"] == "gaussian" else TopSingular(group["rank"]),
            side=group["side"],
            every=group["every"],
            inner=self.adam(group, eps_inside=code, correct_bias=group["correct_bias"]),
            output=ScaleGradient(
                alpha=self.default_scale if scale is None else scale**0.5 if code else scale,
                whole=group["whole"],
                limiter=None if group["limit"] is None else Limiter(group["limit"]),
            ),
            decay_last=code,
        )


class ApolloMini(Apollo):
    """APOLLO of rank 1 with one factor a matrix and α = √128."""

    default_scale = 128.0**0.5

    def __init__(
        self, params: Params, lr: float = 0.01, *, every: int = 200, scale: float | None = None, variant: str = "paper", **options: Any
    ) -> None:
        merged: dict[str, Any] = {"rank": 1, "whole": True} | options
        super().__init__(params, lr, every=every, scale=scale, variant=variant, **merged)
