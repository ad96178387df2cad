"""LR, the zeroth-order estimator: loss differences along Z Vᵀ with Z standard normal m×r; no backward pass.

Unbiased up to c and O(ε²) (antithetic; O(ε) in the other forms) because E[⟨Ĝ,ZVᵀ⟩Z | V] = ĜV, whose lift has mean cĜ; what is taken from every
loss, the one at W or the mean of the other queries', is independent of Z, whose mean is zero. On a quadratic loss the antithetic form has no ε error.
Variance: theory/mse.py ``lr``; at c = 1 a low rank does not reduce that of one query.
Reference: LowRank-LR, arXiv 2603.20632; two-point form as in MeZO (arXiv 2305.17333).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from estimators.law import check_finite
from estimators.sketch import lift

Form = Literal["antithetic", "one_sided", "leave_one_out"]
FORMS: tuple[Form, ...] = get_args(Form)


@torch.no_grad()
def lr(
    loss: Callable[[Tensor], Tensor],
    W: Float[Tensor, "m n"],
    V: Float[Tensor, "*batch n r"],
    Z: Float[Tensor, "queries *batch m r"],
    *,
    epsilon: float = 1e-3,
    form: Form = "antithetic",
) -> Float[Tensor, "*batch m r"]:
    """The sketch (1/q)Σ_i δ_i Z_i with δ_i the ``slopes`` along Z_iVᵀ; its lift estimates cĜ.

    ``loss`` maps weights (queries, *batch, m, n) to values (queries, *batch). ``Z``: q standard normal draws that share V. Forward passes:
    2q antithetic, q + 1 one-sided, q leave-one-out. Raises ``ValueError`` for ε ≤ 0, an unknown form, a W that is not finite,
    or shapes that do not fit.
    """
    check(f"lr(epsilon={epsilon}, form={form!r}, queries={len(Z)})", epsilon, form, len(Z))
    if Z.ndim < 3 or W.ndim != 2 or V.ndim < 2 or Z.shape[-2:] != (W.shape[0], V.shape[-1]) or W.shape[1] != V.shape[-2]:
        raise ValueError(
            f"lr(W={tuple(W.shape)}, V={tuple(V.shape)}, Z={tuple(Z.shape)}): W must be (m, n), V (*, n, r) and Z (queries, *, m, r)"
        )
    check_finite("lr", "W", W)
    W, step = W.detach(), epsilon * lift(Z, V)
    other = {
        "antithetic": lambda: loss(W - step),
        "one_sided": lambda: loss(W.expand(1, *V.shape[:-2], *W.shape)),
        "leave_one_out": lambda: None,
    }[form]()
    return (slopes(form, loss(W + step), other, epsilon)[..., None, None] * Z).mean(0)


def check(call: str, epsilon: float, form: str, queries: int) -> None:
    """Raises ``ValueError`` for what is no form, no step, or too few queries."""
    if not epsilon > 0:
        raise ValueError(f"{call}: epsilon, the step, must be positive")
    if form not in FORMS:
        raise ValueError(f"{call}: unknown form, known are {', '.join(FORMS)}")
    if queries < 1 + (form == "leave_one_out"):
        raise ValueError(f"{call}: leave_one_out needs at least 2 queries, the others 1")


def slopes(form: str, there: Tensor, other: Tensor | None, epsilon: float) -> Tensor:
    """δ (queries, *batch) of each query from its loss at W + εD: minus the loss at W − εD (``other``; over 2ε), at W (``other``; over ε), or the
    mean of the other queries' losses (over ε)."""
    if form == "leave_one_out":
        return (there - there.mean(0)) * (len(there) / (len(there) - 1)) / epsilon
    assert other is not None
    return (there - other) / (2 * epsilon if form == "antithetic" else epsilon)
