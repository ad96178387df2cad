"""WTA-CRS: mean and variance of Σ_{j∈C} a_j + (1/s)Σ_i a_{J_i}·(1−p_C)/p_{J_i}, with s = k − |C| independent draws J_i from p restricted to j ∉ C.

a_j = δ_jx_jᵀ is what token j adds to ΔᵀX. Proof: one draw has the values a_j(1−p_C)/p_j with probabilities p_j/(1−p_C), hence the mean
R = Σ_{j∉C} a_j and the second moment (1−p_C)·Σ_{j∉C} ‖a_j‖²/p_j; the draws are independent, so that

    mean      Σ_j a_j = ΔᵀX, for every p that is positive where a_j ≠ 0, every C with |C| < k or 1 − p_C = 0
    variance  ((1−p_C)·Σ_{j∉C} ‖a_j‖²/p_j − ‖R‖²)/(k−|C|)
    E[ĜᵀĜ]    GᵀG + ((1−p_C)·Σ_{j∉C} a_jᵀa_j/p_j − RᵀR)/(k−|C|), of which the variance is the trace beside ‖G‖²

At p_j = ‖a_j‖/Z the first term is (1−p_C)²Z², so a bound of the variance is least where (1−p_C)²/(k−|C|) is; the published rule minimises
(1−p_C)/(k−|C|), which takes fewer winners or as many. With |C| = 0 this is column-row sampling with probabilities p.
Source: arXiv 2305.15265; the moments derived above.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from theory.arguments import Array, finite, matrix


def variance(delta: ArrayLike, inputs: ArrayLike, probabilities: ArrayLike, k: int, winners: int) -> float:
    """E‖estimate − ΔᵀX‖² with the ``winners`` most probable tokens in C (of equal ones the first), in units of squared gradient.

    ``delta``: Δ (T, m); ``inputs``: X (T, n); ``probabilities``: p (T,), sum 1. Raises ``ValueError`` unless 0 ≤ winners < k ≤ T and p > 0 wherever
    Δ and X both are not zero.
    """
    delta, inputs, p, rest = _rest("wta_crs.variance", delta, inputs, probabilities, k, winners)
    square = (delta[rest] ** 2).sum(1) * (inputs[rest] ** 2).sum(1)  # ‖a_j‖²
    first = float(p[rest].sum() * (square / p[rest]).sum())
    return (first - float(np.sum((delta[rest].T @ inputs[rest]) ** 2))) / (k - winners)


def second_moment(delta: ArrayLike, inputs: ArrayLike, probabilities: ArrayLike, k: int, winners: int) -> Array:
    """E[ĜᵀĜ] (n×n) of the estimate Ĝ of G = ΔᵀX; E[ĜĜᵀ] with ``delta`` and ``inputs`` exchanged. Arguments and errors as in ``variance``."""
    delta, inputs, p, rest = _rest("wta_crs.second_moment", delta, inputs, probabilities, k, winners)
    G, R, X = delta.T @ inputs, delta[rest].T @ inputs[rest], inputs[rest]
    first = p[rest].sum() * (X.T * ((delta[rest] ** 2).sum(1) / p[rest])) @ X
    return G.T @ G + (first - R.T @ R) / (k - winners)


def optimal_winners(probabilities: ArrayLike, k: int, power: int = 2) -> int:
    """|C| in {0 … k−1} that minimises (1−p_C)^power/(k−|C|), the least of equals. ``power``: 2 for the bound of the variance at p_j ∝ ‖a_j‖, 1 for
    the published rule."""
    p = np.sort(_probabilities("wta_crs.optimal_winners", probabilities, k))[::-1]
    left = np.cumsum(p[::-1])[::-1][:k]
    return int(np.argmin(left**power / (k - np.arange(k))))


def _rest(
    call: str, delta: ArrayLike, inputs: ArrayLike, probabilities: ArrayLike, k: int, winners: int
) -> tuple[Array, Array, Array, NDArray[np.intp]]:
    """(Δ, X, p, the tokens outside C that can be drawn), checked."""
    delta, inputs = matrix(call, "delta", delta), matrix(call, "inputs", inputs)
    p = _probabilities(call, probabilities, k)
    if not 0 <= winners < k:
        raise ValueError(f"{call}(k={k}, winners={winners}): there must be at least one draw, 0 <= winners < k")
    if len(delta) != len(p) or len(inputs) != len(p):
        raise ValueError(f"{call}: delta {delta.shape} and inputs {inputs.shape} must have {len(p)} rows, as there are probabilities")
    if (((delta**2).sum(1) * (inputs**2).sum(1))[p == 0] > 0).any():
        raise ValueError(f"{call}: a token that adds to the gradient has probability 0")
    rest = np.argsort(-p, kind="stable")[winners:]
    return delta, inputs, p, rest[p[rest] > 0]


def _probabilities(call: str, probabilities: ArrayLike, k: int) -> Array:
    p = finite(call, "probabilities", probabilities)
    if p.ndim != 1 or (p < 0).any() or abs(p.sum() - 1) > 1e-9:
        raise ValueError(f"{call}(probabilities={p}): must be numbers that are not negative, with sum 1")
    if not 1 <= k <= len(p):
        raise ValueError(f"{call}(k={k}): must be between 1 and the number of tokens, {len(p)}")
    return p
