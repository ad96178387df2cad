"""LR, the zeroth-order estimator: loss differences along Z Vᵀ with Z standard normal m×r; no backward pass.

Unbiased up to c and O(ε²) (antithetic; O(ε) one-sided) because E[⟨Ĝ,ZVᵀ⟩Z | V] = ĜV, whose lift has mean cĜ. On a quadratic loss the
antithetic form has no ε error. Variance: theory/mse.py ``lr``; at c = 1 a low rank does not reduce that of one query.
Reference: LowRank-LR, arXiv 2603.20632; two-point form as in MeZO (arXiv 2305.17333).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from estimators.law import check_finite
from estimators.sketch import lift


@torch.no_grad()
def lr(
    loss: Callable[[Tensor], Tensor],
    W: Float[Tensor, "m n"],
    V: Float[Tensor, "*batch n r"],
    Z: Float[Tensor, "queries *batch m r"],
    *,
    epsilon: float = 1e-3,
    form: Literal["antithetic", "one_sided"] = "antithetic",
) -> Float[Tensor, "*batch m r"]:
    """The sketch (1/q)Σ_i δ_i Z_i with δ_i the loss difference along Z_iVᵀ divided by its step; its lift estimates cĜ.

    ``loss`` maps weights (queries, *batch, m, n) to values (queries, *batch). ``Z``: q standard normal draws that share V. Forward passes:
    2q antithetic, q + 1 one-sided. Raises ``ValueError`` for ε ≤ 0, an unknown form, a W that is not finite,
    or shapes that do not fit.
    """
    if not epsilon > 0:
        raise ValueError(f"lr(epsilon={epsilon}): the step must be positive")
    if Z.ndim < 3 or W.ndim != 2 or V.ndim < 2 or Z.shape[-2:] != (W.shape[0], V.shape[-1]) or W.shape[1] != V.shape[-2]:
        raise ValueError(
            f"lr(W={tuple(W.shape)}, V={tuple(V.shape)}, Z={tuple(Z.shape)}): W must be (m, n), V (*, n, r) and Z (queries, *, m, r)"
        )
    check_finite("lr", "W", W)
    W, step = W.detach(), epsilon * lift(Z, V)
    if form == "antithetic":
        difference = (loss(W + step) - loss(W - step)) / (2 * epsilon)
    elif form == "one_sided":
        difference = (loss(W + step) - loss(W.expand(1, *V.shape[:-2], *W.shape))) / epsilon
    else:
        raise ValueError(f"lr(form={form!r}): known forms are 'antithetic' and 'one_sided'")
    return (difference[..., None, None] * Z).mean(0)
